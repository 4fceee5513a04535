"""Agreement of two distributions against NumPy in float64 on dense logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2m_jax import losses

T, V, VALID = 37, 50, 47


def _log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def expected(student_logits, teacher_logits, labels):
    """Straight from the definitions, token by token."""
    rows = []
    for log_q, log_p, label in zip(
        _log_softmax(student_logits), _log_softmax(teacher_logits), labels, strict=True
    ):
        p, q = np.exp(log_p), np.exp(log_q)
        ten_p, ten_q = (set(np.argsort(-x)[:10].tolist()) for x in (log_p, log_q))
        rows.append(
            [
                (p * (log_p - log_q)).sum(),
                -log_q[label],
                -(q * log_q).sum(),
                float(log_p.argmax() == log_q.argmax()),
                len(ten_p & ten_q) / 10,
                -log_p[label],
                -(p * log_p).sum(),
            ]
        )
    return np.array(rows)


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 5)
    return {
        "student_hidden": jax.random.normal(keys[0], (T, 6)),
        "student_head_VxE": jax.random.normal(keys[1], (V, 6)),
        "teacher_hidden": jax.random.normal(keys[2], (T, 8)),
        "teacher_head_UxF": jax.random.normal(keys[3], (V + 3, 8)),  # padded further
        "labels": jax.random.randint(keys[4], (T,), 0, VALID),
    }


@pytest.fixture(scope="module")
def dense(inputs):
    student = np.asarray(inputs["student_hidden"]) @ np.asarray(inputs["student_head_VxE"]).T
    teacher = np.asarray(inputs["teacher_hidden"]) @ np.asarray(inputs["teacher_head_UxF"]).T
    found = expected(student[:, :VALID], teacher[:, :VALID], np.asarray(inputs["labels"]))
    assert 0 < found[:, 3].mean() < 1 and len(set(found[:, 4])) > 3  # every measure varies
    return found


def test_from_logits(dense, inputs):
    student = inputs["student_hidden"] @ inputs["student_head_VxE"].T
    teacher = inputs["teacher_hidden"] @ inputs["teacher_head_UxF"].T
    found = losses.agreement(student[:, :VALID], teacher[:, :VALID], inputs["labels"])
    np.testing.assert_allclose(np.stack(found, axis=-1), dense, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("chunk_size", [32, 512])
def test_in_chunks_with_padding_that_may_be_nan(dense, inputs, chunk_size):
    given = dict(inputs, student_hidden=inputs["student_hidden"].at[30:].set(jnp.nan))
    weights = (jnp.arange(T) < 30).astype(jnp.float32)
    found = losses.fused_token_agreement(
        **given, weights=weights, valid_vocab_size=VALID, chunk_size=chunk_size
    )
    found = np.stack(found, axis=-1)
    np.testing.assert_allclose(found[:30], dense[:30], rtol=2e-4, atol=2e-5)
    assert not found[30:].any()


def test_leading_axes(dense, inputs):
    pair = {name: x if "head" in name else jnp.stack([x, x[::-1]]) for name, x in inputs.items()}
    found = losses.fused_token_agreement(
        **pair, weights=jnp.ones((2, T)), valid_vocab_size=VALID, chunk_size=32
    )
    np.testing.assert_allclose(np.stack(found, axis=-1)[1, ::-1], dense, rtol=2e-4, atol=2e-5)


def test_of_a_distribution_with_itself(inputs):
    logits = inputs["student_hidden"] @ inputs["student_head_VxE"].T
    found = losses.agreement(logits, logits, inputs["labels"])
    np.testing.assert_allclose(found.kl, 0, atol=1e-6)
    assert (np.asarray(found.top1) == 1).all() and np.allclose(found.top10, 1)
    np.testing.assert_array_equal(found.entropy, found.teacher_entropy)
