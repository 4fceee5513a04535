"""A plan: does a run fit, what does it hold, move and compute, and if it does not fit, what would."""

import dataclasses
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from l2m_jax import methods
from l2m_jax.config import Config
from l2m_jax.errors import InputError
from l2m_jax.generation.schedule import bucket
from l2m_jax.models import DecoderConfig
from l2m_jax.models.attention import why_not_cudnn
from l2m_jax.parallel import Parallel
from l2m_jax.plan import targets
from l2m_jax.plan.estimate import BASIS, collective_seconds, seconds, wire_bytes
from l2m_jax.plan.phases import Phase, Planner
from l2m_jax.plan.programs import Compiler, Program
from l2m_jax.plan.targets import Target
from l2m_jax.plan.workload import Workload, workload

_USABLE = 0.95  # of a card: the rest is the driver's and the allocator's
_DEFAULT_FRACTION = 0.75  # what jax takes of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
_LISTED_BUFFERS = 8


@dataclass(frozen=True)
class Plan:
    target: Target
    mapping: str
    devices: int
    workload: Workload
    phases: tuple[Phase, ...]

    @property
    def largest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.memory.total)

    @property
    def fits(self) -> bool:
        return self.largest.memory.total <= _USABLE * self.target.memory

    def phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)


def make(
    config: Config, target_name: str, devices: int, *, dry: bool = False, only: Collection[str] = ()
) -> Plan:
    """The plan of a run of `config` on `devices` cards.

    Args:
        dry: compile nothing, and count only what stays on the devices between programs.
        only: names of the phases to plan; by default all.

    Raises:
        InputError: an unknown target, a compiler that is not installed, a model that is not known.
    """
    target = targets.get(target_name)
    if devices < 1:
        raise InputError(f"--devices {devices}: at least 1")
    mapping = config.devices.mapping
    work = workload(config, target.platform, devices)
    parallel = Parallel(mapping, targets.devices(target, devices))
    planner = Planner(work, target, Compiler(parallel), dry)
    phases = tuple(phase() for name, phase in planner.phases().items() if not only or name in only)
    return Plan(target, mapping, devices, work, phases)


@dataclass(frozen=True)
class Change:
    """A way to less memory: settings and devices, and what it comes to."""

    settings: dict[str, Any]
    devices: int
    total: float
    fits: bool
    compiled: bool


def what_would_fit(config: Config, plan: Plan) -> list[Change]:
    """Changes in the order of what they cost, up to the first that fits.

    Shorter rows with smaller chunks; smaller chunks; these with remat; sharding; all of these, then on more devices. Where what stays on a device is too much by itself, nothing is compiled.
    """
    tried = []
    room = _USABLE * plan.target.memory
    too_large = {phase.name for phase in plan.phases if phase.memory.total > room}
    for changes, devices in _changes(config, plan.devices):
        if devices > plan.devices and plan.target.platform == "cpu":
            break  # they share one memory
        changed = _with(config, changes)
        found = make(changed, plan.target.name, devices, dry=True, only=too_large)
        if found.fits:
            found = make(changed, plan.target.name, devices, only=too_large)
        compiled = any(phase.programs for phase in found.phases)
        tried.append(Change(changes, devices, found.largest.memory.total, compiled and found.fits, compiled))
        if tried[-1].fits:
            break
    return tried


def _changes(config: Config, devices: int) -> list[tuple[dict[str, Any], int]]:
    chunk = {"chunk_size": min(config.chunk_size, 128)}
    remat = chunk | {"teacher.model.remat": "block", "student.model.remat": "block"}
    sharded = {"devices.mapping": "fsdp"}
    found = [
        ({"data.max_length": config.data.max_length // 2} | chunk, devices),
        (chunk, devices),
        (remat, devices),
    ]
    if devices > 1:
        found += [(sharded, devices), (remat | sharded, devices)]
    found += [(remat | sharded, devices * factor) for factor in (2, 4, 8)]
    # Only real changes.
    return [(changes, n) for changes, n in found if n != devices or _with(config, changes) != config]


def _with(config: Any, changes: dict[str, Any]) -> Any:
    for path, value in changes.items():
        first, _, rest = path.partition(".")
        new = _with(getattr(config, first), {rest: value}) if rest else value
        config = dataclasses.replace(config, **{first: new})
    return config


def document(plan: Plan, tried: list[Change] | None = None) -> dict[str, Any]:
    """The plan as JSON; bytes, seconds and operations."""
    student = plan.phase("student")
    largest = plan.largest
    per_step = _per_step(plan)
    collectives = [
        {
            "program": p.name,
            "kind": c.kind,
            "bytes": c.bytes,
            "count": c.count * times,
            "overlaps": c.overlaps,
        }
        for p, times in per_step
        for c in p.module.collectives
    ]
    limit = _DEFAULT_FRACTION if plan.target.platform == "cuda" else 1.0
    return {
        "target": plan.target.name,
        "devices": plan.devices,
        "mapping": plan.mapping,
        "fits": plan.fits,
        "memory_of_card": plan.target.memory,
        "needs_larger_memory_fraction": plan.fits and largest.memory.total > limit * plan.target.memory,
        "largest_phase": largest.name,
        "bytes_per_device": _memory(largest),
        "flops_per_step": student.flops_per_step,
        "collectives_per_step": {
            "bytes": sum(c["bytes"] * c["count"] for c in collectives),
            "bytes_sent_by_a_device": sum(
                times * c.count * wire_bytes(c, plan.devices)
                for p, times in per_step
                for c in p.module.collectives
            ),
            "seconds": sum(t * collective_seconds(p, plan.target, plan.devices) for p, t in per_step),
            "list": collectives,
        },
        "estimate": {
            "basis": BASIS,
            "step_seconds": student.step_seconds,
            "hours": sum(phase.seconds for phase in plan.phases) / 3600,
            "hours_by_phase": {phase.name: phase.seconds / 3600 for phase in plan.phases},
        },
        "compile_seconds": sum(p.seconds for phase in plan.phases for p in phase.programs),
        "compilations": compilations(plan),
        "attention": {
            "student": attention(plan.workload.student, plan, student.programs),
            "teacher": attention(plan.workload.teacher, plan, _programs_of(plan, "teacher pass")),
        },
        "largest_buffers": buffers(plan, student.programs[0]),
        "largest_logits": largest_logits(plan, student.programs[0]),
        "updates": plan.workload.updates,
        "micro_batches_per_step": {
            f"{shape.rows} × {shape.length}": count for shape, count in plan.workload.micro_batches.items()
        },
        "phases": [_phase(plan, phase) for phase in plan.phases],
        "assumptions": list(plan.workload.assumptions),
        "would_fit": [asdict(change) for change in tried or []],
    }


def _memory(phase: Phase) -> dict[str, float]:
    return asdict(phase.memory) | {"total": phase.memory.total}


def _programs_of(plan: Plan, name: str) -> tuple[Program, ...]:
    return next((phase.programs for phase in plan.phases if phase.name == name), ())


def _per_step(plan: Plan) -> list[tuple[Program, float]]:
    """The student's programs, and how often an update runs them."""
    accumulate, update = plan.phase("student").programs
    return [(accumulate, sum(plan.workload.micro_batches.values())), (update, 1.0)]


def _phase(plan: Plan, phase: Phase) -> dict[str, Any]:
    listed = [
        {
            "name": p.name,
            "size": p.size,
            "compile_seconds": p.seconds,
            "flops": p.flops,
            "memory_traffic": p.module.traffic,
            "kernels": p.module.kernels,
            "temporaries": p.temporaries,
            "roofline_seconds": seconds(p, plan.target, plan.devices),
            "custom_calls": p.module.custom_calls,
        }
        for p in phase.programs
    ]
    return {"name": phase.name, "bytes_per_device": _memory(phase), "programs": listed}


def compilations(plan: Plan) -> dict[str, int]:
    """Distinct programs of a run."""
    w, config = plan.workload, plan.workload.config
    method = methods.get(config.method, config)
    objectives = len({o for stage in w.stages for o in methods.objectives(method, config, stage)})
    # With `update`, the optimiser's start and the zero sums.
    counts = {"student: objectives × shapes + 3": objectives * len(w.shapes) + 3}
    if config.teacher.finetune.epochs:
        counts["teacher fine-tuning: shapes + 3"] = len(w.shapes) + 3
    long_rows = 1 + (int(w.lengths.max()) > 512)
    if config.teacher.signal == "store":
        counts["teacher pass: rows"] = long_rows
    counts["cross-entropy of the ranking: rows"] = long_rows
    caches = len({bucket(n, 4, 64) for n in range(1, w.longest_sequence + 1)})
    counts["decoding, each model: at most cache lengths"] = caches
    return counts | {"total": sum(counts.values()) + caches}


def attention(config: DecoderConfig, plan: Plan, programs: tuple[Program, ...]) -> dict[str, Any]:
    """Whether cuDNN computes attention in these programs, or why not."""
    calls = {name: n for p in programs for name, n in p.module.custom_calls.items() if "fmha" in name}
    why = None
    if not calls:
        why = _why_plain(config, plan.target.platform)
    return {"cudnn": bool(calls), "custom_calls": calls, "why_not": why}


def _why_plain(config: DecoderConfig, platform: str) -> str:
    if platform != "cuda":
        return f"there is no cuDNN on {platform}"
    if reason := why_not_cudnn(config.dtype, 64, config.head_dim):
        return reason
    if config.attention_dropout:
        return "dropout on attention probabilities, as GPT-2 trains with, is not in jax's call of cuDNN"
    return "config.attention is 'xla'"


def buffers(plan: Plan, program: Program) -> list[dict[str, Any]]:
    found = program.module.buffers()[:_LISTED_BUFFERS]
    return [{"shape": str(array), "bytes": array.bytes, "operation": name} for array, name in found]


def largest_logits(plan: Plan, program: Program) -> dict[str, Any] | None:
    """The most tokens whose logits an array of the program holds: a chunk's, never a batch's."""
    w = plan.workload
    vocabularies = {n for c in (w.student, w.teacher) for n in (c.vocab_size, c.valid_vocab_size)}
    # Sharded, a device may hold its part of the vocabulary for the tokens of all.
    whole = {n // parts: n for parts in (1, plan.devices) for n in vocabularies if n % parts == 0}
    widths = {n for c in (w.student, w.teacher) for n in (c.embed_size, c.hidden_size)}
    found = []
    for array, _ in program.module.buffers():
        others = [d for d in array.dims[:-1] if d > 1]
        if not others or array.dims[-1] not in whole:
            continue
        tokens = array.size // whole[array.dims[-1]]
        # A head, transposed, ends in the vocabulary too.
        if tokens <= w.config.chunk_size or not widths & set(others):
            found.append((tokens, str(array)))
    if not found:
        return None
    tokens, shape = max(found)
    return {"tokens": tokens, "of": w.largest.slots, "shape": shape}
