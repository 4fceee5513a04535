import doctest
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from l2m_jax import losses
from l2m_jax.losses import divergences

PLAIN = ["forward_kl", "reverse_kl", "total_variation", "alpha_beta", "adaptive_kl", "todi"]
MIXED = ["skew_kl", "skew_reverse_kl", "jsd", "taid"]
STOPPED = ["adaptive_kl", "todi", "taid"]  # weights or targets without gradient
ALL = [(name, {}) for name in PLAIN] + [(name, {"alpha": a}) for name in MIXED for a in (0.0, 0.1, 0.5, 0.9)]


def logits(seed, shape=(3, 11), scale=2.0):
    student, teacher = np.random.default_rng(seed).normal(0, scale, (2, *shape)).astype(np.float32)
    return student, teacher


def divergence(name, options):
    return partial(getattr(losses, name), **options)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # teacher (1/2, 1/2), student (1/4, 3/4); the mixture at 1/2 is (3/8, 5/8)
        ("forward_kl", {}, 0.5 * np.log(2) + 0.5 * np.log(2 / 3)),
        ("reverse_kl", {}, 0.25 * np.log(1 / 2) + 0.75 * np.log(3 / 2)),
        ("skew_kl", {"alpha": 0.5}, 0.5 * np.log(4 / 3) + 0.5 * np.log(4 / 5)),
        # at 1/10 it is 0.1·(1/2, 1/2) + 0.9·(1/4, 3/4) = (0.275, 0.725)
        ("skew_kl", {"alpha": 0.1}, 0.5 * np.log(0.5 / 0.275) + 0.5 * np.log(0.5 / 0.725)),
        # and with the student's share at 1/10, (0.475, 0.525)
        ("skew_reverse_kl", {"alpha": 0.1}, 0.25 * np.log(0.25 / 0.475) + 0.75 * np.log(0.75 / 0.525)),
        (
            "jsd",
            {},
            (0.5 * np.log(4 / 3) + 0.5 * np.log(4 / 5)) / 2
            + (0.25 * np.log(2 / 3) + 0.75 * np.log(6 / 5)) / 2,
        ),
        ("total_variation", {}, 0.25),
    ],
)
def test_worked_by_hand(name, options, expected):
    teacher, student = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    # Logits are free up to a constant.
    np.testing.assert_allclose(divergence(name, options)(student + 3, teacher - 7), expected, atol=1e-6)


def test_cross_entropy_worked_by_hand():
    student = jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]]))
    np.testing.assert_allclose(
        losses.cross_entropy(student, jnp.array([1, 0])), [np.log(4 / 3), np.log(2)], rtol=1e-6
    )


@pytest.mark.parametrize("name", PLAIN + MIXED)
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    alpha=st.floats(0, 1),
    scale=st.sampled_from([1e-2, 1.0, 10.0]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
    padding=st.integers(0, 4),
)
def test_equals_float64_oracle(oracle, name, seed, alpha, scale, dtype, padding):
    student, teacher = (jnp.asarray(x, dtype) for x in logits(seed, scale=scale))
    padded = jnp.arange(11)[None, :] >= 11 - padding
    student, teacher = jnp.where(padded, -jnp.inf, student), jnp.where(padded, -jnp.inf, teacher)
    options = {"alpha": alpha} if name in MIXED else {}
    actual = divergence(name, options)(student, teacher)
    assert actual.shape == (3,) and actual.dtype == jnp.float32
    expected = oracle.divergence(name, student.astype(jnp.float32), teacher.astype(jnp.float32), alpha)
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-6)
    assert np.all(actual > -1e-6)


@pytest.mark.parametrize(("name", "options"), [case for case in ALL if case[0] not in STOPPED])
def test_gradients(name, options):
    student, teacher = logits(1)
    function = divergence(name, options)
    check_grads(lambda s: function(s, teacher), (student,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(("name", "options"), ALL)
@pytest.mark.parametrize("where", ["teacher", "student", "both"])
def test_logits_of_minus_infinity_give_no_nan(name, options, where):
    student, teacher = logits(2)
    infinite = np.arange(11)[None, :] >= 8
    if where != "student":
        teacher = np.where(infinite, -np.inf, teacher)
    if where != "teacher":
        student = np.where(infinite, -np.inf, student)

    def value(student, teacher):
        return jnp.sum(divergence(name, options)(student, teacher))

    result, gradients = jax.value_and_grad(value, (0, 1))(student, teacher)
    assert np.isfinite(result)
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))
    if where == "both":
        sliced, sliced_gradients = jax.value_and_grad(value, (0, 1))(student[:, :8], teacher[:, :8])
        np.testing.assert_allclose(result, sliced, rtol=1e-6, atol=1e-7)
        for gradient, expected in zip(gradients, sliced_gradients, strict=True):
            np.testing.assert_allclose(gradient[:, :8], expected, rtol=1e-5, atol=1e-7)
            np.testing.assert_array_equal(gradient[:, 8:], 0)


@pytest.mark.parametrize(("name", "options"), [("forward_kl", {}), ("skew_kl", {"alpha": 0.1})])
def test_tokens_that_the_teacher_rules_out_cost_nothing_by_themselves(oracle, name, options):
    student, teacher = logits(3)
    teacher[:, 4:] = -np.inf
    np.testing.assert_allclose(
        divergence(name, options)(student, teacher),
        oracle.divergence(name, student, teacher, options.get("alpha")),
        rtol=1e-5,
    )


def test_reverse_kl_pushes_mass_off_tokens_that_the_teacher_rules_out():
    student, teacher = logits(4, (11,))
    teacher[3] = -np.inf
    gradient = jax.grad(losses.reverse_kl)(student, teacher)
    assert gradient[3] > 0 and np.argmax(gradient) == 3


@pytest.mark.parametrize(("name", "plain"), [("skew_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")])
def test_alpha_zero_is_exactly_the_plain_divergence(name, plain):
    student, teacher = logits(5)

    def both(name, options):
        function = divergence(name, options)
        return jax.value_and_grad(lambda s: jnp.sum(function(s, teacher)))(student)

    for actual, expected in zip(both(name, {"alpha": 0.0}), both(plain, {}), strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert str(jax.make_jaxpr(divergence(name, {"alpha": 0.0}))(student, teacher)) == str(
        jax.make_jaxpr(divergence(plain, {}))(student, teacher)
    )


@pytest.mark.parametrize("name", ["skew_kl", "skew_reverse_kl", "jsd"])
def test_alpha_one_is_exactly_zero(name):
    student, teacher = logits(6)
    value, gradient = jax.value_and_grad(lambda s: jnp.sum(divergence(name, {"alpha": 1.0})(s, teacher)))(
        student
    )
    if name == "jsd":  # the student is compared with the teacher, with weight 0
        np.testing.assert_allclose(value, 0, atol=1e-6)
    else:
        assert value == 0
    np.testing.assert_allclose(gradient, 0, atol=1e-7)


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_out_of_range(name, alpha):
    with pytest.raises(ValueError, match="between 0 and 1"):
        divergence(name, {"alpha": alpha})(*logits(0))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-3, 1.0, 30.0]))
def test_bounds_and_symmetry(seed, scale):
    student, teacher = logits(seed, scale=scale)
    np.testing.assert_allclose(
        losses.jsd(student, teacher), losses.jsd(teacher, student), rtol=1e-5, atol=1e-6
    )
    assert np.all(losses.jsd(student, teacher) <= np.log(2) + 1e-5)
    variation = losses.total_variation(student, teacher)
    np.testing.assert_array_equal(variation, losses.total_variation(teacher, student))
    assert np.all((variation >= 0) & (variation <= 1 + 1e-6))
    # Pinsker's inequality
    assert np.all(variation**2 <= losses.forward_kl(student, teacher) / 2 + 1e-6)


@pytest.mark.parametrize(("name", "options"), ALL)
def test_identities(name, options):
    function = divergence(name, options)
    student, teacher = logits(7, (2, 3, 11))
    result = function(student, teacher)
    order = np.random.default_rng(0).permutation(11)
    np.testing.assert_allclose(
        function(student[..., order], teacher[..., order]), result, rtol=1e-5, atol=5e-7
    )
    np.testing.assert_allclose(function(student[1, 2], teacher[1, 2]), result[1, 2], rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.jit(function))(student, teacher), result, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(function(teacher, teacher), 0, atol=1e-6)


def test_a_fixed_mixture_has_the_same_value_and_another_gradient():
    student, teacher = logits(8)

    def both(mixture_gradient):
        return jax.value_and_grad(
            lambda s: jnp.sum(losses.skew_reverse_kl(s, teacher, 0.4, mixture_gradient=mixture_gradient))
        )(student)

    (value, gradient), (fixed_value, fixed_gradient) = both(True), both(False)
    assert value == fixed_value
    assert np.max(np.abs(gradient - fixed_gradient)) > 1e-2


@pytest.mark.parametrize("a", [0.0, 0.5, 1.0, -0.5])
@pytest.mark.parametrize("b", [0.0, 0.5, 1.0, -0.3])
def test_alpha_beta_and_its_limits(oracle, a, b):
    student, teacher = logits(9)
    p, q = (np.exp(x - np.log(np.exp(x).sum(-1, keepdims=True))) for x in np.float64([teacher, student]))
    value = losses.alpha_beta(student, teacher, a, b)
    np.testing.assert_allclose(value, oracle.alpha_beta(p, q, a, b), rtol=2e-5)
    plain = {(1.0, 0.0): losses.forward_kl, (0.0, 1.0): losses.reverse_kl}.get((a, b))
    if plain is not None:
        np.testing.assert_allclose(value, plain(student, teacher), rtol=1e-5)


def test_taid_goes_from_nothing_to_forward_kl():
    student, teacher = logits(10)
    np.testing.assert_allclose(losses.taid(student, teacher, 0.0), 0, atol=1e-6)
    np.testing.assert_allclose(
        losses.taid(student, teacher, 1.0), losses.forward_kl(student, teacher), rtol=1e-5
    )


def test_docstring_examples():
    assert doctest.testmod(divergences).failed == 0
