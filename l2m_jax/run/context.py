"""What all phases of a run share. It changes only cost or rounding, never the result."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax

from l2m_jax import files
from l2m_jax.config import Config
from l2m_jax.data.packing import Shape, choose_shapes
from l2m_jax.errors import InputError
from l2m_jax.models.settings import Compute
from l2m_jax.multihost import DETERMINISTIC, Devices, is_deterministic, is_first
from l2m_jax.parallel import Placement
from l2m_jax.progress import console
from l2m_jax.training.metrics import MetricsLog

_SECONDS = "phases.json"


@dataclass(frozen=True)
class Context:
    """
    Attributes:
        slots: sequences decoded at once on each device; 0: chosen from the model's size.
        chunk_size: tokens whose logits are held at once.
        max_shapes: the maximum number of compiled shapes of packed rows in a phase.
        checkpoint_minutes: minutes between checkpoints within a stage.
        skip_nonfinite: skip batches whose loss or gradient is not finite, instead of ending the run.
        teacher, student: compute dtype and remat of these models.
        workdir: the folder of metrics.jsonl and phases.json.
    """

    placement: Placement
    slots: int
    chunk_size: int
    max_shapes: int
    checkpoint_minutes: float
    skip_nonfinite: bool
    teacher: Compute
    student: Compute
    workdir: Path
    metrics: MetricsLog

    @property
    def seconds(self) -> dict[str, float]:
        """The time that each phase has taken, over all starts, as the first process has written it."""
        return _seconds(self.workdir / _SECONDS)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Shows the name of a phase, and adds its time to `phases.json` even if it is interrupted."""
        console.rule(name, align="left")
        start = time.monotonic()
        try:
            yield
        finally:
            taken = time.monotonic() - start
            if is_first():
                # Read again: another process may have made what this one has waited for.
                seconds = self.seconds
                seconds[name] = seconds.get(name, 0.0) + taken
                files.write_json(self.workdir / _SECONDS, seconds)

    def shapes(self, lengths, batch_size: int, max_length: int | None = None) -> tuple[Shape, ...]:
        """The micro-batch shapes in which random batches of examples with `lengths` tokens cost least."""
        shapes = choose_shapes(
            lengths,
            batch_size=batch_size,
            num_devices=self.placement.num_devices,
            max_length=max_length,
            max_shapes=self.max_shapes,
        )
        described = ", ".join(f"{shape.rows} × {shape.length}" for shape in shapes)
        console.print(f"  packed into micro-batches of {described} tokens")
        return shapes


def start(config: Config, workdir: Path) -> Context:
    """The context of a run of `config` in `workdir`, which is created.

    Raises:
        InputError: more devices than there are, or a number that the processes cannot share evenly.
    """
    placement = placement_of(config.devices)
    workdir.mkdir(parents=True, exist_ok=True)
    _use_compilation_cache()
    return Context(
        placement=placement,
        slots=config.devices.slots,
        chunk_size=config.chunk_size,
        max_shapes=config.max_shapes,
        checkpoint_minutes=config.checkpoint_minutes,
        skip_nonfinite=config.skip_nonfinite,
        teacher=config.teacher.compute,
        student=config.student.compute,
        workdir=workdir,
        metrics=MetricsLog(workdir / "metrics.jsonl"),
    )


def _seconds(file: Path) -> dict[str, float]:
    """The times of earlier starts. They are only reported, so damaged ones stop no run."""
    if not file.is_file():
        return {}
    try:
        return {str(phase): float(taken) for phase, taken in json.loads(file.read_bytes()).items()}
    except (ValueError, TypeError, AttributeError):
        console.print(f"  note: {file} cannot be read; the times of earlier starts are lost", markup=False)
        return {}


def _use_compilation_cache() -> None:
    """Lets a restart find its compiled programs. The user's own settings take precedence."""
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        with contextlib.suppress(RuntimeError):  # no home folder
            jax.config.update("jax_compilation_cache_dir", str(files.cache_folder() / "xla"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # JAX's limit is a second, and a run has dozens of programs below it.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def placement_of(devices: Devices) -> Placement:
    """The placement that the settings ask for, over the devices of all processes.

    Raises:
        InputError: more devices than there are, or a number that the processes cannot share evenly.
    """
    if devices.deterministic and not is_deterministic():
        raise InputError(f"config.devices.deterministic: set XLA_FLAGS={DETERMINISTIC} before JAX starts")
    hosts = [jax.local_devices(process_index=process) for process in range(jax.process_count())]
    found = sum(map(len, hosts))
    count = devices.count or found
    if count > found:
        raise InputError(
            f"config.devices.count: {count} devices requested, {found} found ({hosts[0][0].platform})"
        )
    share, rest = divmod(count, len(hosts))
    if rest or any(len(own) < share for own in hosts):
        raise InputError(
            f"config.devices.count: {count} devices cannot be shared evenly by {len(hosts)} processes, which "
            f"have {', '.join(str(len(own)) for own in hosts)}; set it to a multiple of {len(hosts)} that "
            "leaves no process short"
        )
    return Placement(devices.mapping, tuple(device for own in hosts for device in own[:share]))
