"""Strata: kinds of examples that every subset gets in proportion."""

from collections.abc import Sequence

import numpy as np

STRATA = ("", "category", "length")

_LENGTHS = 4


def length_strata(lengths_N: np.ndarray) -> np.ndarray:
    """int64 [N], which quarter of the lengths each example is in; equal lengths are in the same one."""
    inner = np.quantile(lengths_N, np.arange(1, _LENGTHS) / _LENGTHS, method="lower")
    return np.searchsorted(inner, lengths_N)


def stratified(order: Sequence[int] | np.ndarray, strata_N: np.ndarray, n: int) -> np.ndarray:
    """`order` such that `partition` into n subsets divides each stratum like the whole, by the ranks within it.

    A subset has the n-th part of each stratum, rounded up or down: d_1 has the easiest of each. Within a subset the
    given order is kept.

    Args:
        order: the examples, easiest first.
        strata_N: the stratum of each example, by its number.
    """
    order = np.asarray(order, np.int64)
    by_stratum = np.argsort(strata_N[order], kind="stable")
    strata = strata_N[order][by_stratum]
    # Subsets dealt in turn along the strata, one after another, are as large as those of `partition`, and differ by
    # at most one within each stratum. Sorted within the stratum, they go to its examples from easy to hard.
    dealt = np.arange(len(order)) % n
    dealt = dealt[np.lexsort((dealt, strata))]
    subset = np.empty_like(dealt)
    subset[by_stratum] = dealt
    return order[np.argsort(subset, kind="stable")]
