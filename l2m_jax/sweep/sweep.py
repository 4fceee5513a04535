"""A sweep: its runs in order, the choice from the grid between them, and its table and contrasts."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from l2m_jax.config import Config
from l2m_jax.errors import InputError
from l2m_jax.sweep import cells as runs
from l2m_jax.sweep.cells import Cell
from l2m_jax.sweep.claims import Claims
from l2m_jax.sweep.contrasts import check_measured, register
from l2m_jax.sweep.contrasts_report import write_contrasts
from l2m_jax.sweep.presets import Row
from l2m_jax.sweep.table import write_table
from l2m_jax.sweep.tuning import Grid, choose, tuning_cells


class Sweep:
    """
    Args:
        seeds: training seeds; ignored with `worlds`.
        worlds: their number; None for a sweep over seeds.
        grid: settings of which each row chooses one point; empty: none. Needs `worlds`.
        claims: contrasts between the rows, which are its arms; None without contrasts. Needs `worlds`.

    Raises:
        InputError: an unknown method, settings that a row cannot have, or a contrast of what is not measured.
    """

    def __init__(
        self,
        config: Config,
        rows: Mapping[str, Row],
        workdir: Path,
        *,
        seeds: Sequence[int] = (),
        worlds: int | None = None,
        redraw_teacher: bool = False,
        grid: Grid | None = None,
        claims: Claims | None = None,
    ):
        self._config, self._rows, self._workdir = config, rows, workdir
        self._seeds, self._worlds, self._redraw_teacher = seeds, worlds, redraw_teacher
        self._grid, self._claims = grid or {}, claims
        self._tuning = tuning_cells(config, rows, self._grid) if self._grid else []
        cells = self._cells(tuned=False)
        if claims is not None:
            check_measured(claims, cells)

    def _cells(self, *, tuned: bool = True) -> list[Cell]:
        """The runs that are reported, with each row's choice from the grid if they are `tuned`."""
        if self._worlds is None:
            return runs.grid(self._config, self._rows, self._seeds)
        chosen = choose(self._tuning, self._grid, self._workdir) if tuned and self._grid else {}
        return runs.world_grid(self._config, self._rows, self._worlds, self._redraw_teacher, chosen)

    def _is_tuned(self) -> bool:
        return all(runs.finished(cell, self._workdir) is not None for cell in self._tuning)

    def cells(self) -> list[Cell]:
        """All runs in the order of their numbers: those of the tuning come first."""
        return [*self._tuning, *self._cells(tuned=self._is_tuned())]

    def run(self, task: int | None = None) -> dict[str, str]:
        """Runs what is not finished: first the tuning, then the rest with the settings that it chose.

        Args:
            task: the number of the only run; None for all.

        Returns:
            The error messages of failed runs, by name.

        Raises:
            InputError: the chosen run needs runs of the tuning that are not finished.
        """
        if self._claims is not None:
            register(self._claims, self._workdir)
        first = len(self._tuning)
        if task is not None and not 0 <= task < first + len(self._cells(tuned=False)):
            raise InputError(
                f"--task {task}: the runs are numbered from 0 to {first + len(self._cells(tuned=False)) - 1}"
            )
        failures = {}
        if self._tuning and (task is None or task < first):
            failures = runs.run(self._tuning, self._workdir, task)
            if task is not None or failures:
                return failures
        return runs.run(self._cells(), self._workdir, None if task is None else task - first)

    def has_scores(self) -> bool:
        """Whether there is something to report."""
        return self._is_tuned() and any(runs.finished(cell, self._workdir) for cell in self._cells())

    def report(self) -> str:
        """Writes the table and the contrasts, and returns their text.

        Raises:
            InputError: no run is finished.
        """
        cells = self._cells()
        text = write_table(cells, self._workdir)
        if self._claims is not None:
            text += "\n" + write_contrasts(self._claims, cells, self._workdir)
        return text
