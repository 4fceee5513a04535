"""Where activations lie when parameters are sharded over devices: split by rows, like the batch."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_MESH: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


@contextlib.contextmanager
def rows_split_over(mesh: Mesh) -> Iterator[None]:
    """While a function is traced in here, `split_rows` puts rows onto the devices of `mesh`, in order.

    Left to itself, the compiler splits some activations as the parameters are: over heads, say, which the cuDNN
    kernel refuses beside a mask that is split over rows.
    """
    token = _MESH.set(mesh)
    try:
        yield
    finally:
        _MESH.reset(token)


def split_rows(x: jax.Array) -> jax.Array:
    """`x`, split over its first axis; as it is outside `rows_split_over`."""
    mesh = _MESH.get()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
