"""Floating-point operations of a function, counted from its jaxpr: its matrix products, as often as they run."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


def flops(function: Callable, *arguments: Any, trips: float = 1.0) -> float:
    """Two for each multiplication and addition of a matrix product; everything else is small beside them.

    XLA's own count takes the body of a loop once. Here a scan counts as often as it runs, and what the backward
    pass computes again counts again.

    Args:
        arguments: arrays or `jax.ShapeDtypeStruct`; nothing is computed.
        trips: how often a loop runs whose length only the data tells.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr, trips)


def _count(jaxpr: Any, trips: float) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        inner = list(_inner(parameters))
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += (
                2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
            )
        elif name == "scan":
            total += parameters["length"] * _count(inner[0], trips)
        elif name == "while":
            total += trips * _count(parameters["body_jaxpr"].jaxpr, trips)
        elif name == "cond":
            total += max(_count(branch, trips) for branch in inner)
        else:
            total += sum(_count(called, trips) for called in inner)
    return total


def _inner(parameters: dict[str, Any]) -> Iterator[Any]:
    for value in parameters.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item
