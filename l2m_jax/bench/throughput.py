"""The training of a config's student on the devices at hand: speed, memory, and how it scales.

Weights, tokens and the teacher's stored hidden states are random. Architectures, lengths, packing, objective, mapping and
the training loop are the run's own, so neither weights nor data need to be there. On-policy methods train on the
references here; their rollouts are not timed.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2m_jax import methods
from l2m_jax.bench.common import Spread, matmul_rate, peak_rss_bytes
from l2m_jax.bench.workload import step_flops
from l2m_jax.config import Config
from l2m_jax.data.batches import ListedExamples
from l2m_jax.errors import InputError
from l2m_jax.models.lora import Lora
from l2m_jax.parallel import Placement
from l2m_jax.plan import programs, targets
from l2m_jax.plan.phases import Planner
from l2m_jax.plan.programs import Compiler
from l2m_jax.plan.workload import Workload, workload
from l2m_jax.training.checkpoint import Checkpoints
from l2m_jax.training.loop import Task, Term, Trainer
from l2m_jax.training.metrics import MetricsLog
from l2m_jax.training.step import Teacher
from l2m_jax.training.store_format import StoreFormat
from l2m_jax.types import Params, TeacherRows

_SCALE = 0.02  # of random weights and hidden states


def run(config: Config, *, devices: Sequence[int] = (), steps: int = 20) -> dict[str, Any]:
    """Trains for `steps` updates on each number of devices, after as many that compile the programs.

    Args:
        devices: numbers of devices; empty: 1, 2, 4, ... up to all of this process. The batch is the config's on any
            number of them.
        steps: timed updates.

    Returns:
        `rows`, one for each number of devices: `step_seconds`, `examples_a_second`, `tokens_a_second` (without
        padding), `efficiency` (against as many times the first row's speed a device), `mfu` (the part of the card's
        peak that the operations needed by real tokens take; None if the card is not known), `of_matmul_rate` (the same
        against the measured rate of a large matrix product in the student's dtype), `peak_memory_gb` of the fullest
        device, or of the process on a CPU, and `estimated_step_seconds`, the plan's.

    Raises:
        InputError: more devices than there are.
    """
    there = jax.local_devices()
    counts = list(devices) or [2**k for k in range(len(there).bit_length()) if 2**k <= len(there)]
    for count in counts:
        if not 1 <= count <= len(there):
            raise InputError(
                f"--devices {count}: must be between 1 and {len(there)}, the devices of this process"
            )
    target = targets.of_kind(there[0].device_kind)
    rows = []
    for count in counts:
        measured = _Measured(config, tuple(there[:count]), steps)
        rows.append(measured.row(target))
        first = rows[0]
        rows[-1]["efficiency"] = (rows[-1]["tokens_a_second"] / count) / (
            first["tokens_a_second"] / first["devices"]
        )
    return {
        "rows": rows,
        "device": there[0].device_kind,
        "mapping": config.devices.mapping,
        "method": config.method,
        "batch_size": config.training.batch_size,
        "steps": steps,
        "assumptions": list(measured.work.assumptions),
    }


class _Measured:
    """The config's training on `devices`, timed."""

    def __init__(self, config: Config, devices: tuple[Any, ...], steps: int):
        self._config, self._steps = config, steps
        self._placement = Placement(config.devices.mapping, devices)
        self._platform = "cuda" if devices[0].platform == "gpu" else devices[0].platform
        self.work: Workload = workload(config, self._platform, len(devices))
        self._distillation = self._planner(targets.get("cpu"), dry=True).distillation(config.method)
        self._clock = _Clock()
        self._train()

    def _planner(self, target: targets.Target, *, dry: bool) -> Planner:
        return Planner(self.work, target, Compiler(self._placement, dry))

    def row(self, target: targets.Target | None) -> dict[str, Any]:
        took, tokens = self._clock.after(self._steps)
        size, count = self._config.training.batch_size, self._placement.num_devices
        settings = self._distillation.shapes.settings
        rate = self._flops() / took.median
        measured = matmul_rate(jnp.dtype(settings.student.dtype)) * (1 if self._platform == "cpu" else count)
        return {
            "devices": count,
            "step_seconds": took,
            "examples_a_second": size / took.median,
            "tokens_a_second": tokens / took.median,
            "efficiency": 1.0,
            "mfu": None if target is None or self._platform == "cpu" else rate / (target.peak * count),
            "of_matmul_rate": rate / measured,
            "peak_memory_gb": self._peak_bytes() / 1e9,
            "estimated_step_seconds": None if target is None else self._estimate(target),
        }

    def _flops(self) -> float:
        """Of one update: what its real tokens need. Weights that are not trained have no gradient."""
        shapes, objectives, *_ = self._distillation
        settings, examples = shapes.settings, self._examples
        teacher = settings.teacher or settings.student
        found = step_flops(settings.student, teacher, examples, self._batches)
        trained = 2 / 3 if isinstance(settings.part, Lora) else 1.0
        total = trained * (found["student_body"] + found["student_head"])
        if shapes.teacher is not None:
            total += found["teacher_head"]
        if shapes.signal == "live":
            total += found["teacher_body"]
        return len(objectives) * total

    def _peak_bytes(self) -> float:
        found = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in self._placement.devices]
        known = [value for value in found if value is not None]
        return max(known) if known else peak_rss_bytes()

    def _estimate(self, target: targets.Target) -> float:
        shapes, objectives, batches, stages = self._distillation
        planner = self._planner(target, dry=False)
        return planner.training(shapes, objectives, batches, self._steps, len(stages)).step_seconds

    def _train(self) -> None:
        """Twice through the same batches: the first time compiles the programs."""
        shapes, objectives, batches, stages = self._distillation
        rng, size = np.random.default_rng(0), batches.size
        chosen = np.resize(rng.permutation(len(self.work.lengths)), self._steps * size)
        self._examples = _examples(self.work, chosen, rng)
        indices = np.arange(len(chosen))
        self._batches = np.split(indices, self._steps)
        stage = dataclasses.replace(stages[-2:][0], index=1, passes=(indices,), examples=len(indices))
        config, placement = self._config, self._placement
        rows = None
        if shapes.stored is not None:
            rows = _teacher_rows(shapes.stored, self._examples, shapes.settings.valid_vocab_size, rng)
        terms = [Term(objective, self._examples, rows) for objective in objectives]
        task = Task(
            "throughput",
            shapes.settings,
            (stage, stage),
            batches.shapes,
            config.training,
            size,
            config.student_seed,
            by_step=methods.by_step(self.work.method(config.method), config.curriculum),
            skip_nonfinite=True,  # random weights promise nothing
        )
        with tempfile.TemporaryDirectory() as folder:
            checkpoints = _NoCheckpoints(Path(folder), placement)
            trainer = Trainer(task, placement, lambda *_: terms, self._teacher(), checkpoints, self._clock)
            trainer.run(self._initial)
            checkpoints.close()

    def _initial(self) -> Params:
        settings = self._distillation.shapes.settings
        frozen = isinstance(settings.part, Lora)
        shapes = programs.frozen(settings.student) if frozen else programs.parameters(settings.student)
        return self._placement.initialise(lambda: _random(shapes))

    def _teacher(self) -> Teacher | None:
        shapes = self._distillation.shapes.teacher
        return None if shapes is None else self._placement.initialise(lambda: _random(shapes))


class _Clock(MetricsLog):
    """Notes when each update's metrics arrive, instead of writing them."""

    def __init__(self):
        self._times: list[float] = []
        self._tokens: list[int] = []

    def write(self, phase: str, step: int, **values: Any) -> None:
        self._times.append(time.perf_counter())
        self._tokens.append(values["tokens"])

    def drop_after(self, phase: str, step: int, validated: int) -> None:
        pass

    def after(self, steps: int) -> tuple[Spread, float]:
        """Seconds an update without the first `steps`, and tokens an update. The first interval fills the queue."""
        times = np.diff(self._times[steps:])
        return Spread.of(times.tolist()), float(np.mean(self._tokens[steps:]))


class _NoCheckpoints(Checkpoints):
    def restore_latest(self, shapes: Any, needs_best: bool) -> None:
        return None

    def due(self, step: int) -> bool:
        return False

    def save(self, state: Any, position: Any) -> None:
        pass


def _examples(work: Workload, chosen: np.ndarray, rng: np.random.Generator) -> ListedExamples:
    vocabulary = min(work.student.valid_vocab_size, work.teacher.valid_vocab_size)
    tokens = [rng.integers(0, vocabulary, n, np.int32) for n in work.lengths[chosen]]
    return ListedExamples(tokens, work.prompt_lengths[chosen])


def _teacher_rows(
    stored: StoreFormat, examples: ListedExamples, vocabulary: int, rng: np.random.Generator
) -> Callable[[int], TeacherRows]:
    """Random numbers in the place of what is stored of the teacher."""
    most = int(examples.response_lengths.max())

    def values(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        if np.issubdtype(jnp.dtype(dtype), np.integer):
            return rng.integers(0, min(vocabulary, np.iinfo(dtype).max), (most, *shape), dtype)
        return (-_SCALE * abs(rng.standard_normal((most, *shape), np.float32))).astype(jnp.dtype(dtype))

    arrays = {name: values(*kind) for name, kind in stored.tensors.items()}
    lengths = examples.response_lengths
    return lambda example: stored.decode({name: array[: lengths[example]] for name, array in arrays.items()})


def _random(shapes: Any) -> Any:
    """Arrays of these shapes and dtypes."""
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))

    def leaf(key: jax.Array, shape: Any) -> jax.Array:
        if jnp.issubdtype(shape.dtype, jnp.integer):
            return jax.random.randint(key, shape.shape, -127, 127, shape.dtype)
        return (_SCALE * jax.random.normal(key, shape.shape)).astype(shape.dtype)

    return structure.unflatten([leaf(*pair) for pair in zip(keys, leaves, strict=True)])
