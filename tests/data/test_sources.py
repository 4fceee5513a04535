import json

import datasets
import huggingface_hub.constants
import pytest

from l2m_jax.data import sources
from l2m_jax.data.sources import (
    Row,
    long_references,
    read_evaluation_set,
    read_jsonl,
    read_rows,
    split_rows,
)
from l2m_jax.data.tokenizer import load_tokenizer
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
        ("[1, 2]", r"a JSON object is expected, not \[1, 2\]"),
        ({"input": "b", "output": "a"}, "no field 'instruction' \\(fields: input, output\\)"),
        ({"instruction": "Sort."}, "no field 'output' \\(or 'response'"),
        ({"instruction": "Sort.", "output": None}, "no field 'output'"),
        ({"instruction": 3, "output": "a"}, "'instruction' must be a text, not 3"),
        ({"instruction": "Sort.", "output": 3}, "'output' must be a text or a list of texts, not 3"),
        ({"instruction": "Sort.", "output": ["a", 3]}, "'output' must be a text or a list of texts"),
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
    with pytest.raises(InputError, match=r"rows\.jsonl holds no rows"):
        list(read_jsonl(written("", "")))


def test_hub_rows_by_split(monkeypatch):
    parts = {"train": [DOLLY, DOLLY], "validation": [ALPACA]}
    monkeypatch.setattr(sources, "require_hub", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: parts)
    assert [row.id for row in read_rows("somebody/something")] == ["train/1", "train/2"]
    assert [row.id for row in read_rows("somebody/something", "evaluation")] == ["validation/1"]


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


ROWS = [Row(str(i), "Say.", str(i), ("x",)) for i in range(50)]


def test_split_shares_no_row():
    parts = split_rows(ROWS, (30, 10, 5), seed=42)
    assert [len(part) for part in parts] == [30, 10, 5]
    chosen = [row.id for part in parts for row in part]
    assert len(set(chosen)) == 45


def test_split_follows_its_seed():
    assert split_rows(ROWS, (30, 10, 5), seed=42) == split_rows(ROWS, (30, 10, 5), seed=42)
    assert split_rows(ROWS, (30, 10, 5), seed=42) != split_rows(ROWS, (30, 10, 5), seed=43)


def test_split_larger_than_the_rows():
    with pytest.raises(InputError, match=r"11500 \+ 1000 \+ 500 rows needs 13000, but there are 50"):
        split_rows(ROWS)


def test_unknown_evaluation_set_lists_the_known():
    with pytest.raises(
        InputError, match=r"'dollly' is neither an evaluation set \(dolly, self_inst, vicuna, s_ni"
    ):
        read_evaluation_set("dollly")


def test_evaluation_file_without_references(written):
    path = written({"instruction": "Sort.", "input": "b a"})
    with pytest.raises(InputError, match="line 1: no field 'output'"):
        list(read_evaluation_set(str(path)))


@pytest.mark.parametrize(
    ("name", "file", "rows"),
    [
        ("dolly", "dolly/test", 500),
        ("self_inst", "self_inst/test", 242),
        ("vicuna", "vicuna/test", 80),
        ("s_ni", "s_ni/test", 1694),
        ("un_ni", "un_ni/short_subset", 1050),
    ],
)
def test_evaluation_sets_from_files(shared, name, file, rows):
    found = list(read_evaluation_set(name, shared / "data" / f"{file}.jsonl"))
    assert len(found) == rows
    assert all(row.references for row in found)
    assert len({row.id for row in found}) == rows


def test_rule_for_short_references(shared):
    tokenizer = load_tokenizer(shared / "tokenizers" / "gpt2")
    long = list(read_jsonl(shared / "data" / "s_ni" / "test.jsonl"))
    # The published subset was taken by this rule, and one token more would leave some of it out.
    assert list(long_references(long, tokenizer, 11)) == long
    assert len(list(long_references(long, tokenizer, 12))) < len(long)
    assert len(list(long_references(long, tokenizer, 11, most_rows=100))) == 100
