"""Matrix products of low-precision operands with float32 sums, also in their backward passes.

On GPUs and TPUs that is what a product does. XLA's CPU backend has fast products of bfloat16 (twice the rate of float32
where the CPU multiplies bfloat16 itself) for one form alone: a float32 result, and every array row by row in memory. It
computes others at the rate of float32 or below, so this module brings them into that form.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint


def product(subscripts: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """The float32 product of two arrays of one dtype, whose backward pass multiplies in that dtype as well.

    JAX would transpose it into float32 products, at a fraction of the speed, because the gradient is float32.

    Args:
        subscripts: as of `einsum`, with a single letter for each axis; an axis is summed over if both operands have it.
    """
    result: Any = _product(subscripts, False, left, right)
    return result


def dense(x: jax.Array, kernel_IxO: jax.Array) -> jax.Array:
    """x·W [..., O] in the dtype of both, for x [..., I].

    Multiplied as matrices: for the kernel's gradient, XLA's CPU backend sums over one axis faster than over two.
    """
    result: Any = _product("ti,io->to", True, x.reshape(-1, x.shape[-1]), kernel_IxO)
    return result.reshape(*x.shape[:-1], -1)


def dense_by_features(x: jax.Array, kernel_OxI: jax.Array) -> jax.Array:
    """x·Wᵀ [..., O] in the dtype of both, for x [..., I] of few rows.

    In float32, XLA's CPU backend takes up to a third longer to multiply few rows by [I, O] than [O, I] by few columns.
    """
    x_IxT = _row_by_row(x.reshape(-1, x.shape[-1]).T)
    y_OxT = _row_by_row(jnp.matmul(kernel_OxI, x_IxT, preferred_element_type=jnp.float32))
    return y_OxT.T.astype(x.dtype).reshape(*x.shape[:-1], -1)


def project(hidden: jax.Array, head_VxE: jax.Array) -> jax.Array:
    """Logits [..., V] in float32, of hidden states [..., E] in the head's dtype."""
    tokens = _letters(hidden.ndim - 1)
    return product(f"{tokens}e,ve->{tokens}v", hidden, head_VxE)


def head_gradient(logits_gradient: jax.Array, hidden: jax.Array) -> jax.Array:
    """[V, E] in float32, summed over tokens, of the gradient [..., V] and hidden states [..., E], of one dtype."""
    tokens = _letters(hidden.ndim - 1)
    return product(f"{tokens}v,{tokens}e->ve", logits_gradient, hidden)


def _letters(axes: int) -> str:
    return "abcd"[:axes]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(subscripts: str, rounded: bool, left: jax.Array, right: jax.Array) -> jax.Array:
    return _einsum(subscripts, rounded, left, right)


def _product_forward(subscripts: str, rounded: bool, left: jax.Array, right: jax.Array):
    return _einsum(subscripts, rounded, left, right), (left, right)


def _product_backward(
    subscripts: str, rounded: bool, operands: tuple[jax.Array, jax.Array], gradient: jax.Array
):
    left, right = operands
    gradient = gradient.astype(left.dtype)
    of_left, of_right, of_result = _axes(subscripts)
    return (
        _einsum(f"{of_result},{of_right}->{of_left}", True, gradient, right),
        _einsum(f"{of_left},{of_result}->{of_right}", True, left, gradient),
    )


_product.defvjp(_product_forward, _product_backward)


def _einsum(subscripts: str, rounded: bool, left: jax.Array, right: jax.Array) -> jax.Array:
    """In float32, or `rounded` to the operands' dtype: GPUs and TPUs then never write the float32 sums to memory."""

    def anywhere(left, right):
        return jnp.einsum(subscripts, left, right, preferred_element_type=None if rounded else jnp.float32)

    def on_cpu(left, right):
        result = _on_cpu(subscripts, left, right)
        return result.astype(left.dtype) if rounded else result

    if not left.dtype == right.dtype == jnp.bfloat16:
        return anywhere(left, right)
    return jax.lax.platform_dependent(left, right, cpu=on_cpu, default=anywhere)


def _on_cpu(subscripts: str, left: jax.Array, right: jax.Array) -> jax.Array:
    of_left, of_right, of_result = _axes(subscripts)
    summed = "".join(axis for axis in of_left if axis not in of_result)
    kept = "".join(axis for axis in of_left if axis in of_result)
    left = jnp.einsum(f"{of_left}->{kept}{summed}", left)
    result = jnp.einsum(
        f"{kept}{summed},{of_right}->{of_result}",
        _row_by_row(left),
        _row_by_row(right),
        preferred_element_type=jnp.float32,
    )
    return _row_by_row(result)


def _row_by_row(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _axes(subscripts: str) -> tuple[str, str, str]:
    operands, result = subscripts.split("->")
    left, right = operands.split(",")
    return left, right, result
