"""Damaged files and a full disk: a selection of the trials of `l2m bench --suite faults`."""

from pathlib import Path
from typing import NamedTuple

import pytest

from l2m_jax.bench.faults import damage, disk

TINY = Path(__file__).resolve().parents[1] / "configs" / "tiny.py"
FLAGS = [
    f"--config={TINY}",
    "--config.data.synthetic.train=24",
    "--config.curriculum.stages=2",
    "--config.curriculum.epochs_per_stage=1",
    "--config.evaluation.validations=2",
    "--config.evaluation.diagnostic_rows=4",
    "--config.evaluation.seeds=10,",
    "--config.training.batch_size=4",
]
TRAINING = "student, stage 2/2"


class Whole(NamedTuple):
    folder: Path
    results: dict[str, bytes]
    places: dict[str, Path]  # the finished run, and a copy from its training


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    with damage.small_shards(), damage.copied_at({TRAINING: 5}, folder / "run", folder / "copies"):
        status, said = damage.train(FLAGS, folder / "run")
    assert status == 0, said
    (training,) = (folder / "copies").iterdir()
    results = damage.results_of(folder / "run")
    assert (
        len(results) == 3 + 1 + 1 + 3 + 3
    )  # models, difficulty, answers, and those of the models with their scores
    return Whole(folder, results, {"finished": folder / "run", "training": training})


@pytest.mark.parametrize(
    ("moment", "file", "kind", "outcome"),
    [
        ("training", "checkpoints/student/[0-9]*/state/d/*", "overwritten", "equal"),
        ("training", "metrics.jsonl", "overwritten", "equal"),
        ("training", "checkpoints/student/inputs.json", "truncated", "refused"),
        ("training", "teacher_store/*.safetensors", "overwritten", "equal"),
        ("training", "diagnostics/*/*.safetensors", "truncated", "equal"),
        ("finished", "phases.json", "truncated", "equal"),
        ("finished", ".difficulty.parquet.inputs.json", "emptied", "refused"),
        ("finished", "evaluation/l2m/responses.jsonl", "removed", "refused"),
    ],
)
def test_a_damaged_file_is_mended_or_named(whole, tmp_path, moment, file, kind, outcome):
    place = whole.places[moment]
    latest = max(place.glob(file), key=lambda f: f.stat().st_mtime_ns)
    name = latest.relative_to(place).as_posix()
    assert damage.trial(FLAGS, place, name, kind, tmp_path / "trial", whole.results) == outcome


def test_the_same_twice(whole, tmp_path):
    with damage.small_shards():
        assert damage.train(FLAGS, tmp_path)[0] == 0
    assert damage.results_of(tmp_path) == whole.results


def test_a_full_disk_is_one_sentence_and_room_is_enough_to_go_on(whole, tmp_path):
    with disk.small_disk(tmp_path / "disk") as mounted:
        if not mounted:
            pytest.skip("mounting a small file system needs root")
        workdir, ballast = tmp_path / "disk" / "run", tmp_path / "disk" / "ballast"
        damage.copy(whole.places["training"], workdir)
        with disk.filled_at(TRAINING, 1, ballast, 0):
            status, said = damage.train(FLAGS, workdir)
        assert status == 2 and said.count("error: ") == 1 and "Traceback" not in said
        assert "the disk or the quota is full: " in said and "0.0 MB free" in said and "checkpoints" in said
        ballast.unlink()
        assert damage.train(FLAGS, workdir)[0] == 0
        assert damage.results_of(workdir) == whole.results
