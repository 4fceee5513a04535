from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from l2m_jax import losses
from l2m_jax.losses import (
    DIVERGENCES,
    JSD,
    Coefficients,
    Objective,
    SkewKL,
    chunks,
    distillation_loss,
    fused_distillation_loss,
    fused_distillation_sums,
    fused_token_losses,
    token_loss,
)

STOPPED = ("skew_reverse_kl_fixed_mixture", "adaptive_kl", "todi", "taid")  # constants within them
OBJECTIVE = Objective(SkewKL(0.1), 0.7)


@pytest.fixture(scope="module", autouse=True)
def _chunks_in_parts():
    """Chunks are divided, and have several blocks, as with a large vocabulary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "_MIN_LOGITS_TO_DIVIDE", 0)
        patch.setattr(chunks, "_BLOCK_LOGITS_CPU", 8 * 29)
        yield


class Inputs(NamedTuple):
    student_hidden: jax.Array
    student_head_VxE: jax.Array
    teacher_hidden: jax.Array
    teacher_head_UxF: jax.Array
    labels: jax.Array
    weights: jax.Array


def inputs(seed=0, lead=(), tokens=37, width=6, teacher_width=9, vocabulary=29, dtype=jnp.float32):
    random = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return jnp.asarray(random.normal(0, scale, shape), dtype)

    return Inputs(
        normal(*lead, tokens, width),
        normal(vocabulary, width, scale=0.6),
        normal(*lead, tokens, teacher_width),
        normal(vocabulary, teacher_width, scale=0.5),
        jnp.asarray(random.integers(0, vocabulary, (*lead, tokens)), jnp.int32),
        jnp.asarray(random.uniform(0.1, 2, (*lead, tokens)), jnp.float32),
    )


def dense_logits(hidden, head):
    return jnp.einsum("...e,ve->...v", hidden, head, preferred_element_type=jnp.float32)


def dense(student_hidden, student_head, teacher_hidden, teacher_head, labels, weights, objective=OBJECTIVE):
    return distillation_loss(
        dense_logits(student_hidden, student_head),
        dense_logits(teacher_hidden, teacher_head),
        labels,
        weights,
        objective,
    )


@partial(jax.jit, static_argnames=("objective", "chunk_size", "valid_vocab_size"))
def fused_with_gradient(
    hidden,
    head,
    *rest: jax.Array | None,
    objective=OBJECTIVE,
    coefficients=Coefficients(),  # noqa: B008 (a value)
    chunk_size=16,
    valid_vocab_size=None,
):
    return jax.value_and_grad(fused_distillation_loss, (0, 1))(
        hidden,
        head,
        *rest,
        objective,
        coefficients=coefficients,
        chunk_size=chunk_size,
        valid_vocab_size=valid_vocab_size,
    )


@partial(jax.jit, static_argnames="objective")
def dense_with_gradient(hidden, head, *rest, objective=OBJECTIVE):
    return jax.value_and_grad(dense, (0, 1))(hidden, head, *rest, objective)


def assert_same(actual, expected, tolerance=1e-5):
    """Equal relative to the largest entry, as values and gradients of a whole batch are compared."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance * np.max(np.abs(e), initial=1e-30))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@settings(max_examples=2, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    alpha=st.sampled_from([0.0, 0.1, 0.5]),
    beta=st.sampled_from([0.0, 0.7, 1.0]),
    temperature=st.sampled_from([1.0, 2.0]),
    lead=st.sampled_from([(), (2,)]),
    zeros=st.integers(0, 37),
)
def test_equals_dense_path(divergence, seed, alpha, beta, temperature, lead, zeros):
    objective = Objective(DIVERGENCES[divergence].with_alpha(alpha), beta, temperature)
    batch = inputs(seed, lead)
    batch = batch._replace(
        weights=jnp.where(jnp.arange(37) >= 37 - zeros, 0, 1)[(None,) * len(lead)] * batch.weights
    )
    actual, expected = (
        fused_with_gradient(*batch, objective=objective),
        dense_with_gradient(*batch, objective=objective),
    )
    assert_same(actual, expected)


@pytest.mark.parametrize("divergence", [n for n in DIVERGENCES if n not in STOPPED])
def test_gradients(divergence):
    batch = inputs(1, tokens=11)
    objective = Objective(DIVERGENCES[divergence].with_alpha(0.3), 0.6, 1.5)

    def loss(hidden, head):
        return fused_distillation_loss(hidden, head, *batch[2:], objective, chunk_size=8)

    check_grads(jax.jit(loss), batch[:2], order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("beta", [0.0, 0.7, 1.0])
def test_sums_equal_float64_oracle(oracle, beta):
    objective = Objective(SkewKL(0.15), beta, 2.0)
    batch = inputs(2, (2,))
    h, w, th, tw = (np.asarray(x, np.float64) for x in batch[:4])
    student, teacher, labels = h @ w.T, th @ tw.T, np.asarray(batch.labels)
    weights = np.asarray(batch.weights, np.float64)
    cross_entropy = oracle.cross_entropy(student, labels)
    divergence = 4 * oracle.divergence("skew_kl", student / 2, teacher / 2, 0.15)
    sums = fused_distillation_sums(*batch, objective, chunk_size=16)
    np.testing.assert_allclose(
        sums.loss, np.sum(weights * oracle.token_loss(student, teacher, labels, objective)), rtol=1e-5
    )
    np.testing.assert_allclose(sums.cross_entropy, np.sum(weights * cross_entropy), rtol=1e-5)
    np.testing.assert_allclose(sums.divergence, np.sum(weights * divergence) if beta else 0.0, rtol=1e-5)
    np.testing.assert_allclose(sums.weight, np.sum(weights), rtol=1e-6)

    each = fused_token_losses(*batch, objective, chunk_size=16)
    np.testing.assert_allclose(each[0], cross_entropy, rtol=1e-5)
    np.testing.assert_allclose(each[1], divergence if beta else 0 * divergence, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("tokens", "chunk_size"), [(1, 8), (16, 8), (17, 8), (17, 1000)])
def test_chunk_boundaries(tokens, chunk_size):
    batch = inputs(3, tokens=tokens)
    assert_same(fused_with_gradient(*batch, chunk_size=chunk_size), dense_with_gradient(*batch))


@pytest.mark.parametrize("targets", [0, 16, 17])
def test_tokens_without_weight_are_as_if_cut_off(targets):
    batch = inputs(4)
    masked = batch._replace(
        student_hidden=batch.student_hidden.at[targets:].set(jnp.nan),
        teacher_hidden=batch.teacher_hidden.at[targets:].set(jnp.nan),
        weights=batch.weights.at[targets:].set(0),
    )
    value, (hidden_gradient, head_gradient) = fused_with_gradient(*masked)
    np.testing.assert_array_equal(hidden_gradient[targets:], 0)
    if targets == 0:
        assert value == 0 and not np.any(head_gradient)
        return
    sliced = Inputs(*(x[:targets] if x.shape[0] == 37 else x for x in batch))
    assert_same((value, (hidden_gradient[:targets], head_gradient)), dense_with_gradient(*sliced))


def test_targets_need_not_come_first():
    batch = inputs(5, (2,))
    keep = np.random.default_rng(0).uniform(size=(2, 37)) < 0.3
    batch = batch._replace(weights=jnp.where(keep, batch.weights, 0))
    assert_same(fused_with_gradient(*batch), dense_with_gradient(*batch))


def test_heads_of_different_size():
    batch = inputs(6)
    cut = (batch.student_head_VxE, batch.teacher_head_UxF)
    padding = np.random.default_rng(1).normal(0, 5, (9, 9)).astype(np.float32)
    wide = batch._replace(
        student_head_VxE=jnp.concatenate([cut[0], padding[:4, :6]]),
        teacher_head_UxF=jnp.concatenate([cut[1], padding]),
    )
    value, (hidden_gradient, head_gradient) = fused_with_gradient(*wide, valid_vocab_size=29)
    assert head_gradient.shape == (33, 6)
    np.testing.assert_array_equal(head_gradient[29:], 0)
    result = (value, (hidden_gradient, head_gradient[:29]))
    assert_same(result, dense_with_gradient(*batch))

    # The dense path with -inf in the padding, as the models' logits have it.
    def loss(hidden, head):
        student = dense_logits(hidden, jnp.pad(head, ((0, 5), (0, 0))))
        teacher = dense_logits(wide.teacher_hidden, wide.teacher_head_UxF)
        valid = (jnp.arange(38) < 29)[None, :]
        student, teacher = jnp.where(valid, student, -jnp.inf), jnp.where(valid, teacher, -jnp.inf)
        return distillation_loss(student, teacher, wide.labels, wide.weights, OBJECTIVE)

    value, (hidden_gradient, head_gradient) = jax.jit(jax.value_and_grad(loss, (0, 1)))(*wide[:2])
    assert_same(result, (value, (hidden_gradient, head_gradient[:29])))


def test_vocabulary_permutation_and_leading_axes():
    batch = inputs(7, (2, 3), tokens=10)
    value, gradients = fused_with_gradient(*batch, chunk_size=8)
    order = np.random.default_rng(0).permutation(29)
    permuted = batch._replace(
        student_head_VxE=batch.student_head_VxE[order],
        teacher_head_UxF=batch.teacher_head_UxF[order],
        labels=jnp.argsort(order)[batch.labels].astype(jnp.int32),
    )
    permuted_value, (hidden_gradient, head_gradient) = fused_with_gradient(*permuted, chunk_size=8)
    assert_same(
        (permuted_value, (hidden_gradient, head_gradient[jnp.argsort(order)])), (value, gradients), 2e-5
    )
    flat = Inputs(*(x.reshape(60, *x.shape[3:]) if x.shape[:2] == (2, 3) else x for x in batch))
    flat_value, (hidden_gradient, head_gradient) = fused_with_gradient(*flat)
    assert_same((flat_value, (hidden_gradient.reshape(2, 3, 10, 6), head_gradient)), (value, gradients))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    batch = inputs(8, dtype=dtype)
    batch = batch._replace(teacher_hidden=batch.teacher_hidden.astype(jnp.float32))
    value, gradients = fused_with_gradient(*batch)
    assert value.dtype == jnp.float32 and all(g.dtype == dtype for g in gradients)
    exact = [x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in batch]
    exact[2] = exact[2].astype(dtype).astype(jnp.float32)  # the teacher's head sets its compute dtype
    expected, expected_gradients = dense_with_gradient(*exact)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert_same([g.astype(jnp.float32) for g in gradients], expected_gradients, 2e-2)


def test_mixed_dtypes():
    """float32 parameters with bfloat16 hidden states, the usual mixed precision."""
    batch = inputs(9)
    mixed = batch._replace(student_hidden=batch.student_hidden.astype(jnp.bfloat16))
    value, (hidden_gradient, head_gradient) = fused_with_gradient(*mixed)
    assert hidden_gradient.dtype == jnp.bfloat16 and head_gradient.dtype == jnp.float32
    rounded = batch._replace(
        student_hidden=mixed.student_hidden.astype(jnp.float32),
        student_head_VxE=batch.student_head_VxE.astype(jnp.bfloat16).astype(jnp.float32),
    )
    expected, gradients = dense_with_gradient(*rounded)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert_same((hidden_gradient.astype(jnp.float32), head_gradient), gradients, 2e-2)


def test_sums_are_float32():
    """1,000 ones add up to 1,000; in bfloat16 they stop at 256."""
    batch = inputs(10, tokens=1000, dtype=jnp.bfloat16)
    sums = fused_distillation_sums(
        *batch._replace(weights=jnp.ones(1000, jnp.bfloat16)), OBJECTIVE, chunk_size=128
    )
    assert all(x.dtype == jnp.float32 and x.shape == () for x in sums)
    assert sums.weight == 1000


def test_only_loss_carries_gradient_and_only_to_the_student():
    batch = inputs(11)

    @jax.jit
    def gradients(floats, labels):
        def sums(floats):
            return fused_distillation_sums(*floats[:4], labels, floats[4], OBJECTIVE)

        return jax.jacrev(sums)(floats)

    by_name = gradients((*batch[:4], batch.weights), batch.labels)
    for name, of_each_argument in by_name._asdict().items():
        nonzero = [bool(np.any(g)) for g in of_each_argument]
        assert nonzero == ([True, True, False, False, False] if name == "loss" else [False] * 5)


def test_without_teacher_or_gradient():
    batch = inputs(12)
    plain = Objective(beta=0.0)
    without = fused_with_gradient(*batch[:2], None, None, *batch[4:], objective=plain)
    assert_same(without, dense_with_gradient(*batch, objective=plain))
    for objective in (plain, OBJECTIVE):
        value = fused_distillation_loss(*batch, objective, chunk_size=16)
        np.testing.assert_allclose(value, fused_with_gradient(*batch, objective=objective)[0], rtol=1e-6)


def count_products(jaxpr) -> int:
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == "dot_general"
        inner = [value for value in jax.tree.leaves(equation.params) if hasattr(value, "eqns")]
        count += sum(map(count_products, inner))
    return count


def test_each_logit_is_computed_once():
    """Products with a head: student and teacher logits, and the gradient's two. Without gradient, the logits.

    A large vocabulary compiles all of them for a chunk, a half, a quarter and an eighth of one.
    """
    batch = inputs(13)

    def loss(hidden, head, objective):
        return fused_distillation_loss(hidden, head, *batch[2:], objective, chunk_size=8)

    for objective, expected in ((OBJECTIVE, (2, 4)), (Objective(beta=0.0), (1, 3))):
        functions = (loss, jax.value_and_grad(loss, (0, 1)))
        for function, products in zip(functions, expected, strict=True):
            jaxpr = jax.make_jaxpr(partial(function, objective=objective))(*batch[:2])
            assert count_products(jaxpr.jaxpr) == 4 * products


@pytest.mark.parametrize("tokens", [100, 500])
def test_no_product_is_computed_outside_the_loops(tokens):
    """XLA moves products out of a loop that has only one chunk to compute: then they run even without a target."""
    vocabulary = 1 << 16
    shapes = jax.eval_shape(partial(inputs, tokens=tokens, vocabulary=vocabulary))
    gradient = jax.grad(lambda *batch: fused_distillation_loss(*batch, OBJECTIVE, chunk_size=512), (0, 1))
    text = jax.jit(gradient).lower(*shapes).compile().as_text()
    outside = text[text.index("\nENTRY ") :]
    assert f",{vocabulary}]" in text and f",{vocabulary}]" not in outside


@pytest.mark.parametrize("width", [32, 128])
def test_peak_memory_is_a_fraction_of_the_dense_path(width):
    shapes = jax.eval_shape(partial(inputs, tokens=1024, width=width, teacher_width=width, vocabulary=8192))

    def temporary(loss):
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    fused = temporary(lambda *batch: fused_distillation_loss(*batch, OBJECTIVE, chunk_size=64))
    assert fused <= temporary(dense) / 8


def test_compiles_once_for_each_objective():
    function = jax.jit(fused_distillation_loss, static_argnums=6)
    for seed in range(3):
        batch = inputs(seed)
        function(*batch._replace(weights=batch.weights.at[5 * seed :].set(0)), Objective(JSD(0.5), 0.7))
    assert function._cache_size() == 1
    function(*batch, Objective(JSD(0.5), 0.8))
    assert function._cache_size() == 2


def test_under_vmap():
    batch = inputs(14, (3,))
    axes = Inputs(0, None, 0, None, 0, 0)
    weights = batch.weights.at[1, 9:].set(0)  # trip counts differ
    batch = batch._replace(weights=weights)
    values, gradients = jax.vmap(fused_with_gradient, in_axes=tuple(axes))(*batch)
    for i in range(3):
        one = Inputs(*(x if axis is None else x[i] for x, axis in zip(batch, axes, strict=True)))
        assert_same((values[i], (gradients[0][i], gradients[1][i])), dense_with_gradient(*one))


def test_mapped_over_devices():
    """pmap with one share a device, and jit over a mesh with the leading axis sharded, equal one device."""
    batch = inputs(15, (4,))
    batch = batch._replace(
        weights=jnp.where(jnp.arange(37)[None, :] < jnp.array([[3], [37], [0], [20]]), 1.0, 0)
    )

    def loss(hidden, head, *rest):
        return fused_distillation_sums(hidden, head, *rest, OBJECTIVE, chunk_size=16).loss

    expected = jax.jit(jax.value_and_grad(loss, (0, 1)))(*batch)

    def share(*batch):
        value, (hidden_gradient, head_gradient) = jax.value_and_grad(loss, (0, 1))(*batch)
        return jax.lax.psum(value, "devices"), (hidden_gradient, jax.lax.psum(head_gradient, "devices"))

    values, (hidden_gradient, head_gradients) = jax.pmap(
        share, axis_name="devices", in_axes=(0, None, 0, None, 0, 0)
    )(*batch)
    shares = [np.asarray(x.addressable_shards[0].data)[0] for x in (values, head_gradients)]
    assert_same((jnp.asarray(shares[0]), (hidden_gradient, jnp.asarray(shares[1]))), expected)

    mesh = jax.make_mesh((4,), ("devices",), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("devices",), ()))
    shardings = Inputs(split, whole, split, whole, split, split)
    compiled = (
        jax.jit(
            jax.value_and_grad(loss, (0, 1)),
            in_shardings=tuple(shardings),
            out_shardings=(whole, (split, whole)),
        )
        .lower(*batch)
        .compile()
    )
    assert_same(compiled(*jax.device_put(batch, shardings)), expected)
    # Nothing token-sized moves between devices.
    assert "all-gather" not in compiled.as_text() and "all-to-all" not in compiled.as_text()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"labels": jnp.zeros(36, jnp.int32)}, {}, "must agree"),
        ({"teacher_hidden": jnp.zeros((36, 9))}, {}, "must agree"),
        ({"teacher_hidden": None}, {}, "teacher_hidden and teacher_head_UxF are needed"),
        ({"teacher_head_UxF": jnp.zeros((30, 9))}, {}, "valid_vocab_size must be given"),
        ({}, {"valid_vocab_size": 30}, "valid_vocab_size 30 does not fit"),
        ({}, {"chunk_size": 0}, "chunk_size must be at least 1"),
    ],
)
@pytest.mark.parametrize("function", [fused_distillation_sums, fused_token_losses])
def test_bad_inputs(function, change, options, message):
    with pytest.raises(ValueError, match=message):
        function(*inputs()._replace(**change), OBJECTIVE, **options)


def test_public_names():
    assert all(hasattr(losses, name) for name in losses.__all__)
    assert token_loss is losses.token_loss


@pytest.mark.parametrize("divergence", ["skew_kl", "skew_reverse_kl_fixed_mixture", "jsd", "taid"])
@pytest.mark.parametrize("shape", [(), (37,)])
def test_constant_coefficients_equal_the_static_objective(divergence, shape):
    batch, static = inputs(15), Objective(DIVERGENCES[divergence].with_alpha(0.3), 0.6, 1.5)
    varying = Objective(DIVERGENCES[divergence].with_alpha(0.9), 1.0, 1.0)
    coefficients = Coefficients(*(jnp.full(shape, value) for value in (0.3, 0.6, 1.5)))
    expected = fused_with_gradient(*batch, objective=static)
    assert_same(fused_with_gradient(*batch, objective=varying, coefficients=coefficients), expected, 2e-5)
    logits = dense_logits(*batch[:2]), dense_logits(*batch[2:4])
    np.testing.assert_allclose(
        distillation_loss(*logits, *batch[4:], varying, coefficients), expected[0], rtol=1e-5
    )


def test_coefficients_of_each_token_equal_the_float64_oracle(oracle):
    """No gradient flows to them, and other values compile nothing anew."""
    batch, random = inputs(16), np.random.default_rng(0)
    h, w, th, tw = (np.asarray(x, np.float64) for x in batch[:4])
    student, teacher, weights = h @ w.T, th @ tw.T, np.asarray(batch.weights, np.float64)
    compiled = jax.jit(partial(fused_distillation_loss, chunk_size=16), static_argnums=6)
    for _ in range(2):
        alpha, beta, temperature = (random.uniform(low, high, 37) for low, high in ((0, 1), (0, 1), (0.5, 2)))
        coefficients = Coefficients(*(jnp.asarray(x, jnp.float32) for x in (alpha, beta, temperature)))
        divergence = [
            t**2 * oracle.divergence("skew_kl", q / t, p / t, a)
            for q, p, a, t in zip(student, teacher, alpha, temperature, strict=True)
        ]
        cross_entropy = oracle.cross_entropy(student, np.asarray(batch.labels))
        expected = np.sum(weights * ((1 - beta) * cross_entropy + beta * divergence)) / np.sum(weights)
        found = compiled(*batch, OBJECTIVE, coefficients=coefficients)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert compiled._cache_size() == 1

    def loss(coefficients):
        return fused_distillation_loss(*batch, OBJECTIVE, coefficients=coefficients)

    assert not any(np.any(g) for g in jax.tree.leaves(jax.grad(loss)(coefficients)))
