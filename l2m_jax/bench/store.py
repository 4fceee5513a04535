"""The teacher store: its size, the speed of writing and reading it, and what its dtype does to the loss."""

import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2m_jax.bench.common import Spread
from l2m_jax.losses import Objective, SkewKL, fused_token_losses
from l2m_jax.parallel import Placement
from l2m_jax.training.shards import bytes_per_target
from l2m_jax.training.store import TeacherStore
from l2m_jax.training.store_format import HiddenStates
from l2m_jax.types import MicroBatch

_DTYPES = ("float32", "float16", "bfloat16", "int8")
_COMPARED = 2048  # targets whose losses are compared


class _Examples:
    """What a store needs to know of a corpus."""

    def __init__(self, prompt_lengths: np.ndarray, response_lengths: np.ndarray):
        self.prompt_lengths, self.response_lengths = prompt_lengths, response_lengths
        self.lengths = prompt_lengths + response_lengths
        self.ids = [str(i) for i in range(len(self.lengths))]

    def __len__(self) -> int:
        return len(self.lengths)

    def example_tokens(self, i: int) -> np.ndarray:
        return np.zeros(self.lengths[i], np.int32)

    def target_positions(self, i: int) -> np.ndarray:
        return np.arange(self.prompt_lengths[i], self.lengths[i])


def run(
    *, repeats: int = 3, examples: int = 2000, width: int = 768, vocabulary: int = 50257
) -> dict[str, Any]:
    """Random hidden states for examples with lengths as Dolly's, stored in each dtype.

    The teacher's own work is left out: writing is packing, copying and flushing. What is read was just written, so
    it comes from the page cache where there is memory for it.

    Returns:
        `rows`, one for each dtype: `bytes_a_target`; `gigabytes`; `write_targets_a_second`;
        `read_targets_a_second`, by example in random order; `divergence_difference`, the mean over tokens of the
        absolute difference that the dtype makes to skew KL, and `of_divergence`, the same as a part of its mean.
    """
    corpus = _corpus(examples)
    targets = int(corpus.response_lengths.sum())
    random = np.random.default_rng(0)
    states_TxE = random.standard_normal((8192, width), np.float32)

    def forward(batch: MicroBatch) -> Any:
        devices, length = batch.labels_T.shape
        return np.broadcast_to(states_TxE[:length], (devices, length, width))

    placement = Placement("pmap", tuple(jax.local_devices()[:1]))
    divergence_of = _divergence(width, vocabulary)
    rows, exact = [], None
    for dtype in _DTYPES:
        wrote, read, store = [], [], None
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                form = HiddenStates(width, dtype)
                store = TeacherStore(Path(folder), corpus, key="random", form=form)
                store.fill(placement, forward)
                wrote.append(targets / (time.perf_counter() - start))
                read.append(targets / _seconds_to_read(store, random.permutation(examples)))
                compared = _first_targets(store)
        divergence = divergence_of(compared)
        exact = divergence if exact is None else exact
        difference = float(np.mean(np.abs(divergence - exact)))
        size = bytes_per_target(form.tensors)
        rows.append(
            {
                "dtype": dtype,
                "bytes_a_target": size,
                "gigabytes": size * targets / 1e9,
                "write_targets_a_second": Spread.of(wrote)._asdict(),
                "read_targets_a_second": Spread.of(read)._asdict(),
                "divergence_difference": difference,
                "of_divergence": difference / float(np.mean(exact)),
            }
        )
    return {"examples": examples, "targets": targets, "width": width, "rows": rows}


def _corpus(examples: int) -> _Examples:
    """Lengths spread about as Dolly's: 80 of 151 tokens are the response's on average."""
    random = np.random.default_rng(1)
    prompts = np.clip(random.lognormal(4.0, 0.7, examples), 20, 400).astype(np.int32)
    responses = np.clip(random.lognormal(3.9, 1.0, examples), 2, 500).astype(np.int32)
    return _Examples(prompts, responses)


def _seconds_to_read(store: TeacherStore, order: np.ndarray) -> float:
    any_rows = store.read(0)["teacher_hidden_TxE"]
    rows = np.empty((int(np.diff(store.offsets).max()), any_rows.shape[1]), any_rows.dtype)
    start = time.perf_counter()
    for example in order:
        found = store.read(example)["teacher_hidden_TxE"]
        rows[: len(found)] = found
    return time.perf_counter() - start


def _first_targets(store: TeacherStore) -> np.ndarray:
    """The hidden states of the first `_COMPARED` targets."""
    examples = range(int(np.searchsorted(store.offsets, _COMPARED)))
    return np.concatenate([store.read(i)["teacher_hidden_TxE"] for i in examples])[:_COMPARED]


def _divergence(width: int, vocabulary: int):
    """Skew KL of each target with a random student; logits have the standard deviation 3 of a trained model's."""
    keys = jax.random.split(jax.random.key(0), 3)
    student = jax.random.normal(keys[0], (_COMPARED, width))
    heads = [3 * width**-0.5 * jax.random.normal(key, (vocabulary, width)) for key in keys[1:]]
    labels, weights = jnp.zeros(_COMPARED, jnp.int32), jnp.ones(_COMPARED)

    @jax.jit
    def divergence(hidden_TxE: jax.Array) -> jax.Array:
        return fused_token_losses(
            student, heads[0], hidden_TxE, heads[1], labels, weights, Objective(SkewKL(0.1))
        )[1]

    return lambda hidden_TxE: np.asarray(divergence(hidden_TxE))
