"""The fused loss against the plain one: time and memory of value and gradient, from hidden states and heads."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2m_jax import progress
from l2m_jax.bench.common import Spread, matmul_rate, seconds, temporary_bytes
from l2m_jax.losses import DIVERGENCES, Objective, distillation_loss, fused_distillation_loss


def run(
    *,
    repeats: int = 3,
    tokens: int = 4096,
    vocabulary: int = 50257,
    widths: Sequence[int] = (768, 1600),
    divergences: Sequence[str] = tuple(DIVERGENCES),
    dtype: str = "float32",
) -> dict[str, Any]:
    """Both paths on the same random inputs, teacher and student of the same width, (1 - β)·CE + β·D at β = 0.7.

    Every divergence at the first width; the first divergence at the others, where only the matrix products differ.

    Args:
        repeats: timed runs of each, after one to warm up.
        dtype: of hidden states and heads.

    Returns:
        `rows`, one for each width, divergence and path: `seconds`; `of_matmul_rate`, the part of the machine's
        matmul rate (measured at the start) that its four matrix products are done at; `temporary_mb` by
        `memory_analysis()`; `difference` of the fused path's head gradient from the plain one's, relative to the
        largest entry. Over all of them, the worst `ratio_time` and `ratio_memory` of fused to plain.
    """
    cases = [(widths[0], divergence) for divergence in divergences]
    cases += [(width, divergences[0]) for width in widths[1:]]
    rate = matmul_rate(dtype, repeats=9)
    paths = {"plain": _plain, "fused": fused_distillation_loss}
    rows, time_ratios, memory_ratios = [], [], []
    with progress.bar("loss", len(cases) * len(paths)) as shown:
        for width, divergence in cases:
            inputs = _inputs(tokens, width, vocabulary, dtype)
            objective = Objective(DIVERGENCES[divergence].with_alpha(0.1), beta=0.7)
            measured = {}
            for name, loss in paths.items():
                measured[name] = _measure(partial(loss, objective=objective), inputs, repeats, rate)
                shown.advance()
            gradients = [measured[name].pop("head_gradient") for name in paths]
            for name, figures in measured.items():
                rows.append({"width": width, "divergence": divergence, "path": name, **figures})
            rows[-1]["difference"] = float(_relative_difference(*gradients))
            rows[-2]["difference"] = 0.0
            plain, fused = measured["plain"], measured["fused"]
            time_ratios.append(fused["seconds"].median / plain["seconds"].median)
            memory_ratios.append(fused["temporary_mb"] / plain["temporary_mb"])
    return {
        "tokens": tokens,
        "vocabulary": vocabulary,
        "dtype": dtype,
        "rows": [row | {"seconds": row["seconds"]._asdict()} for row in rows],
        "ratio_time": max(time_ratios),
        "ratio_memory": max(memory_ratios),
    }


def _plain(
    student_hidden, student_head, teacher_hidden, teacher_head, labels, weights, objective
) -> jax.Array:
    product = partial(jnp.einsum, "te,ve->tv", preferred_element_type=jnp.float32)
    return distillation_loss(
        product(student_hidden, student_head),
        product(teacher_hidden, teacher_head),
        labels,
        weights,
        objective,
    )


def _inputs(tokens: int, width: int, vocabulary: int, dtype: str) -> tuple[jax.Array, ...]:
    """Hidden states as after a norm, and heads that give logits a standard deviation of 2."""
    keys = jax.random.split(jax.random.key(0), 5)
    hidden = [jax.random.normal(key, (tokens, width), dtype) for key in keys[:2]]
    heads = [2 * width**-0.5 * jax.random.normal(key, (vocabulary, width), dtype) for key in keys[2:4]]
    labels = jax.random.randint(keys[4], (tokens,), 0, vocabulary)
    return hidden[0], heads[0], hidden[1], heads[1], labels, jnp.ones(tokens)


def _measure(
    loss: Callable[..., jax.Array], inputs: tuple[jax.Array, ...], repeats: int, rate: float
) -> dict[str, Any]:
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*inputs).compile()
    result: Any = None

    def call():
        nonlocal result
        result = compiled(*inputs)
        return result

    took: Spread = seconds(call, repeats)
    (tokens, width), vocabulary = inputs[0].shape, inputs[1].shape[0]
    operations = 4 * 2 * tokens * width * vocabulary
    return {
        "seconds": took,
        "of_matmul_rate": operations / took.median / rate,
        "temporary_mb": temporary_bytes(compiled) / 1e6,
        "head_gradient": np.asarray(result[1][1], np.float32),
    }


def _relative_difference(expected: np.ndarray, actual: np.ndarray) -> np.floating:
    return np.max(np.abs(actual - expected)) / np.max(np.abs(expected))
