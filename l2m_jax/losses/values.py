"""Divergences as values: hashable, with their parameters, callable on logits.

>>> SkewKL(0.1) == SkewKL(alpha=0.1), DIVERGENCES["forward_kl"]
(True, ForwardKL())

Each is a function of `divergences.py` with its parameters held fixed. A new one is such a function, a class here, and a
line in `DIVERGENCES` if settings should know it by name.
"""

import dataclasses
from dataclasses import dataclass

import jax

from l2m_jax.losses import divergences
from l2m_jax.losses.divergences import Weight, is_number


@dataclass(frozen=True)
class Divergence:
    """A divergence between the distributions of teacher and student, per token.

    A field `alpha` is the share of one model in a mixture. It can vary by step or by sample: `with_alpha` then holds an
    array, which is possible inside a compiled function but not in its static arguments.
    """

    def __post_init__(self):
        alpha = getattr(self, "alpha", 0.0)
        if is_number(alpha) and not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be between 0 and 1, not {alpha}")

    def __call__(self, student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
        """The divergence of each token in float32, `[..., V] -> [...]`."""
        raise NotImplementedError

    @property
    def takes_alpha(self) -> bool:
        return hasattr(self, "alpha")

    def with_alpha(self, alpha: Weight) -> "Divergence":
        """The same with another alpha, a number or an array `[...]`; itself if it has none."""
        return dataclasses.replace(self, alpha=alpha) if self.takes_alpha else self


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """`forward_kl` as a value."""

    def __call__(self, student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
        return divergences.forward_kl(student_logits, teacher_logits)


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """`reverse_kl` as a value."""

    def __call__(self, student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
        return divergences.reverse_kl(student_logits, teacher_logits)


@dataclass(frozen=True)
class SkewKL(Divergence):
    """`skew_kl` as a value."""

    alpha: Weight = 0.1

    def __call__(self, student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
        return divergences.skew_kl(student_logits, teacher_logits, self.alpha)


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """`skew_reverse_kl` as a value."""

    alpha: Weight = 0.1
    mixture_gradient: bool = True

    def __call__(self, student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
        return divergences.skew_reverse_kl(
            student_logits, teacher_logits, self.alpha, mixture_gradient=self.mixture_gradient
        )


@dataclass(frozen=True)
class JSD(Divergence):
    """`jsd` as a value."""

    alpha: Weight = 0.5

    def __call__(self, student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
        return divergences.jsd(student_logits, teacher_logits, self.alpha)


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """`total_variation` as a value."""

    def __call__(self, student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
        return divergences.total_variation(student_logits, teacher_logits)


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """`alpha_beta` as a value."""

    a: float = 0.2
    b: float = 0.7

    def __call__(self, student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
        return divergences.alpha_beta(student_logits, teacher_logits, self.a, self.b)


@dataclass(frozen=True)
class AdaptiveKL(Divergence):
    """`adaptive_kl` as a value."""

    mu: float = 0.5

    def __call__(self, student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
        return divergences.adaptive_kl(student_logits, teacher_logits, self.mu)


@dataclass(frozen=True)
class ToDi(Divergence):
    """`todi` as a value."""

    def __call__(self, student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
        return divergences.todi(student_logits, teacher_logits)


@dataclass(frozen=True)
class TAID(Divergence):
    """`taid` as a value; alpha is t."""

    alpha: Weight = 0.4

    def __call__(self, student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
        return divergences.taid(student_logits, teacher_logits, self.alpha)


# The divergences that settings know by name.
DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": ForwardKL(),
    "reverse_kl": ReverseKL(),
    "skew_kl": SkewKL(),
    "skew_reverse_kl": SkewReverseKL(),
    "skew_reverse_kl_fixed_mixture": SkewReverseKL(mixture_gradient=False),
    "jsd": JSD(),
    "total_variation": TotalVariation(),
    "alpha_beta": AlphaBeta(),
    "adaptive_kl": AdaptiveKL(),
    "todi": ToDi(),
    "taid": TAID(),
}
