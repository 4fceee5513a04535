"""What the first process does for all."""

import os

import numpy as np
import pytest

from l2m_jax import multihost
from l2m_jax.errors import InputError
from l2m_jax.multihost import Devices, first, share, total, use_deterministic_kernels
from l2m_jax.run.context import placement_of


def test_its_value_and_its_exception_are_everyones():
    assert first(lambda: 3) == 3
    with pytest.raises(KeyError):
        first(lambda: {}["absent"])
    assert first(lambda: 4) == 4  # an exception leaves nothing behind


def test_a_nested_call_is_refused():
    """With several processes the others would wait for a call that they never make."""
    with pytest.raises(RuntimeError, match="within first"):
        first(lambda: first(lambda: 1))


def test_a_value_is_what_json_makes_of_it():
    """With one process as with several: a caller that needs a tuple must make it."""
    assert first(lambda: {"a": (1, 2.5), "b": None}) == {"a": [1, 2.5], "b": None}
    with pytest.raises(TypeError):
        first(lambda: object())


def add_as_one_of_two(folder) -> list:
    """A sum of the parts of two processes, as text: JSON rounds nothing away."""
    multihost._ADDED_TOGETHER = 4
    own = np.zeros(10)
    own[list(share(range(10)))] = [1 / (i + 3) for i in share(range(10))]
    return [repr(float(value)) for value in total(own)]


def test_a_total_over_two_processes_is_exact(in_two_processes, tmp_path):
    first, second = in_two_processes(add_as_one_of_two, tmp_path)
    assert first == second == [repr(1 / (i + 3)) for i in range(10)]


def test_deterministic_kernels_need_their_flag_before_jax_starts(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    use_deterministic_kernels(Devices())
    with pytest.raises(
        InputError, match=r"devices\.deterministic: set XLA_FLAGS=--xla_gpu_deterministic_ops=true before"
    ):
        placement_of(Devices(deterministic=True))
    for _ in range(2):
        use_deterministic_kernels(Devices(deterministic=True))
        flags = os.environ["XLA_FLAGS"].split()
        assert flags == ["--xla_force_host_platform_device_count=8", "--xla_gpu_deterministic_ops=true"]
    assert placement_of(Devices(deterministic=True, count=1)).num_devices == 1
