"""metrics.jsonl: one JSON object per line, written during training. A resumed run leaves no duplicates."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from l2m_jax import files
from l2m_jax.multihost import is_first
from l2m_jax.training.trackers import Trackers


class MetricsLog:
    """Appends lines to `path`, in the first process only, and hands their numbers to the trackers."""

    def __init__(self, path: Path):
        self._path = path
        self._writes = is_first()
        self._trackers: Trackers | None = None
        # The last step that trackers have received, by phase, of updates and of validations.
        self._tracked: dict[tuple[str, bool], int] = {}

    @contextlib.contextmanager
    def tracked(self, names: Sequence[str], config: Mapping[str, Any]) -> Iterator[None]:
        """Within the block, the trackers `names` receive what is written, each step once.

        Args:
            config: all settings, for the trackers to show.
        """
        if not (names and self._writes):
            yield
            return
        history = [(line["phase"], line["step"], _numbers(line)) for line in read_metrics(self._path)]
        self._trackers = Trackers(names, self._path.parent, config, history)
        completed = False
        try:
            yield
            completed = True
        finally:
            trackers, self._trackers = self._trackers, None
            trackers.finish(completed)

    def write(self, phase: str, step: int, **values: Any) -> None:
        if not self._writes:
            return
        line = {"phase": phase, "step": step, **values}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._trackers is not None and step > self._tracked.get((phase, _is_validation(line)), 0):
            self._trackers.log(phase, step, _numbers(line))

    def drop_after(self, phase: str, step: int, validated: int) -> None:
        """Deletes the lines of `phase` after `step`, those of validations after `validated`, and an incomplete line."""
        if not self._writes:
            return
        last = {False: step, True: validated}
        kept = []
        for line in read_metrics(self._path):
            kind = _is_validation(line)
            if line["phase"] == phase:
                # The trackers have also what is deleted here.
                self._tracked[phase, kind] = max(line["step"], self._tracked.get((phase, kind), 0))
            if line["phase"] != phase or line["step"] <= last[kind]:
                kept.append(line)
        files.write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def report(
        self,
        scores: Mapping[str, Any],
        figures: Sequence[Path],
        samples: Sequence[Mapping[str, Any]],
        markdown: str,
    ) -> None:
        """Hands the end of a run to the trackers.

        Args:
            scores: numbers, by nested names.
            figures: PNG files.
            samples: sample answers, rows with the same columns.
            markdown: the samples as a text.
        """
        if self._trackers is None:
            return
        self._trackers.log("evaluation", 1, _numbers(scores))
        for file in figures:
            self._trackers.figure(f"report/{file.stem}", file)
        if samples:
            self._trackers.table("report/samples", samples, markdown)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in nested mappings, under paths such as "validation_by_category/copy/kl", without the step."""
    found = {}
    for name, value in values.items():
        if isinstance(value, int | float) and name != "step":
            found[name] = value
        elif isinstance(value, Mapping):
            found |= {f"{name}/{inner}": number for inner, number in _numbers(value).items()}
    return found


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
