import json

import datasets
import huggingface_hub.constants
import pytest

from l2m_jax.data import sources
from l2m_jax.data.sources import Row, check_rows, is_hub_name, read_jsonl, read_rows
from l2m_jax.errors import InputError

ALPACA = {"instruction": "Sort.", "input": "b a", "output": "a b"}
DOLLY = {"instruction": "Sort.", "context": "b a", "response": "a b", "category": "sorting"}


@pytest.fixture
def written(tmp_path):
    """Writes lines (objects, or text as it is) to a file."""

    def write(*lines, name="rows.jsonl"):
        path = tmp_path / name
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
        return path

    return write


def test_both_forms_give_the_same_row(written):
    rows = list(read_jsonl(written(ALPACA, DOLLY)))
    assert rows == [
        Row("rows/1", "Sort.", "b a", ("a b",), ""),
        Row("rows/2", "Sort.", "b a", ("a b",), "sorting"),
    ]


def test_several_references_topic_and_id(written):
    value = {
        "id": 7,
        "topic": "qa",
        "instruction": "Who?",
        "output": ["Ann", " ", "Bea"],
        "prompt": "ignored",
    }
    assert list(read_jsonl(written(value))) == [Row("7", "Who?", "", ("Ann", "Bea"), "qa")]


def test_blank_lines_count_but_hold_nothing(written):
    rows = list(read_jsonl(written("", ALPACA, "  ", ALPACA)))
    assert [row.id for row in rows] == ["rows/2", "rows/4"]


def test_empty_answer_is_no_reference(written):
    assert next(read_jsonl(written(ALPACA | {"output": "\n"}))).references == ()


def test_missing_file_at_once(tmp_path):
    with pytest.raises(InputError, match=r"no such file '.*x\.jsonl' \(JSON lines with instruction"):
        read_rows(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "not JSON"),
        ("[1, 2]", r"expected a JSON object, not \[1, 2\]"),
        ({"input": "b", "output": "a"}, "no field 'instruction' \\(fields: input, output\\)"),
        ({"instruction": "Sort."}, "no field 'output' \\(or 'response'"),
        ({"instruction": "Sort.", "output": None}, "no field 'output'"),
        ({"instruction": 3, "output": "a"}, "'instruction' must be a string, not 3"),
        ({"instruction": "Sort.", "output": 3}, "'output' must be a string or a list of strings, not 3"),
        ({"instruction": "Sort.", "output": ["a", 3]}, "'output' must be a string or a list of strings"),
    ],
)
def test_bad_line_is_named_with_its_file(written, line, message):
    with pytest.raises(InputError, match=rf"rows\.jsonl, line 2: {message}") as caught:
        list(read_jsonl(written(ALPACA, line)))
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"instruction": "\xff\xff"}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl, line 1: not JSON"):
        list(read_jsonl(path))


def test_empty_file(written):
    with pytest.raises(InputError, match=r"rows\.jsonl has no rows"):
        list(read_jsonl(written("", "")))


def test_hub_rows_by_split(monkeypatch):
    parts = {"train": [DOLLY, DOLLY], "validation": [ALPACA]}
    monkeypatch.setattr(sources, "require_hub", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: parts)
    assert [row.id for row in read_rows("somebody/something")] == ["train/1", "train/2"]
    assert [row.id for row in read_rows("somebody/something", "evaluation")] == ["validation/1"]


@pytest.mark.parametrize(
    ("source", "is_name"),
    [
        ("owner/name", True),
        ("rows.jsonl", False),
        ("./rows", False),
        ("a/rows.jsonl", False),
        ("a/b/c", False),
    ],
)
def test_hub_names(source, is_name):
    assert is_hub_name(source) == is_name


def test_a_file_that_looks_like_a_hub_name_is_a_file(written, tmp_path, monkeypatch):
    (tmp_path / "owner").mkdir()
    written(ALPACA, name="owner/name")
    monkeypatch.chdir(tmp_path)
    assert [row.id for row in read_rows("owner/name")] == ["name/1"]


def test_a_check_reads_the_first_row_alone(written):
    check_rows(written(ALPACA, "not json"))
    check_rows("owner/name")
    with pytest.raises(InputError, match=r"line 1: not JSON"):
        check_rows(written("not json", ALPACA))


def test_a_hub_data_set_is_loaded_once(monkeypatch):
    loaded = []
    monkeypatch.setattr(sources, "require_hub", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: loaded.append(name) or {"train": [DOLLY]})
    assert list(read_rows("read/twice")) == list(read_rows("read/twice"))
    assert loaded == ["read/twice"]


def test_hub_offline_says_what_to_pass(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"cannot download 'databricks/databricks-dolly-15k' .* pass a file"):
        list(read_rows(sources.DOLLY))


def test_hub_errors_in_one_sentence(monkeypatch):
    def fail(name):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(sources, "require_hub", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=r"^cannot load 'a/b' \(first line\): pass a file \(.*\)$"):
        list(read_rows("a/b"))
