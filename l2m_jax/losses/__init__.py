"""Distillation losses. They depend only on jax.

>>> from l2m_jax import losses
>>> losses.Objective("skew_kl", alpha=0.1, beta=0.7).needs_labels
True

From logits: the divergences, `cross_entropy`, `token_loss` `distillation_loss` and `agreement`. From hidden states and output
heads, without materialising the logits of a whole batch: `fused_distillation_sums`, `fused_distillation_loss`,
`fused_token_losses` and `fused_token_agreement`.
"""

from l2m_jax.losses.agreement import Agreement, agreement, fused_token_agreement
from l2m_jax.losses.distillation import DIVERGENCE_NAMES, Objective, distillation_loss, token_loss
from l2m_jax.losses.divergences import (
    cross_entropy,
    forward_kl,
    jsd,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    total_variation,
)
from l2m_jax.losses.fused import (
    LossSums,
    fused_distillation_loss,
    fused_distillation_sums,
    fused_token_losses,
)

__all__ = [
    "DIVERGENCE_NAMES",
    "Agreement",
    "LossSums",
    "Objective",
    "agreement",
    "cross_entropy",
    "distillation_loss",
    "forward_kl",
    "fused_distillation_loss",
    "fused_distillation_sums",
    "fused_token_agreement",
    "fused_token_losses",
    "jsd",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "token_loss",
    "total_variation",
]
