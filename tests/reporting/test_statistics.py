import math

import numpy as np
import pytest
from scipy import stats

from l2m_jax.reporting.statistics import bootstrap, detectable, holm, paired, verdict


def test_the_paired_test_is_that_of_scipy():
    left, right = np.random.default_rng(0).normal(size=(2, 8))
    expected = stats.ttest_rel(left, right + 0.4)
    found = paired(left - right - 0.4)
    interval = expected.confidence_interval()
    np.testing.assert_allclose(
        [found.p, found.low, found.high], [expected.pvalue, interval.low, interval.high], rtol=1e-9
    )


def test_the_paired_test_by_hand():
    # Mean 2 and deviation 1 of three: t = 2·√3 = 3.464, and the table's t(0.975, 2) is 4.303.
    found = paired([1.0, 2.0, 3.0])
    assert (found.n, found.mean, found.sd) == (3, 2.0, 1.0)
    assert found.high - found.mean == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)
    # With 2 degrees of freedom, p = 1 - t / √(t² + 2).
    assert found.p == pytest.approx(1 - math.sqrt(12 / 14))


def test_differences_without_deviation_and_a_single_one():
    assert (paired([2.0, 2.0]).p, paired([0.0, 0.0]).p) == (0.0, 1.0)
    assert paired([3.0]).mean == 3.0 and math.isnan(paired([3.0]).p)


def test_holm_by_hand():
    # 4·0.005; 3·0.01; 2·0.03 and then 0.04, which must not fall below 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(("n", "effect"), [(5, 1.68), (8, 1.15), (10, 0.99), (16, 0.75)])
def test_the_detectable_difference_has_its_power(n, effect):
    assert detectable(n) == pytest.approx(effect, abs=0.01)
    draws = np.random.default_rng(n).normal(detectable(n), 1.0, size=(20_000, n))
    p = stats.ttest_1samp(draws, 0.0, axis=1).pvalue
    assert np.mean((p < 0.05) & (draws.mean(axis=1) > 0)) == pytest.approx(0.8, abs=0.01)


def test_intervals_cover_the_truth_when_worlds_and_prompts_are_drawn():
    """Differences of worlds, of prompts, and of answers around 1, in the proportions of short runs."""
    random, worlds, prompts, draws = np.random.default_rng(3), 8, 60, 300
    of_worlds = of_both = 0
    for seed in range(draws):
        shared_P = random.normal(0, 4, size=prompts)  # the same prompts in every world
        effects_W = 1 + random.normal(0, 1, size=worlds)
        answers = random.normal(0, 8, size=(worlds, prompts))
        differences_WxP = effects_W[:, None] + shared_P + answers
        found = paired(differences_WxP.mean(axis=1))
        # For the prompts at hand, which are the same in every world.
        of_worlds += found.low <= 1 + shared_P.mean() <= found.high
        low, high = bootstrap([differences_WxP], seed, resamples=400)
        of_both += low <= 1 <= high
    assert of_worlds / draws == pytest.approx(0.95, abs=0.035)
    assert 0.88 <= of_both / draws <= 0.99


def test_the_bootstrap_is_the_same_for_the_same_seed_and_weighs_sets_equally():
    small, large = np.full((3, 2), 6.0), np.zeros((3, 50))
    assert bootstrap([small, large]) == pytest.approx((3.0, 3.0))
    noise = np.random.default_rng(0).normal(size=(4, 9))
    assert bootstrap([noise], 1) == bootstrap([noise], 1) != bootstrap([noise], 2)


@pytest.mark.parametrize(
    ("differences", "p", "sign", "effect", "expected"),
    [
        ([2.0, 3.0, 4.0], 0.01, 1, None, "holds"),
        ([2.0, 3.0, 4.0], 0.01, -1, None, "reversed"),
        ([-2.0, -3.0, -4.0], 0.01, -1, -9.0, "holds"),
        ([-0.1, 0.1, 0.0], 0.9, 1, 0.4, "smaller than the paper's effect"),
        ([0.1, -0.1, 0.0], 0.9, -1, -0.4, "smaller than the paper's effect"),
        ([-0.1, 0.1, 0.0], 0.9, 1, 0.2, "unresolved"),  # the interval ends at 0.248
        ([-0.1, 0.1, 0.0], 0.9, 1, None, "unresolved"),
        ([2.0, 3.0, 4.0], 0.06, 1, None, "unresolved"),
    ],
)
def test_verdicts(differences, p, sign, effect, expected):
    assert verdict(paired(differences), p, sign, effect) == expected
