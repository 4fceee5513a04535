import dataclasses
import re

import numpy as np
import pytest

from l2m_jax.curriculum import Difficulty, baby_steps, exposure, partition
from l2m_jax.data.sources import Row
from l2m_jax.evaluation.protocol import Group, Results, Score, SetResult
from l2m_jax.generation import SamplingRules
from l2m_jax.reporting.report import extremes, verdict, write_report

N = 16


def results(mean, **changes):
    score, exact = Score.of([mean - 1, mean + 1]), Score.of([5.0, 7.0])
    categories = {"copy": Group(3, score, exact), "sort": Group(2, Score.of([1.0, 1.0]), exact)}
    found = SetResult("test", "DollyEval", 5, 2, False, score, exact, 31.4, categories)
    return Results("f", (10, 20), SamplingRules(top_k=50, max_new_tokens=256, **changes), (found,))


def metrics():
    lines = []
    for stage, alpha, beta in ((1, 0.0, 0.7), (2, 0.1, 1.0)):
        for step in range(4 * stage - 3, 4 * stage + 1):
            lines.append(
                dict(
                    phase="student", step=step, stage=stage, alpha=alpha, beta=beta, loss=3 / step, examples=4
                )
                | dict(
                    cross_entropy=4 / step,
                    divergence=2 / step,
                    examples_per_second=50.0,
                    tokens_per_second=6e3,
                )
            )
        lines.append(
            {"phase": "student", "step": 4 * stage, "stage": stage, "validation_rouge_l": 20.0 + stage}
        )
    return lines


@pytest.fixture
def graded():
    scores = np.linspace(1, 0, N)
    return Difficulty.of([f"d/{i}" for i in range(N)], scores, 1 - scores, subsets=2)


@pytest.fixture
def report(tmp_path, graded):
    rows = {
        i: Row(f"d/{i}", f"do {i} | <b>*now*</b>\nplease", "in" * 200, (f"answer {i}",)) for i in range(N)
    }
    stages = baby_steps(partition(graded.order, 2), epochs=2, alpha=(0.0, 0.1))
    write_report(
        tmp_path,
        title="l2m",
        results={"teacher": results(40), "student": results(41.96)},
        teacher="teacher",
        facts={"method": "l2m", "training rows": N},
        metrics=metrics(),
        stages=stages,
        batch_size=4,
        seconds={"difficulty": 61.2, "student": 3725.0},
        difficulty=graded,
        exposures={"category": exposure(stages, 0, 4, ["a|b", "c"], np.arange(N) % 2)},
        rows=rows,
        files={"student/": "the distilled student"},
    )
    return (tmp_path / "report.md").read_text(encoding="utf-8")


def test_sections_and_figures(report, tmp_path):
    assert re.findall(r"^#+ .*$", report, re.M) == [
        "# l2m", "## Results", "## Training", "## Exposure", "## Phases", "## Difficulty", "## Files",
    ]  # fmt: skip
    shown = re.findall(r"!\[.+\]\((figures/\w+\.png)\)", report)
    assert shown == [f"figures/{name}.png" for name in ("training", "schedule", "exposure", "difficulty")]
    for name in shown:
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
        assert (tmp_path / name).stat().st_size < 300_000
    assert "- method: l2m\n- training rows: 16\n" in report
    assert "- [`student/`](student/): the distilled student" in report


def test_results(report):
    assert "2 seeds of sampling (temperature 1, top-k 50, at most 256 new tokens)" in report
    assert "| teacher | 40.0 ± 1.4 |" in report
    assert r"| student | 42.0 ± 1.4\* |" in report
    assert "| student | DollyEval | 5 (2 left out) | 42.0 ± 1.4 | 6.0 ± 1.4 | 31 |" in report
    assert "<summary>DollyEval by category</summary>" in report
    assert "|  | teacher | student |" in report
    assert "| copy (3) | 40.0 ± 1.4 | 42.0 ± 1.4 |" in report


def test_stages_and_phases(report):
    assert "| 1 | 0 | 0.7 | 8 | 2 | 16 | 4 |" in report
    assert "| 2 | 0.1 | 1 | 16 | 2 | 32 | 8 |" in report
    # The second stage ended early: 8 of 12 steps.
    assert "12 steps of 4 examples in total, 48 examples seen; 8 steps were made." in report
    assert "| difficulty | 0:01:01 | – | – | – | – | – | – |" in report
    assert "| student | 1:02:05 | 8 | 32 | 0.375 | 22.0 | 50 | 6,000 |" in report


def test_exposure_is_a_table_by_stage(report):
    assert "| category | examples | stage 1 | stage 2 | in total |" in report
    assert r"| a\|b | 8 | 1.00 | 2.00 | 3.00 |" in report


def test_samples(report, graded):
    assert extremes(graded) == ([0, 1, 2, 3, 4], [11, 12, 13, 14, 15])
    assert "The 5 easiest:" in report and "The 5 hardest:" in report
    row = next(line for line in report.splitlines() if line.startswith("| 16 |"))
    assert row.startswith(r"| 16 | 0.0 | 1.00 | d/15 | do 15 \| &lt;b&gt;\*now\*&lt;/b&gt; please | in")
    assert row.endswith("i… | answer 15 |")
    assert "d/7" not in report
    assert "| 1 | 8 | 76.7 | 0.23 |" in report


def test_extremes_of_few_examples_do_not_overlap():
    graded = Difficulty.of("abc", np.array([0.1, 0.9, 0.5]), np.zeros(3), subsets=1)
    assert extremes(graded, 2) == ([1, 2], [0])


def test_an_evaluation_alone(tmp_path):
    write_report(tmp_path, title="evaluation", results={"model": results(30, no_repeat_ngram=6)})
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert re.findall(r"^#+ .*$", report, re.M) == ["# evaluation", "## Results"]
    assert "no repeated 6-gram" in report and "| model | 30.0 ± 1.4 |" in report
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]


def test_many_categories_are_cut_and_counted(tmp_path):
    one = results(30)
    group = one.sets[0].categories["copy"]
    many = {f"c{i:02}": dataclasses.replace(group, rows=i) for i in range(1, 31)}
    changed = dataclasses.replace(one, sets=(dataclasses.replace(one.sets[0], categories=many),))
    write_report(tmp_path, title="evaluation", results={"model": changed})
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "by category, the 12 largest of 30" in report
    assert "| c30 (30) |" in report and "| c19 (19) |" in report and "c18" not in report


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ({"l2m": 40, "random_order": 43.5, "sft": 42}, "**random_order scores highest: Rouge-L 43.5 (l2m 40.0, sft 42.0).** Easiest first loses 3.5"),
        ({"l2m": 44, "random_order": 43.5}, "**l2m scores highest: Rouge-L 44.0 (random_order 43.5).** Easiest first gains 0.5"),
    ],
)  # fmt: skip
def test_the_first_lines_say_which_student_wins(scores, said):
    models = {"teacher": results(90), "student before": results(80)}
    text = verdict(models | {name: results(score) for name, score in scores.items()})
    assert text.startswith(said) and "one seed" in text


def test_one_student_has_no_rival():
    assert verdict({"teacher": results(90), "student before": results(80), "l2m": results(40)}) == ""
    assert "Easiest first" not in verdict({"l2m": results(40), "sft": results(41)})
