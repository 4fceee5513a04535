import dataclasses
import itertools

import numpy as np
import pytest

from l2m_jax import methods
from l2m_jax.curriculum import Curriculum, examples_seen
from l2m_jax.data.order import order_of_examples
from l2m_jax.errors import InputError
from l2m_jax.losses import ForwardKL, Objective, SkewKL, SkewReverseKL
from l2m_jax.methods import Overrides, Rollouts
from l2m_jax.run.distillation import relevant_curriculum


@pytest.mark.parametrize(
    "changes",
    [{}, {"mix": 0.25}, {"open_by": 0.4}, {"loss_by": "sample"}, {"weight": "p(1-p)", "stratify": "length"}],
)
def test_all_methods_see_as_many_examples(changes):
    order = np.arange(103)
    seen = {
        examples_seen(
            methods.stages(methods.get(name), Curriculum(**changes), order, 1, order % 5, order / 103)
        )
        for name in methods.METHODS
    }
    assert seen == {8 * (26 + 52 + 78 + 103)}


@pytest.mark.parametrize("budget", [7, 50, 103, 2072])
def test_a_budget_of_examples_holds_for_all_methods(budget):
    """Also if it is less than one pass over the 103 examples."""
    curriculum = Curriculum(examples=budget)
    for name in methods.METHODS:
        found = methods.stages(methods.get(name), curriculum, np.arange(103), 1)
        assert examples_seen(found) == budget
        assert sum(len(order) for order in trained_on(found, 1)) == budget


def test_the_budget_of_eight_epochs_a_stage_gives_their_stages():
    order = np.arange(104)
    by_epochs = methods.stages(methods.get("l2m"), Curriculum(), order)
    assert methods.stages(methods.get("l2m"), Curriculum(examples=20 * 104), order) == by_epochs


def test_a_budget_of_tokens_counts_examples_of_average_length():
    lengths = np.array([10, 20, 30])
    assert Curriculum(tokens=1000).in_examples(lengths) == Curriculum(examples=50)
    assert Curriculum(examples=7).in_examples(lengths) == Curriculum(examples=7)
    with pytest.raises(InputError, match="tokens: 1000 and examples 7 both set the budget"):
        Curriculum(tokens=1000, examples=7)


def trained_on(stages, seed):
    return [stage.order(epoch, seed).tolist() for stage in stages for epoch in range(stage.epochs)]


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


@pytest.mark.parametrize("name", ["l2m", "m2l", "random_order", "kld", "sft"])
def test_the_defaults_train_on_algorithm_1_in_the_known_order(name):
    """Written out for 40 examples: epochs over d_1 ∪ ... ∪ d_i, or over everything, in the order of each epoch."""
    ranked, seed = np.random.default_rng(0).permutation(40), 5
    random = np.random.default_rng(seed).permutation(40)
    order = random if name == "random_order" else ranked
    if methods.get(name).staged:
        expected = [
            order_of_examples(seed, i, e, order[: 10 * i]).tolist() for i in (1, 2, 3, 4) for e in range(8)
        ]
    else:
        expected = [order_of_examples(seed, 1, e, np.arange(40)).tolist() for e in range(20)]
    assert trained_on(methods.stages(methods.get(name), Curriculum(), ranked, seed), seed) == expected


@pytest.mark.parametrize("changes", [{}, {"mix": 0.25, "open_by": 0.5}, {"epochs_per_stage": 1.5}])
def test_shuffled_multiset_has_the_examples_and_schedules_of_l2m(changes):
    order, curriculum = np.random.default_rng(0).permutation(50), Curriculum(**changes)
    l2m, shuffled = (
        methods.stages(methods.get(n), curriculum, order, 3) for n in ("l2m", "shuffled_multiset")
    )
    assert l2m == shuffled  # α_i, β_i and lengths
    drawn, redrawn = (trained_on(stages, 3) for stages in (l2m, shuffled))
    assert [len(epoch) for epoch in drawn] == [len(epoch) for epoch in redrawn]
    assert sorted(flat(drawn)) == sorted(flat(redrawn))
    if not changes:
        counts = np.bincount(flat(redrawn))[order]
        assert counts.tolist() == [32] * 13 + [24] * 13 + [16] * 12 + [8] * 12
        easiest = np.isin(redrawn[0], order[:13]).mean()
        assert 0.2 < easiest < 0.7  # 0.4 on average, all of them in l2m


def test_hard_first_opens_the_subsets_in_reverse():
    order = np.arange(40)[::-1]
    opening = methods.subsets(methods.get("hard_first"), Curriculum(), order)
    assert list(opening) == [4, 3, 2, 1]
    assert set(opening[4].tolist()) == set(range(10)) and set(opening[1].tolist()) == set(range(30, 40))
    some = methods.subsets(methods.get("hard_first"), Curriculum(subsets=(1, 3)), order)
    assert list(some) == [3, 1] and set(some[3].tolist()) == set(opening[3].tolist())
    stages = methods.stages(methods.get("hard_first"), Curriculum(), order)
    assert set(stages[0].indices.tolist()) == set(range(10)) and stages[3].beta == 1.0


def test_strata_are_for_what_is_ranked():
    order, strata = np.arange(40), np.arange(40) // 20
    parts = methods.subsets(methods.get("l2m"), Curriculum(), order, 0, strata)
    assert parts[1].tolist() == [*range(5), *range(20, 25)]
    hard = methods.subsets(methods.get("hard_first"), Curriculum(), order, 0, strata)
    assert {n: sorted(p.tolist()) for n, p in hard.items()} == {n: p.tolist() for n, p in parts.items()}
    with_strata, without = (
        methods.subsets(methods.get("random_order"), Curriculum(), order, 0, s) for s in (strata, None)
    )
    assert all(with_strata[n].tolist() == without[n].tolist() for n in (1, 2, 3, 4))


def test_alpha_and_beta_by_sample_follow_the_ranks_in_a_single_stage():
    order = np.random.default_rng(1).permutation(21)
    curriculum = Curriculum(loss_by="sample", alpha=0.2, beta_first=0.6, beta_last=0.9)
    (stage,) = methods.stages(methods.get("l2m"), curriculum, order)
    assert sorted(stage.indices.tolist()) == list(range(21))
    np.testing.assert_allclose(stage.samples.alpha_N[order], [0.2 * r / 20 for r in range(21)], atol=1e-7)
    np.testing.assert_allclose(
        stage.samples.beta_N[order], [0.6 + 0.3 * r / 20 for r in range(21)], atol=1e-7
    )
    assert (stage.alpha, stage.beta) == pytest.approx((0.1, 0.75))
    assert stage.samples.temperature_N is None and stage.temperature == 1
    for name, temperatures in (("pocl", ()), ("l2m", (1.0, 2.0))):
        warmer = dataclasses.replace(curriculum, temperatures=temperatures, subsets=(1, 2))
        (warm,) = methods.stages(methods.get(name), warmer, order)
        temperature_N = warm.samples.temperature_N
        np.testing.assert_allclose(temperature_N[order[:11]], np.linspace(1, 2, 11), atol=1e-6)
        # Padding has the last example's, and would be divided by it.
        assert warm.temperature == 1.5 and temperature_N[-1] >= 1
    (constant,) = methods.stages(methods.get("l2m_no_beta"), curriculum, order)
    assert constant.samples.beta_N is None and constant.beta == 1.0
    (falling,) = methods.stages(methods.get("m2l"), curriculum, order)
    np.testing.assert_allclose(falling.samples.alpha_N[order[::-1]], stage.samples.alpha_N[order], atol=1e-7)
    assert all(s.samples is None for s in methods.stages(methods.get("l2m"), Curriculum(), order))


def test_paced_weighs_by_p_times_one_minus_p_and_leaves_no_example_out():
    rouge = np.array([0.0, 0.25, 0.5, 0.9, 1.0])
    for stage in methods.stages(
        methods.get("kld"), Curriculum(weight="p(1-p)"), np.arange(5), rouge_l_N=rouge
    ):
        np.testing.assert_allclose(stage.samples.weight_N, [0.0025, 0.1875, 0.25, 0.09, 0.0025], rtol=1e-6)
        assert stage.samples.alpha_N is None and stage.samples.beta_N is None


def test_objectives_are_those_of_the_table():
    def first(name, **overrides):
        method = methods.get(name, Overrides(**overrides))
        return methods.objectives(method, methods.stages(method, Curriculum(), np.arange(8))[0])

    assert first("seqkd") == first("sft") == (Objective(ForwardKL(), beta=0.0),)
    assert first("skl_on_policy") == first("skl") == (Objective(SkewKL(0.5)),)
    assert first("skl", alpha=0.3, beta=0.9, temperature=2.0) == (Objective(SkewKL(0.3), 0.9, 2.0),)
    # Twice the factors 2 - b and b, for the mean is over the responses of both terms.
    assert first("distillm2") == first("distillm2_on_policy")
    assert first("distillm2") == (
        Objective(SkewKL(0.1), scale=2.0),
        Objective(SkewReverseKL(0.1, mixture_gradient=False), scale=2.0),
    )


@pytest.mark.parametrize("name", ["kld", "skl", "rkl", "jsd", "srkl", "tvd", "l2m_no_beta", "skl_on_policy"])
def test_policy_is_a_setting_of_every_divergence(name):
    on = methods.get(name, Overrides(policy="on"), Rollouts(refreshes=3))
    off = methods.get(name, Overrides(policy="off"))
    assert (on.on_policy, on.refreshes, on.on_references_alone) == (True, 3, False)
    assert off.on_references_alone
    assert dataclasses.replace(on, on_policy=False, refreshes=off.refreshes) == off


def test_skl_on_policy_is_skl_but_for_its_policy():
    assert methods.get("skl_on_policy") == methods.get("skl", Overrides(policy="on"))


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("sft", Overrides(policy="on"), "overrides.beta: sft uses cross-entropy at beta 0"),
        ("seqkd", Overrides(policy="on"), "overrides.beta: seqkd"),
        ("l2m", Overrides(policy="on"), "curriculum.beta_first: l2m uses cross-entropy at beta 0.7"),
        ("l2m", Overrides(alpha=0.3), "overrides.alpha: l2m is staged and takes α_i from curriculum.alpha"),
        ("m2l", Overrides(beta=0.3), "overrides.beta: m2l takes β_i from curriculum.beta_first"),
        ("distillm2", Overrides(beta=0.5), "overrides.beta: distillm2"),
        ("distillm2", Overrides(divergence="jsd"), "overrides.divergence: distillm2 has two divergences"),
        ("distilm2", Overrides(), "did you mean 'distillm2'"),
    ],
)
def test_what_makes_no_sense_is_refused(name, overrides, said):
    with pytest.raises(InputError, match=said):
        methods.get(name, overrides)


@pytest.mark.parametrize(
    ("name", "curriculum", "ranked", "taught"),
    [
        ("sft", Curriculum(), False, False),
        ("kld", Curriculum(), False, True),
        ("kld", Curriculum(subsets=(1,)), True, True),
        ("l2m", Curriculum(), True, True),
        ("l2m", Curriculum(beta_first=0.0, beta_last=0.0), True, False),
        ("random_order", Curriculum(), False, True),
        ("random_order", Curriculum(weight="p(1-p)"), True, True),
        ("sft", Curriculum(weight="p(1-p)"), True, False),
        ("hard_first", Curriculum(), True, True),
        ("shuffled_multiset", Curriculum(), True, True),
    ],
)
def test_what_a_method_needs(name, curriculum, ranked, taught):
    method = methods.get(name)
    assert methods.needs_ranking(method, curriculum) == ranked
    assert methods.needs_teacher(method, curriculum) == taught


def test_random_order_fills_the_stages_of_l2m_by_its_seed():
    order, curriculum = np.arange(40), Curriculum()
    staged = methods.stages(methods.get("l2m"), curriculum, order)
    random = [methods.stages(methods.get("random_order"), curriculum, order, seed) for seed in (0, 0, 1)]
    for found in random:
        assert [(s.alpha, s.beta, len(s.indices)) for s in found] == [
            (s.alpha, s.beta, len(s.indices)) for s in staged
        ]
    first = [found[0].indices.tolist() for found in random]
    assert first[0] == first[1] != first[2] and first[0] != staged[0].indices.tolist()


@pytest.mark.parametrize(
    ("name", "value"), [("mix", 0.25), ("open_by", 0.25), ("rerank", True), ("temperature_by", "linear")]
)
def test_settings_of_stages_are_refused_without_stages(name, value):
    with pytest.raises(InputError, match=f"{name}: has no effect in the single stage of loss_by 'sample'"):
        Curriculum(loss_by="sample", **{name: value})


def test_neighbours_are_those_of_their_papers():
    pocl = methods.stages(methods.get("pocl"), Curriculum(), np.arange(8))
    np.testing.assert_allclose([s.temperature for s in pocl], [1, 4 / 3, 5 / 3, 2])
    np.testing.assert_allclose([s.beta for s in pocl], [0.7, 0.8, 0.9, 1])
    assert methods.objectives(methods.get("pocl"), pocl[-1]) == (Objective(ForwardKL(), 1.0, 2.0),)
    taid = methods.by_step(methods.get("taid_linear"), Curriculum())
    assert [taid["alpha"].at_step(step, 4) for step in range(4)] == pytest.approx([0.4, 0.6, 0.8, 1.0])


def test_curricula_set_the_coefficients_of_staged_methods():
    curriculum = Curriculum(
        alphas=(0.1, 0.3), betas=(0.5, 0.5, 0.6, 0.9), temperatures=(1.0, 2.0), temperature_by="cosine"
    )
    staged = methods.stages(methods.get("m2l"), curriculum, np.arange(8))
    np.testing.assert_allclose([s.alpha for s in staged], [0.3, 0.7 / 3, 0.5 / 3, 0.1])
    assert [s.beta for s in staged] == [0.5, 0.5, 0.6, 0.9]
    assert set(methods.by_step(methods.get("m2l"), curriculum)) == {"temperature"}
    assert not methods.by_step(methods.get("skl"), curriculum)
    # Without a teacher there must be no array of β, whose program needs one.
    constant = Curriculum(betas=(0.0,), beta_by="linear")
    assert not methods.by_step(methods.get("l2m"), constant)
    assert not methods.needs_teacher(methods.get("l2m"), constant)


def test_a_divergence_without_alpha_has_no_schedule_of_it():
    method = methods.get("l2m", Overrides(divergence="reverse_kl"))
    assert method.alpha == "own"
    assert relevant_curriculum(method, Curriculum(alpha=0.3)) == Curriculum()
