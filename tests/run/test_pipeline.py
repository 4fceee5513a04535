"""Whole runs of the script on a very small config: what they leave, and that a killed one ends the same."""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from l2m_jax import models
from l2m_jax.cli import train
from l2m_jax.config import defaults, parse
from l2m_jax.curriculum.difficulty import Difficulty, matched_rouge_l
from l2m_jax.data.corpus import Corpus
from l2m_jax.data.tokenizer import train_tokenizer
from l2m_jax.errors import InputError
from l2m_jax.run import data, locks, tokenizers
from l2m_jax.run.artefacts import Artefact
from l2m_jax.run.context import start
from l2m_jax.run.distillation import Student
from l2m_jax.run.models import make_model
from l2m_jax.run.ranking import make_ranking
from l2m_jax.run.resolve import resolve
from l2m_jax.run.responses import make_responses, with_end

ROOT = Path(__file__).resolve().parents[2]
DIAGNOSED = "--config.evaluation.diagnostic_rows=32"


def _command(folder: Path, *flags: str) -> list[str]:
    script, config = ROOT / "train.py", ROOT / "tests" / "configs" / "tiny.py"
    return [sys.executable, str(script), f"--config={config}", f"--workdir={folder / 'run'}", *flags]


def _run(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(_command(folder, *flags), cwd=ROOT, capture_output=True, text=True, timeout=600)


def _run_here(command: list[str]) -> None:
    """The command in this process, which has imported all modules and compiled many programs."""
    _, _, *arguments = command
    train.main([*arguments, "--config.devices.num_processes=1"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    done = _run(folder, DIAGNOSED, "--config.baselines=('sft',)")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_workdir_holds_what_the_readme_says(finished):
    run = finished / "run"
    for name in ("config.json", "difficulty.parquet", "report.md", "figures/training.png"):
        assert (run / name).stat().st_size > 0
    for name in ("teacher", "student", "initial_student", "baselines/sft"):
        assert (run / name / "model.safetensors").is_file() and (run / name / "tokenizer.json").is_file()
    results = json.loads((run / "evaluation" / "results.json").read_text())
    assert list(results) == ["teacher", "student before", "l2m", "sft"]
    answers = [json.loads(line) for line in (run / "evaluation" / "responses.jsonl").read_text().splitlines()]
    assert len(answers) == 4 * 4 * 2  # models, test rows, seeds
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    student = [line for line in steps if line["phase"] == "student" and "loss" in line]
    assert [line["step"] for line in student] == list(range(1, len(student) + 1))
    exposure = json.loads((run / "exposure" / "student.json").read_text())
    for seen in exposure.values():
        assert np.sum(seen["seen_KxG"]) == sum(line["examples"] for line in student)
        assert seen["end_K"][-1] == student[-1]["step"]
    # Eq. 6 and 7 for n = 4, as the steps saw them.
    assert list(dict.fromkeys(line["alpha"] for line in student)) == pytest.approx([0, 0.1 / 3, 0.2 / 3, 0.1])
    assert list(dict.fromkeys(line["beta"] for line in student)) == pytest.approx([0.7, 0.8, 0.9, 1.0])


@pytest.mark.parametrize("method", ["l2m", "sft"])
def test_diagnostics_are_those_of_the_saved_students(finished, method):
    """Independent of the run: dense logits of each held-out row by itself, in float64."""
    run = finished / "run"
    phase, folder = ("student", "student") if method == "l2m" else ("student:sft", "baselines/sft")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["phase"] == phase and "validation_rouge_l" in line]
    kept = max(lines, key=lambda line: line["validation_rouge_l"])  # the earliest of the best
    corpus = Corpus.open(run / "data" / "validation")
    tokens_BxL = np.zeros((len(corpus), corpus.lengths.max()), np.int32)
    for i, n in enumerate(corpus.lengths):
        tokens_BxL[i, :n] = corpus.example_tokens(i)
    of_model = []
    for path in (folder, "teacher"):
        config, params = models.load(str(run / path))
        logits = np.asarray(jax.jit(models.logits, static_argnums=0)(config, params, tokens_BxL), np.float64)
        at_targets = np.concatenate(
            [
                x[p - 1 : n - 1, : config.valid_vocab_size]
                for x, p, n in zip(logits, corpus.prompt_lengths, corpus.lengths, strict=True)
            ]
        )
        of_model.append(at_targets - np.log(np.exp(at_targets).sum(-1, keepdims=True)))
    log_q, log_p = of_model
    labels = np.concatenate([corpus.example_tokens(i)[p:] for i, p in enumerate(corpus.prompt_lengths)])
    expected = {
        "kl": (np.exp(log_p) * (log_p - log_q)).sum(-1).mean(),
        "cross_entropy": -log_q[np.arange(len(labels)), labels].mean(),
        "entropy": -(np.exp(log_q) * log_q).sum(-1).mean(),
        "top1": (log_p.argmax(-1) == log_q.argmax(-1)).mean(),
    }
    assert {name: kept[f"validation_{name}"] for name in expected} == pytest.approx(expected, rel=1e-3)
    by_subset = kept["train_by_subset"]
    assert (
        list(by_subset) == ["1", "2", "3", "4"] and sum(group["rows"] for group in by_subset.values()) == 32
    )
    assert sum(group["rows"] for group in kept["validation_by_category"].values()) == len(corpus)
    assert (run / "figures" / "agreement.png").is_file() and kept["samples"][0]["id"] in (
        run / "samples.md"
    ).read_text()


def test_a_student_has_one_name_throughout_the_report(finished):
    report = (finished / "run" / "report.md").read_text()
    agreement = report.partition("## Agreement with the teacher")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\S+) +\|", agreement.partition("<details>")[0], re.M)
    assert [row for row in rows if row in ("l2m", "sft", "student", "teacher")] == ["l2m", "sft", "teacher"]
    assert "Greedy answers of l2m as training goes" in agreement
    samples = (finished / "run" / "samples.md").read_text()
    assert set(re.findall(r"^\| +\d+ \| +\d+ \| (\S+) \|", samples, re.M)) == {"l2m", "sft"}


def test_the_student_says_how_it_was_made_and_how_well_it_does(finished):
    card = (finished / "run" / "student" / "README.md").read_text()
    results = json.loads((finished / "run" / "evaluation" / "results.json").read_text())
    assert "l2m" in card and "rouge" in card
    assert f"{results['l2m']['sets'][0]['rouge_l']['mean']:.2f}"[:3] in card


def test_responses_that_a_power_failure_cut_short_are_named_and_made_again(finished, tmp_path, capsys):
    """The record may say finished: it can reach the disk before the answers do."""
    shutil.copytree(finished / "run", tmp_path / "run")
    answers = tmp_path / "run" / "initial_student_responses.jsonl"
    whole = answers.read_bytes()
    answers.write_bytes(whole[: whole[:-1].rfind(b"\n") + 20])
    command = _command(tmp_path, "--config.baselines=('distillm2',)", "--config.training.learning_rate=1e-4")
    with pytest.raises(SystemExit) as refused:
        _run_here(command)
    assert refused.value.code == 2
    assert capsys.readouterr().err == (
        f"error: {answers}: differs from what was written; restore it, or delete {answers} to make it again\n"
    )
    answers.unlink()
    _run_here(command)
    assert answers.read_bytes() == whole


def test_a_ranking_from_the_answers_to_a_sample(finished, tmp_path, tiny):
    run, values = finished / "run", tiny.copy_and_resolve_references()
    values.curriculum.ranking_rows = 12
    config = parse(values)
    context = start(config, tmp_path)
    ranking = resolve(config, run, run).ranking
    answers = dataclasses.replace(ranking.inputs.answers, path=tmp_path / "answers.jsonl")
    inputs = dataclasses.replace(ranking.inputs, answers=answers)
    found = make_ranking(Artefact(inputs, tmp_path / "difficulty.parquet"), context)
    whole = Difficulty.read(run / "difficulty.parquet")
    np.testing.assert_array_equal(found.cross_entropy, whole.cross_entropy)
    sampled = make_responses(answers, context.student, context, "not made again")
    assert len(sampled) == len(list(sampled)) == 12
    np.testing.assert_array_equal(found.rouge_l[sampled.examples_P], whole.rouge_l[sampled.examples_P])
    np.testing.assert_array_equal(
        found.rouge_l,
        matched_rouge_l(whole.rouge_l, whole.cross_entropy, np.isin(np.arange(48), sampled.examples_P)),
    )
    # Tokens by example are those of the lines, with the end of sequence that a line leaves out.
    tokens = sampled.tokens(answers.inputs.sampling, end=9)
    assert list(tokens) == sampled.examples_P.tolist() and 48 not in tokens
    for (example, answer), length in zip(sorted(sampled), tokens.lengths_P, strict=True):
        assert (
            tokens[example] == with_end(answer, answers.inputs.sampling, 9) and len(tokens[example]) == length
        )
    assert len(set(range(48)) & tokens.keys()) == 12 and all(i in tokens for i in sampled.examples_P)


@pytest.mark.parametrize(("family", "dropped"), [("gpt2", 3), ("opt", 1), ("llama", 1)])
def test_a_student_is_trained_with_the_dropout_that_is_asked_for(tmp_path, family, dropped, tiny):
    """Its folder may not be able to say so: a Llama config has no residual dropout."""
    values = tiny.copy_and_resolve_references()
    values.student.model.architecture.family = family
    values.student.warmup.epochs = 0
    values.training.dropout = 0.4
    config = parse(values)
    context = start(config, tmp_path)
    artefacts = resolve(config, tmp_path, tmp_path)
    tokenizers.make_tokenizer(artefacts.tokenizer)
    data.make_corpora([artefacts.corpora["train"]])
    make_model(artefacts.initial_student, "initial student", config.student.compute, context)
    inputs = artefacts.students["l2m"].inputs
    student = Student(artefacts.students["l2m"], "student", inputs.validation, context)
    trained = student._config
    rates = [trained.embedding_dropout, trained.attention_dropout, trained.residual_dropout]
    assert sorted(rates) == [0.0] * (3 - dropped) + [0.4] * dropped


def test_a_student_with_another_tokenizer_is_refused(finished, tmp_path):
    other = train_tokenizer(["quite other words than those of the tasks"] * 9, 300)
    student = tmp_path / "student"
    shutil.copytree(finished / "run" / "student", student)
    other.save_pretrained(student)
    done = _run(tmp_path, f"--config.student.model.path={student}")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "config.student.model.path: the tokenizer of" in done.stderr
    assert not (tmp_path / "run" / "teacher").exists()


def test_a_run_killed_within_a_stage_ends_as_one_that_was_not(finished, tmp_path):
    running = subprocess.Popen(
        _command(tmp_path, DIAGNOSED), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while running.poll() is None and time.monotonic() < deadline:
        if metrics.is_file() and '"phase": "student", "step": 9,' in metrics.read_text():
            break
        time.sleep(0.05)
    assert running.poll() is None, "the run ended before it could be killed"
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert not (tmp_path / "run" / "student").exists()
    times = tmp_path / "run" / "phases.json"
    before = json.loads(times.read_text())
    # Without diagnostics: they change what is reported, and nothing else.
    again = _run(tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "already there" in again.stdout
    seconds = json.loads(times.read_text())
    assert {"teacher", "student", "evaluation"} < set(seconds)
    assert all(seconds[phase] >= taken > 0 for phase, taken in before.items())  # of both starts
    for name in ("teacher", "initial_student", "student"):
        file = Path("run") / name / "model.safetensors"
        assert (tmp_path / file).read_bytes() == (finished / file).read_bytes()
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    student = [line["step"] for line in steps if line["phase"] == "student" and "loss" in line]
    assert student == list(range(1, len(student) + 1))  # nothing twice, nothing lost
    validations = [line for line in steps if line["phase"] == "student" and "validation_rouge_l" in line]
    assert len(validations) == 4
    assert "validation_kl" in validations[0] and "validation_kl" not in validations[-1]


def test_a_signal_in_training_saves_the_last_step_and_the_run_ends_as_one_that_got_none(finished, tmp_path):
    shared = tmp_path / "run"
    shutil.copytree(finished / "run", shared)
    for made_again in ("student", "evaluation", "baselines"):
        shutil.rmtree(shared / made_again)
    metrics = shared / "metrics.jsonl"
    metrics.unlink()
    # No checkpoint is due by itself before the signal: the first stage has 6 updates.
    command = _command(tmp_path, "--config.checkpoint_minutes=60", "--config.evaluation.select=best")
    running = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 600
    while running.poll() is None and time.monotonic() < deadline:
        if metrics.is_file() and '"phase": "student", "step": 1,' in metrics.read_text():
            break
        time.sleep(0.01)
    running.terminate()
    _, errors = running.communicate(timeout=600)
    assert running.returncode == 75, errors
    assert "Traceback" not in errors and "run the same command again" in errors
    steps = [line["step"] for line in map(json.loads, metrics.read_text().splitlines()) if "loss" in line]
    saved = [
        int(folder.name) for folder in (shared / "checkpoints" / "student").iterdir() if folder.name.isdigit()
    ]
    assert max(saved) == steps[-1] > 0
    _run_here(command)
    for file in (
        "student/model.safetensors",
        "evaluation/l2m/results.json",
        "evaluation/l2m/responses.jsonl",
    ):
        assert (shared / file).read_bytes() == (finished / "run" / file).read_bytes()
    after = [line["step"] for line in map(json.loads, metrics.read_text().splitlines()) if "loss" in line]
    assert after[: len(steps)] == steps and after == list(range(1, len(after) + 1))


def test_a_second_run_in_a_folder_is_refused_with_the_name_of_the_first(tmp_path):
    with locks.held(tmp_path / "run"):
        done = _run(tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"in use by process {os.getpid()} on {socket.gethostname()} since 2" in done.stderr
    assert os.listdir(tmp_path / "run") == [".lock"]


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--config.data.source=files", "config.data.tokenizer: empty"),
        ("--config.method=l2n", "did you mean 'l2m'"),
        ("--config.evaluation.sets=self_inst,vicunna", "did you mean 'vicuna'"),
        ("--config.evaluation.sets=mine=nowhere.jsonl", "no such file 'nowhere.jsonl'"),
        ("--config.teacher.model.path=nowhere/at/all", "config.teacher.model.path"),
        (
            "--config.sampling.max_new_tokens=192",
            "leaves no room for a prompt in the teacher's 192 positions",
        ),
        ("--config.data.max_length=500", "exceeds the teacher's 192 positions"),
        ("--config.devices.count=9", "9 devices requested"),
        ("--config.curriculum.stages=100", "100 difficulty subsets of 48"),
        ("--config.curriculum.stages=100 --config.method=kld", "100 difficulty subsets of 48"),
        ("--config.student.model.path=/does/not/exist", "config.student.model.path: "),
        ("--config.curriculum.ranking_model=/does/not/exist", "config.curriculum.ranking_model: "),
        ("--config.curriculum.alpha=2.0", "config.curriculum.alpha: 2.0 must be between 0 and 1"),
        ("--config.nonsense=1", "nonsense"),
    ],
)
def test_bad_settings_end_in_one_sentence(tmp_path, capsys, flag, said):
    _, _, *arguments = _command(tmp_path, *flag.split())
    with pytest.raises(SystemExit) as ended:
        train.main([*arguments, "--config.devices.num_processes=1"])
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert said in errors and errors.count("\n") == 1
    assert not (tmp_path / "run" / "teacher").exists()  # before anything is trained


def test_unknown_and_mistyped_settings_are_named():
    values = defaults().to_dict()
    values["training"]["learning_rat"] = 1.0
    with pytest.raises(InputError, match=r"config\.training\.learning_rat: .*did you mean 'learning_rate'"):
        parse(values)
    values = defaults().to_dict()
    values["data"]["train"] = 3
    with pytest.raises(InputError, match=r"config\.data\.train: expected str, got 3"):
        parse(values)
