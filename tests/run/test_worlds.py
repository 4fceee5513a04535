"""What worlds have in common, and where each keeps its own."""

import json

import pytest

from l2m_jax.config import change, defaults, parse
from l2m_jax.data.tokenizer import train_tokenizer
from l2m_jax.errors import InputError
from l2m_jax.run import data
from l2m_jax.run.resolve import resolve
from l2m_jax.sweep.presets import rows_of
from l2m_jax.sweep.sweep import Sweep

CONFIG = change(parse(defaults()), {"data.source": "synthetic", "student.warmup.epochs": 1})


def of_world(tmp_path, world: int, **changes):
    return resolve(change(CONFIG, {"world": world, **changes}), tmp_path / "run", tmp_path / "shared")


def test_worlds_have_one_teacher_and_one_test_set(tmp_path):
    first, second = of_world(tmp_path, 1), of_world(tmp_path, 2)
    for name in ("tokenizer", "teacher"):
        assert getattr(first, name) == getattr(second, name)
        assert getattr(first, name).path == getattr(second, name).path
    for part in ("validation", "test"):
        assert first.corpora[part] == second.corpora[part]
        assert first.corpora[part].path == second.corpora[part].path
    assert first.evaluations["teacher"].path == second.evaluations["teacher"].path
    assert first.teacher == of_world(tmp_path, 0).teacher
    # The teacher learns from the rows of world 0, which are among those to be made.
    own = of_world(tmp_path, 0).corpora["train"]
    assert first.teacher.inputs.train == own and own in first.all_corpora and own in list(first)


def test_each_world_keeps_its_own_rows_student_ranking_and_store(tmp_path):
    first, second = of_world(tmp_path, 1), of_world(tmp_path, 2)
    for name in ("initial_student", "ranking", "store"):
        one, other = getattr(first, name), getattr(second, name)
        assert one.key != other.key and tmp_path / "shared" / "world1" in one.path.parents
        assert tmp_path / "shared" / "world2" in other.path.parents
    assert first.corpora["train"].key != second.corpora["train"].key
    assert first.initial_student.inputs.seed != second.initial_student.inputs.seed
    assert first.students["l2m"].inputs.seed != second.students["l2m"].inputs.seed
    assert of_world(tmp_path, 0).initial_student.path == tmp_path / "shared" / "initial_student"


def test_a_redrawn_teacher_learns_from_the_rows_of_its_world(tmp_path):
    first, second = (of_world(tmp_path, world, **{"teacher.world": -1}) for world in (1, 2))
    assert first.teacher.key != second.teacher.key and first.teacher.path != second.teacher.path
    assert first.teacher.inputs.train == first.corpora["train"]
    assert first.tokenizer == second.tokenizer


def test_a_student_that_is_pretrained_once_is_kept_once(tmp_path):
    (tmp_path / "text.txt").write_text("a text")
    once = {
        "student.pretrain.text": str(tmp_path / "text.txt"),
        "student.pretrain.seed": 0,
        "student.warmup.epochs": 0,
    }
    first, second = (of_world(tmp_path, world, **once) for world in (1, 2))
    assert first.initial_student == second.initial_student
    assert first.initial_student.path == second.initial_student.path == tmp_path / "shared/initial_student"
    place = "student before"
    assert first.evaluations[place].path == second.evaluations[place].path
    assert first.ranking.path != second.ranking.path
    again = of_world(tmp_path, 1, **once | {"student.warmup.epochs": 1})
    assert again.initial_student.path == tmp_path / "shared/world1/initial_student"


def test_a_student_pretrained_from_a_redrawn_teacher_is_one_of_its_world(tmp_path):
    (tmp_path / "text.txt").write_text("a text")
    text = str(tmp_path / "text.txt")
    settings = {"teacher.world": -1, "teacher.pretrain.text": text, "student.pretrain.text": text}
    settings |= {"student.pretrain.seed": 0, "student.pretrain.from_teacher": True}
    first, second = (of_world(tmp_path, world, **settings).pretrained["student"] for world in (1, 2))
    assert first.key != second.key and first.path != second.path


@pytest.fixture
def from_files(tmp_path):
    """Settings of 60 rows, of which a world has 10 and a teacher 20."""
    rows = [{"instruction": f"say {i}", "output": f"it is {i}"} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_tokenizer(["say it is"] * 3, 300).save_pretrained(tmp_path / "tokenizer")
    return {
        "data.source": "files",
        "data.train": str(tmp_path / "rows.jsonl"),
        "data.tokenizer": str(tmp_path / "tokenizer"),
        "data.validation_rows": 4,
        "data.test_rows": 4,
        "data.train_rows": 10,
        "teacher.train_rows": 20,
    }


def _ids(corpus):
    (made,) = data.make_corpora([corpus])
    return {made.row(i).id for i in range(len(made))}


def test_a_redrawn_teacher_with_more_rows_has_those_of_its_world(tmp_path, from_files):
    found = of_world(tmp_path, 2, **from_files, **{"teacher.world": -1})
    own, teachers = _ids(found.corpora["train"]), _ids(found.teacher.inputs.train)
    assert len(own) == 10 and len(teachers) == 20 and own < teachers


def test_a_teacher_with_rows_of_several_worlds(tmp_path, from_files):
    seen = []
    for world in (0, 1, 2):
        found = of_world(tmp_path, world, **from_files)
        assert found.teacher.inputs.train in found.all_corpora
        seen.append(_ids(found.corpora["train"]))
    assert _ids(found.teacher.inputs.train) == seen[0] | seen[1]
    with pytest.raises(InputError, match=r"config\.teacher\.train_rows: 20 is for rows from files"):
        of_world(tmp_path, 1, **{"teacher.train_rows": 20})


def test_worlds_need_rows_of_their_own():
    for name in ("world", "teacher.world"):
        with pytest.raises(
            InputError, match=rf"config\.{name}: 2 has no training rows .* set data\.train_rows"
        ):
            change(parse(defaults()), {name: 2})
    assert change(parse(defaults()), {"world": 2, "data.train_rows": 100}).world == 2


def test_a_run_of_another_world_than_the_teachers(tmp_path, tiny):
    config = change(
        parse(tiny),
        {"data.synthetic.train": 32, "student.warmup.epochs": 0, "curriculum.epochs_per_stage": 1, "evaluation.validations": 1},
    )  # fmt: skip
    sweep = Sweep(config, rows_of(["kld"]), tmp_path, worlds=1)
    assert sweep.run() == {}
    of_all, own = (
        {file.name for file in (tmp_path / "shared" / place).iterdir()} for place in (".", "world1")
    )
    assert "teacher" in of_all - own and {"initial_student", "teacher_store"} <= own - of_all
    result = json.loads((tmp_path / "kld/world1/result.json").read_text())
    [of_set], prompts = result["results"]["kld"]["sets"], result["prompts"]["test"]
    assert len(prompts) == of_set["rows"] == 4
    assert sum(prompts.values()) / 4 == pytest.approx(of_set["rouge_l"]["mean"], abs=1e-3)
    assert "validation_rouge_l" in result["validation"]
    assert "of one run" in sweep.report()
