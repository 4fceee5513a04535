"""Settings that each arm chooses from one grid: by validation in world 0, which no contrast uses."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from l2m_jax import files
from l2m_jax.config import Config
from l2m_jax.errors import InputError
from l2m_jax.sweep.cells import Cell, config_of, finished
from l2m_jax.sweep.presets import Row

Grid = Mapping[str, Sequence[Any]]


def points_of(grid: Grid) -> dict[str, dict[str, Any]]:
    """The settings of each point of the grid, by a name such as "learning_rate=0.001"."""
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return {
        ",".join(f"{name.rpartition('.')[2]}={value}" for name, value in point.items()).replace(
            "/", "_"
        ): point
        for point in points
    }


def tuning_cells(config: Config, rows: Mapping[str, Row], grid: Grid) -> list[Cell]:
    """A run of each arm at each point of the grid, in world 0.

    Raises:
        InputError: an arm sets what the grid chooses, or a setting or value is unknown.
    """
    for label, row in rows.items():
        if fixed := set(row.changes) & set(grid):
            raise InputError(f"{label}: sets {min(fixed)}, which --grid chooses; leave it out of one of them")
    return [
        Cell(label, f"tuning_{name}", config_of(config, label, row, {"world": 0, **point}))
        for name, point in points_of(grid).items()
        for label, row in rows.items()
    ]


def choose(cells: Sequence[Cell], grid: Grid, workdir: Path) -> dict[str, dict[str, Any]]:
    """The point of the grid with the highest validation Rouge-L for each arm; of equal ones the first.

    Writes tuning.json: the validation Rouge-L of each arm at each point, what was chosen, and whether that is the
    first or last value of its setting, in which case a wider grid might do better.

    Raises:
        InputError: some runs are not finished, or have lost their validations.
    """
    points, scores, missing = points_of(grid), {}, []
    for cell in cells:
        found = finished(cell, workdir)
        if found is None:
            missing.append(cell.name)
        elif "validation_rouge_l" not in found.validation:
            raise InputError(
                f"{workdir / cell.name}: has no validation in its metrics.jsonl, by which --grid chooses; delete this "
                "folder to run it again"
            )
        else:
            point = cell.run.removeprefix("tuning_")
            scores.setdefault(cell.row, {})[point] = found.validation["validation_rouge_l"]
    if missing:
        raise InputError(
            f"{workdir}: --grid chooses each arm's settings once its runs of the tuning are finished, and "
            f"{len(missing)} are not: {', '.join(missing)}"
        )
    best = {row: max(points, key=of_points.__getitem__) for row, of_points in scores.items()}
    chosen = {row: points[name] for row, name in best.items()}
    record = {
        row: {
            "validation_rouge_l": of_points,
            "chosen": chosen[row],
            "at_the_edge": [
                name for name, values in grid.items() if chosen[row][name] in (values[0], values[-1])
            ],
        }
        for row, of_points in scores.items()
    }
    files.write_json(workdir / "tuning.json", record)
    return chosen
