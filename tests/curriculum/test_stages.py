import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2m_jax import curriculum
from l2m_jax.curriculum import stages
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
    alphas = [stages.alpha_at(i, 4) for i in (1, 2, 3, 4)]
    betas = [stages.beta_at(i, 4) for i in (1, 2, 3, 4)]
    assert alphas == pytest.approx([0.0, 0.1 / 3, 0.2 / 3, 0.1], abs=1e-15)
    assert betas == pytest.approx([0.7, 0.8, 0.9, 1.0], abs=1e-15)
    # The ends decide what is compiled (α = 0 is plain KL, β = 1 has no cross-entropy), so they are exact.
    assert (alphas[0], alphas[3], betas[0], betas[3]) == (0.0, 0.1, 0.7, 1.0)


def test_schedules_may_fall_or_stand_still():
    assert [stages.alpha_at(i, 4, 0.15, 0.0) for i in (1, 2, 3, 4)] == pytest.approx([0.15, 0.1, 0.05, 0.0])
    assert [stages.beta_at(i, 4, 0.3, 0.3) for i in (1, 2, 3, 4)] == [0.3] * 4


def test_one_stage_takes_the_last_values():
    assert stages.alpha_at(1, 1, 0.0, 0.15) == 0.15
    assert stages.beta_at(1, 1, 0.7, 1.0) == 1.0


@pytest.mark.parametrize("i", [0, 5])
def test_stages_count_from_one(i):
    with pytest.raises(ValueError, match="from 1 to n"):
        stages.alpha_at(i, 4)


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
    budget = stages.baby_step_examples(11_500, 4, 8)
    (baseline,) = stages.single_stage(np.arange(11_500), budget, alpha=0.5)
    staged = stages.baby_steps(stages.partition(np.arange(11_500), 4))
    assert budget == stages.examples_seen(staged) == 230_000
    assert (baseline.epochs, baseline.alpha, baseline.beta) == (20, 0.5, 1.0)


@given(st.integers(4, 60), st.integers(1, 4), st.integers(1, 5), st.integers(1, 16))
def test_a_baseline_sees_exactly_the_staged_number_of_examples(size, n, epochs, batch_size):
    staged = stages.baby_steps(stages.partition(np.arange(size), n), epochs=epochs)
    single = stages.single_stage(np.arange(size), stages.baby_step_examples(size, n, epochs))
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
    one, other = (stages.Stage(1, 0.0, 0.7, np.arange(size), 2, 6) for size in (3, 4))
    assert one == other and hash(one) == hash(other)
    assert one != stages.Stage(1, 0.1, 0.7, np.arange(3), 2, 6)


def test_the_import_is_light():
    code = "import sys; from l2m_jax import curriculum; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert set(curriculum.__all__) >= {"rank", "partition", "alpha_at", "beta_at", "baby_steps"}
