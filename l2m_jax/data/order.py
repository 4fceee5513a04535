"""The order in which an epoch's examples are trained on."""

import numpy as np


def order_of_examples(seed: int, stage: int, epoch: int, indices: np.ndarray) -> np.ndarray:
    """`indices` in the random order of an epoch, which depends only on these numbers and on the multiset of indices."""
    return shuffled(np.sort(indices), seed, stage, epoch)


def shuffled(items: np.ndarray, *words: int) -> np.ndarray:
    """`items` in a random order that depends on `words` and is the same with every version of NumPy."""
    # numpy guarantees the same raw random bits in every version, but not the same permutations.
    keys = np.random.PCG64(np.random.SeedSequence(words)).random_raw(len(items))
    return items[np.argsort(keys, kind="stable")]
