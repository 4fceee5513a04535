"""The paper's tables: methods by sets, mean ± standard deviation, as Markdown, CSV and LaTeX."""

import csv
import dataclasses
import io
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from l2m_jax.evaluation.protocol import Results

AVERAGE = "Avg."


@dataclasses.dataclass(frozen=True)
class Spread:
    """A mean and the sample standard deviation of its values; None for a single value."""

    mean: float
    std: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.std is None else f"{self.mean:.1f} ± {self.std:.1f}"


@dataclasses.dataclass(frozen=True)
class _Cell:
    spread: Spread | None
    best: bool = False
    beats_teacher: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of results, in which one row may be the teacher.

    Attributes:
        values: for each row (method or model) and column (set), the values to average: Rouge-L × 100 of several
            training runs or sampling seeds. A missing entry is shown as a dash.
        teacher: the row that the others are compared with. It comes first and is never marked as best.
        unreportable: columns that must not be reported. They carry a dagger and are left out of the average.
        plain: only numbers, without an average and without marking the best.
    """

    values: Mapping[str, Mapping[str, Sequence[float]]]
    teacher: str | None = None
    unreportable: frozenset[str] = frozenset()
    plain: bool = False

    def __post_init__(self):
        if self.teacher is not None and self.teacher not in self.values:
            raise ValueError(f"the teacher's row '{self.teacher}' is not one of {', '.join(self.values)}")

    @property
    def sets(self) -> list[str]:
        """The sets, in the order of their first appearance."""
        return list(dict.fromkeys(name for row in self.values.values() for name in row))

    @property
    def columns(self) -> list[str]:
        """The sets, and their average if there are several."""
        return self.sets + [AVERAGE] * (len(self._averaged) > 1 and not self.plain)

    @property
    def _averaged(self) -> list[str]:
        return [name for name in self.sets if name not in self.unreportable]

    def spread(self, row: str, column: str) -> Spread | None:
        """The cell's mean and deviation; None if a value is missing.

        The average's deviation is that of the runs' averages; None unless all sets have equally many runs.
        """
        found = self.values[row]
        if column != AVERAGE:
            return Spread.of(found[column]) if found.get(column) else None
        if not all(found.get(name) for name in self._averaged):
            return None
        runs = [found[name] for name in self._averaged]
        if len({len(values) for values in runs}) == 1:
            return Spread.of([statistics.fmean(run) for run in zip(*runs, strict=True)])
        return Spread(statistics.fmean(statistics.fmean(values) for values in runs))

    def _rows(self) -> Iterable[tuple[str, list[_Cell]]]:
        others = [name for name in self.values if name != self.teacher]
        spreads = {name: [self.spread(name, column) for column in self.columns] for name in self.values}
        # Rounded as shown, so that scores that look equal are equally good.
        shown = {name: [None if s is None else round(s.mean, 1) for s in spreads[name]] for name in spreads}
        best = [
            max((value for name in others if (value := shown[name][i]) is not None), default=None)
            for i in range(len(self.columns))
        ]
        if self.teacher is not None:
            yield self.teacher, [_Cell(spread) for spread in spreads[self.teacher]]
        compared = len(others) > 1 and not self.plain
        for name in others:
            cells = []
            for i, value in enumerate(shown[name]):
                to_beat = None if self.teacher is None else shown[self.teacher][i]
                beats = value is not None and to_beat is not None and value > to_beat
                is_best = compared and value is not None and value == best[i]
                cells.append(_Cell(spreads[name][i], is_best, beats))
            yield name, cells

    def _heading(self, column: str, dagger: str) -> str:
        return column + dagger if column in self.unreportable else column

    def notes(self) -> list[str]:
        """What the marks in the table mean."""
        notes = []
        if len(self.values) - (self.teacher is not None) > 1 and not self.plain:
            notes.append("Bold: the best, except for the teacher.")
        if self.teacher is not None:
            notes.append("*: better than the teacher.")
        if not self.unreportable.isdisjoint(self.sets):
            notes.append("†: not the paper's set and not to be reported; left out of the average.")
        return notes

    def markdown(self) -> str:
        """A GitHub table, followed by its notes."""

        def text(cell: _Cell) -> str:
            if cell.spread is None:
                return "–"
            value = f"**{cell.spread}**" if cell.best else str(cell.spread)
            return value + r"\*" * cell.beats_teacher

        headings = ["", *(_markdown_escaped(self._heading(c, "†")) for c in self.columns)]
        lines = [_markdown_row(headings), _markdown_row(["---", *["---:"] * len(self.columns)])]
        lines += [_markdown_row([_markdown_escaped(name), *map(text, cells)]) for name, cells in self._rows()]
        notes = " ".join(self.notes()).replace("*:", r"\*:")
        return "\n".join(lines) + "\n" + (f"\n{notes}\n" if notes else "")

    def csv(self) -> str:
        """One line per row, with each column's mean and standard deviation at full precision, without marks."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["", *(heading for c in self.columns for heading in (c, f"{c} std"))])
        for name, cells in self._rows():
            numbers: list[float | str] = []
            for cell in cells:
                spread = cell.spread
                numbers.append("" if spread is None else spread.mean)
                numbers.append("" if spread is None or spread.std is None else spread.std)
            writer.writerow([name, *numbers])
        return file.getvalue()

    def latex(self) -> str:
        """A `tabular` with booktabs rules."""

        def text(cell: _Cell) -> str:
            if cell.spread is None:
                return "--"
            value = str(cell.spread).replace("±", r"$\pm$")
            return (rf"\textbf{{{value}}}" if cell.best else value) + r"$^{*}$" * cell.beats_teacher

        def row(name: str, cells: Iterable[str]) -> str:
            return " & ".join([_latex_escaped(name), *cells]) + r" \\"

        headings = (_latex_escaped(self._heading(c, "†")).replace("†", r"$^\dagger$") for c in self.columns)
        rows = list(self._rows())
        lines = [
            rf"\begin{{tabular}}{{l{'c' * len(self.columns)}}}",
            r"\toprule",
            row("", headings),
            r"\midrule",
        ]
        lines += [row(name, map(text, cells)) for name, cells in rows]
        if self.teacher is not None and len(rows) > 1:
            lines.insert(5, r"\midrule")
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def results_table(results: Mapping[str, Results], *, teacher: str | None = None) -> Table:
    """A table of models by sets; `teacher` is the row that the others are compared with."""
    values = {
        model: {found.title: found.rouge_l.per_seed for found in result.sets}
        for model, result in results.items()
    }
    unreportable = {found.title for result in results.values() for found in result.sets if found.unreportable}
    return Table(values, teacher, frozenset(unreportable))


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escaper(special: str, replacement: Callable[[str], str]) -> Callable[[str], str]:
    pattern = re.compile(special)
    return lambda text: pattern.sub(lambda match: replacement(match[0]), text)


_markdown_escaped = _escaper(r"[\\|*_`<\[\]]", lambda character: "\\" + character)
_latex_escaped = _escaper(
    r"[\\&%$#_{}~^]",
    lambda character: {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}.get(
        character, "\\" + character
    ),
)
