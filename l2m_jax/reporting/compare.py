"""A run's curve and scores beside those of another run, or of a reference file such as a published log.

Both sides are `values`: measures by place, where a place is the end of a stage of the main student's training, or its
scores on the evaluation sets. They are compared where they have a place and a measure in common.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2m_jax.errors import InputError
from l2m_jax.evaluation.protocol import Results
from l2m_jax.reporting import figures, markdown
from l2m_jax.training.metrics import read_metrics

_PHASE, _SCORES = "student", "scores"
# The curve's measures, and whether they are Rouge-L (in points) or in nats a token.
_CURVE = {
    "validation_rouge_l": True,
    "validation_rouge_l_greedy": True,
    "validation_kl": False,
    "validation_cross_entropy": False,
    "validation_entropy": False,
}

Values = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Tolerance:
    """The largest differences that still count as equal: of Rouge-L in points, and of losses in nats a token."""

    rouge_l: float
    nats: float

    def of(self, place: str, measure: str) -> float:
        return self.rouge_l if place == _SCORES or _CURVE[measure] else self.nats


@dataclass(frozen=True)
class Difference:
    place: str
    measure: str
    first: float
    second: float
    tolerance: float

    @property
    def within(self) -> bool:
        return abs(self.first - self.second) <= self.tolerance


def read(path: Path) -> tuple[str, Values]:
    """Name and values of a run's folder or of a reference file.

    Raises:
        InputError: there is neither, or it has no values.
    """
    values = _read_run(path) if path.is_dir() else None
    if values is not None:
        if not values:
            raise InputError(f"{path}: neither validations of a student nor scores; finish the run first")
        return path.name, values
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        name, values = found["name"], found["values"]
        for place, measures in values.items():
            for measure, value in measures.items():
                float(value)
                if place != _SCORES and measure not in _CURVE:
                    raise ValueError(f"unknown measure '{measure}' (known: {', '.join(_CURVE)})")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: neither the folder of a run nor a reference file ({error!r}); see configs/references"
        ) from error
    return name, values


def _read_run(folder: Path) -> dict[str, dict[str, float]]:
    """The last validation within each stage, and the mean Rouge-L of each set."""
    values: dict[str, dict[str, float]] = {}
    for line in figures.validations_of(read_metrics(folder / "metrics.jsonl"), _PHASE):
        values[f"end of stage {line['stage']}"] = {name: line[name] for name in _CURVE if name in line}
    results, config = folder / "evaluation" / "results.json", folder / "config.json"
    if results.is_file() and config.is_file():
        scored: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
        method = json.loads(config.read_text(encoding="utf-8"))["method"]
        if method in scored:
            values[_SCORES] = {
                found.name: found.rouge_l.mean for found in Results.from_json(scored[method]).sets
            }
    return values


def differences(first: Values, second: Values, tolerance: Tolerance) -> list[Difference]:
    """What both have, in the order of `first`.

    Raises:
        InputError: they have nothing in common.
    """
    found = [
        Difference(place, measure, value, second[place][measure], tolerance.of(place, measure))
        for place, measures in first.items()
        for measure, value in measures.items()
        if measure in second.get(place, {})
    ]
    if not found:
        raise InputError(
            f"nothing to compare: the first has {', '.join(first)}, the second {', '.join(second)}, without a measure "
            "in common"
        )
    return found


def table(found: list[Difference], names: tuple[str, str]) -> str:
    """A Markdown table of the differences, and the verdict."""
    rows = [
        [
            d.place,
            d.measure.removeprefix("validation_"),
            f"{d.first:.2f}",
            f"{d.second:.2f}",
            f"{d.first - d.second:+.2f}",
            f"{d.tolerance:g}",
            "yes" if d.within else "no",
        ]
        for d in found
    ]
    heading = ("place", "measure", *map(markdown.short, names), "difference", "tolerance", "within")
    outside = sum(not d.within for d in found)
    verdict = f"{outside} of {len(found)} differ by more" if outside else f"all {len(found)} agree"
    return f"{markdown.table(heading, rows, left=2)}\nWithin the tolerance: {verdict}.\n"
