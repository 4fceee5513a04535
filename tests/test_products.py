"""Products against float64, their gradients, and the form in which they reach the compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2m_jax import products

DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])


def _arrays(dtype, *shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def _exact(*arrays):
    return [np.asarray(x, np.float64) for x in arrays]


def _assert_close(found, expected, dtype):
    tolerance = 1e-5 if dtype == jnp.float32 else 2**-7
    np.testing.assert_allclose(
        np.asarray(found, np.float64), expected, rtol=tolerance, atol=tolerance * np.abs(expected).max()
    )


@DTYPES
@pytest.mark.parametrize("shape", [(33, 48, 65), (1, 3, 2), (2, 5, 48, 16)])
def test_dense_and_its_gradients(dtype, shape):
    *tokens, width, features = shape
    x, kernel, gradient = _arrays(dtype, (*tokens, width), (width, features), (*tokens, features))

    @jax.jit
    def both(x, kernel, gradient):
        y, transposed = jax.vjp(products.dense, x, kernel)
        return y, *transposed(gradient)

    y, of_x, of_kernel = both(x, kernel, gradient)
    exact_x, exact_kernel, exact_gradient = _exact(x, kernel, gradient)
    assert y.dtype == of_x.dtype == of_kernel.dtype == dtype
    _assert_close(y, exact_x @ exact_kernel, dtype)
    _assert_close(of_x, exact_gradient @ exact_kernel.T, dtype)
    flat = exact_x.reshape(-1, width).T @ exact_gradient.reshape(-1, features)
    _assert_close(of_kernel, flat, dtype)


@DTYPES
def test_batched_products_and_their_gradients(dtype):
    scores, values, gradient = _arrays(dtype, (2, 3, 16, 9), (2, 3, 9, 4), (2, 3, 16, 4))

    @jax.jit
    def both(scores, values, gradient):
        subscripts = "BKQS,BKSD->BKQD"
        y, transposed = jax.vjp(lambda s, v: products.product(subscripts, s, v), scores, values)
        return y, *transposed(gradient.astype(jnp.float32))

    y, of_scores, of_values = both(scores, values, gradient)
    s, v, g = _exact(scores, values, gradient)
    assert y.dtype == jnp.float32
    assert of_scores.dtype == of_values.dtype == dtype
    np.testing.assert_allclose(y, np.einsum("BKQS,BKSD->BKQD", s, v), rtol=1e-4, atol=1e-4)
    _assert_close(of_scores, np.einsum("BKQD,BKSD->BKQS", g, v), dtype)
    _assert_close(of_values, np.einsum("BKQS,BKQD->BKSD", s, g), dtype)


@DTYPES
@pytest.mark.parametrize("tokens", [(17,), (2, 9)])
def test_logits_and_the_gradient_of_the_head(dtype, tokens):
    hidden, head, gradient = _arrays(dtype, (*tokens, 24), (70, 24), (*tokens, 70))
    exact_hidden, exact_head, exact_gradient = _exact(hidden, head, gradient)
    logits = jax.jit(products.project)(hidden, head)
    of_head = jax.jit(products.head_gradient)(gradient, hidden)
    assert logits.dtype == of_head.dtype == jnp.float32
    np.testing.assert_allclose(logits, exact_hidden @ exact_head.T, rtol=1e-4, atol=1e-4)
    expected = exact_gradient.reshape(-1, 70).T @ exact_hidden.reshape(-1, 24)
    np.testing.assert_allclose(of_head, expected, rtol=1e-4, atol=1e-4)


def test_many_devices_compute_the_same():
    x, kernel = _arrays(jnp.bfloat16, (8, 5, 16), (16, 12))

    def loss(kernel, x):
        return jnp.sum(products.dense(x, kernel).astype(jnp.float32) ** 2)

    alone = jax.grad(loss)(kernel, x)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("rows",))
    by_row = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    split = jax.jit(jax.grad(loss))(kernel, jax.device_put(x, by_row))
    mapped = jax.pmap(jax.grad(loss), in_axes=(None, 0))(kernel, x).astype(jnp.float32).sum(0)
    expected = np.asarray(alone, np.float32)
    tolerance = 0.02 * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(split, np.float32), expected, atol=tolerance)
    np.testing.assert_allclose(np.asarray(mapped, np.float32), expected, atol=tolerance)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_what_the_compiler_of_a_platform_is_given(platform):
    """On a GPU the sums of a bfloat16 product are not written in float32; on a CPU they have to be."""
    x, kernel = _arrays(jnp.bfloat16, (33, 48), (48, 16))

    def gradients(x, kernel):
        y, transposed = jax.vjp(products.dense, x, kernel)
        return transposed(y)

    lowered = jax.jit(gradients).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
    results = [line.split("->")[-1] for line in lowered.splitlines() if "stablehlo.dot_general" in line]
    assert len(results) == 3
    assert all(("xf32>" in result) == (platform == "cpu") for result in results)
    assert ("LayoutConstraint" in lowered) == (platform == "cpu")
