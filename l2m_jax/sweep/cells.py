"""The cells of a sweep, one run for each row and seed or world: lists them, runs them, and reads their results."""

import collections
import json
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from l2m_jax import files, methods
from l2m_jax.config import Config, change, to_dict
from l2m_jax.errors import InputError
from l2m_jax.evaluation.protocol import RESPONSES, Results
from l2m_jax.progress import console
from l2m_jax.run import locks, pipeline
from l2m_jax.run.resolve import resolve
from l2m_jax.sweep.presets import Row
from l2m_jax.training.metrics import read_metrics

_SHARED, _RESULT = "shared", "result.json"
_SECONDS_BETWEEN_LOOKS = 2.0  # at cells that other processes run


class Cell(NamedTuple):
    """One run: its row of the table, which of the row's runs it is ("seed0", "world1"), and its settings."""

    row: str
    run: str
    config: Config

    @property
    def name(self) -> str:
        """The name, which is also the run's folder within that of the sweep."""
        return f"{self.row}/{self.run}"


class Scores(NamedTuple):
    """
    Attributes:
        results: of teacher, student before and student.
        validation: what was measured of the student that is kept, by the names of metrics.jsonl.
        prompts: Rouge-L × 100 of the student, the mean over the sampling seeds, by set and id of the prompt.
    """

    results: dict[str, Results]
    validation: dict[str, float]
    prompts: dict[str, dict[str, float]]


def grid(config: Config, rows: Mapping[str, Row], seeds: Sequence[int]) -> list[Cell]:
    """All cells, seed by seed, so that an unfinished sweep has every row with the first seeds.

    Raises:
        InputError: an unknown method, settings that a row cannot have, or a seed below 0.
    """
    if wrong := [seed for seed in seeds if seed < 0]:
        raise InputError(f"training seed {wrong[0]}: must be 0 or more")
    return [
        Cell(label, f"seed{seed}", config_of(config, label, row, {"student.seed": seed}))
        for seed in dict.fromkeys(seeds)
        for label, row in rows.items()
    ]


def world_grid(
    config: Config,
    rows: Mapping[str, Row],
    worlds: int,
    redraw_teacher: bool = False,
    tuned: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Cell]:
    """All cells, world by world. Worlds are numbered from 1: world 0 is the teacher's, and that of the tuning.

    Args:
        tuned: further settings of each row.

    Raises:
        InputError: as `grid`, or no worlds.
    """
    if worlds < 1:
        raise InputError(f"--worlds {worlds}: must be at least 1")
    config = change(config, {"teacher.world": -1}) if redraw_teacher else config
    return [
        Cell(
            label,
            f"world{world}",
            config_of(config, label, row, {"world": world, **(tuned or {}).get(label, {})}),
        )
        for world in range(1, worlds + 1)
        for label, row in rows.items()
    ]


def config_of(config: Config, label: str, row: Row, changes: Mapping[str, Any]) -> Config:
    """The settings of a row's run.

    Raises:
        InputError: an unknown method, or settings that the row cannot have; names the row.
    """
    try:
        methods.get(row.method)
        return change(config, {"method": row.method, "baselines": (), **changes, **row.changes})
    except InputError as error:
        raise InputError(f"{label}: {error}") from error


def finished(cell: Cell, workdir: Path) -> Scores | None:
    """The scores of a cell; None unless it is finished with these settings."""
    file = workdir / cell.name / _RESULT
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["made_from"] != _key(cell, workdir):
            return None
        results = {name: Results.from_json(value) for name, value in found["results"].items()}
        return Scores(results, found["validation"], found["prompts"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # damaged: the run reads its results again


def _key(cell: Cell, workdir: Path) -> str:
    """Of the cell's scores: it changes with every setting and file that they depend on."""
    artefacts = resolve(cell.config, workdir / cell.name, workdir / _SHARED)
    return artefacts.evaluations[cell.config.method].key


def prepare(cells: Sequence[Cell], workdir: Path) -> None:
    """Makes what the cells share. One process does it while others wait.

    Raises:
        InputError: as `pipeline.prepare`.
    """
    shared = workdir / _SHARED
    for config in _common(cells):
        common = resolve(config, shared, shared).common
        if not all(artefact.is_finished for artefact in common):
            console.rule(
                f"shared by all runs{f' of world {config.world}' * (config.world > 0)}", characters="═"
            )
            pipeline.prepare(config, shared)


def _common(cells: Sequence[Cell]) -> Iterator[Config]:
    """One config for each group of cells that differ only in method and seed."""
    groups = collections.defaultdict(list)
    for cell in cells:
        values = to_dict(cell.config)
        del values["method"], values["student"]["seed"]
        groups[files.fingerprint(values)].append(cell)
    for group in groups.values():
        first, *others = dict.fromkeys(cell.config.method for cell in group)
        yield change(group[0].config, {"method": first, "baselines": tuple(others), "student.seed": -1})


def _run_cell(cell: Cell, workdir: Path) -> None:
    folder = workdir / cell.name
    start = time.monotonic()
    results = pipeline.run(cell.config, folder, workdir / _SHARED)
    seconds = time.monotonic() - start
    console.print(f"{cell.name}: {seconds:,.0f} s")
    result = {
        "made_from": _key(cell, workdir),
        "seconds": seconds,
        "results": results,
        "validation": _kept_validation(cell.config, folder),
        "prompts": _by_prompt(folder / "evaluation" / cell.config.method / RESPONSES),
    }
    files.write_json(folder / _RESULT, result)


def _kept_validation(config: Config, folder: Path) -> dict[str, float]:
    """The numbers of the validation of the student that is kept; empty without one."""
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "validation_rouge_l" in line]
    lines = sorted((line for line in lines if line["phase"] == "student"), key=lambda line: line["step"])
    if not lines:
        return {}
    best = config.evaluation.select == "best"
    kept = max(lines, key=lambda line: line["validation_rouge_l"]) if best else lines[-1]
    return {name: value for name, value in kept.items() if isinstance(value, int | float)}


def _by_prompt(responses: Path) -> dict[str, dict[str, float]]:
    if not responses.is_file():
        return {}
    found = collections.defaultdict(lambda: collections.defaultdict(list))
    with responses.open(encoding="utf-8") as lines:
        for line in map(json.loads, lines):
            found[line["set"]][line["id"]].append(100 * line["rouge_l"])
    return {
        name: {prompt: round(sum(values) / len(values), 4) for prompt, values in prompts.items()}
        for name, prompts in found.items()
    }


def run(cells: Sequence[Cell], workdir: Path, task: int | None = None) -> dict[str, str]:
    """Runs the unfinished cells, one after another. A failure does not stop the others.

    Several processes may do so at the same time. Each cell is run by one of them, and all wait for the last. If what the
    cells of a world share cannot be made, they all fail; with a single world, that error is raised.

    Args:
        task: the number of the only cell to run; None for all.

    Returns:
        The error messages of failed cells, by name.
    """
    if task is not None and not 0 <= task < len(cells):
        raise InputError(f"--task {task}: the runs are numbered from 0 to {len(cells) - 1}")
    chosen = cells if task is None else [cells[task]]
    worlds = {cell.config.world for cell in chosen}
    waiting = [cell for cell in chosen if finished(cell, workdir) is None]
    console.print(
        f"{len(chosen)} of {len(cells)} runs, {len(chosen) - len(waiting)} of them finished already"
    )
    failures: dict[str, str] = {}
    unprepared: dict[int, Exception | None] = {}  # why a world could not be prepared
    told: set[str] = set()
    if waiting:
        _check_rows(cells, workdir)
    while waiting:
        others = []
        for cell in waiting:
            if finished(cell, workdir) is not None:
                continue  # by another process
            world = cell.config.world
            if world not in unprepared:
                sharing = [other for other in cells if other.config.world == world]
                try:
                    prepare(sharing, workdir)
                    unprepared[world] = None
                except Exception as error:
                    if len(worlds) == 1:
                        raise
                    unprepared[world] = error
            try:
                if (failure := unprepared[world]) is not None:
                    raise failure
                with locks.held(workdir / cell.name):
                    if finished(cell, workdir) is None:
                        console.rule(cell.name, characters="═")
                        _run_cell(cell, workdir)
            except locks.InUse as held:
                others.append(cell)
                if str(held) not in told:
                    console.print(f"  {held}".partition(";")[0], markup=False)
                told.add(str(held))
            except InputError as error:
                failures[cell.name] = str(error)
            except Exception as error:  # an unexpected error must not stop the other cells
                traceback.print_exc()
                failures[cell.name] = repr(error)
            if cell.name in failures:
                console.print(f"{cell.name} failed: {failures[cell.name]}", markup=False)
        # What other processes run is looked at again: they may end without finishing it.
        waiting = others
        if waiting:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    return failures


def _check_rows(cells: Sequence[Cell], workdir: Path) -> None:
    """Checks that the last world has training rows, too: what is shared is made world by world."""
    last = max(cells, key=lambda cell: cell.config.world)
    if last.config.world > cells[0].config.world:
        pipeline.check(last.config, workdir / _SHARED)
