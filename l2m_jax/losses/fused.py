"""The distillation loss from hidden states and output heads, a chunk of tokens at a time.

Logits over a vocabulary of 50,000 are by far the largest arrays of a training step, so only those of one chunk exist
at a time. The loop over chunks multiplies with both heads, computes the loss and its gradient with respect to the
student's logits, and multiplies that gradient into gradients of the student's hidden states and head. The backward
pass only scales what the forward pass has stored. Each logit is computed once.

The gradient of a chunk is `jax.vjp` of the same `cross_entropy` and `scaled_divergence` that `distillation_loss`
uses, so both always optimise the same loss.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from l2m_jax.losses.chunks import (
    Inputs,
    Static,
    choose_chunk_size,
    chunk_result,
    over_chunks,
    put_tokens,
    take_chunk,
)
from l2m_jax.losses.distillation import FIXED, Coefficients, Objective, combine, mean
from l2m_jax.losses.top_k import TopK, top_k
from l2m_jax.products import dense, head_gradient, project

DEFAULT_CHUNK_SIZE = 512


class LossSums(NamedTuple):
    """Sums over tokens of weight·value, float32 scalars; add them over devices and micro-batches, then divide.

    Attributes:
        loss: Σ weight·loss, the only one with a gradient.
        cross_entropy: Σ weight·CE, even if it is not part of the loss.
        divergence: Σ weight·T²·D; 0 if the objective needs no teacher.
        weight: Σ weight.
    """

    loss: jax.Array
    cross_entropy: jax.Array
    divergence: jax.Array
    weight: jax.Array


def fused_distillation_sums(
    student_hidden: jax.Array,
    student_head_VxE: jax.Array,
    teacher_hidden: jax.Array | None,
    teacher_head_UxF: jax.Array | None,
    labels: jax.Array,
    weights: jax.Array,
    objective: Objective,
    *,
    teacher_top_k: TopK | None = None,
    coefficients: Coefficients = FIXED,
    valid_vocab_size: int | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> LossSums:
    """`distillation_loss` before its division, holding the logits of only `chunk_size` tokens.

    Chunks divide only the token axis T, so leading axes (such as devices) keep their sharding. Tokens past the last
    one with nonzero weight are skipped, up to an eighth of a chunk. If the real targets come first, the time depends
    on their number, not on T. Gradients flow to `student_hidden` and `student_head_VxE` only: the teacher and the
    weights are constants.

    Args:
        student_hidden: `[..., T, E]`, the student's final hidden states, in the compute dtype: matrix products run in it
            and accumulate in float32.
        student_head_VxE: the student's output head.
        teacher_hidden: `[..., T, F]`, in any floating dtype; None if the loss needs no teacher, or with `teacher_top_k`.
        teacher_head_UxF: the teacher's output head; its dtype is the one in which the teacher's logits are computed.
        labels: integer `[..., T]`.
        weights: `[..., T]`, 0 for tokens without loss. Their hidden states may be anything, even NaN.
        objective: static under `jax.jit`.
        teacher_top_k: the teacher's top k at each token, instead of its hidden states and head.
        coefficients: arrays in place of the objective's numbers: scalars, or one for each token, `[..., T]`.
        valid_vocab_size: entries of both vocabularies from this index on are padding, with logits of −∞. Required if
            V and U differ.
        chunk_size: the most tokens per chunk, for each entry of the leading axes; rounded up to a multiple of 64. Two
            float32 arrays `[..., chunk_size, V]` exist at a time, so flatten leading axes that are not sharded.

    Returns:
        LossSums of float32 scalars.

    Raises:
        ValueError: shapes do not match, or the objective needs a teacher and none is given.
    """
    given = Inputs(
        student_hidden,
        student_head_VxE,
        teacher_hidden,
        teacher_head_UxF,
        labels,
        weights,
        coefficients,
        teacher_top_k,
    )
    static, inputs = prepare(given, objective, valid_vocab_size, chunk_size)
    return _loss_sums(static, inputs)


def fused_distillation_loss(*args, **kwargs) -> jax.Array:
    """The weighted mean over all tokens: `loss / weight` of `fused_distillation_sums`, with the same arguments.

    Equal to `distillation_loss` of the logits; 0 if all weights are 0.
    """
    sums = fused_distillation_sums(*args, **kwargs)
    return mean(sums.loss, sums.weight)


def fused_token_losses(
    student_hidden: jax.Array,
    student_head_VxE: jax.Array,
    teacher_hidden: jax.Array | None,
    teacher_head_UxF: jax.Array | None,
    labels: jax.Array,
    weights: jax.Array,
    objective: Objective,
    *,
    teacher_top_k: TopK | None = None,
    coefficients: Coefficients = FIXED,
    valid_vocab_size: int | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and divergence (T²·D) of each token, for evaluation and ranking. Has no gradient.

    Args:
        As `fused_distillation_sums`. Weights only say which tokens to compute; the result is not multiplied by them.

    Returns:
        Two float32 arrays `[..., T]`; the second is 0 if the objective needs no teacher. Values of tokens with weight 0
        are meaningless.

    Raises:
        ValueError: as `fused_distillation_sums`.
    """
    given = Inputs(
        student_hidden,
        student_head_VxE,
        teacher_hidden,
        teacher_head_UxF,
        labels,
        weights,
        coefficients,
        teacher_top_k,
    )
    static, inputs = prepare(given, objective, valid_vocab_size, chunk_size)
    cross_entropy, divergence = _token_terms(static, inputs)
    tokens = labels.shape[-1]
    return cross_entropy[..., :tokens], divergence[..., :tokens]


def fused_top_k(
    hidden: jax.Array,
    head_VxE: jax.Array,
    weights: jax.Array,
    k: int,
    *,
    valid_vocab_size: int | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> TopK:
    """The `top_k` of each token, holding the logits of only `chunk_size` tokens. Has no gradient.

    Args:
        hidden: `[..., T, E]`, final hidden states.
        head_VxE: the output head, in whose dtype the logits are computed.
        weights: `[..., T]`; what is found for tokens with weight 0 is meaningless.
        valid_vocab_size, chunk_size: as in `fused_distillation_sums`.

    Returns:
        int32 and float32 arrays `[..., T, k]`, and the tail, `[..., T]`.
    """
    labels = jnp.zeros(weights.shape, jnp.int32)
    given = Inputs(hidden.astype(head_VxE.dtype), head_VxE, None, None, labels, weights)
    static, inputs = prepare(given, Objective(beta=0.0), valid_vocab_size, chunk_size)
    axis, padded = weights.ndim - 1, inputs.weights.shape

    def body(start: jax.Array, size: int, done: TopK) -> TopK:
        chunk = take_chunk(inputs, start, size)
        found = top_k(project(chunk.student_hidden, head_VxE)[..., : static.vocab_size], k)
        return jax.tree.map(lambda x, part: put_tokens(x, part, start, axis), done, found)

    zeros = TopK(
        jnp.zeros((*padded, k), jnp.int32),
        jnp.zeros((*padded, k), jnp.float32),
        jnp.zeros(padded, jnp.float32),
    )
    found = over_chunks(static, inputs.weights, body, zeros)
    return jax.tree.map(lambda x: x[(slice(None),) * axis + (slice(weights.shape[-1]),)], found)


def prepare(
    given: Inputs, objective: Objective, valid_vocab_size: int | None, chunk_size: int
) -> tuple[Static, Inputs]:
    """Checks the inputs, and pads them to whole chunks."""
    student_hidden, student_head_VxE, teacher_hidden, teacher_head_UxF, labels, weights, coefficients, top = (
        given
    )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    if student_hidden.shape[:-1] != labels.shape or weights.shape != labels.shape:
        raise ValueError(
            f"student_hidden {student_hidden.shape} without its last axis, labels {labels.shape} and "
            f"weights {weights.shape} must agree"
        )
    vocab_sizes = {student_head_VxE.shape[0]}
    if not coefficients.needs_teacher(objective):
        teacher_hidden = teacher_head_UxF = top = None
    elif top is not None:
        teacher_hidden = teacher_head_UxF = None
        if top.token_ids.shape != top.log_probs.shape or top.token_ids.shape[:-1] != labels.shape:
            raise ValueError(
                f"token_ids {top.token_ids.shape}, log_probs {top.log_probs.shape} and labels {labels.shape} must agree"
            )
    elif teacher_hidden is None or teacher_head_UxF is None:
        raise ValueError(f"teacher_hidden and teacher_head_UxF are needed with beta = {objective.beta}")
    else:
        if teacher_hidden.shape[:-1] != labels.shape:
            raise ValueError(
                f"teacher_hidden {teacher_hidden.shape} without its last axis and labels {labels.shape} must agree"
            )
        vocab_sizes.add(teacher_head_UxF.shape[0])
        teacher_hidden = teacher_hidden.astype(teacher_head_UxF.dtype)
    if valid_vocab_size is None and len(vocab_sizes) > 1:
        raise ValueError(
            f"valid_vocab_size must be given, because the heads have {sorted(vocab_sizes)} entries"
        )
    vocab_size = min(vocab_sizes) if valid_vocab_size is None else valid_vocab_size
    if not 0 < vocab_size <= min(vocab_sizes):
        raise ValueError(f"valid_vocab_size {vocab_size} does not fit heads of {sorted(vocab_sizes)} entries")

    tokens = labels.shape[-1]
    chunk_size = choose_chunk_size(tokens, chunk_size)
    padding = -tokens % chunk_size
    axis = labels.ndim - 1

    def token_coefficient(x: jax.Array) -> jax.Array:
        # Padded with 1, a temperature that the padding's logits can be divided by.
        return _pad(jnp.broadcast_to(jnp.asarray(x, jnp.float32), labels.shape), padding, axis, 1.0)

    inputs = Inputs(
        _pad(student_hidden, padding, axis),
        student_head_VxE,
        None if teacher_hidden is None else _pad(teacher_hidden, padding, axis),
        teacher_head_UxF,
        _pad(labels, padding, axis),
        _pad(weights.astype(jnp.float32), padding, axis),
        jax.tree.map(token_coefficient, coefficients),
        jax.tree.map(lambda x: _pad(x, padding, axis), top),
    )
    return Static(objective, vocab_size, chunk_size), inputs


def _pad(x: jax.Array, padding: int, axis: int, value: float = 0) -> jax.Array:
    if padding == 0:
        return x
    return jnp.pad(x, [(0, padding if i == axis else 0) for i in range(x.ndim)], constant_values=value)


def _token_terms(static: Static, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    axis = inputs.labels.ndim - 1
    head_VxE = inputs.student_head_VxE.astype(inputs.student_hidden.dtype)

    def body(start: jax.Array, size: int, done: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        result = chunk_result(static, take_chunk(inputs, start, size), head_VxE, gradient=False)
        return put_tokens(done[0], result.cross_entropy, start, axis), put_tokens(
            done[1], result.divergence, start, axis
        )

    zeros = jnp.zeros_like(inputs.weights)
    return over_chunks(static, inputs.weights, body, (zeros, zeros))


def _sum_terms(static: Static, inputs: Inputs, cross_entropy: jax.Array, divergence: jax.Array) -> LossSums:
    weights = inputs.weights

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(weights * x)

    return LossSums(
        total(combine(cross_entropy, divergence, static.objective, inputs.coefficients)),
        total(cross_entropy),
        total(divergence),
        jnp.sum(weights),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss_sums(static: Static, inputs: Inputs) -> LossSums:
    """The forward pass when no gradient is needed: computes only the sums."""
    return _sum_terms(static, inputs, *_token_terms(static, inputs))


def _loss_sums_forward(static: Static, inputs: Inputs):
    axis = inputs.labels.ndim - 1
    dtype = inputs.student_hidden.dtype
    head_VxE = inputs.student_head_VxE.astype(dtype)

    def body(start: jax.Array, size: int, done):
        cross_entropy, divergence, hidden_gradient, head_gradient_VxE = done
        chunk = take_chunk(inputs, start, size)
        result = chunk_result(static, chunk, head_VxE, gradient=True)
        logits_gradient = result.student_logits.astype(dtype)
        chunk_gradient = dense(logits_gradient, head_VxE)
        chunk_head_gradient_VxE = head_gradient(logits_gradient, chunk.student_hidden)
        return (
            put_tokens(cross_entropy, result.cross_entropy, start, axis),
            put_tokens(divergence, result.divergence, start, axis),
            put_tokens(hidden_gradient, chunk_gradient, start, axis),
            head_gradient_VxE + chunk_head_gradient_VxE,
        )

    zeros = jnp.zeros_like(inputs.weights)
    cross_entropy, divergence, hidden_gradient, head_gradient_VxE = over_chunks(
        static,
        inputs.weights,
        body,
        (
            zeros,
            zeros,
            jnp.zeros_like(inputs.student_hidden),
            jnp.zeros_like(inputs.student_head_VxE, jnp.float32),
        ),
    )
    # An empty array carries the head's dtype: residuals can only be arrays.
    head_dtype = jnp.zeros((0,), inputs.student_head_VxE.dtype)
    residuals = (hidden_gradient, head_gradient_VxE, head_dtype)
    return _sum_terms(static, inputs, cross_entropy, divergence), residuals


def _loss_sums_backward(static: Static, residuals, cotangents: LossSums) -> tuple[Inputs]:
    hidden_gradient, head_gradient_VxE, head_dtype = residuals
    scale = cotangents.loss
    return (
        Inputs(
            (scale * hidden_gradient).astype(hidden_gradient.dtype),
            (scale * head_gradient_VxE).astype(head_dtype.dtype),
            None,
            None,
            None,  # pyright: ignore[reportArgumentType]
            None,  # pyright: ignore[reportArgumentType]
            None,  # pyright: ignore[reportArgumentType]
        ),
    )


_loss_sums.defvjp(_loss_sums_forward, _loss_sums_backward)
