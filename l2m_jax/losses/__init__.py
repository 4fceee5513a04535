"""Distillation losses. They depend only on jax.

>>> from l2m_jax import losses
>>> losses.Objective(losses.SkewKL(0.1), beta=0.7).needs_labels
True

A divergence is a value such as `SkewKL(0.1)`, and a function such as `skew_kl` for direct use.
From logits: the divergences, `cross_entropy`, `token_loss`, `distillation_loss` and `agreement`. From hidden states and output
heads, without materialising the logits of a whole batch: `fused_distillation_sums`, `fused_distillation_loss`,
`fused_token_losses` and `fused_token_agreement`. In place of the teacher's logits or hidden states, the losses also
take its `TopK`, which `top_k` and `fused_top_k` compute.
"""

from l2m_jax.losses.agreement import Agreement, agreement, fused_token_agreement
from l2m_jax.losses.distillation import Coefficients, Objective, distillation_loss, token_loss
from l2m_jax.losses.divergences import (
    adaptive_kl,
    alpha_beta,
    cross_entropy,
    forward_kl,
    jsd,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    taid,
    todi,
    total_variation,
)
from l2m_jax.losses.fused import (
    LossSums,
    fused_distillation_loss,
    fused_distillation_sums,
    fused_token_losses,
    fused_top_k,
)
from l2m_jax.losses.top_k import TopK, top_k
from l2m_jax.losses.values import (
    DIVERGENCES,
    JSD,
    TAID,
    AdaptiveKL,
    AlphaBeta,
    Divergence,
    ForwardKL,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    ToDi,
    TotalVariation,
)

__all__ = [
    "DIVERGENCES",
    "JSD",
    "TAID",
    "AdaptiveKL",
    "Agreement",
    "AlphaBeta",
    "Coefficients",
    "Divergence",
    "ForwardKL",
    "LossSums",
    "Objective",
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "ToDi",
    "TopK",
    "TotalVariation",
    "adaptive_kl",
    "agreement",
    "alpha_beta",
    "cross_entropy",
    "distillation_loss",
    "forward_kl",
    "fused_distillation_loss",
    "fused_distillation_sums",
    "fused_token_agreement",
    "fused_token_losses",
    "fused_top_k",
    "jsd",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "taid",
    "todi",
    "token_loss",
    "top_k",
    "total_variation",
]
