import csv
import io

import pytest

from l2m_jax.evaluation.protocol import Results, Score, SetResult
from l2m_jax.generation import SamplingRules
from l2m_jax.reporting.tables import Spread, Table, results_table

# Means: Teacher 27.0 / 14.0, sft 23.0 / 14.5, l2m 25.0 / 14.5. Deviation of (22, 24): sqrt(2).
VALUES = {
    "sft": {"DollyEval": [22.0, 24.0], "SelfInst": [14.0, 15.0]},
    "Teacher": {"DollyEval": [27.0, 27.0], "SelfInst": [13.0, 15.0]},
    "l2m_no_beta": {"DollyEval": [25.0, 25.0], "SelfInst": [14.46, 14.46]},
}


def test_a_spread_has_the_sample_deviation():
    spread = Spread.of([22.0, 24.0])
    assert (spread.mean, spread.std) == (23.0, pytest.approx(2**0.5))
    assert str(Spread.of([22.0, 24.0])) == "23.0 ± 1.4"
    assert Spread.of([22.0]) == Spread(22.0, None) and str(Spread.of([22.0])) == "22.0"


def test_markdown_marks_the_best_and_who_beats_the_teacher():
    lines = Table(VALUES, teacher="Teacher").markdown().splitlines()
    assert lines[0] == "|  | DollyEval | SelfInst | Avg. |"
    assert lines[1] == "| --- | ---: | ---: | ---: |"
    assert lines[2] == "| Teacher | 27.0 ± 0.0 | 14.0 ± 1.4 | 20.5 ± 0.7 |"
    # 14.5 and 14.46 read the same, so both are the best. Averages: 18, 19.5 per run and 19.73.
    assert lines[3] == r"| sft | 23.0 ± 1.4 | **14.5 ± 0.7**\* | 18.8 ± 1.1 |"
    assert lines[4] == r"| l2m\_no\_beta | **25.0 ± 0.0** | **14.5 ± 0.0**\* | **19.7 ± 0.0** |"
    assert lines[6] == r"Bold: the best, except for the teacher. \*: better than the teacher."


def test_one_set_has_no_average_and_one_row_no_best():
    text = Table({"l2m": {"test": [25.04]}}).markdown()
    assert text == "|  | test |\n| --- | ---: |\n| l2m | 25.0 |\n"


def test_missing_cells_are_dashes_and_leave_the_average_open():
    table = Table({"a": {"x": [1.0], "y": [2.0]}, "b": {"y": [3.0]}})
    assert table.markdown().splitlines()[3] == "| b | – | **3.0** | – |"
    assert table.spread("b", "x") is None and table.spread("b", "Avg.") is None
    assert table.latex().splitlines()[5] == r"b & -- & \textbf{3.0} & -- \\"


def test_unequal_numbers_of_runs_average_without_a_deviation():
    table = Table({"a": {"x": [1.0, 3.0], "y": [5.0]}})
    assert table.spread("a", "Avg.") == Spread(3.5, None)


def test_a_set_never_to_report_carries_a_dagger_and_stays_out_of_the_average():
    values = {"a": {"x": [1.0], "y": [3.0], "short": [90.0]}}
    table = Table(values, unreportable=frozenset({"short"}))
    lines = table.markdown().splitlines()
    assert lines[0] == "|  | x | y | short† | Avg. |" and lines[2] == "| a | 1.0 | 3.0 | 90.0 | 2.0 |"
    assert "†: not the paper's set and not to be reported" in lines[4]
    assert r"short$^\dagger$" in table.latex()


def test_a_plain_table_holds_numbers_alone():
    text = Table({"x": {"a": [1.0], "b": [3.0]}, "y": {"a": [2.0], "b": [2.0]}}, plain=True).markdown()
    assert text == "|  | a | b |\n| --- | ---: | ---: |\n| x | 1.0 | 3.0 |\n| y | 2.0 | 2.0 |\n"


def test_latex():
    assert Table(VALUES, teacher="Teacher").latex().splitlines() == [
        r"\begin{tabular}{lccc}",
        r"\toprule",
        r" & DollyEval & SelfInst & Avg. \\",
        r"\midrule",
        r"Teacher & 27.0 $\pm$ 0.0 & 14.0 $\pm$ 1.4 & 20.5 $\pm$ 0.7 \\",
        r"\midrule",
        r"sft & 23.0 $\pm$ 1.4 & \textbf{14.5 $\pm$ 0.7}$^{*}$ & 18.8 $\pm$ 1.1 \\",
        r"l2m\_no\_beta & \textbf{25.0 $\pm$ 0.0} & \textbf{14.5 $\pm$ 0.0}$^{*}$ & \textbf{19.7 $\pm$ 0.0} \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_csv_holds_full_precision_and_no_marks():
    rows = list(csv.DictReader(io.StringIO(Table(VALUES, teacher="Teacher").csv())))
    assert [row[""] for row in rows] == ["Teacher", "sft", "l2m_no_beta"]
    assert float(rows[1]["DollyEval std"]) == pytest.approx(2**0.5, abs=1e-12)
    assert float(rows[2]["SelfInst"]) == 14.46
    assert list(csv.reader(io.StringIO(Table({"a": {"x": [1.5]}}).csv()))) == [
        ["", "x", "x std"],
        ["a", "1.5", ""],
    ]


def test_text_is_escaped():
    table = Table({"100% #1 {a}": {"x|y": [1.0]}})
    assert r"100\% \#1 \{a\} & 1.0" in table.latex()
    assert r"| x\|y |" in table.markdown()


def test_an_unknown_teacher():
    with pytest.raises(ValueError, match="'T' is not one of a"):
        Table({"a": {"x": [1.0]}}, teacher="T")


def test_models_are_compared_by_their_results():
    def results(*values):
        score = Score.of(values)
        sets = tuple(
            SetResult(title.lower(), title, 3, 0, title == "Short", score, Score.of([0.0]), 4.0, {})
            for title in ("SelfInst", "Short")
        )
        return Results("f", (10, 20), SamplingRules(), sets)

    table = results_table({"teacher": results(50.0, 52.0), "student": results(90.0, 92.0)}, teacher="teacher")
    text = table.markdown()
    assert text.splitlines()[0] == "|  | SelfInst | Short† |"
    assert r"| student | 91.0 ± 1.4\* | 91.0 ± 1.4\* |" in text
    assert "not to be reported" in text
