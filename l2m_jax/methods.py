"""Every row of the paper's tables by name: objective, data and curriculum of a method.

p is the teacher, q the student.

| method | loss | responses | curriculum |
|---|---|---|---|
| sft | CE | reference | - |
| seqkd | CE | the teacher's | - |
| kld | KL(p‖q) | reference | - |
| skl | KL(p‖½p+½q) | reference | - |
| skl_on_policy | the same | reference, and the current student's (`rollouts.student_share`) | - |
| rkl, jsd, srkl, tvd | the field's other divergences | reference | - |
| distillm2 | KL(p‖αp+(1-α)q) on the first + KL(q‖(1-α)p+α·sg(q)) on the second | the teacher's, and the initial student's | - |
| distillm2_on_policy | the same | the teacher's, and the student's at the epoch's start | - |
| l2m | (1-β_i)·CE + β_i·KL(p‖α_i p+(1-α_i)q) | reference | four Baby-Step stages, easiest first |
| l2m_no_beta | the same with β_i = 1 | reference | the same |
| m2l | the same with α_i falling | reference | the same |
| random_order | as l2m | reference | the same stages, subsets drawn at random |

`overrides.policy` puts any method with a teacher on- or off-policy, as `skl_on_policy` is skl with "on".
"""

import dataclasses
import difflib
from collections.abc import Iterable
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
        responses: "reference", or "teacher": generated once.
        on_policy: the current student's responses, in place of some of these or, with `contrast`, beside them.
        refreshes: how many times an epoch an on-policy method samples responses anew.
        contrast: b of DistiLLM-2 (Ko et al., 2025): (2-b)·mean D on `responses` + b·mean D_2 on the student's own
            (the initial one's off-policy), where D_2 is KL(q‖(1-α)p+α·stop_gradient(q)) and each mean is over
            tokens, then over responses. 0: D alone.
    """

    divergence: str = "skew_kl"
    alpha: float = 0.0
    beta: float = 1.0
    staged: bool = False
    adaptive_beta: bool = False
    falling_alpha: bool = False
    ranking: str = ""
    responses: str = "reference"
    on_policy: bool = False
    refreshes: int = 4
    contrast: float = 0.0

    @property
    def on_references_alone(self) -> bool:
        return self.responses == "reference" and not self.on_policy and not self.contrast


METHODS: dict[str, Method] = {
    "sft": Method(beta=0.0),
    "seqkd": Method(beta=0.0, responses="teacher"),
    "kld": Method(),
    "skl": Method(alpha=0.5),
    "skl_on_policy": Method(alpha=0.5, on_policy=True),
    "rkl": Method("reverse_kl"),
    "jsd": Method("jsd", alpha=0.5),
    "srkl": Method("skew_reverse_kl", alpha=0.1),
    "tvd": Method("total_variation"),
    "distillm2": Method(alpha=0.1, responses="teacher", contrast=1.0),
    "distillm2_on_policy": Method(alpha=0.1, responses="teacher", contrast=1.0, on_policy=True, refreshes=1),
    "l2m": Method(staged=True, adaptive_beta=True),
    "l2m_no_beta": Method(staged=True),
    "m2l": Method(staged=True, adaptive_beta=True, falling_alpha=True),
    "random_order": Method(staged=True, adaptive_beta=True, ranking="random"),
}


def get(name: str, config: Config) -> Method:
    """The method of that name with the overrides of the config.

    Raises:
        InputError: no such method; the known ones are listed. Or overrides that make no sense with it.
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
    if o.divergence and method.contrast:
        raise InputError(
            f"config.overrides.divergence: {name} is two divergences, skew_kl and skew_reverse_kl_fixed_mixture; "
            "leave it empty"
        )
    changes = {
        "divergence": o.divergence or method.divergence,
        "alpha": method.alpha if o.alpha < 0 else o.alpha,
        "beta": method.beta if o.beta < 0 else o.beta,
        "on_policy": method.on_policy if o.policy == "own" else o.policy == "on",
        "refreshes": config.rollouts.refreshes or method.refreshes,
    }
    method = dataclasses.replace(method, **changes)
    first, last = config.curriculum.beta_first, config.curriculum.beta_last
    beta = min(first, last) if method.adaptive_beta else method.beta
    if (method.on_policy or method.contrast) and beta < 1:
        setting = "curriculum.beta_first" if method.adaptive_beta else "overrides.beta"
        raise InputError(
            f"config.{setting}: {name} takes cross-entropy at beta {beta:g}, and its labels would be the student's "
            "own responses here; set it to 1, or overrides.policy to 'off'"
        )
    return method


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


def objectives(method: Method, config: Config, stage: Stage) -> tuple[Objective, ...]:
    """The static objectives of a stage: that on `method.responses` and, with `contrast`, that on the student's."""
    objective = Objective(method.divergence, stage.alpha, stage.beta, config.overrides.temperature)
    if not method.contrast:
        return (objective,)
    # The mean over the responses of both terms, which are as many in each, is half the sum of the terms' means.
    first, second = (2 * factor for factor in (2 - method.contrast, method.contrast))
    student = "skew_reverse_kl_fixed_mixture"
    return (
        dataclasses.replace(objective, scale=first),
        dataclasses.replace(objective, divergence=student, scale=second),
    )


def needs_teacher(method: Method, config: Config, stages: Iterable[Stage]) -> bool:
    """Whether any stage has a divergence from the teacher in its loss."""
    return any(o.needs_teacher for stage in stages for o in objectives(method, config, stage))
