"""The distillation loss (1 - β)·CE + β·D (Eq. 3 and 6), for each token and over a batch."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from l2m_jax.losses import divergences
from l2m_jax.losses.top_k import TopK, reduced
from l2m_jax.losses.values import Divergence, SkewKL


@dataclass(frozen=True)
class Objective:
    """The loss to minimise, as a static (hashable) argument of a compiled function.

    loss = scale·((1 - beta)·CE + beta·T²·D(p_T ‖ q_T))

    The subscript T is the temperature: inside the divergence, the logits of teacher and student are divided by it. The
    divergence is multiplied by T², which keeps its gradient at the same scale (Hinton et al., 2015). Cross-entropy is
    always computed at temperature 1.

    Attributes:
        divergence: D, such as `SkewKL(0.1)`, whose alpha is α_i of Eq. 6.
        beta: β_i of Eq. 7, the weight of the divergence. 0 is plain cross-entropy, which needs no teacher.
        temperature: T above.
        scale: weight of this loss if it is one of several terms of a sum.

    Raises:
        ValueError: not a divergence, beta outside [0, 1], a temperature or scale that is not positive.
    """

    divergence: Divergence = SkewKL()  # noqa: RUF009 (a frozen value)
    beta: float = 1.0
    temperature: float = 1.0
    scale: float = 1.0

    def __post_init__(self):
        if not isinstance(self.divergence, Divergence):
            raise ValueError(f"divergence {self.divergence!r} is not a value such as SkewKL(0.1)")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be between 0 and 1, not {self.beta}")
        for name in ("temperature", "scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number, not {getattr(self, name)}")

    @property
    def needs_teacher(self) -> bool:
        return self.beta > 0

    @property
    def needs_labels(self) -> bool:
        return self.beta < 1


class Coefficients(NamedTuple):
    """Arrays in place of an objective's numbers, to vary them by step or by token without recompiling.

    Each is None (the objective's own number), a scalar, or `[...]`, one for each token. They carry no gradient. With
    `beta`, both terms of the loss are computed, whatever the objective's own β is.
    """

    alpha: jax.Array | None = None  # of the divergence, if it has one
    beta: jax.Array | None = None
    temperature: jax.Array | None = None

    def needs_teacher(self, objective: Objective) -> bool:
        return self.beta is not None or objective.needs_teacher

    def needs_labels(self, objective: Objective) -> bool:
        return self.beta is not None or objective.needs_labels


FIXED = Coefficients()


def scaled_divergence(
    student_logits: jax.Array,
    teacher_logits: jax.Array | TopK,
    objective: Objective,
    coefficients: Coefficients = FIXED,
) -> jax.Array:
    """T²·D(p_T ‖ q_T), the divergence term of the loss, `[..., V] -> [...]`.

    Raises:
        ValueError: the teacher's tail at another temperature than 1, which cannot be known.
    """
    divergence, temperature = objective.divergence, objective.temperature
    if isinstance(teacher_logits, TopK):
        if teacher_logits.log_tail is not None and (temperature != 1 or coefficients.temperature is not None):
            raise ValueError("the tail of the teacher's top k is known at temperature 1 alone; leave it out")
        student_logits, teacher_logits = reduced(student_logits, teacher_logits)
    if coefficients.alpha is not None:
        divergence = divergence.with_alpha(coefficients.alpha)
    if coefficients.temperature is not None:
        temperature = jnp.asarray(coefficients.temperature, jnp.float32)
        student_logits = student_logits.astype(jnp.float32) / temperature[..., None]
        teacher_logits = teacher_logits.astype(jnp.float32) / temperature[..., None]
    elif temperature != 1:
        student_logits = student_logits.astype(jnp.float32) / temperature
        teacher_logits = teacher_logits.astype(jnp.float32) / temperature
    return divergence(student_logits, teacher_logits) * temperature**2


def combine(
    cross_entropy: jax.Array | None,
    divergence: jax.Array | None,
    objective: Objective,
    coefficients: Coefficients = FIXED,
) -> jax.Array:
    """scale·((1 - β)·CE + β·D). A term that β excludes may be None, and is not in the compiled program."""
    if not coefficients.needs_teacher(objective):
        assert cross_entropy is not None
        loss = cross_entropy
    elif not coefficients.needs_labels(objective):
        assert divergence is not None
        loss = divergence
    else:
        assert cross_entropy is not None and divergence is not None
        beta = objective.beta if coefficients.beta is None else coefficients.beta
        loss = (1 - beta) * cross_entropy + beta * divergence
    return loss if objective.scale == 1 else objective.scale * loss


def token_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array | TopK | None,
    labels: jax.Array | None,
    objective: Objective,
    coefficients: Coefficients = FIXED,
) -> jax.Array:
    """The loss of each token.

    Args:
        student_logits: `[..., V]`, any floating dtype.
        teacher_logits: `[..., V]`, or the teacher's top k; None if the loss needs no teacher.
        labels: integer `[...]`, the reference tokens; None if the loss needs no labels.
        objective: static under `jax.jit`.
        coefficients: arrays in place of the objective's numbers, not static.

    Returns:
        float32 `[...]`.

    Raises:
        ValueError: logits over vocabularies of different sizes, or an input that the objective needs is missing.

    >>> import jax.numpy as jnp
    >>> teacher, student = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    >>> objective = Objective(SkewKL(0.5), beta=0.7)
    >>> print(f"{token_loss(student, teacher, jnp.array(0), objective):.4f}")
    0.4385
    """
    # Cast here, not only inside each term: the gradients of the terms then add up in float32 and are rounded once.
    student_logits = student_logits.astype(jnp.float32)
    coefficients = jax.tree.map(
        lambda x: jax.lax.stop_gradient(jnp.broadcast_to(x, student_logits.shape[:-1])), coefficients
    )
    cross_entropy = divergence = None
    if coefficients.needs_labels(objective):
        if labels is None:
            raise ValueError(f"labels are needed with beta = {objective.beta}")
        cross_entropy = divergences.cross_entropy(student_logits, labels)
    if coefficients.needs_teacher(objective):
        if teacher_logits is None:
            raise ValueError(f"teacher_logits are needed with beta = {objective.beta}")
        if not isinstance(teacher_logits, TopK) and student_logits.shape != teacher_logits.shape:
            raise ValueError(
                f"student and teacher logits differ in shape, {student_logits.shape} and {teacher_logits.shape}; "
                "pad the smaller vocabulary with -inf"
            )
        divergence = scaled_divergence(student_logits, teacher_logits, objective, coefficients)
    return combine(cross_entropy, divergence, objective, coefficients)


def distillation_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array | TopK | None,
    labels: jax.Array | None,
    weights: jax.Array,
    objective: Objective,
    coefficients: Coefficients = FIXED,
) -> jax.Array:
    """The weighted mean of `token_loss` over all tokens: Σ weight·loss / Σ weight.

    Over several devices or micro-batches, add up Σ weight·loss and Σ weight and divide once: a mean of means is a
    different loss if the sums of weights differ. `fused_distillation_sums` returns the sums.

    Args:
        student_logits: `[..., V]`, any floating dtype. student_logits[..., t, :] predict labels[..., t]: nothing is
            shifted here.
        teacher_logits: `[..., V]`, or the teacher's top k; None if the loss needs no teacher.
        labels: integer `[...]`; None if the loss needs no labels.
        weights: `[...]`, 0 for tokens without loss (prompt, padding). Logits of such tokens may be anything, even NaN.
        objective: static under `jax.jit`.
        coefficients: arrays in place of the objective's numbers, not static.

    Returns:
        A float32 scalar; 0 if all weights are 0.

    Raises:
        ValueError: as `token_loss`.

    >>> import jax.numpy as jnp
    >>> student = jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]]))
    >>> labels, weights = jnp.array([0, 0]), jnp.array([1.0, 0.0])
    >>> print(f"{distillation_loss(student, None, labels, weights, Objective(beta=0.0)):.4f}")
    1.3863
    """
    weights = weights.astype(jnp.float32)
    student_logits = zeroed(student_logits, weights)
    teacher_logits = jax.tree.map(lambda x: zeroed(x, weights), teacher_logits)
    loss = jnp.sum(weights * token_loss(student_logits, teacher_logits, labels, objective, coefficients))
    return mean(loss, jnp.sum(weights))


def zeroed(x: jax.Array, weights: jax.Array) -> jax.Array:
    """`x`, `[...]` or `[..., N]`, with 0 for the tokens without loss."""
    has_loss = weights != 0
    return jnp.where(has_loss if x.ndim == weights.ndim else has_loss[..., None], x, 0)


def mean(total: jax.Array, weight: jax.Array) -> jax.Array:
    """total / weight; 0 with a gradient of 0 if the weight is 0."""
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)
