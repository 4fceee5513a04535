"""`l2m compare`: a run beside another one, and beside the published log."""

import json
from pathlib import Path

import pytest

from l2m_jax import files
from l2m_jax.cli.main import main
from l2m_jax.evaluation.protocol import Results, Score, SetResult
from l2m_jax.generation import SamplingRules

REFERENCE = Path(__file__).resolve().parents[2] / "configs" / "references" / "pocl_gpt2_120m.json"
PUBLISHED = [19.83, 25.28, 26.74, 27.31]


def _run(folder: Path, rouge_l, cross_entropy=3.9, test=24.9) -> Path:
    """What a run leaves: an earlier validation in each stage, which does not count, and one at its end."""
    folder.mkdir()
    lines = []
    for stage, value in enumerate(rouge_l, start=1):
        for step, shown in ((10 * stage - 5, 1.0), (10 * stage, value)):
            line = {"phase": "student", "step": step, "stage": stage, "validation_rouge_l": shown}
            lines.append(line | {"validation_cross_entropy": cross_entropy})
    lines.append({"phase": "student:sft", "step": 99, "stage": 1, "validation_rouge_l": 50.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    score = Score.of([test])
    found = SetResult("test", "DollyEval", 5, 0, False, score, score, 10.0, {})
    files.write_json(
        folder / "evaluation" / "results.json", {"pocl": Results("k", (10,), SamplingRules(), (found,))}
    )
    files.write_json(folder / "config.json", {"method": "pocl"})
    return folder


def test_the_published_curve_is_within_tolerance_of_itself(tmp_path, capsys):
    main(["compare", str(_run(tmp_path / "mine", PUBLISHED)), str(REFERENCE)])
    shown = capsys.readouterr().out
    assert shown.count("| yes |") == 6 and "all 6 agree" in shown


def test_a_difference_beyond_the_tolerance_is_found(tmp_path, capsys):
    run = _run(tmp_path / "mine", [*PUBLISHED[:3], 25.5])
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(run), str(REFERENCE)])
    shown = capsys.readouterr().out
    assert ended.value.code == 1 and "1 of 6 differ" in shown
    assert "| end of stage 4 | rouge\\_l | 25.50 | 27.31 | -1.81 | 1.5 | no |" in shown.replace(
        "rouge_l", "rouge\\_l"
    )
    main(["compare", str(run), str(REFERENCE), "--rouge-l=2"])


def test_two_runs_with_different_lengths_share_their_first_stages(tmp_path, capsys):
    first, second = _run(tmp_path / "a", [10, 20]), _run(tmp_path / "b", [10], cross_entropy=3.0)
    with pytest.raises(SystemExit):
        main(["compare", str(first), str(second)])
    shown = capsys.readouterr().out
    assert "stage 2" not in shown and "+0.90 | 0.2 | no |" in shown


@pytest.mark.parametrize("content", [None, "[]", '{"name": "x", "values": {"end of stage 1": {"bleu": 1}}}'])
def test_what_is_no_run_and_no_reference(tmp_path, capsys, content):
    other = tmp_path / "other.json"
    if content is not None:
        other.write_text(content)
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(REFERENCE), str(other)])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and str(other) in said and said.count("\n") == 1
