"""How the next-token distributions of student and teacher compare, token by token, for diagnostics. No gradients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from l2m_jax.losses.chunks import Inputs, over_chunks, put_tokens, take_chunk
from l2m_jax.losses.distillation import Objective
from l2m_jax.losses.divergences import cross_entropy, forward_kl
from l2m_jax.losses.fused import DEFAULT_CHUNK_SIZE, prepare
from l2m_jax.products import project

TOP = 10


class Agreement(NamedTuple):
    """Measures of each token at temperature 1, float32 `[..., T]`; p is the teacher, q the student.

    Attributes:
        kl: KL(p ‖ q), in nats.
        cross_entropy: −log q of the label, in nats.
        entropy: of q, in nats.
        top1: 1 if both have the same most likely token, otherwise 0.
        top10: the share of the teacher's ten most likely tokens that are among the student's ten.
        teacher_cross_entropy, teacher_entropy: the same of p.
    """

    kl: jax.Array
    cross_entropy: jax.Array
    entropy: jax.Array
    top1: jax.Array
    top10: jax.Array
    teacher_cross_entropy: jax.Array
    teacher_entropy: jax.Array


def agreement(student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array) -> Agreement:
    """`Agreement` from logits `[..., V]` of one vocabulary and integer labels `[...]`."""
    # Not the first of the ten: XLA sorts the whole vocabulary, on a CPU 30 times as slow, if slices of these are read.
    best_q, best_p = (jnp.argmax(logits, axis=-1) for logits in (student_logits, teacher_logits))
    ids_q, ids_p = (_most_likely(logits) for logits in (student_logits, teacher_logits))
    common = jnp.any(ids_p[..., :, None] == ids_q[..., None, :], axis=-1)
    return Agreement(
        kl=forward_kl(student_logits, teacher_logits),
        cross_entropy=cross_entropy(student_logits, labels),
        entropy=_entropy(student_logits),
        top1=(best_p == best_q).astype(jnp.float32),
        top10=jnp.mean(common, axis=-1, dtype=jnp.float32),
        teacher_cross_entropy=cross_entropy(teacher_logits, labels),
        teacher_entropy=_entropy(teacher_logits),
    )


def _most_likely(logits: jax.Array) -> jax.Array:
    return lax.top_k(logits, min(TOP, logits.shape[-1]))[1]


def _entropy(logits: jax.Array) -> jax.Array:
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.sum(jnp.exp(log_probabilities) * log_probabilities, axis=-1)


def fused_token_agreement(
    student_hidden: jax.Array,
    student_head_VxE: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head_UxF: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    *,
    valid_vocab_size: int,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> Agreement:
    """`agreement` of the logits, holding those of only `chunk_size` tokens at a time.

    Args:
        student_hidden: `[..., T, E]`, in the dtype of the matrix products, which accumulate in float32.
        teacher_hidden: `[..., T, F]`, in any floating dtype.
        teacher_head_UxF: its dtype is the one in which the teacher's logits are computed.
        labels: integer `[..., T]`.
        weights: `[..., T]`, 0 for tokens to leave out, which come last.
        valid_vocab_size: entries of both vocabularies from this index on don't count.
        chunk_size: tokens per chunk, for each entry of the leading axes.

    Returns:
        Float32 arrays `[..., T]`, 0 where the weight is 0.
    """
    given = Inputs(student_hidden, student_head_VxE, teacher_hidden, teacher_head_UxF, labels, weights)
    static, inputs = prepare(given, Objective(), valid_vocab_size, chunk_size)
    axis = labels.ndim - 1
    head_VxE = student_head_VxE.astype(student_hidden.dtype)

    def body(start: jax.Array, size: int, done: Agreement) -> Agreement:
        chunk = take_chunk(inputs, start, size)
        assert chunk.teacher_hidden is not None
        student_logits = project(chunk.student_hidden, head_VxE)[..., :valid_vocab_size]
        teacher_logits = project(chunk.teacher_hidden, teacher_head_UxF)[..., :valid_vocab_size]
        found = agreement(student_logits, teacher_logits, chunk.labels)
        counted = [jnp.where(chunk.weights != 0, values, 0) for values in found]
        return Agreement(*(put_tokens(*pair, start, axis) for pair in zip(done, counted, strict=True)))

    zeros = jnp.zeros_like(inputs.weights)
    done = over_chunks(static, inputs.weights, body, Agreement(*[zeros] * len(Agreement._fields)))
    return Agreement(*(values[..., : labels.shape[-1]] for values in done))
