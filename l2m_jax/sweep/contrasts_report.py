"""The report of a sweep's contrasts: a table, its statements, and a forest plot."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from l2m_jax import files
from l2m_jax.reporting import figures
from l2m_jax.sweep.cells import Cell
from l2m_jax.sweep.claims import Claims
from l2m_jax.sweep.contrasts import Outcome, outcomes, without_nan


def write_contrasts(claims: Claims, cells: Sequence[Cell], workdir: Path) -> str:
    """Writes contrasts.md, contrasts.json and contrasts.png into `workdir`.

    Returns:
        The text of contrasts.md.
    """
    found = outcomes(claims, cells, workdir)
    text = _markdown(claims, found)
    files.write_text(workdir / "contrasts.md", text)
    files.write_json(workdir / "contrasts.json", [without_nan(dataclasses.asdict(o)) for o in found])
    if estimated := [o for o in found if o.found is not None and not math.isnan(o.found.low)]:
        _forest(workdir / "contrasts.png", estimated)
    return text


_VERDICTS = {
    "holds": figures.GREEN,
    "reversed": figures.RED,
    "smaller than the paper's effect": figures.ORANGE,
}


def _forest(path: Path, found: Sequence[Outcome]) -> None:
    """Differences with their intervals, one panel for each metric, the first contrast at the top."""
    by_metric: dict[str, list[Outcome]] = {}
    for o in found:
        by_metric.setdefault(o.contrast.metric, []).append(o)
    heights = [len(of_metric) for of_metric in by_metric.values()]
    with figures.drawing(path, 7.2, 0.5 + 0.34 * len(found) + 0.6 * len(heights)) as figure:
        panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0].tolist()
        for axes, (metric, of_metric) in zip(panels, by_metric.items(), strict=True):
            axes.axvline(0, color=figures.GREY, linewidth=0.8)
            for y, outcome in enumerate(of_metric):
                _interval(axes, y, outcome)
            axes.set_yticks(range(len(of_metric)), [o.contrast.id for o in of_metric])
            axes.set_ylim(len(of_metric) - 0.4, -0.6)
            axes.grid(axis="x")
            axes.grid(visible=False, axis="y")
            axes.set_title(f"{_title(metric)}: left − right")


def _interval(axes: Axes, y: int, o: Outcome) -> None:
    assert o.found is not None
    colour = _VERDICTS.get(o.verdict, figures.GREY)
    if o.bootstrap is not None:
        axes.plot(o.bootstrap, (y + 0.2, y + 0.2), color=colour, linewidth=0.8)
    axes.plot((o.found.low, o.found.high), (y, y), color=colour, linewidth=2)
    filled = colour if o.is_primary else "white"
    axes.plot(o.found.mean, y, marker="o", markersize=6, color=colour, markerfacecolor=filled)
    if o.contrast.effect is not None:
        axes.plot(o.contrast.effect, y, marker="D", markersize=4, color=figures.BLUE)
    figures.annotate_at_right(axes, y, o.verdict, colour)


def _markdown(claims: Claims, found: Sequence[Outcome]) -> str:
    primary = [o for o in found if o.is_primary]
    lines = [
        f"# {claims.title}",
        "",
        "Differences over worlds, 95% intervals and p of the paired t test; p is adjusted by Holm's method for all "
        "primary contrasts that were named before the first run. The second interval redraws worlds and prompts (bootstrap). "
        "“Detectable” is the true difference that is found with a probability of 80%.",
        "",
        "![Differences and their intervals](contrasts.png)",
        "",
        "Filled: primary. Thick: the t interval; thin: over worlds × prompts. Diamonds: the paper's difference.",
    ]
    for title, group in (
        ("Primary", primary),
        ("Secondary: p is not adjusted", [o for o in found if o.registered and not o.is_primary]),
        ("Named after the first run: p is not adjusted", [o for o in found if not o.registered]),
    ):
        if group:
            lines += ["", f"## {title}", "", _HEADING, *(_row(o) for o in group)]
    lines += ["", "## Statements", ""]
    for o in found:
        c = o.contrast
        lines.append(f"- **{c.id}**: {c.statement.strip()} `{c.left}` − `{c.right}`, {c.metric}, {c.sign}.")
        if c.prediction or c.predicted:
            said = f" ({c.predicted})" if c.predicted else ""
            lines.append(f"  Predicted{said}: {c.prediction.strip()}")
    return "\n".join(lines) + "\n"


_HEADING = (
    "| contrast | worlds | difference | 95% interval | worlds × prompts | p | detectable | paper | predicted | verdict |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---|---|"
)


def _row(o: Outcome) -> str:
    f, effect = o.found, o.contrast.effect
    worlds = f"{len(o.worlds)} of {len(o.worlds) + o.missing}" if o.missing else str(len(o.worlds))
    cells = [
        o.contrast.id,
        worlds,
        _number(f.mean) if f else "–",
        _pair((f.low, f.high)) if f else "–",
        _pair(o.bootstrap),
        "–" if math.isnan(o.p) else "< 0.001" if o.p < 0.001 else f"{o.p:.3f}",
        _number(o.detectable).lstrip("+"),
        "–" if effect is None else _number(effect),
        o.contrast.predicted or "–",
        o.verdict,
    ]
    return f"| {' | '.join(cells)} |"


def _title(metric: str) -> str:
    """As in "validation Rouge-L × 100"."""
    return metric.replace("rouge_l", "Rouge-L × 100").replace("_", " ")


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.2f}"


def _pair(pair: tuple[float, float] | None) -> str:
    return "–" if pair is None or math.isnan(pair[0]) else f"{_number(pair[0])} to {_number(pair[1])}"
