"""The part of the report on the students' agreement with the teacher, and their answers as training goes."""

from collections.abc import Mapping
from typing import Any

from l2m_jax.data.sources import Row
from l2m_jax.reporting import figures, markdown
from l2m_jax.reporting.figures import Metrics, diagnosed, name_of

_SHOWN_SAMPLES, _SHOWN_VALIDATIONS = 2, 4
_WHOLE = 10_000  # characters: answers are not shortened


def section(metrics: Metrics, sampled: Mapping[str, Row], student: str) -> str:
    """Figure, tables of the last validation of each student, and a few answers.

    Args:
        metrics: the lines of metrics.jsonl.
        sampled: the validation rows whose answers are in `metrics`, by id.
        student: the name of the main student.
    """
    last = {name: lines[-1] for name, lines in _lines(metrics, student).items()}
    text = (
        "## Agreement with the teacher\n\nAt temperature 1 on reference responses of a few rows, means over tokens. "
        "The tables show each student's last validation.\n\n"
        "![Divergence, entropies and overlap over the steps](figures/agreement.png)\n\n"
    )
    text += markdown.table(
        ("held-out rows", "KL", "cross-entropy", "entropy", "top-1", "top-10", "greedy", "sampled"),
        [*(_line(name, found) for name, found in last.items()), _teacher(next(iter(last.values())))],
    )
    text += (
        "\nTop-1, top-10: % of tokens with the same most likely token, and of the ten most likely tokens that are "
        "common. Greedy, sampled: Rouge-L × 100; the sampled answers are those to all validation rows.\n"
    )
    text += _groups(
        "Held-out rows by category", "category", {name: _categories(found) for name, found in last.items()}
    )
    subsets = {name: found.get("train_by_subset", {}) for name, found in last.items()}
    text += _groups("Training rows by difficulty, 1 the easiest", "subset", subsets)
    return text + _some_samples(metrics, sampled, student)


def _lines(metrics: Metrics, student: str) -> dict[str, Metrics]:
    """The validations of each student that were diagnosed: a run may have resumed with or without diagnostics."""
    return {
        name_of(phase, student): [m for m in figures.validations_of(metrics, phase) if "validation_kl" in m]
        for phase in diagnosed(metrics)
    }


def _line(name: str, found: Mapping[str, Any]) -> list[str]:
    nats = [f"{found[f'validation_{key}']:.3f}" for key in ("kl", "cross_entropy", "entropy")]
    shares = [f"{100 * found[f'validation_{key}']:.1f}" for key in ("top1", "top10")]
    rouge_l = [_number(found.get(f"validation_rouge_l{kind}"), 1) for kind in ("_greedy", "")]
    return [name, *nats, *shares, *rouge_l]


def _teacher(found: Mapping[str, Any]) -> list[str]:
    own = [f"{found[f'validation_teacher_{name}']:.3f}" for name in ("cross_entropy", "entropy")]
    return ["teacher", "–", *own, *["–"] * 4]


def _categories(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    rouge_l = found.get("validation_rouge_l_greedy_by_category", {})
    groups = found.get("validation_by_category", {})
    return {
        name: {**group, **({"greedy": rouge_l[name]} if name in rouge_l else {})}
        for name, group in groups.items()
    }


def _groups(title: str, kind: str, of_students: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A collapsed table with a row for each group and columns for each student."""
    groups = next(iter(of_students.values()))
    if not groups:
        return ""
    measures = [("kl", "KL", 3), ("cross_entropy", "CE", 3)]
    measures += [("greedy", "greedy", 1)] * any("greedy" in group for group in groups.values())
    heading = [kind, "rows", *(f"{name} {short}" for name in of_students for _, short, _ in measures)]
    rows = [
        [
            markdown.short(group),
            groups[group]["rows"],
            *(
                _number(of.get(group, {}).get(key), digits)
                for of in of_students.values()
                for key, _, digits in measures
            ),
        ]
        for group in groups
    ]
    return f"\n<details><summary>{title}</summary>\n\n{markdown.table(heading, rows)}\n</details>\n"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _some_samples(metrics: Metrics, sampled: Mapping[str, Row], student: str) -> str:
    name, diagnosed_lines = next(iter(_lines(metrics, student).items()))
    lines = [m for m in diagnosed_lines if m.get("samples")]
    if not lines:
        return ""
    count = min(_SHOWN_VALIDATIONS, len(lines))
    chosen = [lines[round((len(lines) - 1) * i / max(1, count - 1))] for i in range(count)]
    text = f"\nGreedy answers of {name} as training goes ([all](samples.md)):\n"
    for number, row in enumerate(list(sampled.values())[:_SHOWN_SAMPLES], start=1):
        text += f"\n{number}. {_question(row, 160)}\n\n" + _answers(row.id, {name: chosen}, 160)
    return text


def all_samples(metrics: Metrics, sampled: Mapping[str, Row], student: str) -> str:
    """samples.md: the greedy answers of all students at all validations, prompt by prompt."""
    lines = _lines(metrics, student)
    parts = ["# Greedy answers to validation prompts as training goes\n"]
    for row in sampled.values():
        parts += [
            f"## {markdown.short(row.id)}\n",
            f"{_question(row, _WHOLE)}\n",
            _answers(row.id, lines, _WHOLE),
        ]
    return "\n".join(parts)


def sample_rows(metrics: Metrics, sampled: Mapping[str, Row], student: str) -> list[dict[str, Any]]:
    """The same answers as rows of a table."""
    return [
        {
            "student": name,
            "step": line["step"],
            "prompt": "\n\n".join(
                part for part in (sampled[found["id"]].instruction, sampled[found["id"]].input) if part
            ),
            "reference": sampled[found["id"]].references[0],
            "answer": found["answer"],
            "rouge_l": found["rouge_l"],
        }
        for name, of_phase in _lines(metrics, student).items()
        for line in of_phase
        for found in line.get("samples", ())
        if found["id"] in sampled
    ]


def _question(row: Row, longest: int) -> str:
    asked = markdown.short(" ".join(part for part in (row.instruction, row.input) if part), longest)
    return f"{asked} **Reference:** {markdown.short(row.references[0], longest)}"


def _answers(row: str, lines: Mapping[str, Metrics], longest: int) -> str:
    rows = [
        [line["step"], f"{answer['rouge_l']:.0f}", name, markdown.short(answer["answer"], longest)]
        for name, of_student in lines.items()
        for line in of_student
        for answer in line.get("samples", ())
        if answer["id"] == row
    ]
    return markdown.table(("step", "Rouge-L", "student", "answer"), rows, right=2)
