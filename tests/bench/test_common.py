from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from l2m_jax.bench import common
from l2m_jax.bench.common import Spread


def test_spread():
    assert Spread.of([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)


def test_seconds_leave_out_the_first_call(monkeypatch):
    clock = iter([0.0, 5.0, 10.0, 11.0, 20.0, 23.0])
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(clock))
    calls = []
    assert common.seconds(lambda: calls.append(1), repeats=3) == (3.0, 1.0, 5.0)
    assert len(calls) == 4


def test_matmul_rate_counts_operations_of_a_long_product(monkeypatch):
    sizes = []

    def seconds(function, repeats):
        sizes.append(function().shape[0])
        return Spread.of([0.02 * sizes[-1] / 1024])

    monkeypatch.setattr(common, "seconds", seconds)
    assert common.matmul_rate(jnp.float32) == pytest.approx(2 * 4096**3 / 0.08)
    assert sizes == [1024, 2048, 4096]


def test_temporary_bytes():
    def program(x):
        return jnp.sort(x @ x.T, axis=0)[:2]

    compiled = jax.jit(program).lower(jax.ShapeDtypeStruct((512, 4), jnp.float32)).compile()
    assert 512 * 512 * 4 <= common.temporary_bytes(compiled) <= 8 * 512 * 512 * 4


def test_peak_rss_is_the_kernels():
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("the kernel's own figure is read from /proc, which only Linux has")
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    assert common.peak_rss_bytes() == pytest.approx(1024 * int(line.split()[1]), rel=0.05)
