"""A plan: whether a run fits, what it holds, moves, computes and writes, and if it does not fit, what would."""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from l2m_jax.config import Config, change
from l2m_jax.errors import InputError
from l2m_jax.parallel import Placement
from l2m_jax.plan import checkpoints, findings, targets
from l2m_jax.plan.estimate import BASIS, seconds
from l2m_jax.plan.moments import Moment
from l2m_jax.plan.phases import Phase, Planner
from l2m_jax.plan.programs import Compiler, Program
from l2m_jax.plan.targets import Target
from l2m_jax.plan.workload import Workload, workload
from l2m_jax.run.disk import peak_bytes

# The part of a GPU's memory that JAX takes, by default and at most; the rest is for CUDA, NCCL and the driver.
DEFAULT_FRACTION, LARGEST_FRACTION = 0.75, 0.95
_LARGER = f"fits with XLA_PYTHON_CLIENT_MEM_FRACTION={LARGEST_FRACTION}"


@dataclass(frozen=True)
class Plan:
    """
    Attributes:
        dry: nothing is compiled: activations count as far as they are known without.
    """

    target: Target
    mapping: str
    devices: int
    workload: Workload
    phases: tuple[Phase, ...]
    dry: bool

    @property
    def largest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.fullest.device_bytes)

    @property
    def verdict(self) -> str:
        worst = max(self.needed(moment) for phase in self.phases for moment in phase.moments)
        default = DEFAULT_FRACTION if self.target.platform == "cuda" else LARGEST_FRACTION
        if worst <= default * self.target.memory:
            return "fits"
        return _LARGER if worst <= LARGEST_FRACTION * self.target.memory else "does not fit"

    @property
    def fits(self) -> bool:
        return self.verdict != "does not fit"

    def needed(self, moment: Moment) -> float:
        """Bytes of one memory: a device's, or that of the machine which stands for all of them."""
        if self.target.platform != "cpu":
            return moment.device_bytes
        return self.devices * moment.device_bytes + moment.host_bytes

    def phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)


def make(
    config: Config, target_name: str, devices: int, *, dry: bool = False, only: Collection[str] = ()
) -> Plan:
    """The plan of a run of `config` on `devices` cards.

    Args:
        dry: compile nothing.
        only: names of the phases to plan; by default all.

    Raises:
        InputError: an unknown target, a compiler that is not installed, a model that is not known.
    """
    target = targets.get(target_name)
    if devices < 1:
        raise InputError(f"--devices {devices}: must be 1 or more")
    mapping = config.devices.mapping
    placement = Placement(mapping, targets.devices(target, devices))
    work = workload(config, target.platform, devices)
    planner = Planner(work, target, Compiler(placement, dry))
    phases = tuple(phase() for name, phase in planner.phases().items() if not only or name in only)
    return Plan(target, mapping, devices, work, phases, dry)


@dataclass(frozen=True)
class Change:
    """A way to use less memory: settings, devices, and the bytes on a device that result.

    Attributes:
        compiled: whether `total` counts the programs' temporaries.
    """

    settings: dict[str, Any]
    devices: int
    total: float
    fits: bool
    compiled: bool


def what_would_fit(config: Config, plan: Plan) -> list[Change]:
    """Changes in the order of what they cost, up to the first that fits.

    Shorter rows with smaller chunks; smaller chunks; these with rematerialisation; sharding; all of these, then on
    more devices. Nothing is compiled where the weights alone are too large.
    """
    tried = []
    room = LARGEST_FRACTION * plan.target.memory
    too_large = {p.name for p in plan.phases if any(plan.needed(moment) > room for moment in p.moments)}
    for changes, devices in _changes(config, plan.devices):
        if devices > plan.devices and plan.target.platform == "cpu":
            break  # they share one memory
        try:
            changed = change(config, changes)
        except InputError:
            continue  # half the length may not leave room for the prompt
        found = make(changed, plan.target.name, devices, dry=True, only=too_large)
        if found.fits:
            found = make(changed, plan.target.name, devices, only=too_large)
        total = found.largest.fullest.device_bytes
        tried.append(Change(changes, devices, total, not found.dry and found.fits, not found.dry))
        if tried[-1].fits:
            break
    return tried


def _changes(config: Config, devices: int) -> list[tuple[dict[str, Any], int]]:
    chunk = {"chunk_size": min(config.chunk_size, 128)}
    remat = chunk | {"teacher.compute.remat": "block", "student.compute.remat": "block"}
    sharded = {"devices.mapping": "fsdp"}
    found = [
        ({"data.max_length": config.data.max_length // 2} | chunk, devices),
        (chunk, devices),
        (remat, devices),
    ]
    if devices > 1:
        found += [(sharded, devices), (remat | sharded, devices)]
    found += [(remat | sharded, devices * factor) for factor in (2, 4, 8)]
    return [(changes, n) for changes, n in found if n != devices or _differs(config, changes)]


def _differs(config: Config, changes: dict[str, Any]) -> bool:
    def value(name: str) -> Any:
        found: Any = config
        for part in name.split("."):
            found = getattr(found, part)
        return found

    return any(value(name) != new for name, new in changes.items())


def document(plan: Plan, tried: list[Change] | None = None) -> dict[str, Any]:
    """The plan as JSON; bytes, seconds and operations."""
    student = plan.phase("student")
    training, fullest, verdict = student.training, plan.largest.fullest, plan.verdict
    assert training is not None
    w, platform = plan.workload, plan.target.platform
    by_name = {phase.name: phase for phase in plan.phases}
    distinct = {id(p): p for phase in plan.phases for p in phase.programs}
    of_teacher = by_name["teacher store"].programs if "teacher store" in by_name else ()
    return {
        "target": plan.target.name,
        "devices": plan.devices,
        "mapping": plan.mapping,
        "verdict": verdict,
        "fits": plan.fits,
        "needs_larger_memory_fraction": verdict == _LARGER,
        "memory_of_card": plan.target.memory,
        "largest_phase": plan.largest.name,
        "largest_moment": fullest.name,
        "bytes_per_device": _on_device(fullest),
        "host": _largest_on_host(plan),
        "checkpoints": _checkpoints(plan),
        "flops_per_step": training.flops_per_step,
        "collectives_per_step": findings.collectives(training, plan.target, plan.devices),
        "estimate": {
            "basis": BASIS,
            "step_seconds": training.step_seconds,
            "hours": sum(phase.seconds for phase in plan.phases) / 3600,
            "hours_by_phase": {phase.name: phase.seconds / 3600 for phase in plan.phases},
        },
        "compile_seconds": sum(p.seconds for p in distinct.values()),
        "compilations": findings.compilations(w, by_name),
        "attention": {
            "student": findings.attention(w.student, platform, (training.accumulate,)),
            "teacher": findings.attention(w.teacher, platform, of_teacher),
        },
        "largest_buffers": findings.buffers(training.accumulate),
        "largest_logits": findings.largest_logits(w, training),
        "updates": training.updates,
        "micro_batches_per_step": {
            f"{shape.rows} × {shape.length}": n for shape, n in training.batches.micro_batches.items()
        },
        "phases": [_phase(plan, phase) for phase in plan.phases],
        "assumptions": [*w.assumptions, *_ASSUMPTIONS],
        "would_fit": [asdict(change) for change in tried or []],
    }


_ASSUMPTIONS = (
    "host bytes leave out programs, libraries and cached files",
    f"checkpoints are written at {checkpoints.DISK_RATE / 1e9:g} GB/s, uncompressed, and as many as fall into the "
    "estimated time; a slower run writes more",
)


def _on_device(moment: Moment) -> dict[str, float]:
    return asdict(moment.weights) | asdict(moment.activations) | {"total": moment.device_bytes}


def _largest_on_host(plan: Plan) -> dict[str, Any]:
    phase, moment = max(
        ((phase, moment) for phase in plan.phases for moment in phase.moments),
        key=lambda pair: pair[1].host_bytes,
    )
    return {"phase": phase.name, "moment": moment.name, "bytes": moment.host | {"total": moment.host_bytes}}


def _checkpoints(plan: Plan) -> dict[str, Any]:
    sizes = checkpoints.disk(plan.workload)
    by_phase = {phase.name: phase.training.written for phase in plan.phases if phase.training is not None}
    return {
        "phases": {
            name: {"bytes": w.bytes, "count": w.count, "bytes_written": w.total, "seconds": w.seconds}
            for name, w in by_phase.items()
        },
        "bytes_written": sum(written.total for written in by_phase.values()),
        "seconds": sum(written.seconds for written in by_phase.values()),
        "disk_rate": checkpoints.DISK_RATE,
        "disk": sizes,
        "peak_bytes_on_disk": peak_bytes(sizes),
    }


def _phase(plan: Plan, phase: Phase) -> dict[str, Any]:
    return {
        "name": phase.name,
        "moments": [
            {"name": m.name, "bytes_per_device": _on_device(m), "host": m.host | {"total": m.host_bytes}}
            for m in phase.moments
        ],
        "programs": [_program(plan, program) for program in phase.programs],
    }


def _program(plan: Plan, p: Program) -> dict[str, Any]:
    return {
        "name": p.name,
        "size": p.size,
        "compile_seconds": p.seconds,
        "flops": p.flops,
        "memory_traffic": p.module.traffic,
        "kernels": p.module.kernels,
        "temporaries": p.temporaries,
        "results": p.results,
        "roofline_seconds": seconds(p, plan.target, plan.devices),
        "custom_calls": p.module.custom_calls,
    } | findings.kernels(p)
