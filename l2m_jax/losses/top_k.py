"""A teacher of which only the k most probable tokens are known.

Two treatments of the rest of the vocabulary reduce both distributions to a few classes, and every divergence is then
computed on these classes:

- With the tail, the rest is one further class, with the mass that each model gives it. An f-divergence (KL and reverse
  KL, their skew forms, JSD, total variation) is then at most the exact one: merging classes loses information.
- Without it, both distributions are renormalised over the k tokens. How much the student gives to other tokens is then
  left to the cross-entropy.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class TopK(NamedTuple):
    """The teacher's most probable tokens.

    Attributes:
        token_ids: integer `[..., k]`, distinct.
        log_probs: `[..., k]`, their log-probabilities over the whole vocabulary, in any floating dtype.
        log_tail: `[...]`, the logarithm of the mass of all other tokens; None: without the tail.
    """

    token_ids: jax.Array
    log_probs: jax.Array
    log_tail: jax.Array | None = None


def top_k(logits: jax.Array, k: int) -> TopK:
    """The k most probable tokens of a distribution, with its tail, in float32.

    Args:
        logits: `[..., V]`, any floating dtype, V > k.

    >>> found = top_k(jnp.log(jnp.array([0.1, 0.6, 0.3])), 2)
    >>> print(found.token_ids, jnp.exp(found.log_tail).round(4))
    [1 2] 0.1
    """
    logits = logits.astype(jnp.float32)
    log_total = jax.nn.logsumexp(logits, axis=-1)
    largest, ids = jax.lax.top_k(logits, k)
    return TopK(ids, largest - log_total[..., None], _log_sum_of_others(logits, ids) - log_total)


def reduced(student_logits: jax.Array, teacher: TopK) -> tuple[jax.Array, jax.Array]:
    """Logits of student and teacher over the teacher's k tokens and, if it has one, the tail.

    Args:
        student_logits: `[..., V]`, any floating dtype.

    Returns:
        Two float32 arrays `[..., k]` or `[..., k + 1]`.
    """
    student_logits = student_logits.astype(jnp.float32)
    of_student = jnp.take_along_axis(student_logits, teacher.token_ids, axis=-1)
    of_teacher = teacher.log_probs.astype(jnp.float32)
    if teacher.log_tail is None:
        return of_student, of_teacher
    tail = _log_sum_of_others(student_logits, teacher.token_ids)
    return (
        jnp.concatenate([of_student, tail[..., None]], axis=-1),
        jnp.concatenate([of_teacher, teacher.log_tail.astype(jnp.float32)[..., None]], axis=-1),
    )


def _log_sum_of_others(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """log Σ exp(logits) over all tokens but `ids`. As 1 - Σ p it would lose small tails to rounding."""
    others = jnp.put_along_axis(logits, ids, -jnp.inf, axis=-1, inplace=False)
    return jax.nn.logsumexp(others, axis=-1)
