import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2m_jax import curriculum
from l2m_jax.curriculum import Schedule, stages
from l2m_jax.errors import InputError


def test_partition_gives_the_remainder_to_the_easiest_subsets():
    order = np.array([7, 3, 9, 0, 1, 8, 2, 6, 5, 4])
    parts = stages.partition(order, 4)
    assert [part.tolist() for part in parts] == [[7, 3, 9], [0, 1, 8], [2, 6], [5, 4]]


def test_the_paper_splits_11500_examples_in_four_equal_subsets():
    assert [len(part) for part in stages.partition(np.arange(11_500), 4)] == [2875] * 4
    assert [len(part) for part in stages.partition(np.arange(11_435), 4)] == [2859, 2859, 2859, 2858]


@given(st.integers(1, 200), st.integers(1, 200))
def test_partition_covers_every_example_once_in_order(size, n):
    order = np.random.default_rng(size).permutation(size)
    if n > size:
        with pytest.raises(InputError, match=f"{n} difficulty subsets of {size}"):
            stages.partition(order, n)
        return
    parts = stages.partition(order, n)
    sizes = [len(part) for part in parts]
    np.testing.assert_array_equal(np.concatenate(parts), order)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


@pytest.mark.parametrize("n", [0, -1])
def test_partition_needs_a_subset(n):
    with pytest.raises(InputError, match="at least 1"):
        stages.partition(np.arange(5), n)


def test_alpha_and_beta_of_algorithm_1_with_four_stages():
    staged = stages.baby_steps(stages.partition(np.arange(8), 4))
    alphas, betas = [stage.alpha for stage in staged], [stage.beta for stage in staged]
    assert alphas == pytest.approx([0.0, 0.1 / 3, 0.2 / 3, 0.1], abs=1e-15)
    assert betas == pytest.approx([0.7, 0.8, 0.9, 1.0], abs=1e-15)
    # The ends decide what is compiled (α = 0 is plain KL, β = 1 has no cross-entropy), so they are exact.
    assert (alphas[0], alphas[3], betas[0], betas[3]) == (0.0, 0.1, 0.7, 1.0)


def test_schedules_may_fall_or_stand_still():
    assert [Schedule((0.15, 0.0)).at_stage(i, 4) for i in (1, 2, 3, 4)] == pytest.approx(
        [0.15, 0.1, 0.05, 0.0]
    )
    assert [Schedule((0.3, 0.3)).at_stage(i, 4) for i in (1, 2, 3, 4)] == [0.3] * 4


def test_one_stage_takes_the_last_values():
    assert Schedule((0.0, 0.15)).at_stage(1, 1) == 0.15
    assert Schedule((0.7, 1.0)).at_stage(1, 1) == 1.0


@pytest.mark.parametrize("i", [0, 5])
def test_stages_count_from_one(i):
    with pytest.raises(ValueError, match="from 1 to n"):
        Schedule((0.0, 0.1)).at_stage(i, 4)


def test_baby_steps_accumulate_the_subsets():
    plan = stages.baby_steps(
        stages.partition([4, 2, 0, 3, 1], 2), epochs=3, alpha=(0.0, 0.15), beta=(0.7, 1.0)
    )
    assert [(s.index, s.alpha, s.beta, s.epochs) for s in plan] == [(1, 0.0, 0.7, 3), (2, 0.15, 1.0, 3)]
    assert [s.indices.tolist() for s in plan] == [[4, 2, 0], [4, 2, 0, 3, 1]]
    assert [s.examples for s in plan] == [9, 15]
    assert stages.examples_seen(plan) == 24
    assert stages.steps(plan, 2) == 3 * 2 + 3 * 3


def test_baby_steps_need_an_epoch():
    with pytest.raises(InputError, match="0 epochs"):
        stages.baby_steps(stages.partition(np.arange(4), 2), epochs=0)


def test_a_baseline_sees_20_epochs_of_the_papers_data():
    staged = stages.baby_steps(stages.partition(np.arange(11_500), 4))
    (baseline,) = stages.single_stage(np.arange(11_500), stages.examples_seen(staged), alpha=0.5)
    assert stages.examples_seen(staged) == 230_000
    assert (baseline.epochs, baseline.alpha, baseline.beta) == (20, 0.5, 1.0)


@given(st.integers(4, 60), st.integers(1, 4), st.integers(1, 5), st.integers(1, 16))
def test_a_baseline_sees_exactly_the_staged_number_of_examples(size, n, epochs, batch_size):
    staged = stages.baby_steps(stages.partition(np.arange(size), n), epochs=epochs)
    single = stages.single_stage(np.arange(size), stages.examples_seen(staged))
    assert stages.examples_seen(single) == stages.examples_seen(staged)
    taken = [single[0].examples_in_epoch(epoch) for epoch in range(single[0].epochs)]
    assert sum(taken) == single[0].examples and min(taken) > 0
    assert taken[:-1] == [size] * (len(taken) - 1)
    # Batches end with their epoch, so the updates agree up to one for each epoch.
    difference = stages.steps(staged, batch_size) - stages.steps(single, batch_size)
    assert abs(difference) <= n * epochs


def test_a_cut_epoch_is_counted_in_steps():
    (stage,) = stages.single_stage(np.arange(10), 25)
    assert [stage.examples_in_epoch(e) for e in range(4)] == [10, 10, 5, 0]
    assert stages.steps([stage], 4) == 3 + 3 + 2


def test_single_stage_rejects_nothing_to_train_on():
    with pytest.raises(InputError, match="both must be at least 1"):
        stages.single_stage([], 10)


def test_stages_compare_by_their_objective_and_length():
    one, other = (stages.Stage(1, 0.0, 0.7, (np.arange(size),) * 2, 6) for size in (3, 4))
    assert one == other and hash(one) == hash(other)
    assert one != stages.Stage(1, 0.1, 0.7, (np.arange(3),) * 2, 6)


def test_the_import_is_light():
    code = "import sys; from l2m_jax import curriculum; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert set(curriculum.__all__) >= {"rank", "partition", "Schedule", "baby_steps"}


def multiset(*found):
    return sorted(np.concatenate([np.concatenate(stage.passes) for of in found for stage in of]).tolist())


SIZES = st.tuples(st.integers(8, 60), st.integers(1, 5), st.sampled_from([0.5, 1.0, 2.0, 2.6]))


@given(SIZES)
def test_without_mixing_the_stages_are_those_of_algorithm_1(sizes):
    size, n, epochs = sizes
    subsets = stages.partition(np.random.default_rng(size).permutation(size), n)
    found = stages.baby_steps(subsets, epochs=epochs, seed=3)
    for i, stage in enumerate(found, start=1):
        opened = [int(x) for subset in subsets[:i] for x in subset]
        whole, rest = int(epochs), round(epochs % 1 * len(opened))
        assert stage.examples == pytest.approx(epochs * len(opened), abs=1)
        assert [p.tolist() for p in stage.passes[:whole]] == [opened] * whole
        for drawn in stage.passes[whole:]:  # a fraction of an epoch: some of them, none twice
            assert abs(len(drawn) - rest) <= 1 and len(set(drawn)) == len(drawn) and set(drawn) <= set(opened)


@given(SIZES, st.sampled_from([0.1, 0.25, 0.5]), st.integers(0, 3))
def test_mixing_takes_its_share_from_unopened_subsets_in_every_epoch(sizes, mix, seed):
    size, n, epochs = sizes
    subsets = stages.partition(np.random.default_rng(size).permutation(size), n)
    plain = stages.baby_steps(subsets, epochs=epochs, seed=seed)
    mixed = stages.baby_steps(subsets, epochs=epochs, mix=mix, seed=seed)
    assert [(s.index, s.alpha, s.beta, s.examples) for s in mixed] == [
        (s.index, s.alpha, s.beta, s.examples) for s in plain
    ]
    assert stages.steps(mixed, 4) == stages.steps(plain, 4)
    for i, stage in enumerate(mixed[:-1], start=1):
        later = np.concatenate(subsets[i:])
        for epoch in stage.passes:
            assert abs(np.isin(epoch, later).sum() - mix * len(epoch)) <= 1
        drawn = np.concatenate(stage.passes)
        assert abs(np.isin(drawn, later).sum() - mix * stage.examples) <= 0.5
        for pool in (later, np.concatenate(subsets[:i])):  # uniformly: nothing again before all were drawn
            counts = [int((drawn == example).sum()) for example in pool]
            assert max(counts) - min(counts) <= 1
    assert multiset(mixed[-1:]) == multiset(plain[-1:])  # nothing is left to mix in


def test_mixed_examples_are_drawn_by_the_seed():
    subsets = stages.partition(np.arange(40), 4)
    first, again, other = (
        multiset(stages.baby_steps(subsets, epochs=1, mix=0.3, seed=s)[:1]) for s in (0, 0, 1)
    )
    assert first == again != other


@given(
    st.integers(20, 200),
    st.integers(2, 5),
    st.sampled_from([2.0, 3.5, 8.0]),
    st.sampled_from([0.3, 0.4, 0.6]),
)
def test_the_last_subset_opens_by_its_share_of_the_same_budget(size, n, epochs, open_by):
    sizes = [len(subset) for subset in stages.partition(np.arange(size), n)]
    plain, paced = stages.stage_examples(sizes, epochs), stages.stage_examples(sizes, epochs, open_by)
    assert sum(paced) == sum(plain)
    assert abs(sum(paced[:-1]) - open_by * sum(plain)) <= 1
    for a, b in zip(paced[:-1], plain[:-1], strict=True):  # in proportion to the data that are open
        assert a / sum(paced[:-1]) == pytest.approx(b / sum(plain[:-1]), abs=2 / sum(paced[:-1]))


def test_the_papers_pacing_has_all_data_open_after_six_tenths():
    sizes = [len(subset) for subset in stages.partition(np.arange(11_500), 4)]
    assert (
        stages.stage_examples(sizes, 8, open_by=0.6)
        == stages.stage_examples(sizes, 8)
        == [23000, 46000, 69000, 92000]
    )


def test_a_stage_without_examples_is_refused():
    with pytest.raises(InputError, match=r"with all data open by 0\.01 of them leave stage 1 without"):
        stages.stage_examples([3, 3, 3, 3], 1, open_by=0.01)


def test_shuffling_over_time_keeps_examples_and_lengths():
    planned = stages.baby_steps(stages.partition(np.arange(43), 4), epochs=2.5, mix=0.2)
    found = stages.shuffled_over_time(planned, seed=0)
    assert found == planned and multiset(found) == multiset(planned)
    assert [[len(p) for p in s.passes] for s in found] == [[len(p) for p in s.passes] for s in planned]
    assert multiset(found[:1]) != multiset(planned[:1])


def test_values_by_rank_are_a_straight_line_by_example():
    values = stages.by_rank(np.array([4, 0, 2]), 0.7, 1.0)
    np.testing.assert_allclose(values, [0.85, 1.0, 1.0, 1.0, 0.7], rtol=1e-6)
    assert values.dtype == np.float32 and stages.by_rank(np.array([1]), 0.0, 0.3)[1] == np.float32(0.3)
