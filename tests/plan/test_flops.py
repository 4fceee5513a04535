import jax
import jax.numpy as jnp

from l2m_jax.plan.flops import flops

X = jnp.ones((4, 8))
W = jnp.ones((6, 8, 8))


def _layers(x, w, remat=False):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, w)[0].sum()


def test_a_matrix_product_is_two_operations_for_each_of_its_multiplications():
    assert flops(lambda a, b: a @ b, jnp.ones((3, 5)), jnp.ones((5, 7))) == 2 * 3 * 5 * 7
    assert (
        flops(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), jnp.ones((2, 3, 5)), jnp.ones((2, 7, 5)))
        == 2 * 210
    )


def test_a_scan_counts_as_often_as_it_runs_and_the_backward_pass_twice():
    forward = 6 * 2 * 4 * 8 * 8
    assert flops(_layers, X, W) == forward
    assert flops(jax.grad(_layers, argnums=(0, 1)), X, W) == 3 * forward
    assert flops(jax.grad(lambda x, w: _layers(x, w, remat=True), argnums=(0, 1)), X, W) == 4 * forward


def test_a_loop_whose_length_only_the_data_tells_counts_as_often_as_said():
    def f(x, n):
        return jax.lax.fori_loop(0, n, lambda _, x: x @ jnp.ones((8, 8)), x)

    assert flops(f, X, 3, trips=5) == 5 * 2 * 4 * 8 * 8
