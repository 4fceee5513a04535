"""One run for each row and seed: which there are, which are finished, and how they are run."""

import json
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from l2m_jax import files, methods
from l2m_jax.config import Config, change, without_cost
from l2m_jax.errors import InputError
from l2m_jax.evaluation.protocol import Results
from l2m_jax.progress import console
from l2m_jax.run import pipeline
from l2m_jax.sweep.presets import Row

_SHARED, _RESULT = "shared", "result.json"


class Cell(NamedTuple):
    """One run: the row that it counts for, its training seed, and its settings."""

    row: str
    seed: int
    config: Config

    @property
    def name(self) -> str:
        """Also its folder within the sweep's."""
        return f"{self.row}/seed{self.seed}"


def grid(config: Config, rows: Mapping[str, Row], seeds: Sequence[int]) -> list[Cell]:
    """All cells, one seed after the other: an unfinished sweep has every row before it has every seed.

    Raises:
        InputError: a method that there is not, or a seed below 0.
    """
    if wrong := [seed for seed in seeds if seed < 0]:
        raise InputError(f"training seed {wrong[0]}: must be 0 or more")
    for row in rows.values():
        methods.get(row.method)
    return [
        Cell(
            label,
            seed,
            change(config, {"method": row.method, "baselines": (), "student.seed": seed, **row.changes}),
        )
        for seed in dict.fromkeys(seeds)
        for label, row in rows.items()
    ]


def finished(cell: Cell, workdir: Path) -> dict[str, Results] | None:
    """The evaluation of teacher, student before and student; None unless the cell is finished with these settings."""
    file = workdir / cell.name / _RESULT
    if not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    if found["made_from"] != _key(cell):
        return None
    return {name: Results.from_json(value) for name, value in found["results"].items()}


def _key(cell: Cell) -> str:
    return files.fingerprint(without_cost(cell.config))


def prepare(cells: Sequence[Cell], workdir: Path) -> None:
    """What all cells share, made by one process while others wait for it.

    Raises:
        InputError: as `pipeline.prepare`.
    """
    first, *others = dict.fromkeys(cell.config.method for cell in cells)
    config = change(cells[0].config, {"method": first, "baselines": tuple(others), "student.seed": -1})
    workdir.mkdir(parents=True, exist_ok=True)
    console.rule("shared by all runs", characters="═")
    with FileLock(workdir / ".shared.lock"):
        pipeline.prepare(config, workdir / _SHARED)


def _run_cell(cell: Cell, workdir: Path) -> None:
    folder = workdir / cell.name
    start = time.monotonic()
    results = pipeline.run(cell.config, folder, workdir / _SHARED)
    seconds = time.monotonic() - start
    console.print(f"{cell.name}: {seconds:,.0f} s")
    result = {"made_from": _key(cell), "seconds": seconds, "results": results}
    files.write_json(folder / _RESULT, result)


def run(cells: Sequence[Cell], workdir: Path, task: int | None = None) -> dict[str, str]:
    """Runs the cells that are not finished, one after another; one that fails does not stop the others.

    Args:
        task: the number of the only cell to run; None: all.

    Returns:
        What went wrong, by the names of the cells that failed.
    """
    if task is not None and not 0 <= task < len(cells):
        raise InputError(f"--task {task}: the runs are numbered from 0 to {len(cells) - 1}")
    chosen = cells if task is None else [cells[task]]
    waiting = [cell for cell in chosen if finished(cell, workdir) is None]
    console.print(
        f"{len(chosen)} of {len(cells)} runs, {len(chosen) - len(waiting)} of them finished already"
    )
    if waiting:
        prepare(cells, workdir)
    failures = {}
    for number, cell in enumerate(waiting, start=1):
        console.rule(f"{cell.name}, {number} of {len(waiting)}", characters="═")
        try:
            _run_cell(cell, workdir)
        except InputError as error:
            failures[cell.name] = str(error)
        except Exception as error:  # whatever it is, the other cells need not fail
            traceback.print_exc()
            failures[cell.name] = repr(error)
        if cell.name in failures:
            console.print(f"{cell.name} failed: {failures[cell.name]}", markup=False)
    return failures
