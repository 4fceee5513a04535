"""The rows of the paper's tables by name: objective, data and curriculum of each method.

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
| hard_first | as l2m | reference | the same stages, hardest first |
| shuffled_multiset | as l2m | reference | the same stages; their examples, each as often in total, in random order over all |

`overrides.policy` makes any method with a teacher on- or off-policy: `skl_on_policy` is skl with "on".
"""

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from l2m_jax.curriculum import (
    Curriculum,
    SampleCoefficients,
    Stage,
    baby_steps,
    by_rank,
    examples_seen,
    partition,
    sample_weights,
    shuffled_over_time,
    single_stage,
    stratified,
)
from l2m_jax.errors import (
    InputError,
    require_at_least,
    require_choice,
    require_fraction,
    require_positive,
)
from l2m_jax.losses import DIVERGENCES, Objective, SkewReverseKL


@dataclass(frozen=True)
class Overrides:
    """Changes to what a method fixes (empty or negative: the method's own value).

    Raises:
        InputError: a value outside its range.
    """

    divergence: str = ""
    alpha: float = -1.0  # of single-stage methods; staged ones use `curriculum.alpha`
    beta: float = -1.0  # of methods with a constant β
    temperature: float = 1.0
    policy: str = "own"  # "on" (with responses of the current student, see `Rollouts`) or "off"

    def __post_init__(self):
        require_choice(self, "divergence", ("", *DIVERGENCES))
        require_choice(self, "policy", ("own", "on", "off"))
        require_positive(self, "temperature")
        for name in ("alpha", "beta"):
            if not getattr(self, name) < 0:
                require_fraction(self, name)


@dataclass(frozen=True)
class Rollouts:
    """Responses that the student generates as it learns, for on-policy methods to train on.

    Raises:
        InputError: a value outside its range.
    """

    student_share: float = 0.5  # of the examples; the others keep their response (DistiLLM-2 uses both)
    refreshes: int = 0  # how often per epoch responses are sampled anew; 0: the method's own number
    replay_share: float = 0.0  # of the student's responses: taken from an earlier epoch, if there are any

    def __post_init__(self):
        require_positive(self, "student_share")
        require_fraction(self, "student_share", "replay_share")
        require_at_least(self, 0, "refreshes")


@dataclass(frozen=True)
class Method:
    """
    Attributes:
        divergence: one of `losses.DIVERGENCES`.
        alpha: skew of a single-stage method; staged methods take theirs from the curriculum's settings.
        beta: weight of the divergence against cross-entropy; 0 is cross-entropy alone.
        staged: Baby-Step stages instead of a single stage with all data.
        adaptive_beta: β_i from the curriculum's settings instead of `beta` in all stages.
        falling_alpha: α_i falls from α to 0 instead of rising.
        ranking: what the curriculum's ranking is turned into: "random", or "reversed" (the hardest subset first).
        shuffled: the stages' examples, each as often as in these, are shuffled over all stages.
        responses: "reference", or "teacher" (generated once).
        on_policy: use the current student's responses instead of some of these or, with `contrast`, in addition.
        refreshes: how often per epoch an on-policy method samples responses anew.
        temperature: of both models' logits in the divergence.
        contrast: b of DistiLLM-2 (Ko et al., 2025): (2-b)·mean D on `responses` + b·mean D_2 on the student's own
            (the initial one's off-policy), where D_2 is KL(q‖(1-α)p+α·stop_gradient(q)) and each mean is over
            tokens, then over responses. 0: only D.
    """

    divergence: str = "skew_kl"
    alpha: float = 0.0
    beta: float = 1.0
    staged: bool = False
    adaptive_beta: bool = False
    falling_alpha: bool = False
    ranking: str = ""
    shuffled: bool = False
    responses: str = "reference"
    on_policy: bool = False
    refreshes: int = 4
    temperature: float = 1.0
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
    "hard_first": Method(staged=True, adaptive_beta=True, ranking="reversed"),
    "shuffled_multiset": Method(staged=True, adaptive_beta=True, shuffled=True),
}


_NO_OVERRIDES, _ROLLOUTS, _CURRICULUM = Overrides(), Rollouts(), Curriculum()


def get(
    name: str,
    overrides: Overrides = _NO_OVERRIDES,
    rollouts: Rollouts = _ROLLOUTS,
    curriculum: Curriculum = _CURRICULUM,
) -> Method:
    """The method `name` with overrides.

    Raises:
        InputError: no such method, or overrides that do not apply to it.
    """
    require(name, "method")
    method = METHODS[name]
    _refuse_unused(name, method, overrides)
    method = dataclasses.replace(
        method,
        divergence=overrides.divergence or method.divergence,
        alpha=method.alpha if overrides.alpha < 0 else overrides.alpha,
        beta=method.beta if overrides.beta < 0 else overrides.beta,
        on_policy=method.on_policy if overrides.policy == "own" else overrides.policy == "on",
        refreshes=rollouts.refreshes or method.refreshes,
        temperature=overrides.temperature,
    )
    # What the method does not use is at its default, so that it does not tell equal methods apart.
    if not method.on_policy:
        method = dataclasses.replace(method, refreshes=Method.refreshes)
    if method.beta == 0 and not method.adaptive_beta:
        method = dataclasses.replace(
            method, divergence=Method.divergence, alpha=Method.alpha, temperature=Method.temperature
        )
    beta = min(curriculum.beta_first, curriculum.beta_last) if method.adaptive_beta else method.beta
    if (method.on_policy or method.contrast) and beta < 1:
        setting = "curriculum.beta_first" if method.adaptive_beta else "overrides.beta"
        raise InputError(
            f"{setting}: {name} uses cross-entropy at beta {beta:g}, and its labels would be the student's own "
            "responses here; set it to 1, or overrides.policy to 'off'"
        )
    return method


def require(name: str, setting: str) -> None:
    """Raises InputError, beginning with `setting`, unless there is a method `name`."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"{setting}: no method {name!r} ({hint}known: {', '.join(METHODS)})")


def _refuse_unused(name: str, method: Method, overrides: Overrides) -> None:
    """Refuses overrides without an effect, which would go unnoticed."""
    if overrides.divergence and method.contrast:
        raise InputError(
            f"overrides.divergence: {name} has two divergences, skew_kl and skew_reverse_kl_fixed_mixture; "
            "leave it empty"
        )
    if overrides.alpha >= 0 and method.staged:
        raise InputError(f"overrides.alpha: {name} is staged and takes α_i from curriculum.alpha; set that")
    if overrides.beta >= 0 and method.adaptive_beta:
        raise InputError(
            f"overrides.beta: {name} takes β_i from curriculum.beta_first and beta_last; set those"
        )


def subsets(
    method: Method,
    curriculum: Curriculum,
    order: np.ndarray,
    seed: int = 0,
    strata_N: np.ndarray | None = None,
) -> dict[int, np.ndarray]:
    """The subsets to train on by their number, in the order in which they open. Number 1 is the easiest.

    Args:
        order: indices of the training examples, easiest first.
        seed: for the subsets of a method with random stages.
        strata_N: the stratum of each example; None: examples are ranked all together.
    """
    n, numbers = curriculum.stages, list(range(1, curriculum.stages + 1))
    chosen = list(curriculum.subsets) or numbers
    if method.ranking == "random":
        order = np.random.default_rng(seed).permutation(len(order))
    if method.ranking == "reversed":
        order, numbers, chosen = order[::-1], numbers[::-1], chosen[::-1]
    if strata_N is not None and method.ranking != "random":
        order = stratified(order, strata_N, n)
    parts = dict(zip(numbers, partition(order, n), strict=True))
    return {number: parts[number] for number in chosen}


def stages(
    method: Method,
    curriculum: Curriculum,
    order: np.ndarray,
    seed: int = 0,
    strata_N: np.ndarray | None = None,
    rouge_l_N: np.ndarray | None = None,
) -> tuple[Stage, ...]:
    """The stages of a method, as `stages_over` its `subsets`."""
    opening = subsets(method, curriculum, order, seed, strata_N)
    return stages_over(list(opening.values()), method, curriculum, seed, rouge_l_N)


def stages_over(
    subsets: Sequence[np.ndarray],
    method: Method,
    curriculum: Curriculum,
    seed: int = 0,
    rouge_l_N: np.ndarray | None = None,
) -> tuple[Stage, ...]:
    """The stages of a method. A single-stage method sees as many examples in total as the staged ones.

    Args:
        subsets: in the order in which they open.
        seed: for what is drawn at random within the stages.
        rouge_l_N: of the student's own answer to each example, which `curriculum.weight` needs.
    """
    c, order = curriculum, np.concatenate(subsets)
    alpha = (c.alpha, 0.0) if method.falling_alpha else (0.0, c.alpha)
    beta = (c.beta_first, c.beta_last) if method.adaptive_beta else (method.beta, method.beta)
    found = baby_steps(
        subsets, epochs=c.epochs_per_stage, alpha=alpha, beta=beta, mix=c.mix, open_by=c.open_by, seed=seed
    )
    alpha_N, beta_N, weight_N = None, None, None
    if not method.staged:
        found = single_stage(np.sort(order), examples_seen(found), alpha=method.alpha, beta=method.beta)
    elif c.loss_by == "sample":
        size = int(order.max()) + 1
        alpha_N, beta_N = (
            by_rank(order, size, *ends) if len(set(ends)) > 1 else None for ends in (alpha, beta)
        )
        # The means are what logs and model cards show; a constant needs no array.
        means = {"alpha": sum(alpha) / 2, "beta": sum(beta) / 2}
        found = single_stage(np.sort(order), examples_seen(found), **means)
    elif method.shuffled:
        found = shuffled_over_time(found, seed)
    if c.weight and rouge_l_N is not None:
        weight_N = sample_weights(rouge_l_N)
    if alpha_N is None and weight_N is None:
        return found
    samples = SampleCoefficients(alpha_N, beta_N, weight_N)
    return tuple(dataclasses.replace(stage, samples=samples) for stage in found)


def objectives(method: Method, stage: Stage) -> tuple[Objective, ...]:
    """The static objectives of a stage: on `method.responses` and, with `contrast`, on the student's responses."""
    divergence = DIVERGENCES[method.divergence].with_alpha(stage.alpha)
    objective = Objective(divergence, stage.beta, method.temperature)
    if not method.contrast:
        return (objective,)
    # Both terms have equally many responses, so the mean over all is half the sum of the two means.
    first, second = (2 * factor for factor in (2 - method.contrast, method.contrast))
    student = SkewReverseKL(stage.alpha, mixture_gradient=False)
    return (
        dataclasses.replace(objective, scale=first),
        dataclasses.replace(objective, divergence=student, scale=second),
    )


def needs_teacher(method: Method, curriculum: Curriculum) -> bool:
    """Whether the loss of any stage includes a divergence from the teacher."""
    return max(curriculum.beta_first, curriculum.beta_last) > 0 if method.adaptive_beta else method.beta > 0


def needs_ranking(method: Method, curriculum: Curriculum) -> bool:
    """Whether the examples' difficulty decides what the method trains on, or when."""
    by_difficulty = method.ranking != "random" and (method.staged or bool(curriculum.subsets))
    return by_difficulty or bool(curriculum.weight)
