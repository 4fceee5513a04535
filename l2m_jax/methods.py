"""Every row of the paper's tables by name: objective, data and curriculum of a method.

p is the teacher, q the student.

| method | loss | responses | curriculum |
|---|---|---|---|
| sft | CE | reference | - |
| kld | KL(p‖q) | reference | - |
| skl | KL(p‖½p+½q) | reference | - |
| rkl, jsd, srkl, tvd | the field's other divergences | reference | - |
| l2m | (1-β_i)·CE + β_i·KL(p‖α_i p+(1-α_i)q) | reference | four Baby-Step stages, easiest first |
| l2m_no_beta | the same with β_i = 1 | reference | the same |
| m2l | the same with α_i falling | reference | the same |
| random_order | as l2m | reference | the same stages, subsets drawn at random |
"""

import dataclasses
import difflib
from dataclasses import dataclass

import numpy as np

from l2m_jax.config import Config
from l2m_jax.curriculum import Stage, baby_steps, examples_seen, partition, single_stage
from l2m_jax.errors import InputError
from l2m_jax.losses import DIVERGENCE_NAMES, Objective


@dataclass(frozen=True)
class Method:
    """
    Attributes:
        divergence: one of `losses.DIVERGENCE_NAMES`.
        alpha: skew of a single-stage method; staged methods take theirs from the curriculum's settings.
        beta: weight of the divergence against cross-entropy: 0 is cross-entropy alone.
        staged: Baby-Step stages instead of one pass over everything.
        adaptive_beta: β_i from the curriculum's settings; else `beta` throughout.
        falling_alpha: α_i from α down to 0 instead of up.
        ranking: overrides the curriculum's ranking.
    """

    divergence: str = "skew_kl"
    alpha: float = 0.0
    beta: float = 1.0
    staged: bool = False
    adaptive_beta: bool = False
    falling_alpha: bool = False
    ranking: str = ""


METHODS: dict[str, Method] = {
    "sft": Method(beta=0.0),
    "kld": Method(),
    "skl": Method(alpha=0.5),
    "rkl": Method("reverse_kl"),
    "jsd": Method("jsd", alpha=0.5),
    "srkl": Method("skew_reverse_kl", alpha=0.1),
    "tvd": Method("total_variation"),
    "l2m": Method(staged=True, adaptive_beta=True),
    "l2m_no_beta": Method(staged=True),
    "m2l": Method(staged=True, adaptive_beta=True, falling_alpha=True),
    "random_order": Method(staged=True, adaptive_beta=True, ranking="random"),
}


def get(name: str, config: Config) -> Method:
    """The method of that name with the overrides of the config.

    Raises:
        InputError: no such method; the known ones are listed.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"config.method: no method {name!r} ({hint}known: {', '.join(METHODS)})")
    method, o = METHODS[name], config.overrides
    if o.divergence and o.divergence not in DIVERGENCE_NAMES:
        raise InputError(
            f"config.overrides.divergence: {o.divergence!r} is none of {', '.join(DIVERGENCE_NAMES)}"
        )
    changes = {
        "divergence": o.divergence or method.divergence,
        "alpha": method.alpha if o.alpha < 0 else o.alpha,
        "beta": method.beta if o.beta < 0 else o.beta,
    }
    return dataclasses.replace(method, **changes)


def stages(method: Method, config: Config, order: np.ndarray) -> tuple[Stage, ...]:
    """What the method trains on: `order` lists the training examples, easiest first.

    All methods see the same number of examples: a single-stage method as many as the staged ones.
    """
    c = config.curriculum
    subsets = partition(order, c.stages)
    chosen = [subsets[i - 1] for i in c.subsets] or subsets
    staged = baby_steps(
        chosen,
        epochs=c.epochs_per_stage,
        alpha=(c.alpha, 0.0) if method.falling_alpha else (0.0, c.alpha),
        beta=(c.beta_first, c.beta_last) if method.adaptive_beta else (method.beta, method.beta),
    )
    if method.staged:
        return staged
    indices = np.sort(np.concatenate(chosen))
    return single_stage(indices, examples_seen(staged), alpha=method.alpha, beta=method.beta)


def objective(method: Method, config: Config, stage: Stage) -> Objective:
    """The static objective of a stage."""
    return Objective(method.divergence, stage.alpha, stage.beta, config.overrides.temperature)
