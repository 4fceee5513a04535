"""Where activations lie when parameters are sharded over devices: split by rows, like the batch."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
from jax.sharding import NamedSharding

_SHARDING: contextvars.ContextVar[NamedSharding | None] = contextvars.ContextVar("sharding", default=None)


@contextlib.contextmanager
def rows_split_as(sharding: NamedSharding) -> Iterator[None]:
    """While a function is traced in here, `split_rows` gives arrays this sharding, which names their first axis.

    Left to itself, the compiler splits some activations as the parameters are: over heads, say, which the cuDNN
    kernel refuses beside a mask that is split over rows.
    """
    token = _SHARDING.set(sharding)
    try:
        yield
    finally:
        _SHARDING.reset(token)


def split_rows(x: jax.Array) -> jax.Array:
    """`x`, whose first axis is the batch, sharded as `rows_split_as` says; as it is outside."""
    sharding = _SHARDING.get()
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)
