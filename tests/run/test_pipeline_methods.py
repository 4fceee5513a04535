"""Whole runs of the methods that train on generated responses."""

import json
import shutil
from pathlib import Path
from typing import ClassVar

import pytest
from ml_collections import ConfigDict

from l2m_jax import files
from l2m_jax.config import Config, parse
from l2m_jax.run import distillation, pipeline, rollouts
from l2m_jax.training.checkpoint import Checkpoints
from l2m_jax.training.metrics import MetricsLog, read_metrics

STEPS = 15  # 5 epochs of 48 examples


def _config(tiny: ConfigDict, method: str, baselines: tuple[str, ...] = (), **changes) -> Config:
    config = tiny.copy_and_resolve_references()
    config.method, config.baselines = method, baselines
    # Parameters move far enough from part to part to be told apart.
    config.training.learning_rate = config.teacher.finetune.learning_rate = 1e-2
    config.data.synthetic.update(validation=2, test=2)
    config.sampling.max_new_tokens = 6
    config.evaluation.update(seeds=(10,), validations=1)
    config.update_from_flattened_dict(changes)
    return parse(config)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    baselines = ("seqkd", "distillm2", "distillm2_on_policy", "skl")
    pipeline.run(_config(tiny, "skl_on_policy", baselines), folder / "run", folder / "shared")
    return folder


def _lines(finished: Path, phase: str) -> list[dict]:
    lines = read_metrics(finished / "run" / "metrics.jsonl")
    return [line for line in lines if line["phase"] == phase and "loss" in line]


def test_all_make_as_many_updates_on_as_many_examples(finished):
    for phase in ("student", *(f"student:{n}" for n in ("seqkd", "distillm2", "distillm2_on_policy", "skl"))):
        lines = _lines(finished, phase)
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        assert sum(line["examples"] for line in lines) == STEPS * 16
    results = json.loads((finished / "run" / "evaluation" / "results.json").read_text())
    assert "distillm2_on_policy" in results and "skl_on_policy" in results


def test_fixed_responses_are_generated_once_and_shared(finished):
    for name in ("teacher", "initial_student"):
        lines = (finished / "shared" / f"{name}_responses.jsonl").read_text().splitlines()
        assert len(lines) == 1 + 48
    # The pair has the tokens of two responses: seqkd's is one of them.
    assert all(
        pair["target_tokens"] > one["target_tokens"]
        for pair, one in zip(
            _lines(finished, "student:distillm2"), _lines(finished, "student:seqkd"), strict=True
        )
    )
    assert _lines(finished, "student:seqkd")[0]["divergence"] == 0
    assert _lines(finished, "student:distillm2")[0]["divergence"] > 0


def test_rollouts_are_refreshed_within_the_epoch(finished):
    # Three batches an epoch, and up to four refreshes; one for DistiLLM-2, with a response to each prompt.
    (folder,) = (finished / "run" / "rollouts").glob("student-*")
    assert len(list(folder.glob("*.jsonl"))) == 5 * 3
    (folder,) = (finished / "run" / "rollouts").glob("student_distillm2_on_policy-*")
    files = sorted(folder.glob("*.jsonl"))
    assert len(files) == 5
    first, last = ([json.loads(line) for line in f.read_text().splitlines()] for f in (files[0], files[-1]))
    assert sorted(line["example"] for line in first) == list(range(48))
    by_example = {line["example"]: line["tokens"] for line in last}
    assert sum(by_example[line["example"]] != line["tokens"] for line in first) > 24


class _Killed(Exception):
    pass


class _RecordedCheckpoints(Checkpoints):
    opened: ClassVar[list[Checkpoints]] = []

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.opened.append(self)


@pytest.mark.parametrize("killed", ["training", "generating"])
def test_an_interrupted_on_policy_run_ends_as_one_that_was_not(tiny, finished, tmp_path, monkeypatch, killed):
    config = _config(
        tiny,
        "skl_on_policy",
        **{"rollouts.refreshes": 2, "rollouts.replay_share": 0.5, "overrides.divergence": "jsd"},
    )
    pipeline.run(config, tmp_path / "whole", finished / "shared")

    write, write_text, rolled = MetricsLog.write, files.write_text, []

    def writing(self, phase, step, **values):
        if killed == "training" and phase == "student" and step == 9:
            raise _Killed
        write(self, phase, step, **values)

    def saving(path, text):
        if "rollouts" in str(path) and path.suffix == ".jsonl":
            rolled.append(path)
            if killed == "generating" and len(rolled) == 6:
                raise _Killed
        write_text(path, text)

    monkeypatch.setattr(distillation, "Checkpoints", _RecordedCheckpoints)
    monkeypatch.setattr(MetricsLog, "write", writing)
    monkeypatch.setattr(rollouts.files, "write_text", saving)
    with pytest.raises(_Killed):
        pipeline.run(config, tmp_path / "killed", finished / "shared")
    _RecordedCheckpoints.opened[-1].close()  # its threads would have died with a process
    monkeypatch.undo()
    before = _files(tmp_path / "killed")
    assert not (tmp_path / "killed" / "student").exists() and 0 < len(before) < 10

    pipeline.run(config, tmp_path / "killed", finished / "shared")
    weights = Path("student") / "model.safetensors"
    assert (tmp_path / "killed" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    assert _files(tmp_path / "killed") == _files(tmp_path / "whole")
    assert before.items() <= _files(tmp_path / "whole").items()
    shutil.rmtree(tmp_path / "killed")


def _files(workdir: Path) -> dict[str, str]:
    (folder,) = (workdir / "rollouts").iterdir()
    return {file.name: file.read_text() for file in folder.glob("*.jsonl")}
