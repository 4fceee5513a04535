import dataclasses

import numpy as np
import pytest

from l2m_jax import methods
from l2m_jax.config import Config, Overrides, Rollouts, defaults, parse
from l2m_jax.curriculum import examples_seen
from l2m_jax.errors import InputError
from l2m_jax.losses import Objective


def config(**changes) -> Config:
    return dataclasses.replace(Config(), **changes)


def test_all_methods_see_as_many_examples():
    order = np.arange(103)
    seen = {
        examples_seen(methods.stages(methods.get(name, config()), config(), order))
        for name in methods.METHODS
    }
    assert seen == {8 * (26 + 52 + 78 + 103)}


def test_objectives_are_those_of_the_table():
    def first(name):
        method = methods.get(name, config())
        stage = methods.stages(method, config(), np.arange(8))[0]
        return methods.objectives(method, config(), stage)

    assert first("seqkd") == first("sft") == (Objective(beta=0.0, alpha=0.0),)
    assert first("skl_on_policy") == first("skl") == (Objective("skew_kl", alpha=0.5),)
    # Twice the factors 2 - b and b, for the mean is over the responses of both terms.
    assert first("distillm2") == first("distillm2_on_policy")
    assert first("distillm2") == (
        Objective("skew_kl", alpha=0.1, scale=2.0),
        Objective("skew_reverse_kl_fixed_mixture", alpha=0.1, scale=2.0),
    )


@pytest.mark.parametrize("name", ["kld", "skl", "rkl", "jsd", "srkl", "tvd", "l2m_no_beta", "skl_on_policy"])
def test_policy_is_a_setting_of_every_divergence(name):
    on = methods.get(name, config(overrides=Overrides(policy="on"), rollouts=Rollouts(refreshes=3)))
    off = methods.get(name, config(overrides=Overrides(policy="off")))
    assert (on.on_policy, on.refreshes, on.on_references_alone) == (True, 3, False)
    assert off.on_references_alone
    assert dataclasses.replace(on, on_policy=False, refreshes=off.refreshes) == off


def test_skl_on_policy_is_skl_but_for_its_policy():
    assert methods.get("skl_on_policy", config()) == methods.get(
        "skl", config(overrides=Overrides(policy="on"))
    )


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("sft", Overrides(policy="on"), "config.overrides.beta: sft takes cross-entropy at beta 0"),
        ("seqkd", Overrides(policy="on"), "config.overrides.beta: seqkd"),
        ("l2m", Overrides(policy="on"), "config.curriculum.beta_first: l2m takes cross-entropy at beta 0.7"),
        ("distillm2", Overrides(beta=0.5), "config.overrides.beta: distillm2"),
        (
            "distillm2",
            Overrides(divergence="jsd"),
            "config.overrides.divergence: distillm2 is two divergences",
        ),
        ("distilm2", Overrides(), "did you mean 'distillm2'"),
    ],
)
def test_what_makes_no_sense_is_refused(name, overrides, said):
    with pytest.raises(InputError, match=said):
        methods.get(name, config(overrides=overrides))


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("overrides.policy", "maybe", "config.overrides.policy: 'maybe' is none of own, on, off"),
        ("rollouts.student_share", 0.0, "config.rollouts.student_share: 0.0 must be greater than 0"),
        ("rollouts.replay_share", 1.5, "config.rollouts.replay_share: 1.5 must lie between 0 and 1"),
        ("rollouts.refreshes", -1, "config.rollouts.refreshes: -1 must be 0 or more"),
    ],
)
def test_bad_settings_are_named(place, value, said):
    values = defaults()
    values.update_from_flattened_dict({place: value})
    with pytest.raises(InputError, match=said):
        parse(values)
