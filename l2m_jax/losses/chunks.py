"""Chunks of tokens for the fused loss: the loop over them, and the logits, losses and gradient of one chunk."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from l2m_jax.losses import divergences
from l2m_jax.losses.distillation import FIXED, Coefficients, Objective, combine, scaled_divergence, zeroed
from l2m_jax.losses.top_k import TopK
from l2m_jax.products import project

Carry = TypeVar("Carry")

# Softmax, divergence and their gradient need about ten arrays of the size of a block's logits. On a CPU they run up to
# twice as fast if these arrays fit into the cache; fewer logits, or a single row, keep fewer cores busy. On other devices
# a block must be large enough to fill the device.
_BLOCK_LOGITS_CPU = 1 << 17
_MIN_BLOCK_SIZE_CPU = 2
_BLOCK_SIZE = 256

# A partly filled last chunk runs as a half, a quarter and an eighth of one, as needed, if a chunk has enough logits to
# justify compiling the loop body for each size.
HALVINGS = 3
_MIN_LOGITS_TO_DIVIDE = 1 << 22
# Sizes are multiples of this, for the matrix units.
_ALIGNMENT = 8


@dataclass(frozen=True)
class Static:
    objective: Objective
    vocab_size: int
    chunk_size: int


class Inputs(NamedTuple):
    student_hidden: jax.Array  # [..., T, E]
    student_head_VxE: jax.Array
    teacher_hidden: jax.Array | None  # [..., T, F]
    teacher_head_UxF: jax.Array | None
    labels: jax.Array  # [..., T]
    weights: jax.Array  # [..., T]
    coefficients: Coefficients = FIXED  # [..., T] each
    teacher_top_k: TopK | None = None  # [..., T, k]


def choose_chunk_size(tokens: int, max_size: int) -> int:
    """A size that makes all chunks about equally full, so that the last one is not mostly padding.

    More tokens than the smallest size make at least two chunks. A loop over a single one has nothing that varies, so
    XLA moves its products out of the loop, and computes them even if it does not run.
    """
    chunks = max(2, _divide_up(tokens, max_size))
    multiple = _ALIGNMENT << HALVINGS
    return max(1, _divide_up(tokens, chunks * multiple)) * multiple


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


def sizes_of_chunk(chunk_size: int, vocab_size: int) -> list[int]:
    """The sizes for which the body of the loop is compiled: a chunk, and what it is divided into."""
    halvings = HALVINGS if chunk_size * vocab_size >= _MIN_LOGITS_TO_DIVIDE else 0
    return [chunk_size >> n for n in range(halvings + 1)]


def over_chunks(
    static: Static,
    weights: jax.Array,
    body: Callable[[jax.Array, int, Carry], Carry],
    initial: Carry,
) -> Carry:
    """Runs `body(start, size, carry)` for each chunk, up to the last token with nonzero weight.

    Whole chunks keep matrix units busy. The last one is divided, so that little work is done past the last token.
    """
    position = lax.broadcasted_iota(jnp.int32, weights.shape, weights.ndim - 1)
    end = jnp.max(jnp.where(weights != 0, position + 1, 0), initial=0)
    sizes = sizes_of_chunk(static.chunk_size, static.vocab_size)
    smallest = sizes[-1]
    end = (end + smallest - 1) // smallest * smallest
    start, carry = jnp.zeros_like(end), initial
    for size in sizes:
        count = (end - start) // size

        def step(i: jax.Array, carry: Carry, size: int = size, start: jax.Array = start) -> Carry:
            return body(start + i * size, size, carry)

        carry = lax.fori_loop(0, count, step, carry)
        start = start + count * size
    return carry


def slice_tokens(x: jax.Array, start: jax.Array, size: int, axis: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, start, size, axis)


def put_tokens(x: jax.Array, part: jax.Array, start: jax.Array, axis: int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, part, start, axis)


def take_chunk(inputs: Inputs, start: jax.Array, size: int) -> Inputs:
    """The chunk's tokens. What models give for tokens with weight 0 is set to 0, because 0 times NaN is NaN."""
    axis = inputs.labels.ndim - 1

    def take(x: jax.Array) -> jax.Array:
        return slice_tokens(x, start, size, axis)

    weights = take(inputs.weights)

    def take_of_model(x: jax.Array) -> jax.Array:
        return zeroed(take(x), weights)

    return inputs._replace(
        student_hidden=take_of_model(inputs.student_hidden),
        teacher_hidden=jax.tree.map(take_of_model, inputs.teacher_hidden),
        teacher_top_k=jax.tree.map(take_of_model, inputs.teacher_top_k),
        labels=take(inputs.labels),
        weights=weights,
        coefficients=jax.tree.map(take, inputs.coefficients),
    )


class ChunkResult(NamedTuple):
    student_logits: jax.Array  # [..., C, V]; with `gradient`, replaced by weight · d loss / d logits
    cross_entropy: jax.Array  # [..., C]
    divergence: jax.Array  # [..., C]


def chunk_result(static: Static, chunk: Inputs, head_VxE: jax.Array, gradient: bool) -> ChunkResult:
    student_logits = project(chunk.student_hidden, head_VxE)
    teacher_logits: jax.Array | TopK | None = chunk.teacher_top_k
    if chunk.teacher_hidden is not None and chunk.teacher_head_UxF is not None:
        teacher_logits = project(chunk.teacher_hidden, chunk.teacher_head_UxF)

    def in_blocks_of(limit: int):
        size = max(n for n in range(1, limit + 1) if chunk.labels.shape[-1] % n == 0)
        return partial(_run_blocks, static, gradient, size)

    return lax.platform_dependent(
        student_logits,
        teacher_logits,
        chunk.labels,
        chunk.weights,
        chunk.coefficients,
        cpu=in_blocks_of(max(_MIN_BLOCK_SIZE_CPU, _BLOCK_LOGITS_CPU // static.vocab_size)),
        default=in_blocks_of(_BLOCK_SIZE),
    )


def _run_blocks(
    static: Static,
    gradient: bool,
    block_size: int,
    student_logits: jax.Array,
    teacher_logits: jax.Array | TopK | None,
    labels: jax.Array,
    weights: jax.Array,
    coefficients: Coefficients,
) -> ChunkResult:
    """Losses of a chunk, block by block. The gradient of each block overwrites its logits."""
    axis = labels.ndim - 1

    def body(i: jax.Array, done: ChunkResult) -> ChunkResult:
        start = i * block_size

        def block(x: jax.Array) -> jax.Array:
            return slice_tokens(x, start, block_size, axis)

        teacher_block, coefficients_block = jax.tree.map(block, (teacher_logits, coefficients))
        labels_block, student_block = block(labels), block(done.student_logits)
        all_logits = done.student_logits
        if gradient:
            _, pullback, (cross_entropy, divergence) = jax.vjp(
                lambda logits: _terms(static, logits, teacher_block, labels_block, coefficients_block),
                student_block,
                has_aux=True,
            )
            (block_gradient,) = pullback(block(weights))
            all_logits = put_tokens(all_logits, block_gradient, start, axis)
        else:
            _, (cross_entropy, divergence) = _terms(
                static, student_block, teacher_block, labels_block, coefficients_block
            )
        return ChunkResult(
            all_logits,
            put_tokens(done.cross_entropy, cross_entropy, start, axis),
            put_tokens(done.divergence, divergence, start, axis),
        )

    zeros = jnp.zeros_like(weights)
    return lax.fori_loop(0, labels.shape[-1] // block_size, body, ChunkResult(student_logits, zeros, zeros))


def _terms(
    static: Static,
    student_logits: jax.Array,
    teacher_logits: jax.Array | TopK | None,
    labels: jax.Array,
    coefficients: Coefficients,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """(loss, (cross-entropy, divergence)). Entries beyond the vocabulary are cut off, as if they were −∞."""
    student_logits = student_logits[..., : static.vocab_size]
    cross_entropy = divergences.cross_entropy(student_logits, labels)
    if teacher_logits is None:
        divergence = jnp.zeros_like(cross_entropy)
    else:
        if not isinstance(teacher_logits, TopK):
            teacher_logits = teacher_logits[..., : static.vocab_size]
        divergence = scaled_divergence(student_logits, teacher_logits, static.objective, coefficients)
    loss = combine(cross_entropy, divergence, static.objective, coefficients)
    return loss, (cross_entropy, divergence)
