"""Agreement of two models on examples, against their dense logits of each example by itself, in float64."""

import dataclasses

import jax
import numpy as np
import pytest

from l2m_jax import models
from l2m_jax.data.batches import ListedExamples
from l2m_jax.evaluation.diagnostics import MEASURES, TeacherSide, agreement_by_example, by_group, means
from l2m_jax.models import DecoderConfig
from l2m_jax.parallel import Placement
from l2m_jax.types import TeacherRows

STUDENT = DecoderConfig(
    family="gpt2", vocab_size=61, valid_vocab_size=60, hidden_size=16, embed_size=16, num_layers=2, num_heads=2,
    num_kv_heads=2, head_dim=8, intermediate_size=32, max_positions=32, residual_dropout=0.5, init_std=0.3,
)  # fmt: skip
TEACHER = dataclasses.replace(STUDENT, hidden_size=24, embed_size=24, head_dim=12, num_layers=1)
LENGTHS, PROMPTS = [4, 25, 9, 31, 6], [2, 3, 8, 5, 1]


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 60, size=n).astype(np.int32) for n in LENGTHS]
    return ListedExamples(tokens, np.array(PROMPTS, np.int32))


@pytest.fixture(scope="module")
def params():
    return models.init(STUDENT, jax.random.key(0)), models.init(TEACHER, jax.random.key(1))


def _at_targets(function, config, params, examples, i: int) -> np.ndarray:
    tokens = np.pad(examples.example_tokens(i), (0, 32 - LENGTHS[i]))[None]
    found = jax.jit(function, static_argnums=0)(config, params, tokens)[0]
    return np.asarray(found[PROMPTS[i] - 1 : LENGTHS[i] - 1], np.float64)


def _log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def expected(examples, params):
    """Sums of KL, cross-entropy, entropy, the same most likely token and common ones of each example."""
    found = []
    for i in range(len(examples)):
        log_q, log_p = (
            _log_softmax(_at_targets(models.logits, config, of, examples, i)[:, :60])
            for config, of in zip((STUDENT, TEACHER), params, strict=True)
        )
        labels = examples.example_tokens(i)[PROMPTS[i] :]
        kl = (np.exp(log_p) * (log_p - log_q)).sum()
        cross_entropy = -log_q[np.arange(len(labels)), labels].sum()
        entropy = -(np.exp(log_q) * log_q).sum()
        ten_p, ten_q = (np.argsort(-x)[:, :10] for x in (log_p, log_q))
        common = sum(len(set(p) & set(q)) for p, q in zip(ten_p.tolist(), ten_q.tolist(), strict=True)) / 10
        found.append([kl, cross_entropy, entropy, (ten_p[:, 0] == ten_q[:, 0]).sum(), common])
    return np.array(found)


@pytest.mark.parametrize(("mapping", "devices"), [("pmap", 1), ("pmap", 4), ("fsdp", 4)])
def test_sums_by_example(examples, params, expected, mapping, devices):
    placement = Placement(mapping, tuple(jax.devices()[:devices]))
    student, teacher = params

    def rows(i: int) -> TeacherRows:
        hidden = _at_targets(models.hidden_states, TEACHER, teacher, examples, i).astype(np.float32)
        return {"teacher_hidden_TxE": hidden}

    side = TeacherSide(rows, placement.place(models.head(TEACHER, teacher)), 60)
    found = agreement_by_example(
        STUDENT, placement.place(student), examples, side, placement, chunk_size=16, slots=32
    )
    assert found.shape == (5, len(MEASURES))
    np.testing.assert_allclose(found[:, :5], expected, rtol=1e-4)


def test_means_weigh_tokens_equally():
    sums, targets = np.arange(21, dtype=float).reshape(3, 7), np.array([1, 2, 5])
    assert means(sums, targets, [0, 2])["cross_entropy"] == (1 + 15) / 6
    groups = by_group(sums, targets, {"a": [0, 2], "b": [1]})
    assert groups["a"]["rows"] == 2 and groups["a"]["kl"] == 14 / 6 and groups["b"]["kl"] == 3.5
