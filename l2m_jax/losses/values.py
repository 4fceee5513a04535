"""Divergences as values: hashable, with their parameters, callable on logits.

>>> SkewKL(0.1) == SkewKL(alpha=0.1), DIVERGENCES["forward_kl"]
(True, ForwardKL())

Each holds the parameters of a function of `divergences.py`, under the same names. A new one is such a function, a class
that names it, and a line in `DIVERGENCES` if settings should know it.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax

from l2m_jax.losses import divergences
from l2m_jax.losses.divergences import Weight, is_number


@dataclass(frozen=True)
class Divergence:
    """A divergence between the distributions of teacher and student, per token.

    A field `alpha` is the share of one model in a mixture. It can vary by step or by sample: `with_alpha` then holds an
    array, which is possible inside a compiled function but not in its static arguments.
    """

    function: ClassVar[Callable[..., jax.Array]]

    def __post_init__(self):
        alpha = getattr(self, "alpha", 0.0)
        if is_number(alpha) and not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be between 0 and 1, not {alpha}")

    def __call__(self, student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
        """The divergence of each token in float32, `[..., V] -> [...]`."""
        return type(self).function(student_logits, teacher_logits, **vars(self))

    @property
    def takes_alpha(self) -> bool:
        return hasattr(self, "alpha")

    def with_alpha(self, alpha: Weight) -> "Divergence":
        """The same with another alpha, a number or an array `[...]`; itself if it has none."""
        return dataclasses.replace(self, alpha=alpha) if self.takes_alpha else self


@dataclass(frozen=True)
class ForwardKL(Divergence):
    function = staticmethod(divergences.forward_kl)


@dataclass(frozen=True)
class ReverseKL(Divergence):
    function = staticmethod(divergences.reverse_kl)


@dataclass(frozen=True)
class SkewKL(Divergence):
    function = staticmethod(divergences.skew_kl)
    alpha: Weight = 0.1


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    function = staticmethod(divergences.skew_reverse_kl)
    alpha: Weight = 0.1
    mixture_gradient: bool = True


@dataclass(frozen=True)
class JSD(Divergence):
    function = staticmethod(divergences.jsd)
    alpha: Weight = 0.5


@dataclass(frozen=True)
class TotalVariation(Divergence):
    function = staticmethod(divergences.total_variation)


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    function = staticmethod(divergences.alpha_beta)
    a: float = 0.2
    b: float = 0.7


@dataclass(frozen=True)
class AdaptiveKL(Divergence):
    function = staticmethod(divergences.adaptive_kl)
    mu: float = 0.5


@dataclass(frozen=True)
class ToDi(Divergence):
    function = staticmethod(divergences.todi)


@dataclass(frozen=True)
class TAID(Divergence):
    function = staticmethod(divergences.taid)
    alpha: Weight = 0.4  # t of the paper


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
