"""The distillation loss from hidden states and output heads, a chunk of tokens at a time.

Logits over a vocabulary of 50,000 are the largest arrays of a training step by far, so they are never held for
more than a chunk: the loop over chunks multiplies with both heads, takes the loss and its gradient with respect to
the student's logits, and multiplies that gradient on to the student's hidden states and head at once. The backward
pass only scales what the forward pass has stored. Each logit is computed once.

The gradient of a chunk is `jax.vjp` of the same `cross_entropy` and `scaled_divergence` that the plain path
uses, so the two cannot come to optimise different losses.
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
from l2m_jax.losses.distillation import Objective, combine, mean

DEFAULT_CHUNK_SIZE = 512


class LossSums(NamedTuple):
    """Sums over tokens of weight·value, float32 scalars; add them over devices and micro-batches, then divide.

    Attributes:
        loss: Σ weight·loss, the only one that carries gradient.
        cross_entropy: Σ weight·CE, also where it is no part of the loss.
        divergence: Σ weight·T²·D; 0 where the objective needs no teacher.
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
    valid_vocab_size: int | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> LossSums:
    """`distillation_loss` without its division, in memory for `chunk_size` tokens' logits.

    The chunks run along the token axis T alone, so leading axes (devices, say) stay as they are sharded. What lies
    behind the last token with weight is not run, to a quarter of a chunk: with the real targets first, the time
    goes with their number and not with T. The gradient reaches `student_hidden` and `student_head_VxE`, and nothing else: the teacher is
    fixed, and so are the weights.

    Args:
        student_hidden: `[..., T, E]`, what the student's head multiplies, in the compute dtype: the matrix products
            run in it and accumulate in float32.
        student_head_VxE: the student's output head.
        teacher_hidden: `[..., T, F]`, in any floating dtype; None where `objective.needs_teacher` is False.
        teacher_head_UxF: the teacher's output head, whose dtype is the one its logits are computed in.
        labels: integer `[..., T]`.
        weights: `[..., T]`, 0 for tokens without loss. Their hidden states may hold anything, NaN included.
        objective: static under `jax.jit`.
        valid_vocab_size: entries of either vocabulary from here on are padding: they have logits of −∞. It must be
            given where V and U differ.
        chunk_size: tokens a chunk, for each entry of the leading axes; rounded up to a multiple of 32. Two float32
            arrays `[..., chunk_size, V]` are held at a time, so axes that are not sharded are better flattened.

    Returns:
        LossSums of float32 scalars.

    Raises:
        ValueError: shapes that do not fit together, or a teacher missing that the objective needs.
    """
    static, inputs = _prepare(
        student_hidden,
        student_head_VxE,
        teacher_hidden,
        teacher_head_UxF,
        labels,
        weights,
        objective,
        valid_vocab_size,
        chunk_size,
    )
    return _loss_sums(static, inputs)


def fused_distillation_loss(*args, **kwargs) -> jax.Array:
    """The weighted mean over all tokens: `loss / weight` of `fused_distillation_sums`, whose arguments it takes.

    Equal to `distillation_loss` of the logits; 0 where all weights are 0.
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
    valid_vocab_size: int | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and divergence (T²·D) of each token, for evaluation and ranking; it has no gradient.

    Args:
        As `fused_distillation_sums`. Weights only say which tokens matter: they do not multiply the result.

    Returns:
        Two float32 arrays `[..., T]`; the second is 0 where the objective needs no teacher. Tokens without weight
        hold numbers without meaning.

    Raises:
        ValueError: as `fused_distillation_sums`.
    """
    static, inputs = _prepare(
        student_hidden,
        student_head_VxE,
        teacher_hidden,
        teacher_head_UxF,
        labels,
        weights,
        objective,
        valid_vocab_size,
        chunk_size,
    )
    entropy, divergence = _token_terms(static, inputs)
    tokens = labels.shape[-1]
    return entropy[..., :tokens], divergence[..., :tokens]


def _prepare(
    student_hidden: jax.Array,
    student_head_VxE: jax.Array,
    teacher_hidden: jax.Array | None,
    teacher_head_UxF: jax.Array | None,
    labels: jax.Array,
    weights: jax.Array,
    objective: Objective,
    valid_vocab_size: int | None,
    chunk_size: int,
) -> tuple[Static, Inputs]:
    if chunk_size < 1:
        raise ValueError(f"chunk_size is at least 1, not {chunk_size}")
    if student_hidden.shape[:-1] != labels.shape or weights.shape != labels.shape:
        raise ValueError(
            f"student_hidden {student_hidden.shape} without its last axis, labels {labels.shape} and "
            f"weights {weights.shape} must agree"
        )
    vocab_sizes = {student_head_VxE.shape[0]}
    if not objective.needs_teacher:
        teacher_hidden = teacher_head_UxF = None
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
        raise ValueError(f"valid_vocab_size must be given, for the heads have {sorted(vocab_sizes)} entries")
    vocab_size = min(vocab_sizes) if valid_vocab_size is None else valid_vocab_size
    if not 0 < vocab_size <= min(vocab_sizes):
        raise ValueError(f"valid_vocab_size {vocab_size} does not fit heads of {sorted(vocab_sizes)} entries")

    tokens = labels.shape[-1]
    chunk_size = choose_chunk_size(tokens, chunk_size)
    padding = -tokens % chunk_size
    axis = labels.ndim - 1
    inputs = Inputs(
        _pad(student_hidden, padding, axis),
        student_head_VxE,
        None if teacher_hidden is None else _pad(teacher_hidden, padding, axis),
        teacher_head_UxF,
        _pad(labels, padding, axis),
        _pad(weights.astype(jnp.float32), padding, axis),
    )
    return Static(objective, vocab_size, chunk_size), inputs


def _pad(x: jax.Array, padding: int, axis: int) -> jax.Array:
    if padding == 0:
        return x
    return jnp.pad(x, [(0, padding if i == axis else 0) for i in range(x.ndim)])


def _token_terms(static: Static, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    axis = inputs.labels.ndim - 1
    head_VxE = inputs.student_head_VxE.astype(inputs.student_hidden.dtype)

    def body(start: jax.Array, size: int, done: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        result = chunk_result(static, take_chunk(inputs, start, size), head_VxE, gradient=False)
        return put_tokens(done[0], result.entropy, start, axis), put_tokens(
            done[1], result.divergence, start, axis
        )

    zeros = jnp.zeros_like(inputs.weights)
    return over_chunks(static, inputs.weights, body, (zeros, zeros))


def _sum_terms(static: Static, weights: jax.Array, entropy: jax.Array, divergence: jax.Array) -> LossSums:
    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(weights * x)

    return LossSums(
        total(combine(entropy, divergence, static.objective)),
        total(entropy),
        total(divergence),
        jnp.sum(weights),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss_sums(static: Static, inputs: Inputs) -> LossSums:
    """Without a gradient asked for, only the sums are computed."""
    return _sum_terms(static, inputs.weights, *_token_terms(static, inputs))


def _loss_sums_forward(static: Static, inputs: Inputs):
    axis = inputs.labels.ndim - 1
    token_axes = tuple(range(inputs.labels.ndim))
    dtype = inputs.student_hidden.dtype
    head_VxE = inputs.student_head_VxE.astype(dtype)

    def body(start: jax.Array, size: int, done):
        entropy, divergence, hidden_gradient, head_gradient_VxE = done
        chunk = take_chunk(inputs, start, size)
        result = chunk_result(static, chunk, head_VxE, gradient=True)
        logits_gradient = result.student_logits.astype(dtype)
        chunk_gradient = jnp.einsum(
            "...v,ve->...e", logits_gradient, head_VxE, preferred_element_type=jnp.float32
        )
        chunk_head_gradient_VxE = jnp.tensordot(
            logits_gradient,
            chunk.student_hidden,
            axes=(token_axes, token_axes),
            preferred_element_type=jnp.float32,
        )
        return (
            put_tokens(entropy, result.entropy, start, axis),
            put_tokens(divergence, result.divergence, start, axis),
            put_tokens(hidden_gradient, chunk_gradient.astype(dtype), start, axis),
            head_gradient_VxE + chunk_head_gradient_VxE,
        )

    zeros = jnp.zeros_like(inputs.weights)
    entropy, divergence, hidden_gradient, head_gradient_VxE = over_chunks(
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
    # The empty array carries the head's dtype to the backward pass, where only arrays can go.
    head_dtype = jnp.zeros((0,), inputs.student_head_VxE.dtype)
    residuals = (hidden_gradient, head_gradient_VxE, head_dtype)
    return _sum_terms(static, inputs.weights, entropy, divergence), residuals


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
        ),
    )


_loss_sums.defvjp(_loss_sums_forward, _loss_sums_backward)
