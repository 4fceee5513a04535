"""metrics.jsonl: one JSON object per line, written during training. A resumed run leaves no duplicates."""

import contextlib
import json
from collections.abc import Mapping, Sequence
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
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(f"{phase}/{name}", value, step)

    def drop_after(self, phase: str, step: int, validated: int) -> None:
        """Deletes the lines of `phase` after `step`, those of validations after `validated`, and an incomplete line."""
        if not self._writes:
            return
        last = {False: step, True: validated}
        kept = [
            line
            for line in read_metrics(self._path)
            if line["phase"] != phase or line["step"] <= last[_is_validation(line)]
        ]
        files.write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _is_validation(line: Mapping[str, Any]) -> bool:
    return any(name.startswith("validation_") for name in line)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without an incomplete last one and without damaged ones."""
    lines = []
    if path.is_file():
        for text in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict) and isinstance(line.get("step"), int) and "phase" in line:
                    lines.append(line)
    return lines


def missing_steps(lines: Sequence[Mapping[str, Any]], phase: str, steps: int = 0) -> int:
    """How many updates of `phase` have no line, of as many as there were: at least `steps`, and the latest one found."""
    found = {line["step"] for line in lines if line["phase"] == phase}
    updates = {
        line["step"] for line in lines if line["phase"] == phase and ("loss" in line or "skipped" in line)
    }
    return len(set(range(1, max(steps, *found, 0) + 1)) - updates)
