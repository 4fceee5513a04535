"""The cards that a plan can be made for: what they hold, how fast they are, and how to compile for them."""

import difflib
import importlib.util
import math
import os
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jax
from jax.experimental import topologies

from l2m_jax.errors import InputError, reason


@dataclass(frozen=True)
class Target:
    """One device, with the figures of its data sheet.

    Attributes:
        name: as given on the command line.
        platform: "cuda", "tpu" or "cpu".
        memory: bytes.
        bandwidth: of the memory, bytes/s.
        peak: floating-point operations/s in bfloat16 (dense), or in float32 on a CPU.
        link: to other devices, bytes/s in one direction.
        launch: seconds to start one kernel.
    """

    name: str
    platform: str
    memory: float
    bandwidth: float
    peak: float
    link: float
    launch: float


_GPUS = {"a100_80gb": (312e12, 300e9), "h100_80gb": (989e12, 450e9)}  # peak, link (NVLink)
_GPU_LAUNCH = 3e-6
_TPUS = {  # memory, bandwidth, peak, link
    "v4": (32e9, 1228e9, 275e12, 150e9),
    "v5e": (16e9, 819e9, 197e12, 100e9),
    "v5p": (95e9, 2765e9, 459e12, 300e9),
    "v6e": (32e9, 1640e9, 918e12, 224e9),
}
_TPU_LAUNCH = 1e-6
# No data sheet tells what this machine does; these only give the estimate an order of magnitude.
_CPU_PEAK_PER_CORE, _CPU_BANDWIDTH, _CPU_LAUNCH = 50e9, 20e9, 5e-6

NAMES = (*_GPUS, *_TPUS, "cpu")


def description(name: str) -> str:
    """XLA's description of a GPU, a text proto."""
    return (resources.files("l2m_jax") / "targets" / f"{name}.txtpb").read_text(encoding="utf-8")


def get(name: str) -> Target:
    """The target of that name; a TPU's may carry its slice, as in "v5e:4x4".

    Raises:
        InputError: no such target; the known ones are listed.
    """
    base = name.partition(":")[0]
    if base in _GPUS and base == name:
        text = description(name)
        memory, bandwidth = (
            float(re.findall(rf"{key}: (\d+)", text)[0]) for key in ("device_memory_size", "memory_bandwidth")
        )
        return Target(name, "cuda", memory, bandwidth, *_GPUS[name], _GPU_LAUNCH)
    if base in _TPUS:
        return Target(name, "tpu", *_TPUS[base], _TPU_LAUNCH)
    if name == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        peak = _CPU_PEAK_PER_CORE * (os.cpu_count() or 1)
        return Target(name, "cpu", memory, _CPU_BANDWIDTH, peak, _CPU_BANDWIDTH, _CPU_LAUNCH)
    near = difflib.get_close_matches(name, NAMES, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(f"--target: no target {name!r} ({hint}known: {', '.join(NAMES)}; a TPU as in v5e:4x4)")


def of_kind(kind: str) -> Target | None:
    """The target that a device of this kind is, such as "NVIDIA A100-SXM4-80GB"; None if none is known."""
    words = kind.lower().replace("-", " ").split()
    names = {"a100_80gb": ("a100", "80gb"), "h100_80gb": ("h100", "80gb"), "cpu": ("cpu",)}
    names |= {name: ("tpu", name) for name in _TPUS} | {"v5e": ("tpu", "v5", "lite")}
    found = [name for name, parts in names.items() if all(part in words for part in parts)]
    return get(found[0]) if found else None


def devices(target: Target, count: int) -> tuple[Any, ...]:
    """`count` devices of that kind to compile for, none of which need be there.

    Raises:
        InputError: the compiler for them is not installed, or there is no such slice.
    """
    if target.platform == "cpu":
        return _fake_cpus(count)
    if target.platform == "cuda":
        _require("jax_cuda12_plugin", "cuda12", "NVIDIA GPUs")
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=description(target.name), topology=f"1x1x{count}"
        )
        return tuple(topology.devices)
    _require("libtpu", "tpu", "TPUs")
    return _tpus(target.name, count)


def _require(package: str, extra: str, cards: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise InputError(
            f"--target: compiling for {cards} needs the package {package}: `uv sync --extra {extra}` or "
            f"`pip install 'l2m_jax[{extra}]'` (no card is needed), or plan with --target cpu"
        )


def _fake_cpus(count: int) -> tuple[Any, ...]:
    found = jax.devices("cpu")
    if len(found) < count:
        raise InputError(
            f"--devices: {count} CPU devices asked for, {len(found)} there; start with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return tuple(found[:count])


def _tpus(name: str, count: int) -> tuple[Any, ...]:
    base, _, grid = name.partition(":")
    grid = grid or _square(count)
    # Three-dimensional machines count their third axis too.
    if base in ("v4", "v5p") and grid.count("x") == 1:
        grid += "x1"
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{base}:{grid}")
    except Exception as error:  # libtpu raises its own kinds
        raise InputError(
            f"--target: no slice {base}:{grid} ({reason(error)}); name one, as in {base}:2x2"
        ) from error
    found = tuple(topology.devices)
    if len(found) < count:
        raise InputError(f"--devices: {count} asked for, but {base}:{grid} has {len(found)}")
    return found[:count]


def _square(count: int) -> str:
    """The smallest grid with so many devices: 1x1, 2x2, 2x4, 4x4, 4x8, ..."""
    if count == 1:
        return "1x1"
    octaves = max(2, math.ceil(math.log2(count)))
    return f"{2 ** (octaves // 2)}x{2 ** (octaves - octaves // 2)}"
