import doctest
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l2m_jax import losses
from l2m_jax.losses import (
    DIVERGENCES,
    JSD,
    ForwardKL,
    Objective,
    SkewKL,
    distillation,
    distillation_loss,
    token_loss,
    values,
)


def batch(seed, shape=(2, 3), vocabulary=7, scale=2.0):
    random = np.random.default_rng(seed)
    student, teacher = random.normal(0, scale, (2, *shape, vocabulary)).astype(np.float32)
    labels = random.integers(0, vocabulary, shape).astype(np.int32)
    weights = random.uniform(0.1, 2, shape).astype(np.float32)
    return student, teacher, labels, weights


@pytest.mark.parametrize("divergence", DIVERGENCES)
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    alpha=st.floats(0, 1),
    beta=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_value_and_gradient_equal_the_float64_oracle(
    oracle, divergence, seed, alpha, beta, temperature, dtype
):
    objective = Objective(DIVERGENCES[divergence].with_alpha(alpha), beta, temperature)
    student, teacher, labels, weights = batch(seed)
    student, teacher = jnp.asarray(student, dtype), jnp.asarray(teacher, dtype)

    def total(student):
        loss = token_loss(student, teacher, labels, objective)
        return jnp.sum(loss), loss

    (_, loss), gradient = jax.value_and_grad(total, has_aux=True)(student)
    student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
    np.testing.assert_allclose(
        loss, oracle.token_loss(student, teacher, labels, objective), rtol=2e-5, atol=2e-6
    )
    rounding = 1e-4 if dtype == jnp.float32 else 1e-2
    expected = oracle.token_loss_gradient(student, teacher, labels, objective)
    np.testing.assert_allclose(
        np.asarray(gradient, np.float32), expected, rtol=rounding, atol=2e-5 * temperature
    )

    mean = distillation_loss(student, teacher, labels, weights, objective)
    np.testing.assert_allclose(mean, np.sum(weights * loss) / np.sum(weights), rtol=1e-5)


def test_equation_3_worked_by_hand():
    teacher, student = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    kl = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    for beta in (0.0, 0.7, 1.0):
        loss = token_loss(student, teacher, jnp.array(0), Objective(ForwardKL(), beta=beta))
        np.testing.assert_allclose(loss, (1 - beta) * math.log(4) + beta * kl, rtol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.7, 1.0])
def test_scale_multiplies_value_and_gradient(beta):
    student, teacher, labels, _ = batch(0)

    def total(student, scale):
        objective = Objective(JSD(0.5), beta, scale=scale)
        return jnp.sum(token_loss(student, teacher, labels, objective))

    plain, scaled = (jax.value_and_grad(total)(jnp.asarray(student), scale) for scale in (1.0, 1.5))
    np.testing.assert_allclose(scaled[0], 1.5 * plain[0], rtol=1e-6)
    np.testing.assert_allclose(scaled[1], 1.5 * plain[1], rtol=1e-5, atol=1e-7)


def test_temperature_worked_by_hand():
    # Logits (0, log 9) at temperature 2 are probabilities (1/4, 3/4); the teacher's stay (1/2, 1/2).
    student, teacher = jnp.array([0.0, math.log(9)]), jnp.zeros(2)
    loss = token_loss(student, teacher, jnp.array(1), Objective(ForwardKL(), beta=0.5, temperature=2.0))
    kl = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    np.testing.assert_allclose(loss, 0.5 * -math.log(0.9) + 0.5 * 4 * kl, rtol=1e-5)


def test_zero_alpha_and_beta_leave_nothing_in_the_program():
    student, teacher, labels, _ = batch(0)

    def program(teacher, labels, objective):
        return jax.jit(token_loss, static_argnums=3).lower(student, teacher, labels, objective).as_text()

    assert program(teacher, None, Objective(SkewKL(0.0))) == program(teacher, None, Objective(ForwardKL()))
    assert program(None, labels, Objective(beta=0.0)) == program(None, labels, Objective(JSD(), beta=0.0))
    np.testing.assert_array_equal(
        token_loss(student, None, labels, Objective(beta=0.0)), losses.cross_entropy(student, labels)
    )
    np.testing.assert_array_equal(
        token_loss(student, teacher, None, Objective(JSD(0.3))), losses.jsd(student, teacher, 0.3)
    )


def test_tokens_without_weight_are_as_if_cut_off():
    student, teacher, labels, weights = batch(1, (9,))
    objective = Objective(SkewKL(0.1), 0.7)
    weights[4:] = 0
    student_nan, teacher_nan = student.copy(), teacher.copy()
    student_nan[6:], teacher_nan[5:] = np.nan, np.nan

    @jax.jit
    def both(student, teacher, labels, weights):
        return jax.value_and_grad(distillation_loss)(student, teacher, labels, weights, objective)

    value, gradient = both(student_nan, teacher_nan, labels, weights)
    expected, expected_gradient = both(student[:4], teacher[:4], labels[:4], weights[:4])
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient[:4], expected_gradient, rtol=1e-6)
    np.testing.assert_array_equal(gradient[4:], 0)


def test_no_weight_at_all_is_zero():
    student, teacher, labels, weights = batch(2)
    value, gradient = jax.value_and_grad(distillation_loss)(
        student, teacher, labels, 0 * weights, Objective()
    )
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_global_mean_is_not_the_mean_of_means():
    student, teacher, labels, _ = batch(3, (2, 4))
    weights = np.array([[1, 1, 1, 1], [1, 0, 0, 0]], np.float32)
    objective = Objective(ForwardKL(), beta=0.5)
    loss = token_loss(student, teacher, labels, objective)
    whole = distillation_loss(student, teacher, labels, weights, objective)
    np.testing.assert_allclose(whole, (jnp.sum(loss[0]) + loss[1, 0]) / 5, rtol=1e-5)
    halves = [distillation_loss(student[i], teacher[i], labels[i], weights[i], objective) for i in range(2)]
    assert abs(whole - sum(halves) / 2) > 1e-3


def test_valid_under_jit_vmap_and_grad():
    student, teacher, labels, weights = batch(4)
    objective = Objective(SkewKL(0.1), 0.7)
    compiled = jax.jit(jax.vmap(jax.grad(distillation_loss), in_axes=(0, 0, 0, 0, None)), static_argnums=4)
    result = compiled(student, teacher, labels, weights, objective)
    for i in range(2):
        expected = jax.grad(distillation_loss)(student[i], teacher[i], labels[i], weights[i], objective)
        np.testing.assert_allclose(result[i], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "kl"}, "'kl' is not a value such as SkewKL"),
        ({"beta": 1.5}, "beta must be between 0 and 1"),
        ({"temperature": 0.0}, "temperature must be a positive number"),
        ({"temperature": float("inf")}, "temperature must be a positive number"),
        ({"scale": 0.0}, "scale must be a positive number"),
    ],
)
def test_bad_objectives(options, message):
    with pytest.raises(ValueError, match=message):
        Objective(**options)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_bad_alpha(alpha):
    with pytest.raises(ValueError, match="alpha must be between 0 and 1"):
        SkewKL(alpha)


def test_missing_inputs():
    student, teacher, labels, _ = batch(5)
    with pytest.raises(ValueError, match="teacher_logits are needed"):
        token_loss(student, None, labels, Objective())
    with pytest.raises(ValueError, match="labels are needed"):
        token_loss(student, teacher, None, Objective(beta=0.7))
    with pytest.raises(ValueError, match="differ in shape"):
        token_loss(student, teacher[..., :-1], labels, Objective())


def test_needs():
    assert [(Objective(beta=b).needs_labels, Objective(beta=b).needs_teacher) for b in (0.0, 0.7, 1.0)] == [
        (True, False),
        (True, True),
        (False, True),
    ]


def test_the_import_needs_jax_alone():
    program = (
        "import sys\n"
        "from l2m_jax import losses\n"
        "print(*sorted({m.split('.')[0] for m in sys.modules}))\n"
        "print(*sorted(m for m in sys.modules if m.startswith('l2m_jax.')))\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    packages, own = (line.split() for line in output.splitlines())
    absent = {"flax", "transformers", "optax", "datasets", "orbax", "tokenizers", "absl", "ml_collections"}
    assert "jax" in packages and not absent & set(packages)
    assert all(name.split(".")[1] in ("losses", "products") for name in own)


def test_docstring_examples():
    assert doctest.testmod(distillation).failed == 0
    assert doctest.testmod(losses).failed == 0
    assert doctest.testmod(values).failed == 0
