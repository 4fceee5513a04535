"""metrics.jsonl: one JSON object per line, written during training. A resumed run leaves no duplicates."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from l2m_jax import files
from l2m_jax.multihost import is_first


class MetricsLog:
    """Appends lines to `path`, in the first process only, and writes the numbers to `tensorboard`, a folder, if given.

    Raises:
        ImportError: `tensorboard` is given, but `tensorboardX` (extra: tracking) is not installed.
    """

    def __init__(self, path: Path, tensorboard: Path | None = None):
        self._path = path
        self._writer = None
        self._writes = is_first()
        if tensorboard is not None and self._writes:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(tensorboard))

    def write(self, phase: str, step: int, **values: Any) -> None:
        if not self._writes:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"phase": phase, "step": step, **values}) + "\n")
        if self._writer is not None:
            for name, value in _numbers(phase, values):
                self._writer.add_scalar(name, value, step)

    def drop_after(self, phase: str, step: int) -> None:
        """Deletes the lines of `phase` after `step`, and an incomplete last line."""
        if not self._writes:
            return
        kept = [line for line in read_metrics(self._path) if line["phase"] != phase or line["step"] <= step]
        files.write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers in nested mappings, under paths such as "student/validation_by_category/copy/kl"."""
    if isinstance(value, int | float):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(f"{name}/{key}", inner)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without an incomplete last one."""
    lines = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(text))
    return lines
