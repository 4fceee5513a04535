import dataclasses

import numpy as np
import pytest

from l2m_jax import methods
from l2m_jax.curriculum import Curriculum, examples_seen
from l2m_jax.errors import InputError
from l2m_jax.losses import ForwardKL, Objective, SkewKL, SkewReverseKL
from l2m_jax.methods import Overrides, Rollouts


def test_all_methods_see_as_many_examples():
    order = np.arange(103)
    seen = {examples_seen(methods.stages(methods.get(name), Curriculum(), order)) for name in methods.METHODS}
    assert seen == {8 * (26 + 52 + 78 + 103)}


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


def test_neighbours_are_those_of_their_papers():
    pocl = methods.stages(methods.get("pocl"), Curriculum(), np.arange(8))
    np.testing.assert_allclose([s.temperature for s in pocl], [1, 4 / 3, 5 / 3, 2])
    np.testing.assert_allclose([s.beta for s in pocl], [0.7, 0.8, 0.9, 1])
    assert methods.objectives(methods.get("pocl"), pocl[-1]) == (Objective(ForwardKL(), 1.0, 2.0),)
    taid = methods.by_step(methods.get("taid_linear"), Curriculum())
    assert [taid["alpha"].at_step(step, 4) for step in range(4)] == pytest.approx([0.4, 0.6, 0.8, 1.0])


def test_curricula_set_the_coefficients_of_staged_methods():
    curriculum = Curriculum(alphas=(0.1, 0.3), betas=(0.5, 0.5, 0.6, 0.9), temperature_by="cosine")
    staged = methods.stages(methods.get("m2l"), curriculum, np.arange(8))
    np.testing.assert_allclose([s.alpha for s in staged], [0.3, 0.7 / 3, 0.5 / 3, 0.1])
    assert [s.beta for s in staged] == [0.5, 0.5, 0.6, 0.9]
    assert set(methods.by_step(methods.get("m2l"), curriculum)) == {"temperature"}
    assert not methods.by_step(methods.get("skl"), curriculum)
