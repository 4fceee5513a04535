"""What all suites measure with: times, the machine's own matmul rate, memory, and the table on screen."""

import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich import box
from rich.console import Console
from rich.table import Table

from l2m_jax.progress import console

_LARGEST_PRODUCT = 16384
_WIDTH_IN_FILES = 160
_LONG_ENOUGH = 0.05  # seconds, so that starting a product does not count


class Spread(NamedTuple):
    """A figure measured several times."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))


def seconds(function: Callable[[], Any], repeats: int) -> Spread:
    """Time of a call whose result is waited for, after one call to warm up."""
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return Spread.of(times)


def matmul_rate(dtype: Any = jnp.float32, repeats: int = 9) -> float:
    """Floating-point operations a second of a large square matrix product, as this machine does it now."""
    multiply = jax.jit(lambda a: a @ a)
    size = 1024
    while True:
        # The size of the entries keeps the product at ones, so no power of it overflows.
        a = jnp.full((size, size), 1 / size, dtype)
        took = seconds(lambda a=a: multiply(a), repeats).median
        if took >= _LONG_ENOUGH or size == _LARGEST_PRODUCT:
            return 2 * size**3 / took
        size *= 2


def temporary_bytes(compiled: Any) -> int:
    """What a compiled program holds besides its arguments and results (`memory_analysis()`)."""
    return compiled.memory_analysis().temp_size_in_bytes


def peak_rss_bytes() -> int:
    """The largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine() -> dict[str, Any]:
    """The devices, their matmul rate, and the load of the machine just now."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "matmul_gflops": matmul_rate() / 1e9,
        "jax": jax.__version__,
    }


def show(title: str, result: dict[str, Any]) -> None:
    """Prints a suite's result: its `rows` as a table, everything else as lines."""
    console.rule(title, align="left")
    rows = result.get("rows", [])
    if rows:
        table = Table(box=box.SIMPLE)
        for name, value in rows[0].items():
            # Words apart, so that a narrow screen breaks between them.
            table.add_column(name.replace("_", " "), justify="left" if isinstance(value, str) else "right")
        for row in rows:
            table.add_row(*(_text(value) for value in row.values()))
        (console if console.is_terminal else Console(width=_WIDTH_IN_FILES)).print(table)
    for name, value in _lines(result):
        console.print(f"  {name}: {value}")


def _lines(result: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    lines = []
    for name, value in result.items():
        if isinstance(value, dict) and set(value) != set(Spread._fields):
            lines += _lines(value, f"{prefix}{name}.")
        elif not isinstance(value, list):
            lines.append((prefix + name, _text(value)))
    return lines


def _text(value: Any) -> str:
    if isinstance(value, Spread):
        value = value._asdict()
    if isinstance(value, dict):
        return f"{_text(value['median'])} ({_text(value['min'])} to {_text(value['max'])})"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
