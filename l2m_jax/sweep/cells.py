"""The cells of a sweep, one run for each row and seed: lists them, runs them, and reads their results."""

import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from l2m_jax import files, methods
from l2m_jax.config import Config, change
from l2m_jax.errors import InputError
from l2m_jax.evaluation.protocol import Results
from l2m_jax.progress import console
from l2m_jax.run import pipeline
from l2m_jax.run.resolve import resolve
from l2m_jax.sweep.presets import Row

_SHARED, _RESULT = "shared", "result.json"


class Cell(NamedTuple):
    """One run: its row of the table, its training seed, and its settings."""

    row: str
    seed: int
    config: Config

    @property
    def name(self) -> str:
        """The name, which is also the run's folder within that of the sweep."""
        return f"{self.row}/seed{self.seed}"


def grid(config: Config, rows: Mapping[str, Row], seeds: Sequence[int]) -> list[Cell]:
    """All cells, seed by seed, so that an unfinished sweep has every row with the first seeds.

    Raises:
        InputError: an unknown method, or a seed below 0.
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
    """The results of teacher, student before and student; None unless the cell is finished with these settings."""
    file = workdir / cell.name / _RESULT
    if not file.is_file():
        return None
    found = files.read_json(file, "delete it; the run's own files are kept")
    try:
        if found["made_from"] != _key(cell, workdir):
            return None
        return {name: Results.from_json(value) for name, value in found["results"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file}: not the result of a run ({error!r}); delete it; the run's own files are kept"
        ) from error


def _key(cell: Cell, workdir: Path) -> str:
    """Of the cell's scores: it changes with every setting and file that they depend on."""
    artefacts = resolve(cell.config, workdir / cell.name, workdir / _SHARED)
    return artefacts.evaluations[cell.config.method].key


def prepare(cells: Sequence[Cell], workdir: Path) -> None:
    """Makes what all cells share. One process does it while others wait.

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
    result = {"made_from": _key(cell, workdir), "seconds": seconds, "results": results}
    files.write_json(folder / _RESULT, result)


def run(cells: Sequence[Cell], workdir: Path, task: int | None = None) -> dict[str, str]:
    """Runs the unfinished cells, one after another. A failure does not stop the others.

    Args:
        task: the number of the only cell to run; None for all.

    Returns:
        The error messages of failed cells, by name.
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
        except Exception as error:  # an unexpected error must not stop the other cells
            traceback.print_exc()
            failures[cell.name] = repr(error)
        if cell.name in failures:
            console.print(f"{cell.name} failed: {failures[cell.name]}", markup=False)
    return failures
