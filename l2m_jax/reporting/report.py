"""report.md: what a run did, and its results, with figures."""

import datetime
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from l2m_jax.curriculum import Difficulty, Exposure, Stage, examples_seen, steps
from l2m_jax.data.sources import Row
from l2m_jax.evaluation.protocol import Results
from l2m_jax.files import write_text
from l2m_jax.reporting import diagnostics, figures, markdown
from l2m_jax.reporting.figures import Metrics
from l2m_jax.reporting.tables import Spread, Table, results_table

_MOST_CATEGORIES_SHOWN = 12


def extremes(graded: Difficulty, count: int = 5) -> tuple[list[int], list[int]]:
    """Indices of the `count` easiest and the `count` hardest examples, each from easier to harder."""
    order = graded.order.tolist()
    return order[:count], order[max(count, len(order) - count) :]


def write_report(
    folder: Path,
    *,
    title: str,
    results: Mapping[str, Results],
    student: str = "student",
    teacher: str | None = None,
    facts: Mapping[str, Any] | None = None,
    metrics: Metrics = (),
    stages: Sequence[Stage] = (),
    batch_size: int = 1,
    seconds: Mapping[str, float] | None = None,
    difficulty: Difficulty | None = None,
    exposures: Mapping[str, Exposure] | None = None,
    rows: Mapping[int, Row] | None = None,
    sampled: Mapping[str, Row] | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Writes `folder`/report.md and the PNG files that it shows into `folder`/figures.

    Sections without input are left out. With several students, the first lines say which scores highest.

    Args:
        title: the heading, such as the method's name.
        results: what `evaluate` returned for each model, in the order of the table's rows.
        student: the main student's name, as in `results`.
        teacher: the model in `results` that the others are compared with.
        facts: further facts about the run, such as method, data, models and hardware.
        metrics: the lines of metrics.jsonl. The student's phase is "student", those of baselines "student:NAME";
            `validation_rouge_l` is × 100.
        stages, batch_size: the student's planned training.
        seconds: the time of each phase, under the same names as in `metrics`.
        difficulty: that of the training examples.
        exposures: how often the student saw each group of examples, by the kind of group.
        rows: the text of the examples from `extremes`, by index.
        sampled: the validation rows whose answers are in `metrics`, by id.
        files: descriptions of files by path, relative to `folder`.
    """
    sections = [f"# {title}\n", verdict(results), _facts(facts or {}), _results(results, teacher)]
    shown = folder / "figures"
    if figures.steps_of(metrics, "student"):
        figures.training(shown / "training.png", metrics, label=student)
        figures.schedule(shown / "schedule.png", metrics)
        sections += [_training(metrics, stages, batch_size)]
    if exposures:
        figures.exposure(shown / "exposure.png", exposures)
        sections += [_exposure(exposures)]
    if figures.diagnosed(metrics):
        figures.agreement(shown / "agreement.png", metrics, label=student)
        sections += [diagnostics.section(metrics, sampled or {}, student)]
    if sampled:
        write_text(folder / "samples.md", diagnostics.all_samples(metrics, sampled, student))
    sections += [_phases(metrics, seconds or {})]
    if difficulty is not None:
        figures.difficulty(shown / "difficulty.png", difficulty)
        sections += [_difficulty(difficulty, rows or {})]
    if files:
        listed = "\n".join(f"- [`{path}`]({path}): {what}" for path, what in files.items())
        sections += [f"## Files\n\n{listed}\n"]
    write_text(folder / "report.md", "\n".join(section for section in sections if section))


def verdict(results: Mapping[str, Results]) -> str:
    """Which student wins, and whether a staged one beats its control; empty with fewer than two students."""
    scores = {name: f.rouge_l for name, f in results.items() if name not in ("teacher", "student before")}
    if len(scores) < 2:
        return ""
    best = max(scores, key=lambda name: scores[name])
    others = ", ".join(f"{name} {score:.1f}" for name, score in scores.items() if name != best)
    text = f"**{best} scores highest: Rouge-L {scores[best]:.1f} ({others}).**"
    control = scores.get("random_order")
    if control is not None and "l2m" in scores:
        lead = scores["l2m"] - control
        text += (
            f" Easiest first {'gains' if lead >= 0 else 'loses'} {abs(lead):.1f} against the same stages filled at random "
            "(l2m against random_order)."
        )
    return f"{text} Each student was trained with one seed, so a difference of a few points may be chance.\n"


def _facts(facts: Mapping[str, Any]) -> str:
    return "".join(f"- {name}: {value}\n" for name, value in facts.items())


def _results(results: Mapping[str, Results], teacher: str | None) -> str:
    if not results:
        return ""
    seeds = sorted({len(found.seeds) for found in results.values()})
    rules = dict.fromkeys(found.rules.described() for found in results.values())
    count = f"{seeds[0]} seed{'s' if seeds[0] > 1 else ''}" if len(seeds) == 1 else "several seeds"
    parts = [
        f"## Results\n\nRouge-L × 100, mean ± standard deviation over {count} of sampling ({'; '.join(rules)}).\n",
        results_table(results, teacher=teacher).markdown(),
        _sets(results),
    ]
    return "\n".join(parts + [_categories(results, name) for name in _with_categories(results)])


def _sets(results: Mapping[str, Results]) -> str:
    rows = [
        [
            model,
            found.title,
            f"{found.rows:,}" + f" ({found.left_out} left out)" * bool(found.left_out),
            str(Spread.of(found.rouge_l.per_seed)),
            str(Spread.of(found.exact_match.per_seed)),
            f"{found.response_tokens:.0f}",
        ]
        for model, result in results.items()
        for found in result.sets
    ]
    return markdown.table(
        ("model", "set", "prompts", "Rouge-L", "exact match", "tokens an answer"), rows, left=2
    )


def _with_categories(results: Mapping[str, Results]) -> list[str]:
    sets = (found for result in results.values() for found in result.sets)
    return list(dict.fromkeys(found.title for found in sets if len(found.categories) > 1))


def _categories(results: Mapping[str, Results], title: str) -> str:
    """Scores by category and model for one set, collapsed."""
    groups = {
        model: found.categories
        for model, result in results.items()
        for found in result.sets
        if found.title == title
    }
    sizes = {name: group.rows for categories in groups.values() for name, group in categories.items()}
    largest = sorted(sizes, key=lambda name: (-sizes[name], name))[:_MOST_CATEGORIES_SHOWN]
    values = {
        f"{name} ({sizes[name]})": {
            model: found[name].rouge_l.per_seed for model, found in groups.items() if name in found
        }
        for name in largest
    }
    rest = f", the {len(largest)} largest of {len(sizes)}" * (len(sizes) > len(largest))
    body = Table(values, plain=True).markdown()
    return f"<details><summary>{title} by category{rest}</summary>\n\n{body}\n</details>\n"


def _training(metrics: Metrics, stages: Sequence[Stage], batch_size: int) -> str:
    text = "## Training\n\n![Loss and Rouge-L over the steps](figures/training.png)\n"
    text += "\n![α and β over the steps](figures/schedule.png)\n"
    if not stages:
        return text
    rows = [
        [
            stage.index,
            f"{stage.alpha:.3g}",
            f"{stage.beta:.3g}",
            f"{len(stage.indices):,}",
            f"{stage.examples / len(stage.passes[0]):.3g}",
            f"{stage.examples:,}",
            f"{steps([stage], batch_size):,}",
        ]
        for stage in stages
    ]
    taken = figures.steps_of(metrics, "student")[-1]["step"]
    planned = steps(stages, batch_size)
    total = f"{planned:,} steps of {batch_size} examples in total, {examples_seen(stages):,} examples seen"
    if taken != planned:
        total += f"; {taken:,} steps were made"
    heading = ("stage", "α", "β", "examples", "epochs", "examples seen", "steps")
    return f"{text}\n{markdown.table(heading, rows)}\n{total}.\n"


def _exposure(exposures: Mapping[str, Exposure]) -> str:
    text = "## Exposure\n\n![Shares of the examples over the steps](figures/exposure.png)\n"
    text += "\nHow often training sees an example, on average over each group.\n"
    for kind, seen in exposures.items():
        stages = seen.stages if len(seen.stages) > 1 else []
        columns = [seen.passes(stage) for stage in stages] + [seen.passes()]
        rows = [
            [markdown.short(name), f"{size:,}", *(f"{passes[i]:.2f}" for passes in columns)]
            for i, (name, size) in enumerate(zip(seen.names, seen.sizes, strict=True))
        ]
        heading = (kind, "examples", *(f"stage {stage}" for stage in stages), "in total")
        text += f"\n{markdown.table(heading, rows)}"
    return text


def _phases(metrics: Metrics, seconds: Mapping[str, float]) -> str:
    phases = list(dict.fromkeys([*seconds, *(m["phase"] for m in metrics)]))
    if not phases:
        return ""
    rows = []
    for phase in phases:
        lines = figures.steps_of(metrics, phase)
        validations = [m["validation_rouge_l"] for m in figures.validations_of(metrics, phase)]
        took = datetime.timedelta(seconds=round(seconds[phase])) if phase in seconds else "–"
        if not lines:
            rows.append([phase, took, *["–"] * 6])
            continue
        rates = [
            statistics.median([m[name] for m in lines if name in m] or [0.0])
            for name in ("examples_per_second", "tokens_per_second")
        ]
        examples = sum(m.get("examples", 0) for m in lines)
        tail = [m["loss"] for m in lines[-max(1, len(lines) // 20) :]]
        rows.append(
            [
                phase,
                took,
                f"{len(lines):,}",
                f"{examples:,}" if examples else "–",
                f"{statistics.fmean(tail):.3f}",
                f"{max(validations):.1f}" if validations else "–",
                *(f"{rate:,.0f}" if rate else "–" for rate in rates),
            ]
        )
    heading = ("phase", "time", "steps", "examples", "last loss", "best validation", "examples/s", "tokens/s")
    return f"## Phases\n\n{markdown.table(heading, rows)}"


def _difficulty(graded: Difficulty, rows: Mapping[int, Row]) -> str:
    text = "## Difficulty\n\n![Rouge-L and cross-entropy of each subset](figures/difficulty.png)\n"
    summary = []
    for number, indices in enumerate(graded.subsets, start=1):
        rouge_l, cross_entropy = 100 * graded.rouge_l[indices], graded.cross_entropy[indices]
        summary.append(
            [number, f"{len(indices):,}", f"{np.mean(rouge_l):.1f}", f"{np.mean(cross_entropy):.2f}"]
        )
    text += "\n" + markdown.table(("subset", "examples", "mean Rouge-L", "mean cross-entropy"), summary)
    for heading, indices in zip(("easiest", "hardest"), extremes(graded), strict=True):
        shown = [
            [
                f"{graded.rank[i] + 1:,}",
                f"{100 * graded.rouge_l[i]:.1f}",
                f"{graded.cross_entropy[i]:.2f}",
                markdown.short(rows[i].id),
                markdown.short(rows[i].instruction),
                markdown.short(rows[i].input),
                markdown.short(rows[i].references[0] if rows[i].references else ""),
            ]
            for i in indices
            if i in rows
        ]
        if shown:
            columns = ("rank", "Rouge-L", "cross-entropy", "id", "instruction", "input", "reference")
            text += f"\nThe {len(shown)} {heading}:\n\n{markdown.table(columns, shown, right=3)}"
    return text
