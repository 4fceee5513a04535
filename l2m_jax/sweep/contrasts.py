"""The contrasts of a sweep over worlds, from its finished cells: differences, intervals, tests and verdicts."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from l2m_jax import files
from l2m_jax.errors import InputError
from l2m_jax.evaluation.protocol import Score
from l2m_jax.evaluation.sources import parse_set
from l2m_jax.reporting.statistics import Paired, bootstrap, detectable, holm, paired, verdict
from l2m_jax.sweep.cells import Cell, Scores, finished
from l2m_jax.sweep.claims import PER_PROMPT, SIGNS, Claims, Contrast, is_of_diagnostics, is_of_validation

_CLAIMS = "claims.json"


@dataclass(frozen=True)
class Outcome:
    """
    Attributes:
        registered: whether the contrast was named before the first run; it is not primary otherwise.
        worlds: those in which all arms are finished; `differences` has a value for each.
        missing: the number of other worlds.
        p: of `found`; adjusted among the primary contrasts.
        bootstrap: interval over worlds × prompts; None unless every prompt's value is known.
        detectable: the true difference that is found with a probability of 80%, in the metric's units.
        verdict: as in `statistics.verdict`; "unfinished" while a world is missing.
    """

    contrast: Contrast
    registered: bool
    worlds: tuple[str, ...]
    missing: int
    differences: tuple[float, ...]
    found: Paired | None
    p: float
    bootstrap: tuple[float, float] | None
    detectable: float
    verdict: str

    @property
    def is_primary(self) -> bool:
        return self.registered and self.contrast.role == "primary"


def register(claims: Claims, workdir: Path) -> None:
    """Keeps the contrasts as they are before the first run. Later calls change nothing."""
    if not (workdir / _CLAIMS).is_file():
        files.write_json(workdir / _CLAIMS, [_plain(contrast) for contrast in claims.contrasts])


def check_measured(claims: Claims, cells: Sequence[Cell]) -> None:
    """Checks that the runs will measure what the contrasts compare.

    Raises:
        InputError: a set that is not evaluated, or a measure of the diagnostics without them; names the contrast.
    """
    for contrast in claims.contrasts:
        for evaluation in [cell.config.evaluation for cell in cells if cell.row in contrast.weights]:
            names = [parse_set(source)[0] for source in evaluation.sets]
            if absent := [name for name in contrast.sets if name not in names]:
                raise InputError(
                    f"contrasts.{contrast.id}.sets: {absent[0]!r} is not in evaluation.sets ({', '.join(names)})"
                )
            if not evaluation.diagnostic_rows and is_of_diagnostics(contrast.metric):
                raise InputError(
                    f"contrasts.{contrast.id}.metric: {contrast.metric} is not measured with "
                    "evaluation.diagnostic_rows = 0; raise it"
                )


def outcomes(claims: Claims, cells: Sequence[Cell], workdir: Path) -> list[Outcome]:
    """The outcome of each contrast, over the worlds in which all its arms are finished."""
    scores: dict[str, dict[str, tuple[Cell, Scores]]] = {cell.run: {} for cell in cells}
    for cell in cells:
        if (found := finished(cell, workdir)) is not None:
            scores[cell.run][cell.row] = cell, found
    file = workdir / _CLAIMS
    registered = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    found = [_outcome(contrast, _plain(contrast) in registered, scores) for contrast in claims.contrasts]
    primary = [i for i, o in enumerate(found) if o.is_primary and o.found and not math.isnan(o.found.p)]
    # Those that have no p yet, or are not in the claims any more, were named too, and count as not significant.
    named = sum(contrast["role"] == "primary" for contrast in registered)
    p = [found[i].p for i in primary]
    adjusted = dict(zip(primary, holm([*p, *[1.0] * (named - len(p))]), strict=False))
    return [_judged(outcome, adjusted.get(i, outcome.p)) for i, outcome in enumerate(found)]


def _outcome(
    contrast: Contrast, registered: bool, scores: Mapping[str, Mapping[str, tuple[Cell, Scores]]]
) -> Outcome:
    values = {}
    for world, arms in scores.items():
        if all(arm in arms for arm in contrast.weights):
            of_arms = {arm: _value(contrast, *arms[arm]) for arm in contrast.weights}
            values[world] = sum(weight * of_arms[arm] for arm, weight in contrast.weights.items())
    known = {world: value for world, value in values.items() if not math.isnan(value)}
    found = paired(list(known.values())) if known else None
    return Outcome(
        contrast,
        registered,
        tuple(known),
        len(scores) - len(known),
        tuple(known.values()),
        found,
        found.p if found else math.nan,
        _bootstrap(contrast, [scores[world] for world in known]),
        detectable(found.n) * found.sd if found and found.n > 1 else math.nan,
        "unfinished",
    )


def _value(contrast: Contrast, cell: Cell, scores: Scores) -> float:
    """The metric of one run; nan if it was not measured."""
    if is_of_validation(contrast.metric):
        return scores.validation.get(contrast.metric, math.nan)
    values = [getattr(s, contrast.metric) for s in _sets(contrast, cell, scores)]
    means = [value.mean if isinstance(value, Score) else value for value in values]
    return sum(means) / len(means) if means else math.nan


def _sets(contrast: Contrast, cell: Cell, scores: Scores):
    """The results of the contrast's sets; none if one is missing."""
    found = scores.results[cell.config.method].sets
    if not contrast.sets:
        return [s for s in found if not s.unreportable]
    chosen = [s for s in found if s.name in contrast.sets]
    return chosen if len(chosen) == len(contrast.sets) else []


def _bootstrap(
    contrast: Contrast, worlds: Sequence[Mapping[str, tuple[Cell, Scores]]]
) -> tuple[float, float] | None:
    if contrast.metric != PER_PROMPT or len(worlds) < 2:
        return None
    cell, scores = worlds[0][next(iter(contrast.weights))]
    of_sets = []
    for name in [s.name for s in _sets(contrast, cell, scores)]:
        rows = []
        for arms in worlds:
            of_arms = {arm: arms[arm][1].prompts.get(name, {}) for arm in contrast.weights}
            rows.append({arm: (contrast.weights[arm], prompts) for arm, prompts in of_arms.items()})
        common = [set(prompts) for row in rows for _, prompts in row.values()]
        ids = sorted(set.intersection(*common))
        if not ids or any(len(prompts) != len(ids) for prompts in common):
            return None  # worlds whose prompts differ are not crossed with them
        of_sets.append(np.array([[sum(w * p[i] for w, p in row.values()) for i in ids] for row in rows]))
    return bootstrap(of_sets) if of_sets else None


def _judged(outcome: Outcome, p: float) -> Outcome:
    contrast, found = outcome.contrast, outcome.found
    if found is None or outcome.missing:
        return dataclasses.replace(outcome, p=p)
    said = "unresolved"
    if not math.isnan(p):
        said = verdict(found, p, SIGNS[contrast.sign], contrast.effect)
    return dataclasses.replace(outcome, p=p, verdict=said)


def _plain(contrast: Contrast) -> dict:
    return json.loads(json.dumps(without_nan(dataclasses.asdict(contrast))))


def without_nan(value):
    """JSON has no nan: null stands for what was not measured or not given."""
    if isinstance(value, dict):
        return {name: without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
