"""The figures of a run's report, as PNG files, from metric lines and difficulties."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from l2m_jax import files
from l2m_jax.curriculum import Difficulty, Exposure

Metrics = Sequence[Mapping[str, Any]]

# Okabe and Ito's palette for colour-blind readers, without its yellow, which is too light for lines.
BLUE, ORANGE, GREEN, RED, _PURPLE, _SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
_LINES = (BLUE, ORANGE, GREEN, _PURPLE, RED, _SKY)
GREY = "#6B6B6B"
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelcolor": "#333333",
    "xtick.color": GREY,
    "ytick.color": GREY,
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
) -> None:
    """Loss over the steps of `phase`, and validation Rouge-L of `phase` and its baselines ("student:sft", ...).

    Args:
        metrics: lines of metrics.jsonl. Measures without a line are left out.
        label: the name of the line of `phase`.
    """
    phases = list(dict.fromkeys(m["phase"] for m in metrics))
    compared = [p for p in phases if p == phase] + [p for p in phases if p.startswith(f"{phase}:")]
    measured = [name for name in compared if validations_of(metrics, name)]
    with drawing(path, 7.2, 5.4 if measured else 3.2) as figure:
        panels = figure.subplots(2 if measured else 1, 1, sharex=True, squeeze=False)[:, 0].tolist()
        _losses(panels[0], steps_of(metrics, phase))
        if measured:
            _validations(panels[1], metrics, measured, {phase: label})
        _mark_stages(panels, steps_of(metrics, phase))
        panels[0].set_xlim(0, max((m["step"] for m in metrics if m["phase"] in compared), default=1))
        panels[-1].set_xlabel("step")


def _validations(axes: Axes, metrics: Metrics, phases: Sequence[str], labels: Mapping[str, str]) -> None:
    ends = []
    for i, (name, colour) in enumerate(zip(phases, itertools.cycle(_LINES), strict=False)):
        lines = validations_of(metrics, name)
        x, y = [m["step"] for m in lines], [m["validation_rouge_l"] for m in lines]
        axes.plot(x, y, color=colour, marker="o", markersize=2.5, linewidth=1.2 if i else 1.8)
        ends.append((y[-1], labels.get(name, name.partition(":")[2]), colour))
    axes.set(ylabel="Rouge-L × 100", title="Validation")
    _annotate_ends(axes, ends)


def _losses(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    x = np.array([m["step"] for m in lines])
    loss = np.array([m["loss"] for m in lines])
    axes.plot(x, loss, color=BLUE, alpha=0.25, linewidth=0.8)
    ends = []
    for name, colour in (("loss", BLUE), ("cross_entropy", ORANGE), ("divergence", GREEN)):
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
        annotate_at_right(axes, y, text, colour)


def annotate_at_right(axes: Axes, y: float, text: str, colour: str) -> None:
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
            axes.axvline(start - 0.5, color=GREY, linewidth=0.8, linestyle=":")
    upper = panels[0]
    low, high = upper.get_ylim()
    upper.set_ylim(low, high + 0.3 * (high - low))
    narrow = min(stop - start + 1 for _, start, stop, _, _ in spans) < 0.06 * spans[-1][2]
    for stage, start, stop, alpha, beta in spans:
        text = f"{stage}" if narrow else f"stage {stage}\nα {alpha:.3g}\nβ {beta:.3g}"
        at = ((start + stop) / 2, 0.98)
        upper.annotate(
            text, at, xycoords=("data", "axes fraction"), ha="center", va="top", fontsize=8, color=GREY
        )


def stage_spans(lines: Sequence[Mapping[str, Any]]) -> list[tuple[int, int, int, float, float]]:
    """(stage, first step, last step, α, β) of each stage in the training lines of a phase."""
    spans = []
    for stage, group in itertools.groupby(lines, key=lambda m: m.get("stage", 1)):
        of_stage = list(group)
        first, last = of_stage[0], of_stage[-1]
        spans.append((stage, first["step"], last["step"], first.get("alpha", 0.0), first.get("beta", 1.0)))
    return spans


def diagnosed(metrics: Metrics) -> list[str]:
    """The phases whose validations compare with the teacher, in the order of their first line."""
    return list(dict.fromkeys(m["phase"] for m in metrics if "validation_kl" in m))


def name_of(phase: str, student: str) -> str:
    """ "sft" for "student:sft", and `student` for "student", the main student's phase."""
    return phase.partition(":")[2] or student


_AGREEMENT = (
    ("kl", "KL(teacher ‖ student)", "nats a token", 1),
    ("cross_entropy", "Cross-entropy of the references", "nats a token", 1),
    ("entropy", "Entropy of the student", "nats a token", 1),
    ("top1", "Same most likely token", "% of tokens", 100),
    ("top10", "Common among the ten most likely", "% of the ten", 100),
    ("rouge_l_greedy", "Greedy answers", "Rouge-L × 100", 1),
)


def agreement(path: Path, metrics: Metrics, *, label: str) -> None:
    """The measures of held-out rows over the steps, one panel each, with a line for each student.

    Dashed: the teacher's own cross-entropy and entropy. `label` names the main student's line.
    """
    phases = diagnosed(metrics)
    with drawing(path, 7.2, 6.6) as figure:
        panels = figure.subplots(3, 2, sharex=True).ravel().tolist()
        for axes, (name, title, unit, factor) in zip(panels, _AGREEMENT, strict=True):
            for i, (phase, colour) in enumerate(zip(phases, itertools.cycle(_LINES), strict=False)):
                lines = [m for m in validations_of(metrics, phase) if f"validation_{name}" in m]
                x, y = [m["step"] for m in lines], [factor * m[f"validation_{name}"] for m in lines]
                axes.plot(
                    x,
                    y,
                    color=colour,
                    marker="o",
                    markersize=2.5,
                    linewidth=1.2 if i else 1.8,
                    label=name_of(phase, label),
                )
            level = next((m[key] for m in metrics if (key := f"validation_teacher_{name}") in m), None)
            if level is not None:
                axes.axhline(level, color=GREY, linewidth=1, linestyle=(0, (4, 3)), label="teacher")
            axes.set(title=title, ylabel=unit)
        for axes in panels[-2:]:
            axes.set_xlabel("step")
        handles, labels = panels[1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 6), frameon=False)


def schedule(path: Path, metrics: Metrics, *, phase: str = "student") -> None:
    """α_i and β_i over the steps of `phase`, with the value of each stage on its line."""
    spans = stage_spans(steps_of(metrics, phase))
    with drawing(path, 7.2, 3.2) as figure:
        pair = figure.subplots(2, 1, sharex=True)
        for axes, column, colour, title in (
            (pair[0], 3, BLUE, "α: the teacher's share in the skew mixture (Eq. 6)"),
            (pair[1], 4, RED, "β: weight of the divergence against cross-entropy (Eq. 7)"),
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
                axes.axvline(edge, color=GREY, linewidth=0.8, linestyle=":")
            axes.set_title(title)
        pair[1].set_xlabel("step")


def difficulty(path: Path, graded: Difficulty) -> None:
    """Rouge-L and cross-entropy of the examples in each subset: quartiles, whiskers at 5% and 95%, examples as points."""
    numbers = [int(number) for number in np.unique(graded.subset)]
    colours = matplotlib.colormaps["cividis"](np.linspace(0.78, 0.1, len(numbers)))
    draw = np.random.default_rng(0)
    with drawing(path, 7.2, 3.4) as figure:
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
                medianprops={"color": RED, "linewidth": 2},
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
                    color=RED,
                )
            axes.set_xticks(numbers, [str(number) for number in numbers])
            axes.set(xlabel="subset, from easy to hard", ylabel=label, title=title)


def exposure(path: Path, exposures: Mapping[str, Exposure]) -> None:
    """The share of each group in the examples of a step, over the steps: one panel for each kind of group."""
    with drawing(path, 7.2, 2.4 * len(exposures) + 0.4) as figure:
        panels = figure.subplots(len(exposures), 1, sharex=True, squeeze=False)[:, 0].tolist()
        for axes, (kind, seen) in zip(panels, exposures.items(), strict=True):
            shares = seen.seen_KxG / np.maximum(seen.seen_KxG.sum(axis=1, keepdims=True), 1)
            edges = np.append(0, seen.end_K)
            # Steps: each span's shares at both of its edges.
            x, y = np.repeat(edges, 2)[1:-1], 100 * np.repeat(shares, 2, axis=0)
            # Subsets have an order, categories have none.
            colours = (
                matplotlib.colormaps["cividis"](np.linspace(0.95, 0.05, len(seen.names)))
                if kind == "subset"
                else matplotlib.colormaps["tab20"](np.arange(len(seen.names)) % 20)
            )
            axes.stackplot(x, y.T, colors=colours, linewidth=0.3, edgecolor="white", labels=seen.names)
            handles, labels = axes.get_legend_handles_labels()
            place: Any = {
                "loc": "center left",
                "bbox_to_anchor": (1.01, 0.5),
                "frameon": False,
                "fontsize": 7,
            }
            axes.legend(handles[::-1], labels[::-1], title=kind, **place)
            for edge in np.flatnonzero(np.diff(seen.stage_K)):
                axes.axvline(seen.end_K[edge], color=RED, linewidth=0.8, linestyle=":")
            axes.set(ylabel="% of examples", ylim=(0, 100), xlim=(0, edges[-1]))
        panels[0].set_title("Exposure: what each step is made of")
        panels[-1].set_xlabel("step")


@contextlib.contextmanager
def drawing(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure to draw on. It replaces `path` atomically if the block ends without an error."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        with files.replacing(path) as unfinished:
            figure.savefig(unfinished, format="png", dpi=130, metadata={"Software": ""})
