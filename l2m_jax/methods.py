"""The rows of the paper's tables by name: objective, data and curriculum of each method.

p is the teacher, q the student.

| method | loss | responses | curriculum |
|---|---|---|---|
| sft | CE | reference | - |
| seqkd | CE | the teacher's | - |
| kld | KL(p‖q) | reference | - |
| kld_beta09 | 0.1·CE + 0.9·KL(p‖q) | reference | - |
| skl | KL(p‖½p+½q) | reference | - |
| skl_on_policy | the same | reference, and the current student's (`rollouts.student_share`) | - |
| rkl, jsd, srkl, tvd | the field's other divergences | reference | - |
| abkd, akl, todi | `losses.alpha_beta`, `losses.adaptive_kl`, `losses.todi` | reference | - |
| taid_linear | KL(p_t‖q), t from 0.4 to 1 by step; TAID's own t also follows the loss | reference | - |
| distillm2 | KL(p‖αp+(1-α)q) on the first + KL(q‖(1-α)p+α·sg(q)) on the second | the teacher's, and the initial student's | - |
| distillm2_on_policy | the same | the teacher's, and the student's at the epoch's start | - |
| l2m | (1-β_i)·CE + β_i·KL(p‖α_i p+(1-α_i)q) | reference | four Baby-Step stages, easiest first |
| l2m_no_beta, l2m_beta09 | the same with β_i = 1, 0.9 | reference | the same |
| m2l | the same with α_i falling | reference | the same |
| random_order | as l2m | reference | the same stages, subsets drawn at random |
| pocl | (1-β_i)·CE + β_i·T_i²·KL(p‖q) at temperatures T_i from 1 to 2 | reference | as l2m |
| hard_first | as l2m | reference | the same stages, hardest first |
| shuffled_multiset | as l2m | reference | the same stages; their examples, each as often in total, in random order over all |

Which to take: in docs/findings.md, no method beat kld_beta09 by a point of Rouge-L from pretrained students on real text.

`overrides.policy` makes a method with a teacher and without cross-entropy on- or off-policy: `skl_on_policy` is skl with "on".
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from l2m_jax.curriculum import (
    Curriculum,
    SampleCoefficients,
    Schedule,
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
from l2m_jax.losses import (
    DIVERGENCES,
    JSD,
    TAID,
    AdaptiveKL,
    AlphaBeta,
    Divergence,
    ForwardKL,
    Objective,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    ToDi,
    TotalVariation,
)


@dataclass(frozen=True)
class Overrides:
    """Changes to what a method fixes (empty or negative: the method's own value).

    Raises:
        InputError: a value outside its range.
    """

    divergence: str = ""
    alpha: float = -1.0  # of methods with a constant α
    beta: float = -1.0  # of methods with a constant β
    temperature: float = -1.0
    policy: str = "own"  # "on" (with responses of the current student, see `Rollouts`) or "off"

    def __post_init__(self):
        require_choice(self, "divergence", ("", *DIVERGENCES))
        require_choice(self, "policy", ("own", "on", "off"))
        if not self.temperature < 0:
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
        divergence: with its own alpha, unless `alpha` says otherwise.
        alpha: "own" of the divergence; "rising" from 0 to `curriculum.alpha`, or "falling"; or its own schedule.
        beta: weight of the divergence against cross-entropy; 0 is cross-entropy alone; "rising": β_i from the
            curriculum's settings.
        temperature: of both models' logits in the divergence.
        staged: Baby-Step stages instead of a single stage with all data.
        ranking: what the curriculum's ranking is turned into: "random", or "reversed" (the hardest subset first).
        shuffled: the stages' examples, each as often as in these, are shuffled over all stages.
        responses: "reference", or "teacher" (generated once).
        on_policy: use the current student's responses instead of some of these or, with `contrast`, in addition.
        refreshes: how often per epoch an on-policy method samples responses anew.
        contrast: a divergence on the student's own responses (the initial one's off-policy), which is added to that on
            `responses`. Each is a mean over tokens, then over responses, as in DistiLLM-2 (Ko et al., 2025). None: none.
    """

    divergence: Divergence = ForwardKL()  # noqa: RUF009 (a frozen value)
    alpha: Literal["own", "rising", "falling"] | Schedule = "own"
    beta: float | Literal["rising"] = 1.0
    temperature: float | Schedule = 1.0
    staged: bool = False
    ranking: str = ""
    shuffled: bool = False
    responses: str = "reference"
    on_policy: bool = False
    refreshes: int = 4
    contrast: Divergence | None = None

    @property
    def on_references_alone(self) -> bool:
        return self.responses == "reference" and not self.on_policy and self.contrast is None


_DISTILLM2 = Method(SkewKL(0.1), responses="teacher", contrast=SkewReverseKL(0.1, mixture_gradient=False))
_L2M = Method(SkewKL(), alpha="rising", beta="rising", staged=True)

METHODS: dict[str, Method] = {
    "sft": Method(beta=0.0),
    "seqkd": Method(beta=0.0, responses="teacher"),
    "kld": Method(),
    "kld_beta09": Method(beta=0.9),
    "skl": Method(SkewKL(0.5)),
    "skl_on_policy": Method(SkewKL(0.5), on_policy=True),
    "rkl": Method(ReverseKL()),
    "jsd": Method(JSD(0.5)),
    "srkl": Method(SkewReverseKL(0.1)),
    "tvd": Method(TotalVariation()),
    "abkd": Method(AlphaBeta(0.2, 0.7)),
    "akl": Method(AdaptiveKL(0.5)),
    "todi": Method(ToDi()),
    "taid_linear": Method(TAID(), alpha=Schedule((0.4, 1.0), "linear")),
    "distillm2": _DISTILLM2,
    "distillm2_on_policy": replace(_DISTILLM2, on_policy=True, refreshes=1),
    "l2m": _L2M,
    "l2m_no_beta": replace(_L2M, beta=1.0),
    "l2m_beta09": replace(_L2M, beta=0.9),
    "m2l": replace(_L2M, alpha="falling"),
    "random_order": replace(_L2M, ranking="random"),
    "hard_first": replace(_L2M, ranking="reversed"),
    "shuffled_multiset": replace(_L2M, shuffled=True),
    "pocl": Method(beta="rising", temperature=Schedule((1.0, 2.0)), staged=True),
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
    divergence = DIVERGENCES[overrides.divergence] if overrides.divergence else method.divergence
    if overrides.alpha >= 0 and not divergence.takes_alpha:
        raise InputError(
            f"overrides.alpha: the divergence of {name}, {divergence}, has no alpha; set overrides.divergence too, to "
            "'skew_kl', say"
        )
    method = replace(
        method,
        divergence=divergence if overrides.alpha < 0 else divergence.with_alpha(overrides.alpha),
        beta=method.beta if overrides.beta < 0 else overrides.beta,
        on_policy=method.on_policy if overrides.policy == "own" else overrides.policy == "on",
        refreshes=rollouts.refreshes or method.refreshes,
        temperature=method.temperature if overrides.temperature < 0 else overrides.temperature,
    )
    # What the method does not use is at its default, so that it does not tell equal methods apart.
    if not method.on_policy:
        method = replace(method, refreshes=Method.refreshes)
    if method.beta == 0:
        method = replace(method, divergence=Method.divergence, alpha="own", temperature=Method.temperature)
    beta = min(coefficients(method, curriculum)["beta"].values)
    if (method.on_policy or method.contrast is not None) and beta < 1:
        setting = "overrides.beta"
        if method.beta == "rising":
            setting = "curriculum.betas" if curriculum.betas else "curriculum.beta_first"
        raise InputError(
            f"{setting}: {name} uses cross-entropy at beta {beta:g}, and its labels would be the student's own "
            "responses here; set it to 1, or overrides.policy to 'off'"
        )
    if method.alpha != "own" and not method.divergence.takes_alpha:
        if curriculum.alpha_by != "stage":
            raise InputError(
                f"curriculum.alpha_by: the divergence of {name} has no alpha; leave it at 'stage'"
            )
        method = replace(method, alpha="own")
    return method


def require(name: str, setting: str) -> None:
    """Raises InputError, beginning with `setting`, unless there is a method `name`."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"{setting}: no method {name!r} ({hint}known: {', '.join(METHODS)})")


def _refuse_unused(name: str, method: Method, overrides: Overrides) -> None:
    """Refuses overrides without an effect, which would go unnoticed."""
    if overrides.divergence and method.contrast is not None:
        raise InputError(
            f"overrides.divergence: {name} has two divergences, {method.divergence} and {method.contrast}; "
            "leave it empty"
        )
    if overrides.alpha >= 0 and isinstance(method.alpha, Schedule):
        raise InputError(f"overrides.alpha: {name} has its own schedule of α; leave it at -1")
    if overrides.alpha >= 0 and method.alpha != "own":
        raise InputError(f"overrides.alpha: {name} is staged and takes α_i from curriculum.alpha; set that")
    if overrides.beta >= 0 and method.beta == "rising":
        raise InputError(
            f"overrides.beta: {name} takes β_i from curriculum.beta_first and beta_last; set those"
        )
    if overrides.temperature > 0 and isinstance(method.temperature, Schedule):
        raise InputError(
            f"overrides.temperature: {name} has its own schedule; set curriculum.temperatures instead"
        )


def coefficients(method: Method, curriculum: Curriculum) -> dict[str, Schedule]:
    """ "alpha", "beta" and "temperature" over the training."""
    c = curriculum
    alpha, beta, temperature = method.alpha, method.beta, method.temperature
    if alpha == "own":
        alpha = Schedule((getattr(method.divergence, "alpha", 0.0),))
    elif not isinstance(alpha, Schedule):
        values = c.alphas or (0.0, c.alpha)
        alpha = Schedule(values[::-1] if alpha == "falling" else values, c.alpha_by)
    beta = (
        Schedule(c.betas or (c.beta_first, c.beta_last), c.beta_by) if beta == "rising" else Schedule((beta,))
    )
    if not isinstance(temperature, Schedule):
        temperature = Schedule((temperature,))
    if method.staged:
        temperature = Schedule(c.temperatures or temperature.values, c.temperature_by)
    return {"alpha": alpha, "beta": beta, "temperature": temperature}


def by_step(method: Method, curriculum: Curriculum) -> dict[str, Schedule]:
    """The coefficients that vary by step. One with equal ends is the stages' constant instead."""
    found = coefficients(method, curriculum)
    return {name: s for name, s in found.items() if s.by_step and s.values[0] != s.values[-1]}


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
    schedules = coefficients(method, c)
    by_sample = method.staged and c.loss_by == "sample"
    epochs = c.epochs_over([len(subset) for subset in subsets])
    found = baby_steps(subsets, epochs=epochs, mix=c.mix, open_by=c.open_by, seed=seed)
    if by_sample or not method.staged:
        found = single_stage(np.sort(order), examples_seen(found))
    elif method.shuffled:
        found = shuffled_over_time(found, seed)
    changes = [
        {name: s.at_stage(stage.index, len(found)) for name, s in schedules.items()} for stage in found
    ]
    samples = {}
    if by_sample:
        ends = {name: schedule.values for name, schedule in schedules.items()}
        # The means are what logs and model cards show; a constant needs no array.
        changes[0] |= {name: (v[0] + v[-1]) / 2 for name, v in ends.items()}
        samples = {f"{name}_N": by_rank(order, v[0], v[-1]) for name, v in ends.items() if v[0] != v[-1]}
    if c.weight and rouge_l_N is not None:
        samples["weight_N"] = sample_weights(rouge_l_N)
    varying = SampleCoefficients(**samples) if samples else None
    return tuple(replace(stage, samples=varying, **new) for stage, new in zip(found, changes, strict=True))


def objectives(method: Method, stage: Stage) -> tuple[Objective, ...]:
    """The static objectives of a stage: on `method.responses` and, with `contrast`, on the student's responses."""
    terms = [method.divergence.with_alpha(stage.alpha)]
    if method.contrast is not None:
        terms.append(method.contrast.with_alpha(stage.alpha))
    # The terms add up, but a batch's loss is the mean over the responses of all terms.
    return tuple(Objective(d, stage.beta, stage.temperature, scale=float(len(terms))) for d in terms)


def needs_teacher(method: Method, curriculum: Curriculum) -> bool:
    """Whether the loss of any stage includes a divergence from the teacher."""
    return max(coefficients(method, curriculum)["beta"].values) > 0


def generated_by(method: Method) -> list[str]:
    """Whose responses, generated once, the method trains on: of "teacher" and "initial_student"."""
    names = ["teacher"] if method.responses == "teacher" else []
    return [*names, "initial_student"] if method.contrast is not None and not method.on_policy else names


def needs_ranking(method: Method, curriculum: Curriculum) -> bool:
    """Whether the examples' difficulty decides what the method trains on, or when."""
    by_difficulty = method.ranking != "random" and (method.staged or bool(curriculum.subsets))
    return by_difficulty or bool(curriculum.weight)
