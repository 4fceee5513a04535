"""Divergences between the next-token distributions of teacher and student, one number per token.

Every function takes two arrays of logits over the same vocabulary, `[..., V]`, and reduces only the last axis:
no mean over tokens, no mask. p is the teacher, q the student, as in the paper. All computation is in float32,
regardless of the dtype of the logits.

A logit of −∞ (padding of the vocabulary, or a masked token) gives neither NaN nor ∞, in values or in gradients. If it
is −∞ for both models, the entry contributes nothing, as if it were cut off. If it is −∞ for only one of them, its
log-probability is taken as log(1.2e-38) ≈ −87.3, the logarithm of the smallest normal float32. A divergence that is
mathematically infinite is then a large finite number that can still be optimised.

A mixing weight that is a Python number is static: 0 and 1 compile to the plain divergence and to 0. It may also be an
array `[...]`, one weight per token, or a scalar array; these need no recompilation, and no gradient is meant to reach
them.
"""

from typing import TypeGuard

import jax
import jax.numpy as jnp

_TINY = float(jnp.finfo(jnp.float32).tiny)
_LOG_TINY = -87.33654


def _log_probabilities(logits: jax.Array) -> jax.Array:
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return jnp.where(jnp.isneginf(log_probabilities), _LOG_TINY, log_probabilities)


def _kl(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(log_a) * (log_a - log_b), axis=-1)


Weight = float | jax.Array


def is_number(weight: Weight) -> TypeGuard[float]:
    """Whether a weight is static: a number that the program is compiled for."""
    return isinstance(weight, int | float)


def _for_each_entry(weight: Weight) -> Weight:
    return weight if is_number(weight) else jnp.asarray(weight, jnp.float32)[..., None]


def _log_mixture(log_a: jax.Array, log_b: jax.Array, weight: Weight) -> jax.Array:
    """log(weight·a + (1 - weight)·b)."""
    if is_number(weight):
        if not 0 <= weight <= 1:
            raise ValueError(f"a mixing weight must be between 0 and 1, not {weight}")
        if weight == 0:
            return log_b
        if weight == 1:
            return log_a
    weight = _for_each_entry(weight)
    mixture = weight * jnp.exp(log_a) + (1 - weight) * jnp.exp(log_b)
    return jnp.log(jnp.maximum(mixture, _TINY))


def forward_kl(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """Kullback-Leibler divergence of the student from the teacher (Eq. 4).

    KL(p ‖ q) = Σ_v p_v · log(p_v / q_v)

    Args:
        student_logits: `[..., V]`, any floating dtype.
        teacher_logits: `[..., V]`.

    Returns:
        float32 `[...]`, in nats.

    >>> import jax.numpy as jnp
    >>> teacher, student = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    >>> print(f"{forward_kl(student, teacher):.4f}")
    0.1438

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """
    return _kl(_log_probabilities(teacher_logits), _log_probabilities(student_logits))


def reverse_kl(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """Kullback-Leibler divergence of the teacher from the student.

    KL(q ‖ p) = Σ_v q_v · log(q_v / p_v)

    Args:
        student_logits: `[..., V]`, any floating dtype.
        teacher_logits: `[..., V]`.

    Returns:
        float32 `[...]`, in nats.

    >>> import jax.numpy as jnp
    >>> teacher, student = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    >>> print(f"{reverse_kl(student, teacher):.4f}")
    0.1308

    References:
        Gu et al., MiniLLM: Knowledge Distillation of Large Language Models, 2023.
    """
    return _kl(_log_probabilities(student_logits), _log_probabilities(teacher_logits))


def skew_kl(student_logits: jax.Array, teacher_logits: jax.Array, alpha: Weight = 0.1) -> jax.Array:
    """Divergence of a mixture of both from the teacher: the paper's guided objective (Eq. 5 and 6).

    KL(p ‖ α·p + (1 - α)·q)

    Args:
        student_logits: `[..., V]`, any floating dtype.
        teacher_logits: `[..., V]`.
        alpha: the teacher's share in the mixture, a number or `[...]`. 0 is exactly `forward_kl`, 1 exactly zero.

    Returns:
        float32 `[...]`, in nats.

    Raises:
        ValueError: alpha outside [0, 1].

    >>> import jax.numpy as jnp
    >>> teacher, student = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    >>> print(f"{skew_kl(student, teacher, alpha=0.5):.4f}")
    0.0323

    References:
        Ko et al., DistiLLM: Towards Streamlined Distillation for Large Language Models, 2024.
    """
    log_p, log_q = _log_probabilities(teacher_logits), _log_probabilities(student_logits)
    return _kl(log_p, _log_mixture(log_p, log_q, alpha))


def skew_reverse_kl(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    alpha: Weight = 0.1,
    *,
    mixture_gradient: bool = True,
) -> jax.Array:
    """Divergence of a mixture of both from the student.

    KL(q ‖ α·q + (1 - α)·p)

    Args:
        student_logits: `[..., V]`, any floating dtype.
        teacher_logits: `[..., V]`.
        alpha: the student's share in the mixture. 0 is exactly `reverse_kl`, 1 exactly zero.
        mixture_gradient: whether the student is differentiated inside the mixture too. DistiLLM-2 holds it fixed.

    Returns:
        float32 `[...]`, in nats.

    Raises:
        ValueError: alpha outside [0, 1].

    >>> import jax.numpy as jnp
    >>> teacher, student = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    >>> print(f"{skew_reverse_kl(student, teacher, alpha=0.5):.4f}")
    0.0354

    References:
        Ko et al., DistiLLM, 2024; Ko et al., DistiLLM-2: A Contrastive Approach Boosts the Distillation of LLMs, 2025.
    """
    log_q, log_p = _log_probabilities(student_logits), _log_probabilities(teacher_logits)
    log_q_in_mixture = log_q if mixture_gradient else jax.lax.stop_gradient(log_q)
    return _kl(log_q, _log_mixture(log_q_in_mixture, log_p, alpha))


def jsd(student_logits: jax.Array, teacher_logits: jax.Array, alpha: Weight = 0.5) -> jax.Array:
    """Generalised Jensen-Shannon divergence.

    α·KL(p ‖ m) + (1 - α)·KL(q ‖ m)   with m = α·p + (1 - α)·q

    Args:
        student_logits: `[..., V]`, any floating dtype.
        teacher_logits: `[..., V]`.
        alpha: the teacher's weight. At 0.5 the divergence is symmetric and at most log 2; at 0 and 1 it is zero.

    Returns:
        float32 `[...]`, in nats.

    Raises:
        ValueError: alpha outside [0, 1].

    >>> import jax.numpy as jnp
    >>> teacher, student = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    >>> print(f"{jsd(student, teacher):.4f}")
    0.0338

    References:
        Agarwal et al., On-Policy Distillation of Language Models, 2024, where α is called β.
    """
    log_p, log_q = _log_probabilities(teacher_logits), _log_probabilities(student_logits)
    log_m = _log_mixture(log_p, log_q, alpha)
    return alpha * _kl(log_p, log_m) + (1 - alpha) * _kl(log_q, log_m)


def total_variation(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """Total variation distance.

    ½·Σ_v |p_v - q_v|

    Args:
        student_logits: `[..., V]`, any floating dtype.
        teacher_logits: `[..., V]`.

    Returns:
        float32 `[...]`, between 0 and 1.

    >>> import jax.numpy as jnp
    >>> teacher, student = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    >>> print(f"{total_variation(student, teacher):.4f}")
    0.2500

    References:
        Wen et al., f-Divergence Minimization for Sequence-Level Knowledge Distillation, 2023.
    """
    p, q = jnp.exp(_log_probabilities(teacher_logits)), jnp.exp(_log_probabilities(student_logits))
    return 0.5 * jnp.sum(jnp.abs(p - q), axis=-1)


def alpha_beta(
    student_logits: jax.Array, teacher_logits: jax.Array, a: float = 0.2, b: float = 0.7
) -> jax.Array:
    """α-β-divergence, with a for α and b for β.

    -1/(ab) · Σ_v [p_v^a·q_v^b - a/(a+b)·p_v^(a+b) - b/(a+b)·q_v^(a+b)]

    and its limits where a, b or a + b is 0: (1, 0) is the forward KL divergence, (0, 1) the reverse one.

    Args:
        student_logits: `[..., V]`, any floating dtype.
        teacher_logits: `[..., V]`.

    Returns:
        float32 `[...]`.

    >>> import jax.numpy as jnp
    >>> teacher, student = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    >>> print(f"{alpha_beta(student, teacher, 0.5, 0.5):.4f}")
    0.1363

    References:
        Wang et al., ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge Distillation via
        α-β-Divergence, 2025.
    """
    log_p, log_q = _log_probabilities(teacher_logits), _log_probabilities(student_logits)
    log_ratio = log_p - log_q
    if a == 0 and b == 0:
        each = log_ratio**2 / 2
    elif b == 0:
        each = (jnp.exp(a * log_p) * (a * log_ratio - 1) + jnp.exp(a * log_q)) / a**2
    elif a == 0:
        each = (jnp.exp(b * log_q) * (-b * log_ratio - 1) + jnp.exp(b * log_p)) / b**2
    elif a + b == 0:
        each = (jnp.exp(a * log_ratio) - a * log_ratio - 1) / a**2
    else:
        # Relative to the larger probability: neither cancellation where p = q, nor overflow where they differ most.
        s, below, above = a + b, jnp.minimum(log_ratio, 0), jnp.minimum(-log_ratio, 0)
        of_q = jnp.exp(s * log_q) * (a / s * jnp.expm1(s * below) - jnp.expm1(a * below))
        of_p = jnp.exp(s * log_p) * (b / s * jnp.expm1(s * above) - jnp.expm1(b * above))
        each = (of_q + of_p) / (a * b)
    return jnp.sum(each, axis=-1)


def adaptive_kl(student_logits: jax.Array, teacher_logits: jax.Array, mu: float = 0.5) -> jax.Array:
    """Forward and reverse KL, weighted by the models' gaps on the teacher's head and on its tail.

    g_head/(g_head + g_tail)·KL(p ‖ q) + g_tail/(g_head + g_tail)·KL(q ‖ p)   with g = Σ |p_v - q_v| over either part

    The head is the smallest set of the teacher's most probable tokens with a probability of at least `mu` in total.
    The weights carry no gradient.

    Args:
        student_logits: `[..., V]`, any floating dtype.
        teacher_logits: `[..., V]`.

    Returns:
        float32 `[...]`, in nats.

    >>> import jax.numpy as jnp
    >>> teacher, student = jnp.log(jnp.array([0.6, 0.4])), jnp.log(jnp.array([0.25, 0.75]))
    >>> print(f"{adaptive_kl(student, teacher):.4f}")  # both gaps are equal
    0.2632

    References:
        Wu et al., Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models, 2024.
    """
    log_p, log_q = _log_probabilities(teacher_logits), _log_probabilities(student_logits)
    p = jax.lax.stop_gradient(jnp.exp(log_p))
    gap = jnp.abs(p - jax.lax.stop_gradient(jnp.exp(log_q)))
    descending, gap = jax.lax.sort((-p, gap), num_keys=1)
    before = jnp.cumsum(-descending, axis=-1) + descending
    head = jnp.sum(jnp.where(before < mu, gap, 0), axis=-1)
    total = jnp.sum(gap, axis=-1)
    share = jnp.where(total > 0, head / jnp.where(total > 0, total, 1), 0.5)
    return share * _kl(log_p, log_q) + (1 - share) * _kl(log_q, log_p)


def todi(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """Forward and reverse KL, weighted for each vocabulary entry by which model gives it more probability.

    Σ_v [w_v·p_v·log(p_v/q_v) + (1 - w_v)·q_v·log(q_v/p_v)]   with w_v = sigmoid(log(p_v/q_v)) = p_v/(p_v + q_v)

    The weights carry no gradient.

    Args:
        student_logits: `[..., V]`, any floating dtype.
        teacher_logits: `[..., V]`.

    Returns:
        float32 `[...]`, in nats.

    >>> import jax.numpy as jnp
    >>> teacher, student = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    >>> print(f"{todi(student, teacher):.4f}")
    0.2747

    References:
        Jung et al., ToDi: Token-wise Distillation via Fine-Grained Divergence Control, 2025.
    """
    log_p, log_q = _log_probabilities(teacher_logits), _log_probabilities(student_logits)
    log_ratio = log_p - log_q
    w = jax.nn.sigmoid(jax.lax.stop_gradient(log_ratio))
    return jnp.sum((w * jnp.exp(log_p) - (1 - w) * jnp.exp(log_q)) * log_ratio, axis=-1)


def taid(student_logits: jax.Array, teacher_logits: jax.Array, alpha: Weight = 0.4) -> jax.Array:
    """Kullback-Leibler divergence of the student from a target between both models.

    KL(p_t ‖ q)   with p_t = softmax((1 - t)·stop_gradient(student_logits) + t·teacher_logits) and t = `alpha`

    Args:
        student_logits: `[..., V]`, any floating dtype.
        teacher_logits: `[..., V]`.
        alpha: the teacher's share t in the logits, a number or `[...]`. 1 is `forward_kl`, 0 is zero.

    Returns:
        float32 `[...]`, in nats.

    Raises:
        ValueError: alpha outside [0, 1].

    >>> import jax.numpy as jnp
    >>> teacher, student = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    >>> print(f"{taid(student, teacher, 1.0):.4f}")
    0.1438

    References:
        Shing et al., TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in Language
        Models, 2025.
    """
    if is_number(alpha) and not 0 <= alpha <= 1:
        raise ValueError(f"a mixing weight must be between 0 and 1, not {alpha}")
    log_p, log_q = _log_probabilities(teacher_logits), _log_probabilities(student_logits)
    t = _for_each_entry(alpha)
    mixed = (1 - t) * jax.lax.stop_gradient(log_q) + t * log_p
    return _kl(jax.nn.log_softmax(mixed, axis=-1), log_q)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Negative log-likelihood of the reference token, one term of Eq. 1.

    -log q_label

    Args:
        logits: `[..., V]`, any floating dtype.
        labels: integer `[...]`. A label outside [0, V) gives loss 0 and no gradient; give it weight 0.

    Returns:
        float32 `[...]`, in nats.

    >>> import jax.numpy as jnp
    >>> print(f"{cross_entropy(jnp.log(jnp.array([0.25, 0.75])), jnp.array(0)):.4f}")
    1.3863
    """
    log_q = _log_probabilities(logits)
    # A comparison fuses with the softmax, forward and backward; the gradient of a gather is a scatter into [..., V].
    is_label = jax.lax.broadcasted_iota(labels.dtype, log_q.shape, log_q.ndim - 1) == labels[..., None]
    return -jnp.sum(jnp.where(is_label, log_q, 0.0), axis=-1)
