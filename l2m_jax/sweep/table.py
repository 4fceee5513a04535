"""The table of a sweep, from its finished cells."""

from collections.abc import Sequence
from pathlib import Path

from l2m_jax import files
from l2m_jax.errors import InputError
from l2m_jax.evaluation.protocol import Results
from l2m_jax.reporting.tables import Table
from l2m_jax.sweep.cells import Cell, finished

_ONE_MODEL = ("teacher", "student before")


def write_table(cells: Sequence[Cell], workdir: Path) -> str:
    """Writes table.md, table.csv and table.tex into `workdir`.

    A row's values are those of its runs. So are those of the teacher and of the student before, if runs differ in them.

    Returns:
        The text of table.md: the table, a caption, and the missing cells.

    Raises:
        InputError: no cell is finished.
    """
    found: dict[str, list[Results]] = {name: [] for name in (*_ONE_MODEL, *(cell.row for cell in cells))}
    missing = []
    for cell in cells:
        scores = finished(cell, workdir)
        if scores is None:
            missing.append(cell.name)
            continue
        found[cell.row].append(scores.results[cell.config.method])
        for name in _ONE_MODEL:
            if scores.results[name] not in found[name]:
                found[name].append(scores.results[name])
    if len(missing) == len(cells):
        raise InputError(f"{workdir}: none of the {len(cells)} runs is finished with these settings")
    unreportable = {s.title for runs in found.values() for run in runs for s in run.sets if s.unreportable}
    table = Table({name: _values(runs) for name, runs in found.items()}, "teacher", frozenset(unreportable))
    text = f"{table.markdown()}\n{_caption(cells, found)}\n"
    if missing:
        text += f"\nMissing, {len(missing)} of {len(cells)} runs: {', '.join(missing)}.\n"
    files.write_text(workdir / "table.md", text)
    files.write_text(workdir / "table.csv", table.csv())
    files.write_text(workdir / "table.tex", table.latex())
    return text


def _values(runs: Sequence[Results]) -> dict[str, tuple[float, ...]]:
    """One value per run for each set; for a single run, one per sampling seed."""
    if len(runs) == 1:
        return {s.title: s.rouge_l.per_seed for s in runs[0].sets}
    titles = [s.title for s in runs[0].sets] if runs else []
    return {
        title: tuple(s.rouge_l.mean for run in runs for s in run.sets if s.title == title) for title in titles
    }


def _caption(cells: Sequence[Cell], found: dict[str, list[Results]]) -> str:
    runs = len({cell.run for cell in cells})
    sampling = len(found["teacher"][0].seeds)
    if runs == 1:
        return f"Rouge-L × 100, mean ± standard deviation over {sampling} sampling seeds of one run."
    what = "worlds" if any(cell.config.world for cell in cells) else "training seeds"
    single = " and ".join(name for name in _ONE_MODEL if len(found[name]) == 1)
    return (
        f"Rouge-L × 100, mean ± standard deviation over {runs} {what}, each the mean of {sampling} sampling seeds"
        + f"; a row with a single model, such as {single}, over the sampling seeds." * bool(single)
        + "." * (not single)
    )
