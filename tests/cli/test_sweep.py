"""A real sweep of the smallest size, from the command line."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from l2m_jax.run import locks

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (
    "--config.data.synthetic.train=32",
    "--config.student.warmup.epochs=0",
    "--config.curriculum.stages=2",
    "--config.curriculum.epochs_per_stage=1",
)


def arguments(folder: Path, *flags: str) -> list[str]:
    config = ROOT / "tests" / "configs" / "tiny.py"
    rows = "--methods=sft,kld", "--seeds=0,1", f"--workdir={folder / 'sweep'}"
    return ["sweep", f"--config={config}:no_dropout", *SETTINGS, *flags, *rows]


def sweep(folder: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "l2m_jax.cli.main", *arguments(folder, *flags)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, env={**os.environ, **environment}
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    done = sweep(folder, "--config.training.learning_rate=0.01")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Rouge-L × 100, mean ± standard deviation over 2 training seeds" in done.stdout
    return folder / "sweep"


def test_every_run_has_its_folder_and_what_they_share_is_there_once(finished):
    for name in ("sft/seed0", "kld/seed0", "sft/seed1", "kld/seed1"):
        folder = finished / name
        assert (folder / "student" / "model.safetensors").is_file()
        assert json.loads((folder / "config.json").read_text())["training"]["learning_rate"] == 0.01
        assert not {"teacher", "initial_student", "teacher_store", "difficulty.parquet"} & set(
            os.listdir(folder)
        )
        evaluated = {"results.json", "responses.jsonl", name.split("/")[0]}
        assert set(os.listdir(folder / "evaluation")) == evaluated
    shared = set(os.listdir(finished / "shared"))
    assert {"teacher", "initial_student", "teacher_store"} < shared
    assert "difficulty.parquet" not in shared  # neither method is staged


def test_seeds_differ_in_the_training_alone(finished):
    weights = [(finished / f"kld/seed{seed}/student/model.safetensors").read_bytes() for seed in (0, 1)]
    assert weights[0] != weights[1]
    found = [
        json.loads((finished / f"kld/seed{seed}/evaluation/results.json").read_text()) for seed in (0, 1)
    ]
    for name in ("teacher", "student before"):
        assert found[0][name] == found[1][name]


def test_the_table_is_that_of_the_runs(finished):
    lines = (finished / "table.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["", "teacher", "student before", "sft", "kld"]
    runs = [
        json.loads((finished / f"kld/seed{seed}/evaluation/results.json").read_text())["kld"]
        for seed in (0, 1)
    ]
    expected = statistics.fmean(value for run in runs for value in run["sets"][0]["rouge_l"]["per_seed"])
    assert float(lines[4].split(",")[1]) == pytest.approx(expected)


def test_a_run_whose_shared_parts_are_there_waits_for_nobody(finished):
    """Another process may make those of another world meanwhile."""
    (finished / "kld/seed1/result.json").unlink()
    with locks.held(finished / "shared"):
        done = sweep(finished.parent, "--config.training.learning_rate=0.01", "--task=3")
    assert done.returncode == 0 and "waiting for" not in done.stdout
    assert (finished / "kld/seed1/result.json").is_file()


def test_a_finished_array_task_trains_nothing(finished):
    metrics = finished / "kld/seed1/metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    done = sweep(finished.parent, "--config.training.learning_rate=0.01", SLURM_ARRAY_TASK_ID="3")
    assert done.returncode == 0 and "1 of 4 runs, 1 of them finished already" in done.stdout
    assert "teacher" not in done.stdout and metrics.stat().st_mtime_ns == before
    listed = sweep(finished.parent, "--config.training.learning_rate=0.01", "--list").stdout
    assert [line.split() for line in listed.splitlines()][3] == ["3", "kld/seed1", "finished"]


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        # Of the students: each run is refused by itself. Of what they share: the sweep is, before any of them.
        (("--config.training.learning_rate=0.02",), 1, "training.learning_rate 0.01 (now 0.02)"),
        (
            ("--config.training.learning_rate=0.01", "--config.teacher.finetune.learning_rate=0.5"),
            2,
            "teacher.finetune.learning_rate 0.0001 (now 0.5)",
        ),
    ],
)
def test_a_sweep_with_other_settings_leaves_what_is_there(finished, flags, status, said):
    def content():
        return {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()}

    before = content()
    done = sweep(finished.parent, *flags)
    assert done.returncode == status and said in done.stderr and "Traceback" not in done.stderr
    after = content()
    assert {file: after.get(file) for file in before if file.name != "phases.json"} == {
        file: text for file, text in before.items() if file.name != "phases.json"
    }


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--table", "none of the 4 runs is finished"),
        ("--task=4", "--task 4: the runs are numbered from 0 to 3"),
        ("--preset=table2", "not allowed with argument"),
        ("--seeds=0,x", "argument --seeds: expected whole numbers such as 0,1,2, got '0,x'"),
        ("--seeds=", "argument --seeds: expected whole numbers"),
        ("--list --table", "argument --table: not allowed with argument --list"),
    ],
)
def test_bad_input_ends_in_one_sentence(tmp_path, refused, flag, said):
    assert said in refused(*arguments(tmp_path, *flag.split()))


def test_a_malformed_array_task(tmp_path, refused, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1-3")
    said = refused(*arguments(tmp_path))
    assert said == (
        "$SLURM_ARRAY_TASK_ID: '1-3' is not a whole number; unset it, or choose a run with --task"
    )
