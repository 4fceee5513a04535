"""Strata, against counts."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from l2m_jax.curriculum import length_strata, partition, stratified

STRATA = st.lists(st.integers(0, 6), min_size=6, max_size=80)


@given(STRATA, st.integers(1, 6), st.integers(0, 5))
def test_every_subset_has_every_stratum_in_proportion_and_its_easiest_first(strata, n, seed):
    strata_N = np.array(strata)
    order = np.random.default_rng(seed).permutation(len(strata_N))
    found = stratified(order, strata_N, n)
    assert sorted(found.tolist()) == list(range(len(strata_N)))
    rank = np.argsort(order)
    subsets = partition(found, n)
    for stratum in np.unique(strata_N):
        of_stratum = [subset[strata_N[subset] == stratum] for subset in subsets]
        whole = (strata_N == stratum).sum()
        for part in of_stratum:
            assert whole // n <= len(part) <= -(-whole // n)
        ranks = [rank[part] for part in of_stratum if len(part)]
        for easier, harder in itertools.pairwise(ranks):
            assert easier.max() < harder.min()
    for subset in subsets:  # within a subset, by difficulty
        assert np.all(np.diff(rank[subset]) > 0)


@given(st.integers(4, 50), st.integers(1, 4))
def test_one_stratum_changes_nothing(size, n):
    order = np.random.default_rng(size).permutation(size)
    np.testing.assert_array_equal(stratified(order, np.zeros(size, int), n), order)


def test_lengths_are_divided_in_quarters():
    lengths = np.random.default_rng(0).permutation(100)
    strata = length_strata(lengths)
    assert np.bincount(strata).tolist() == [25, 25, 25, 25]
    assert all(lengths[strata == k].max() < lengths[strata == k + 1].min() for k in range(3))
    assert set(length_strata(np.array([5, 5, 5, 5, 9])).tolist()) == {0, 3}
