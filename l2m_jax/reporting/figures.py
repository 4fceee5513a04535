"""The figures of a run's report, as PNG files, from metric lines and difficulties."""

import contextlib
import io
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from l2m_jax.curriculum import Difficulty

Metrics = Sequence[Mapping[str, Any]]

# Okabe and Ito's palette for colour-blind readers, without its yellow, which is too light for lines.
_BLUE, _ORANGE, _GREEN, _RED, _PURPLE, _SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
_LINES = (_BLUE, _ORANGE, _GREEN, _PURPLE, _RED, _SKY)
_GREY = "#6B6B6B"
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelcolor": "#333333",
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
}
_POINTS_A_SUBSET = 400


def steps_of(metrics: Metrics, phase: str) -> list[Mapping[str, Any]]:
    """The training lines of a phase, in the order of their steps."""
    return sorted((m for m in metrics if m["phase"] == phase and "loss" in m), key=lambda m: m["step"])


def validations_of(metrics: Metrics, phase: str) -> list[Mapping[str, Any]]:
    """The lines of a phase with a Rouge-L on the validation rows, in the order of their steps."""
    found = (m for m in metrics if m["phase"] == phase and "validation_rouge_l" in m)
    return sorted(found, key=lambda m: m["step"])


def training(
    path: Path,
    metrics: Metrics,
    *,
    label: str = "student",
    phase: str = "student",
    teacher_phase: str = "teacher",
) -> None:
    """Loss over the steps of `phase`, and validation Rouge-L of `phase` and its baselines ("student:sft", ...).

    Args:
        metrics: lines of metrics.jsonl. Measures without a line are left out.
        label: the name of the line of `phase`.
        teacher_phase: its best validation Rouge-L is drawn as a horizontal line.
    """
    phases = list(dict.fromkeys(m["phase"] for m in metrics))
    compared = [p for p in phases if p == phase] + [p for p in phases if p.startswith(f"{phase}:")]
    measured = [name for name in compared if validations_of(metrics, name)]
    with _figure(path, 7.2, 5.4 if measured else 3.2) as figure:
        panels = figure.subplots(2 if measured else 1, 1, sharex=True, squeeze=False)[:, 0].tolist()
        _losses(panels[0], steps_of(metrics, phase))
        if measured:
            _validations(panels[1], metrics, measured, {phase: label}, teacher_phase)
        _mark_stages(panels, steps_of(metrics, phase))
        panels[0].set_xlim(0, max((m["step"] for m in metrics if m["phase"] in compared), default=1))
        panels[-1].set_xlabel("step")


def _validations(
    axes: Axes, metrics: Metrics, phases: Sequence[str], labels: Mapping[str, str], teacher_phase: str
) -> None:
    ends = []
    for i, (name, colour) in enumerate(zip(phases, itertools.cycle(_LINES), strict=False)):
        lines = validations_of(metrics, name)
        x, y = [m["step"] for m in lines], [m["validation_rouge_l"] for m in lines]
        axes.plot(x, y, color=colour, marker="o", markersize=2.5, linewidth=1.2 if i else 1.8)
        ends.append((y[-1], labels.get(name, name.partition(":")[2]), colour))
    if levels := [m["validation_rouge_l"] for m in validations_of(metrics, teacher_phase)]:
        axes.axhline(max(levels), color=_GREY, linewidth=1, linestyle=(0, (4, 3)))
        ends.append((max(levels), f"{teacher_phase}, best", _GREY))
    axes.set(ylabel="Rouge-L × 100", title="Validation")
    _annotate_ends(axes, ends)


def _losses(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    x = np.array([m["step"] for m in lines])
    loss = np.array([m["loss"] for m in lines])
    axes.plot(x, loss, color=_BLUE, alpha=0.25, linewidth=0.8)
    ends = []
    for name, colour in (("loss", _BLUE), ("cross_entropy", _ORANGE), ("divergence", _GREEN)):
        values = np.array([m.get(name, np.nan) for m in lines], float)
        # A measure that was not computed, such as the divergence without a teacher, is 0 throughout.
        if len(values) == 0 or not np.isfinite(values).all() or not values.any():
            continue
        smooth = _running_mean(values, max(1, len(values) // 60))
        axes.plot(x, smooth, color=colour, linewidth=1.8 if name == "loss" else 1.2)
        ends.append((smooth[-1], name.replace("_", "-"), colour))
    axes.set(ylabel="nats a token", title="Training loss and its parts (running mean)")
    _annotate_ends(axes, ends)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _annotate_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Labels lines (height, text, colour) at the right border, moved apart so that labels don't overlap."""
    low, high = axes.get_ylim()
    apart = (high - low) * 0.08
    ends = sorted(ends)
    heights = np.array([end[0] for end in ends])
    for _ in range(100):
        for i in range(len(ends) - 1):
            overlap = apart - (heights[i + 1] - heights[i])
            if overlap > 0:
                heights[i] -= overlap / 2
                heights[i + 1] += overlap / 2
    for y, (_, text, colour) in zip(heights, ends, strict=True):
        axes.annotate(
            text,
            (1, y),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            annotation_clip=False,
        )


def _mark_stages(panels: Sequence[Axes], lines: Sequence[Mapping[str, Any]]) -> None:
    spans = stage_spans(lines)
    if len(spans) < 2:
        return
    for _, start, _, _, _ in spans[1:]:
        for axes in panels:
            axes.axvline(start - 0.5, color=_GREY, linewidth=0.8, linestyle=":")
    upper = panels[0]
    low, high = upper.get_ylim()
    upper.set_ylim(low, high + 0.3 * (high - low))
    narrow = min(stop - start + 1 for _, start, stop, _, _ in spans) < 0.06 * spans[-1][2]
    for stage, start, stop, alpha, beta in spans:
        text = f"{stage}" if narrow else f"stage {stage}\nα {alpha:.3g}\nβ {beta:.3g}"
        at = ((start + stop) / 2, 0.98)
        upper.annotate(
            text, at, xycoords=("data", "axes fraction"), ha="center", va="top", fontsize=8, color=_GREY
        )


def stage_spans(lines: Sequence[Mapping[str, Any]]) -> list[tuple[int, int, int, float, float]]:
    """(stage, first step, last step, α, β) of each stage in the training lines of a phase."""
    spans = []
    for stage, group in itertools.groupby(lines, key=lambda m: m.get("stage", 1)):
        of_stage = list(group)
        first, last = of_stage[0], of_stage[-1]
        spans.append((stage, first["step"], last["step"], first.get("alpha", 0.0), first.get("beta", 1.0)))
    return spans


def schedule(path: Path, metrics: Metrics, *, phase: str = "student") -> None:
    """α_i and β_i over the steps of `phase`, with the value of each stage on its line."""
    spans = stage_spans(steps_of(metrics, phase))
    with _figure(path, 7.2, 3.2) as figure:
        pair = figure.subplots(2, 1, sharex=True)
        for axes, column, colour, title in (
            (pair[0], 3, _BLUE, "α: the teacher's share in the skew mixture (Eq. 6)"),
            (pair[1], 4, _RED, "β: weight of the divergence against cross-entropy (Eq. 7)"),
        ):
            edges = [span[1] - 1 for span in spans] + [spans[-1][2]]
            values = [span[column] for span in spans]
            axes.stairs(values, edges, color=colour, linewidth=1.8, baseline=None)
            span_of_values = max(values) - min(values) or max(values) or 1.0
            axes.set_ylim(min(values) - 0.2 * span_of_values, max(values) + 0.4 * span_of_values)
            for left, right, value in zip(edges[:-1], edges[1:], values, strict=True):
                middle = ((left + right) / 2, value)
                axes.annotate(
                    f"{value:.3g}",
                    middle,
                    xytext=(0, 3),
                    textcoords="offset points",
                    ha="center",
                    color=colour,
                )
            for edge in edges[1:-1]:
                axes.axvline(edge, color=_GREY, linewidth=0.8, linestyle=":")
            axes.set_title(title)
        pair[1].set_xlabel("step")


def difficulty(path: Path, graded: Difficulty) -> None:
    """Rouge-L and cross-entropy of the examples in each subset: quartiles, whiskers at 5% and 95%, examples as points."""
    numbers = [int(number) for number in np.unique(graded.subset)]
    colours = matplotlib.colormaps["cividis"](np.linspace(0.78, 0.1, len(numbers)))
    draw = np.random.default_rng(0)
    with _figure(path, 7.2, 3.4) as figure:
        for axes, scores, label, title in (
            (
                figure.add_subplot(1, 2, 1),
                100 * graded.rouge_l,
                "Rouge-L × 100",
                "Student's own output (high is easy)",
            ),
            (
                figure.add_subplot(1, 2, 2),
                graded.cross_entropy,
                "nats a token",
                "Cross-entropy (low is easy)",
            ),
        ):
            groups = [scores[graded.subset == number] for number in numbers]
            for number, group, colour in zip(numbers, groups, colours, strict=True):
                some = draw.permutation(group)[:_POINTS_A_SUBSET]
                x = number + draw.uniform(-0.32, 0.32, len(some))
                axes.scatter(x, some, s=4, color=colour, alpha=0.5, linewidths=0)
            axes.boxplot(
                groups,
                positions=numbers,
                widths=0.64,
                whis=(5, 95),
                showfliers=False,
                medianprops={"color": _RED, "linewidth": 2},
                boxprops={"color": "#333333"},
                whiskerprops={"color": "#333333"},
                capprops={"color": "#333333"},
            )
            for number, group in zip(numbers, groups, strict=True):
                axes.annotate(
                    f"{np.median(group):.3g}",
                    (number + 0.34, float(np.median(group))),
                    xytext=(2, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                    color=_RED,
                )
            axes.set_xticks(numbers, [str(number) for number in numbers])
            axes.set(xlabel="subset, from easy to hard", ylabel=label, title=title)


class Interval(NamedTuple):
    """A line of a forest plot.

    Attributes:
        unit: lines of one unit share a panel.
        second: another interval, drawn thinner.
        reference: a value to compare with, such as a published one.
        is_strong: filled rather than open.
    """

    label: str
    unit: str
    mean: float
    interval: tuple[float, float]
    second: tuple[float, float] | None
    reference: float | None
    verdict: str
    is_strong: bool


_VERDICTS = {"holds": _GREEN, "reversed": _RED, "smaller than the paper's effect": _ORANGE}


def contrasts(path: Path, lines: Sequence[Interval]) -> None:
    """A forest plot: differences with their intervals, one panel for each unit, the first line at the top."""
    units = list(dict.fromkeys(line.unit for line in lines))
    heights = [sum(line.unit == unit for line in lines) for unit in units]
    with _figure(path, 7.2, 0.5 + 0.34 * len(lines) + 0.6 * len(units)) as figure:
        panels = figure.subplots(len(units), 1, squeeze=False, height_ratios=heights)[:, 0].tolist()
        for axes, unit in zip(panels, units, strict=True):
            _forest(axes, [line for line in lines if line.unit == unit])
            axes.set_title(f"{unit}: left − right")


def _forest(axes: Axes, lines: Sequence[Interval]) -> None:
    axes.axvline(0, color=_GREY, linewidth=0.8)
    for y, line in enumerate(lines):
        colour = _VERDICTS.get(line.verdict, _GREY)
        if line.second is not None:
            axes.plot(line.second, (y + 0.2, y + 0.2), color=colour, linewidth=0.8)
        axes.plot(line.interval, (y, y), color=colour, linewidth=2)
        filled = colour if line.is_strong else "white"
        axes.plot(line.mean, y, marker="o", markersize=6, color=colour, markerfacecolor=filled)
        if line.reference is not None:
            axes.plot(line.reference, y, marker="D", markersize=4, color=_BLUE)
        axes.annotate(
            line.verdict,
            (1, y),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            annotation_clip=False,
        )
    axes.set_yticks(range(len(lines)), [line.label for line in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")


@contextlib.contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure to draw on. It replaces `path` atomically if the block ends without an error."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=130, metadata={"Software": ""})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.unfinished")
    temporary.write_bytes(file.getvalue())
    os.replace(temporary, path)
