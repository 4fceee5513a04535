"""A run over more and more rows: what each phase takes before the first update, and how it grows.

The rows are those of a file, as often as needed, with ids and numbers of their own. The models are as small as they can be,
so that time and memory are those of the data. The command is `l2m train`, in a process of its own, observed from outside
until the student's first update; then it is killed and started again. For Linux: memory is read from /proc.
"""

import contextlib
import itertools
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from l2m_jax import files
from l2m_jax.data.rows import Row
from l2m_jax.data.sources import read_file
from l2m_jax.data.tokenizer import train_tokenizer
from l2m_jax.progress import console
from l2m_jax.training.metrics import read_metrics

_TOKENIZER_SIZE, _TOKENIZER_ROWS = 2000, 2000
_INTERVAL = 0.05  # seconds between two looks at memory
_START = "start"  # until the first phase: imports, and checks that read nothing of the rows
_STUDENT = "student"
# What each phase writes, of which sizes are reported.
_WRITTEN = {
    "data": ("data",),
    "difficulty": ("difficulty.parquet", "initial_student_responses.jsonl"),
    "teacher store": ("teacher_store",),
}
# Phases that do not depend on the number of rows are left out of the ratios.
_GROWING = (*_WRITTEN, _STUDENT)

_CONFIG = """\
data: {{train: {train}, tokenizer: {tokenizer}, max_length: 512, truncate: true, validation_rows: 8, test_rows: 8}}
teacher:
  model: {{architecture: {{num_layers: 1, num_heads: 1, hidden_size: 16, max_positions: 520}}}}
  finetune: {{epochs: 0}}
student:
  model: {{architecture: {{num_layers: 1, num_heads: 1, hidden_size: 16, max_positions: 520}}}}
curriculum: {{examples: 1024}}
sampling: {{max_new_tokens: 2}}
evaluation: {{validations: 1, diagnostic_rows: 0}}
devices: {{count: 1, slots: 256}}
max_shapes: 1
"""


def run(
    data: Path, *, rows: Sequence[int] = (10_000, 100_000, 1_000_000), workdir: Path | None = None
) -> dict[str, Any]:
    """
    Args:
        rows: numbers of rows, ascending.
        workdir: where rows and runs are kept until the suite ends; None: a temporary folder.

    Returns:
        `rows`, one for each phase and number of rows: `seconds`, `microseconds_a_row`, `peak_memory_mb` (of all its
        processes, without mapped files), `bytes_a_row` on disk. `fits`: for each phase, seconds and bytes of memory as a
        + b·rows. Between the two largest numbers, the largest over the phases: `memory_ratio` and `time_ratio`, by row.
        `restart_seconds`: to the first update of a run whose preparation is finished, by number of rows.
    """
    observed: dict[int, dict[str, _Phase]] = {}
    restarts: dict[int, float] = {}
    for count in rows:
        with _folder(workdir, count) as folder:
            command = _command(data, folder, count)
            observed[count] = _observe(command, folder / "run")
            restarts[count] = sum(phase.seconds for phase in _observe(command, folder / "run").values())
            for name, phase in observed[count].items():
                phase.bytes = sum(_size(folder / "run" / place) for place in _WRITTEN.get(name, ()))
    return {
        "rows": [_row(name, count, phase) for count in rows for name, phase in observed[count].items()],
        "fits": {name: _fit({n: observed[n][name] for n in rows}) for name in _GROWING},
        "restart_seconds": {f"{count:,} rows": seconds for count, seconds in restarts.items()},
    } | _ratios(observed)


@dataclass
class _Phase:
    """
    Attributes:
        memory: the most bytes that all its processes held, without mapped files.
        bytes: on disk.
    """

    seconds: float = 0.0
    memory: int = 0
    bytes: int = 0


@contextlib.contextmanager
def _folder(workdir: Path | None, count: int) -> Iterator[Path]:
    if workdir is not None:
        workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"rows_{count}_", dir=workdir) as folder:
        yield Path(folder)


def _command(data: Path, folder: Path, count: int) -> list[str]:
    """Writes the rows, a tokenizer trained on some of them and the config; returns the command."""
    given = list(read_file(data))
    _write_rows(given, folder / "rows.jsonl", count)
    texts = [f"{row.instruction} {row.input} {row.references[0]}" for row in given[:_TOKENIZER_ROWS]]
    train_tokenizer(texts, _TOKENIZER_SIZE).save_pretrained(folder / "tokenizer")
    places = {"train": folder / "rows.jsonl", "tokenizer": folder / "tokenizer"}
    text = _CONFIG.format(**{name: json.dumps(str(place)) for name, place in places.items()})
    files.write_text(folder / "config.yaml", text)
    flags = [f"--config={folder / 'config.yaml'}", f"--workdir={folder / 'run'}"]
    return [sys.executable, "-m", "l2m_jax.cli.main", "train", *flags]


def _write_rows(given: Sequence[Row], file: Path, count: int) -> None:
    """`count` rows, each different from all others."""
    with file.open("w", encoding="utf-8") as opened:
        for number, row in zip(range(count), itertools.cycle(given), strict=False):
            line = {
                "id": f"row-{number}",
                "instruction": f"{row.instruction} ({number})",
                "input": row.input,
                "output": row.references[0],
            }
            opened.write(json.dumps(line) + "\n")


@dataclass
class _Observer:
    """Follows the output of a run, and what it holds."""

    process: subprocess.Popen
    phases: dict[str, _Phase] = field(default_factory=lambda: {_START: _Phase()})
    current: str = _START
    last_lines: list[str] = field(default_factory=list)

    def read(self) -> None:
        """Until the run ends: notes the headings of phases."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.last_lines = [*self.last_lines[-20:], line]
            if heading := re.fullmatch(r"(\w[\w ]*) ─+\n", line):
                self.current = heading.group(1)
                self.phases.setdefault(self.current, _Phase())

    def look(self, seconds: float) -> None:
        phase = self.phases[self.current]
        phase.seconds += seconds
        phase.memory = max(phase.memory, _memory(self.process.pid))


def _observe(command: Sequence[str], workdir: Path) -> dict[str, _Phase]:
    """Starts the run and kills it after the student's first update. Returns its phases.

    Raises:
        RuntimeError: it ended before.
    """
    started = time.time_ns()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    observer = _Observer(process)
    reader = threading.Thread(target=observer.read)
    reader.start()
    last = time.monotonic()
    try:
        while process.poll() is None and not _has_updated(workdir / "metrics.jsonl", started):
            time.sleep(_INTERVAL)
            now = time.monotonic()
            observer.look(now - last)
            last = now
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with {process.returncode}: {''.join(observer.last_lines)}")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        reader.join()
    for name, phase in observer.phases.items():
        console.print(f"  {name}: {phase.seconds:.1f} s, {phase.memory / 1e6:,.0f} MB")
    return observer.phases


def _has_updated(metrics: Path, since: int) -> bool:
    """Whether the student was updated since then, in nanoseconds. A restart drops the lines of the start before."""
    if not metrics.is_file() or metrics.stat().st_mtime_ns < since:
        return False
    return any(line["phase"] == _STUDENT for line in read_metrics(metrics))


def _memory(pid: int) -> int:
    """Bytes that a process and those that it has started hold, without mapped files."""
    total = 0
    for process in (pid, *_children(pid)):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            status = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace")
            found = re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", status, re.MULTILINE)
            total += 1024 * sum(map(int, found))
    return total


def _children(pid: int) -> list[int]:
    found = []
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += [int(child) for child in tasks.read_text(encoding="ascii").split()]
    return found + [inner for child in found for inner in _children(child)]


def _size(place: Path) -> int:
    if place.is_file():
        return place.stat().st_size
    return sum(file.stat().st_size for file in place.rglob("*") if file.is_file())


def _row(name: str, count: int, phase: _Phase) -> dict[str, Any]:
    return {
        "phase": name,
        "training_rows": count,
        "seconds": phase.seconds,
        "microseconds_a_row": 1e6 * phase.seconds / count,
        "peak_memory_mb": phase.memory / 1e6,
        "bytes_a_row": phase.bytes / count,
    }


def _fit(phases: Mapping[int, _Phase]) -> dict[str, str]:
    """Straight lines through what was observed, by least squares of the relative errors."""
    found = {}
    for quantity, unit in (("seconds", "s"), ("memory", "B")):
        n = np.array(list(phases), float)
        values = np.array([getattr(phase, quantity) for phase in phases.values()], float)
        weights = 1 / np.maximum(values, 1e-9)
        b, a = np.polyfit(n, values, 1, w=weights) if len(n) > 1 else (values[0] / n[0], 0.0)
        found[quantity] = f"{a:.3g} {unit} + {b:.3g} {unit} a row"
    return found


def _ratios(observed: Mapping[int, Mapping[str, _Phase]]) -> dict[str, float]:
    if len(observed) < 2:
        return {}
    fewer, more = sorted(observed)[-2:]
    pairs = [(observed[fewer][name], observed[more][name]) for name in _GROWING]
    return {
        "memory_ratio": max(b.memory / a.memory for a, b in pairs),
        "time_ratio": max((b.seconds / more) / (a.seconds / fewer) for a, b in pairs),
    }
