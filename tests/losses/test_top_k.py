"""Losses against a teacher's top k: as float64 NumPy computes them on the k tokens and the tail."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2m_jax import losses
from l2m_jax.losses import (
    DIVERGENCES,
    Coefficients,
    ForwardKL,
    Objective,
    SkewKL,
    TopK,
    chunks,
    fused_distillation_sums,
    fused_token_losses,
    fused_top_k,
    token_loss,
    top_k,
)

V, K, TOKENS, WIDTH = 29, 5, 40, 6
STOPPED = ("skew_reverse_kl_fixed_mixture", "adaptive_kl", "todi", "taid")  # constants within them
F_DIVERGENCES = ("forward_kl", "reverse_kl", "skew_kl", "skew_reverse_kl", "jsd", "total_variation")


@pytest.fixture(scope="module", autouse=True)
def _chunks_in_parts():
    """As with a large vocabulary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "_MIN_LOGITS_TO_DIVIDE", 0)
        yield


def _normal(seed, *shape):
    return np.random.default_rng(seed).normal(0, 1.5, shape).astype(np.float32)


def _log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _merged(logits, ids, tail):
    """float64 log-probabilities of the classes, from a distribution over the whole vocabulary."""
    log_probs = _log_softmax(logits)
    chosen = np.take_along_axis(log_probs, ids, -1)
    if not tail:
        return chosen - np.log(np.exp(chosen).sum(-1, keepdims=True))
    others = np.exp(log_probs)
    np.put_along_axis(others, ids, 0, -1)
    return np.concatenate([chosen, np.log(others.sum(-1, keepdims=True))], -1)


def _teacher(logits, tail) -> TopK:
    found = top_k(jnp.asarray(logits), K)
    return found if tail else found._replace(log_tail=None)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_and_its_gradient_on_the_classes(name, tail, oracle):
    student, teacher = _normal(0, 7, V), _normal(1, 7, V)
    ids = np.argsort(-teacher, -1)[:, :K]
    objective = Objective(DIVERGENCES[name])
    alpha = getattr(DIVERGENCES[name], "alpha", None)
    known = _teacher(teacher, tail)

    def loss(logits):
        return token_loss(logits, known, None, objective)

    expected = oracle.divergence(name, _merged(student, ids, tail), _merged(teacher, ids, tail), alpha)
    np.testing.assert_allclose(loss(jnp.asarray(student)), expected, rtol=2e-5, atol=1e-6)
    gradient = jax.grad(lambda logits: loss(logits).sum())(jnp.asarray(student))
    fixed = _merged(student, ids, tail) if name in STOPPED else None
    for v in (int(ids[0, 0]), int(np.argsort(-teacher[0])[-1])):  # one of the k, and one of the others
        shift = np.zeros(V)
        shift[v] = 1e-5
        up, down = (
            oracle.divergence(name, _merged(shifted, ids, tail), _merged(teacher, ids, tail), alpha, fixed)
            for shifted in (student + shift, student - shift)
        )
        np.testing.assert_allclose(gradient[:, v], (up - down) / 2e-5, rtol=1e-3, atol=2e-5)


def test_kl_is_that_of_the_split_plus_that_within_the_k(oracle):
    """The chain rule: KL with the tail = KL of the masses of both parts + the teacher's mass · KL without the tail."""
    student, teacher = _normal(2, 9, V), _normal(3, 9, V)
    with_tail, without = (
        token_loss(jnp.asarray(student), _teacher(teacher, tail), None, Objective(ForwardKL()))
        for tail in (True, False)
    )
    ids = np.argsort(-teacher, -1)[:, :K]
    p, q = (np.exp(_merged(logits, ids, True)) for logits in (teacher, student))
    p, q = (np.stack([1 - x[:, -1], x[:, -1]], -1) for x in (p, q))
    np.testing.assert_allclose(with_tail, oracle.divergence("forward_kl", np.log(q), np.log(p), None) + p[:, 0] * without, rtol=1e-5)  # fmt: skip


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_with_the_tail_it_is_at_most_the_exact_one_and_closer_for_larger_k(name):
    student, teacher = jnp.asarray(_normal(4, 9, V)), jnp.asarray(_normal(5, 9, V))
    objective = Objective(DIVERGENCES[name])
    exact = token_loss(student, teacher, None, objective)
    found = [token_loss(student, top_k(teacher, k), None, objective) for k in (2, 8, 20, V)]
    for smaller, larger in zip(found, [*found[1:], exact], strict=True):
        assert np.all(smaller <= larger + 1e-5)
    np.testing.assert_allclose(found[-1], exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("tail", "lead"), [(True, (2,)), (False, ())])
def test_fused_equals_dense(tail, lead):
    hidden, head = jnp.asarray(_normal(6, *lead, TOKENS, WIDTH)), jnp.asarray(_normal(7, V + 3, WIDTH))
    labels = jnp.asarray(np.random.default_rng(8).integers(0, V, (*lead, TOKENS)), jnp.int32)
    weights = jnp.broadcast_to(jnp.where(jnp.arange(TOKENS) < TOKENS - 5, 0.7, 0), labels.shape)
    known = _teacher(_normal(9, *lead, TOKENS, V), tail)
    # What lies at tokens without loss must not matter.
    known = known._replace(log_probs=jnp.where(weights[..., None] == 0, jnp.nan, known.log_probs))
    alpha = jnp.broadcast_to(jnp.linspace(0, 0.9, TOKENS), labels.shape)
    objective, coefficients = Objective(SkewKL(0.1), beta=0.7), Coefficients(alpha)

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def fused(hidden, head):
        sums = fused_distillation_sums(
            hidden, head, None, None, labels, weights, objective, teacher_top_k=known, coefficients=coefficients,
            valid_vocab_size=V, chunk_size=16,
        )  # fmt: skip
        return sums.loss / sums.weight, sums

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1))
    def dense(hidden, head):
        logits = jnp.einsum("...e,ve->...v", hidden, head)[..., :V]
        return losses.distillation_loss(logits, known, labels, weights, objective, coefficients)

    (loss, sums), gradients = fused(hidden, head)
    expected, expected_gradients = dense(hidden, head)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    _, divergence = fused_token_losses(
        hidden, head, None, None, labels, weights, objective, teacher_top_k=known, coefficients=coefficients,
        valid_vocab_size=V, chunk_size=16,
    )  # fmt: skip
    np.testing.assert_allclose(
        jnp.sum(weights * jnp.where(weights, divergence, 0)), sums.divergence, rtol=1e-5
    )


@pytest.mark.parametrize("lead", [(), (2,)])
def test_the_top_k_of_hidden_states(lead):
    hidden, head = _normal(10, *lead, TOKENS, WIDTH), _normal(11, V + 3, WIDTH)
    found = fused_top_k(
        jnp.asarray(hidden),
        jnp.asarray(head),
        jnp.ones((*lead, TOKENS)),
        K,
        valid_vocab_size=V,
        chunk_size=16,
    )
    log_probs = _log_softmax(hidden.astype(np.float64) @ head.T.astype(np.float64)[:, :V])
    ids = np.argsort(-log_probs, -1)[..., :K]
    np.testing.assert_array_equal(found.token_ids, ids)
    np.testing.assert_allclose(found.log_probs, np.take_along_axis(log_probs, ids, -1), atol=1e-5)
    np.testing.assert_allclose(found.log_tail, _merged(log_probs, ids, True)[..., -1], atol=1e-5)


def test_a_tiny_tail_keeps_its_digits():
    logits = np.zeros((1, V), np.float32)
    logits[0, :2] = (30.0, 29.0)
    expected = np.log((V - 2) * np.exp(0.0) / np.exp(np.float64(logits)).sum())
    np.testing.assert_allclose(top_k(jnp.asarray(logits), 2).log_tail, [expected], rtol=1e-6)


def test_a_temperature_needs_the_renormalised_form(oracle):
    student, teacher = _normal(12, 4, V), _normal(13, 4, V)
    warm = Objective(ForwardKL(), temperature=2.0)
    with pytest.raises(ValueError, match="at temperature 1"):
        token_loss(jnp.asarray(student), _teacher(teacher, True), None, warm)
    ids = np.argsort(-teacher, -1)[:, :K]
    found = token_loss(jnp.asarray(student), _teacher(teacher, False), None, warm)
    expected = oracle.divergence(
        "forward_kl", _merged(student / 2, ids, False), _merged(teacher / 2, ids, False), None
    )
    np.testing.assert_allclose(found, 4 * expected, rtol=1e-5)
