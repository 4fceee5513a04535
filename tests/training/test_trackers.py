"""What trackers receive: each number once, also after a kill, and nothing that can end a run.

The trackers' own packages are optional. Where one is absent, its test is skipped; TensorBoard's runs always.
"""

import json
import struct
import threading
from pathlib import Path

import pytest

from l2m_jax.config import defaults, parse
from l2m_jax.errors import InputError
from l2m_jax.training import trackers
from l2m_jax.training.metrics import MetricsLog

CONFIG = {"seed": 1, "training": {"learning_rate": 0.1}}
SAMPLES = [{"student": "l2m", "step": 2, "prompt": "p", "reference": "r", "answer": "a | b", "rouge_l": 50.0}]


class Recorder:
    """A tracker in memory; `fails` names the calls that raise."""

    calls: list[tuple]
    fails: tuple[str, ...] = ()

    def __init__(self, workdir, run_id, config):
        self._did("start", run_id, config)
        self.run_id = run_id or "new"

    def _did(self, what, *how):
        self.calls.append((what, *how))
        if what in self.fails:
            raise ConnectionError("no answer from https://me:word@server/api with key-123\nmore")

    def log(self, phase, step, values):
        self._did("log", phase, step, values)

    def figure(self, name, file):
        self._did("figure", name)

    def table(self, name, rows, markdown):
        self._did("table", name, rows)

    def finish(self, completed):
        self._did("finish", completed)


@pytest.fixture
def recorder(monkeypatch):
    kind = type("Kind", (Recorder,), {"calls": []})
    monkeypatch.setitem(trackers.TRACKERS, "wandb", kind)
    return kind


def train(folder: Path, names, steps, resume_at=None, error=None) -> None:
    """Writes a step's loss, and a validation at every second step."""
    log = MetricsLog(folder / "metrics.jsonl")
    with log.tracked(names, CONFIG):
        log.drop_after("student", resume_at or 0, resume_at or 0)
        for step in steps:
            log.write("student", step, loss=1.0 / step, stage=1)
            if step % 2 == 0:
                log.write("student", step, validation_rouge_l=10.0 * step, by={"a": {"kl": 1.0}}, samples=[])
        if error:
            raise error


def logged(recorder) -> list[tuple]:
    return [(step, *values) for what, *_, step, values in (c for c in recorder.calls if c[0] == "log")]


def test_a_resumed_run_continues_the_same_run_and_sends_no_step_twice(tmp_path, recorder):
    with pytest.raises(RuntimeError):
        train(tmp_path, ["wandb"], range(1, 6), error=RuntimeError("killed"))
    assert recorder.calls[0] == ("start", None, CONFIG) and recorder.calls[-1] == ("finish", False)
    before = len(recorder.calls)
    train(tmp_path, ["wandb"], range(3, 8), resume_at=2)  # steps 3 to 5 are made again
    assert recorder.calls[before] == ("start", "new", CONFIG) and recorder.calls[-1] == ("finish", True)
    steps = [(step, "loss" in names) for step, *names in logged(recorder)]
    assert steps == [(1, True), (2, True), (2, False), (3, True), (4, True), (4, False), (5, True), (6, True), (6, False), (7, True)]  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "loss" in line) for line in lines] == steps


def test_nested_numbers_have_paths(tmp_path, recorder):
    train(tmp_path, ["wandb"], [1, 2])
    assert logged(recorder)[-1] == (2, "validation_rouge_l", "by/a/kl")


def test_a_tracker_that_is_added_later_receives_what_was_logged_before(tmp_path, recorder):
    train(tmp_path, [], range(1, 4))
    assert not recorder.calls
    train(tmp_path, ["wandb"], range(4, 6), resume_at=3)
    assert [step for step, *_ in logged(recorder)] == [1, 2, 2, 3, 4, 4, 5]


@pytest.mark.parametrize("call", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_left_out_with_one_warning(tmp_path, recorder, monkeypatch, capsys, call):
    monkeypatch.setenv("WANDB_API_KEY", "key-123")
    recorder.fails = (call,)
    train(tmp_path, ["wandb", "tensorboard"], range(1, 5))
    said = capsys.readouterr().out
    assert (
        said.count("note: ") == 1
        and "tracking with wandb has stopped (ConnectionError: no answer from" in said
    )
    assert "https://***@server/api with ***" in said and "word" not in said and "key-123" not in said
    assert [c[0] for c in recorder.calls].count(call) == 1
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 6
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    ids = json.loads((tmp_path / "tracking.json").read_text())
    assert ids == {"tensorboard": "tensorboard"} | ({} if call == "start" else {"wandb": "new"})


def test_a_tracker_that_hangs_delays_no_step(tmp_path, recorder, monkeypatch, capsys):
    answers = threading.Event()
    monkeypatch.setattr(recorder, "log", lambda *_: answers.wait(60))
    monkeypatch.setattr(trackers, "_SECONDS_TO_FINISH", {True: 0.05})
    train(tmp_path, ["wandb"], range(1, 5))
    answers.set()
    assert "tracking with wandb has stopped (TimeoutError: does not answer)" in capsys.readouterr().out


def test_other_processes_track_nothing(tmp_path, recorder, monkeypatch):
    monkeypatch.setattr("l2m_jax.training.metrics.is_first", lambda: False)
    train(tmp_path, ["wandb"], [1, 2])
    assert not recorder.calls and not list(tmp_path.iterdir())


def test_what_is_refused(monkeypatch):
    monkeypatch.setitem(trackers.PACKAGES, "mlflow", "no_such_package")
    with pytest.raises(
        InputError, match=r"tracking: 'mlflow' needs .* run pip install no_such_package, or leave"
    ):
        trackers.require_packages(["tensorboard", "mlflow"])
    for names, said in (
        (("x",), r"config.tracking: no tracker 'x' .known: tensorboard, wandb"),
        (("mlflow",) * 2, "twice"),
    ):
        config = defaults()
        config.tracking = names
        with pytest.raises(InputError, match=said):
            parse(config)


# --- The trackers themselves -----------------------------------------------------------------------------------------


def whole(folder: Path, name: str) -> None:
    """A killed and resumed run with its report."""
    import matplotlib.image
    import numpy as np

    figure = folder / "training.png"
    matplotlib.image.imsave(figure, np.linspace(0, 1, 48).reshape(4, 4, 3))
    with pytest.raises(RuntimeError):
        train(folder, [name], range(1, 4), error=RuntimeError("killed"))
    train(folder, [name], range(3, 6), resume_at=2)
    log = MetricsLog(folder / "metrics.jsonl")
    with log.tracked([name], CONFIG):
        log.report({"l2m": {"test": 41.5}}, [figure], SAMPLES, "| step | answer |\n|---|---|\n| 2 | a |\n")


def test_tensorboard_event_files(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    whole(tmp_path, "tensorboard")
    scalars, others = [], set()
    for file in sorted((tmp_path / "tensorboard").iterdir()):
        content = file.read_bytes()
        while content:  # length, its checksum, event, its checksum
            (size,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    scalars.append((value.tag, event.step, value.simple_value))
                else:
                    others.add(value.tag)
    losses = [(step, number) for tag, step, number in scalars if tag == "student/loss"]
    assert sorted(losses) == [(step, pytest.approx(1 / step)) for step in range(1, 6)]
    assert ("evaluation/l2m/test", 1, 41.5) in scalars
    assert others == {"config/text_summary", "report/training", "report/samples/text_summary"}


def leveldb_records(content: bytes):
    """The records of a LevelDB log: blocks of 32 KiB, fragments with checksum, length and kind; 7 bytes of header."""
    place, record = 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        size, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or its last fragment
            yield record
            record = b""


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    whole(tmp_path, "wandb")
    steps, ids = [], set()
    for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        for data in leveldb_records(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            items = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
            if "student/loss" in items:
                steps.append((int(items["student/step"]), float(items["student/loss"])))
    assert sorted(steps) == [(step, pytest.approx(1 / step)) for step in range(1, 6)]
    assert ids == {json.loads((tmp_path / "tracking.json").read_text())["wandb"]}
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any(file.suffix == ".png" and "media" in file.parts for file in written)
    assert not any(b"a" * 40 in file.read_bytes() for file in written)


def test_mlflow_read_back(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    whole(tmp_path, "mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("l2m_jax")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == json.loads((tmp_path / "tracking.json").read_text())["mlflow"]
    assert run.info.status == "FINISHED" and run.data.params["training.learning_rate"] == "0.1"
    losses = sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, "student/loss"))
    assert losses == [(step, pytest.approx(1 / step)) for step in range(1, 6)]
    assert run.data.metrics["evaluation/l2m/test"] == 41.5
    found = {file.path for file in client.list_artifacts(run.info.run_id, "report")}
    assert found == {"report/training.png", "report/samples.md"}


def test_trackio_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read at import
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    whole(tmp_path, "trackio")
    run_id = json.loads((tmp_path / "tracking.json").read_text())["trackio"]
    (run,) = trackio.Api().runs("l2m_jax")
    assert run.name == run_id
    found = [
        line
        for line in trackio.sqlite_storage.SQLiteStorage.get_logs("l2m_jax", run_id)
        if "student/loss" in line
    ]
    assert [(line["student/step"], line["student/loss"]) for line in found] == [
        (step, pytest.approx(1 / step)) for step in range(1, 6)
    ]
