"""Artefacts: what is in a key, when finished work counts as finished, and what a changed setting does to it."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from l2m_jax.errors import InputError
from l2m_jax.run.artefacts import Artefact, Source, refuse_changed
from l2m_jax.training.optimizer import Training


@dataclass(frozen=True)
class Inputs:
    training: Training
    weights: Source
    teacher: Artefact | None = None


def _artefact(
    folder: Path, rate: float = 1e-3, content: str = "a", teacher: Artefact | None = None
) -> Artefact:
    inputs = Inputs(Training(learning_rate=rate), Source(str(folder / "given"), content), teacher)
    settings = {"training": "student.warmup", "weights": "student.model.path"}
    return Artefact(inputs, folder / "model", folder / "checkpoints" / "model", settings)


def _make(artefact: Artefact) -> None:
    artefact.begin()
    with artefact.writing() as folder:
        (folder / "weights").write_text("finished work")


def _files(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): f.read_text() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_a_key_follows_from_contents_and_not_from_places(tmp_path):
    one, other = _artefact(tmp_path / "a"), _artefact(tmp_path / "b")
    assert one.key == other.key and one == other
    assert one.key != _artefact(tmp_path / "a", content="b").key
    assert one.key != _artefact(tmp_path / "a", rate=2e-3).key
    assert _artefact(tmp_path, teacher=one).key == _artefact(tmp_path, teacher=other).key
    assert _artefact(tmp_path, teacher=one).key != _artefact(tmp_path, teacher=replace(one, inputs=1)).key


def test_finished_work_counts_for_its_inputs_alone(tmp_path):
    artefact = _artefact(tmp_path)
    assert not artefact.is_finished
    artefact.begin()
    assert not artefact.is_finished and (tmp_path / "checkpoints" / "model").is_dir()
    _make(artefact)
    assert artefact.is_finished and not _artefact(tmp_path, rate=2e-3).is_finished
    assert not (tmp_path / "checkpoints" / "model").exists()  # a finished model needs no checkpoints


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"rate": 3e-3},
            r"was made with student\.warmup\.learning_rate 0\.001 \(now 0\.003\)\. Choose another --workdir",
        ),
        ({"content": "b"}, r"was made with other content of student\.model\.path"),
    ],
)
def test_a_changed_setting_is_named_and_destroys_nothing(tmp_path, finished, changes, said):
    artefact = _artefact(tmp_path)
    _make(artefact) if finished else artefact.begin()
    before = _files(tmp_path)
    with pytest.raises(InputError, match=said):
        refuse_changed([_artefact(tmp_path, **changes)])
    assert _files(tmp_path) == before
    refuse_changed([artefact])


def test_the_cause_is_named_and_not_only_its_consequence(tmp_path):
    teacher = _artefact(tmp_path / "teacher")
    student = _artefact(tmp_path / "student", teacher=teacher)
    _make(teacher)
    _make(student)
    changed = _artefact(tmp_path / "teacher", rate=3e-3)
    with pytest.raises(InputError) as error:
        refuse_changed([changed, _artefact(tmp_path / "student", teacher=changed)])
    places = ", ".join(str(tmp_path / name / "model") for name in ("teacher", "student"))
    assert "was made with student.warmup.learning_rate 0.001 (now 0.003). Choose" in str(error.value)
    assert str(error.value).endswith(f"make them anew: {places}")
    _make(changed)  # as if the teacher alone had been moved away
    with pytest.raises(InputError, match=r"was made with another teacher\. Choose"):
        refuse_changed([changed, _artefact(tmp_path / "student", teacher=changed)])


def test_a_setting_keeps_its_name(tmp_path):
    artefact = _artefact(tmp_path)
    _make(artefact)
    changed = replace(_artefact(tmp_path, rate=3e-3), settings={})
    with pytest.raises(InputError, match=r"was made with training\.learning_rate 0\.001 \(now 0\.003\)"):
        refuse_changed([changed])


def test_what_others_have_put_there_is_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    refuse_changed([_artefact(tmp_path)])  # empty
    (tmp_path / "model" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="no record of its inputs at"):
        refuse_changed([_artefact(tmp_path)])


def test_a_torn_record_is_said_in_a_sentence(tmp_path):
    artefact = _artefact(tmp_path)
    _make(artefact)
    (tmp_path / "model" / "inputs.json").write_text('{"key": "')
    said = r"inputs\.json: cannot read what .*model was made from .* delete .*model to make it again"
    with pytest.raises(InputError, match=said):
        refuse_changed([artefact])


def test_what_a_kill_left_of_the_progress_stands_in_nobodys_way(tmp_path):
    artefact = _artefact(tmp_path)
    _make(artefact)
    leftover = tmp_path / "checkpoints" / "model" / "3" / "state"  # the record went first
    leftover.mkdir(parents=True)
    refuse_changed([artefact])
    artefact.drop_progress()
    assert not leftover.exists()
    other = _artefact(tmp_path / "other")
    half_written = tmp_path / "other" / "checkpoints" / "model" / ".inputs.json.x7"
    half_written.parent.mkdir(parents=True)
    half_written.touch()
    refuse_changed([other])


def test_a_single_file_has_its_record_beside_it(tmp_path):
    artefact = Artefact(Inputs(Training(), Source("x", "a")), tmp_path / "difficulty.parquet")
    artefact.begin()
    assert not artefact.is_finished
    artefact.path.write_text("ranks")
    assert not artefact.is_finished
    artefact.finish()
    assert artefact.is_finished
    record = json.loads((tmp_path / ".difficulty.parquet.inputs.json").read_text())
    assert record["inputs"]["weights"] == {"content": "a"}
    artefact.path.unlink()
    assert not artefact.is_finished
    refuse_changed([artefact])


def _damages(file: Path):
    size = file.stat().st_size
    yield "truncated", lambda: file.write_bytes(file.read_bytes()[: size // 2])
    yield "emptied", lambda: file.write_bytes(b"")
    yield "overwritten", lambda: file.write_bytes(b"\x17" * size)
    yield "removed", file.unlink


@pytest.mark.parametrize("damage", ["truncated", "emptied", "overwritten", "removed"])
def test_a_damaged_file_of_a_finished_artefact_is_named(tmp_path, damage):
    artefact = _artefact(tmp_path)
    _make(artefact)
    file = artefact.path / "weights"
    dict(_damages(file))[damage]()
    with pytest.raises(InputError, match=rf"{file}: .*delete {artefact.path} to make it again"):
        refuse_changed([artefact])


def test_a_copy_is_intact_and_its_readme_may_change(tmp_path):
    artefact, copy = _artefact(tmp_path / "a"), _artefact(tmp_path / "b")
    _make(artefact)
    (artefact.path / "README.md").write_text("scores")
    shutil.copytree(artefact.path, copy.path, copy_function=shutil.copyfile)  # with other times
    assert artefact.is_finished and copy.is_finished
