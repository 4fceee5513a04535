import gzip
import json

import datasets
import huggingface_hub.constants
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from l2m_jax.data import sources
from l2m_jax.data.sources import Row, check_rows, is_hub_name, read_file, read_rows
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
    rows = list(read_file(written(ALPACA, DOLLY)))
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
    assert list(read_file(written(value))) == [Row("7", "Who?", "", ("Ann", "Bea"), "qa")]


def test_blank_lines_count_but_hold_nothing(written):
    rows = list(read_file(written("", ALPACA, "  ", ALPACA)))
    assert [row.id for row in rows] == ["rows/2", "rows/4"]


def test_empty_answer_is_no_reference(written):
    assert next(read_file(written(ALPACA | {"output": "\n"}))).references == ()


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
        list(read_file(written(ALPACA, line)))
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"instruction": "\xff\xff"}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl, line 1: not JSON"):
        list(read_file(path))


def test_empty_file(written):
    with pytest.raises(InputError, match=r"rows\.jsonl has no rows"):
        list(read_file(written("", "")))


def test_hub_rows_by_split(monkeypatch):
    parts = {"train": [DOLLY, DOLLY], "validation": [ALPACA]}
    monkeypatch.setattr(sources, "require_hub", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, streaming: parts)
    assert [row.id for row in read_rows("somebody/something")] == ["train/1", "train/2"]
    assert [row.id for row in read_rows("somebody/something", "test")] == ["validation/1"]


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
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, streaming: loaded.append(name) or {"train": [DOLLY]}
    )
    assert list(read_rows("read/twice")) == list(read_rows("read/twice"))
    assert loaded == ["read/twice"]


def test_hub_offline_says_what_to_pass(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"cannot download 'databricks/databricks-dolly-15k' .* pass a file"):
        list(read_rows(sources.DOLLY))


def test_hub_errors_in_one_sentence(monkeypatch):
    def fail(name, streaming):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(sources, "require_hub", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=r"^cannot load 'a/b' \(first line\): pass a file \(.*\)$"):
        list(read_rows("a/b"))


def test_a_lost_connection_is_one_sentence(monkeypatch):
    def rows():
        yield DOLLY
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(sources, "require_hub", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, streaming: {"train": rows()})
    with pytest.raises(
        InputError, match=r"^'lost/rows' cannot be read on \(reset by peer\): run the command"
    ):
        list(read_rows("lost/rows"))


CHAT = {
    "messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann"}],
    "extra": {"embedding": [1.0, 2.0]},
}


def _written_as(kind: str, path, values):
    table = pa.Table.from_pylist(values)
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=700)
    elif kind == "feather":
        pyarrow.feather.write_feather(table, path)
    elif kind == "arrow":  # a stream
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(value) + "\n" for value in values).encode()))
    elif kind == "jsonl.zst":
        with pa.output_stream(path, compression="zstd") as file:
            file.write("".join(json.dumps(value) + "\n" for value in values).encode())
    return path


KINDS = ("parquet", "feather", "arrow", "jsonl.gz", "jsonl.zst")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [ALPACA, CHAT], ids=["alpaca", "chat"])
def test_all_files_give_the_rows_of_json_lines(written, tmp_path, kind, value):
    """More rows than are read at once; the default ids count them."""
    values = [value | {"category": str(i)} for i in range(2500)]
    expected = list(read_file(written(*values)))
    assert list(read_rows(_written_as(kind, tmp_path / f"rows.{kind}", values))) == expected
    assert expected[-1].id == "rows/2500"


@pytest.mark.parametrize("kind", ["parquet", "feather", "arrow"])
def test_a_bad_row_of_a_columnar_file_is_named(tmp_path, kind):
    path = _written_as(kind, tmp_path / f"rows.{kind}", [ALPACA] * 1500 + [ALPACA | {"output": None}])
    with pytest.raises(InputError, match=rf"rows\.{kind}, row 1501: no field 'output'"):
        list(read_rows(path))


def test_a_table_of_other_columns_lists_them(tmp_path):
    path = _written_as("parquet", tmp_path / "rows.parquet", [{"question": "a", "answer": "b"}])
    with pytest.raises(InputError, match=r"row 1: columns question, answer are of no known format"):
        list(read_rows(path))


def test_a_folder_is_read_by_splits_and_in_order(tmp_path):
    folder = tmp_path / "chats"
    folder.mkdir()
    for name, answers in (("train-00001-of-00002", "bc"), ("train-00000-of-00002", "a"), ("test", "z")):
        _written_as(
            "parquet", folder / f"{name}.parquet", [ALPACA | {"output": answer} for answer in answers]
        )
    (folder / "README.md").write_text("# Chats")
    assert [row.references for row in read_rows(folder)] == [("a",), ("b",), ("c",)]
    assert [row.references for row in read_rows(folder, "test")] == [("z",)]
    _written_as("parquet", folder / "train-00001-of-00002.parquet", [ALPACA, {"instruction": "x"}])
    with pytest.raises(InputError, match=r"train-00001-of-00002\.parquet, row 2: no field 'output'"):
        list(read_rows(folder))


def test_a_folder_that_datasets_has_saved(tmp_path):
    datasets.Dataset.from_list([ALPACA, ALPACA]).save_to_disk(tmp_path / "saved")
    assert [row.instruction for row in read_rows(tmp_path / "saved")] == ["Sort.", "Sort."]


def test_a_folder_without_rows(tmp_path):
    with pytest.raises(InputError, match=r"is a folder without files of rows .*; or a file \(JSON lines"):
        read_rows(tmp_path)


def test_a_hub_data_set_is_streamed(written, tmp_path, monkeypatch):
    """With a local folder in place of the hub's."""
    load, folder = datasets.load_dataset, tmp_path / "name"
    folder.mkdir()
    written(*[DOLLY | {"id": i} for i in range(5)], name="name/train.jsonl")
    monkeypatch.setattr(sources, "require_hub", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: load(str(folder), **options))
    assert isinstance(sources._load_hub("streamed/rows")["train"], datasets.IterableDataset)
    assert [row.id for row in read_rows("streamed/rows")] == list("01234")


def test_a_mixture_of_files_of_several_kinds(written, tmp_path):
    chats = _written_as("parquet", tmp_path / "chats.parquet", [CHAT | {"id": f"c{i}"} for i in range(9)])
    sorting = written(*[ALPACA | {"id": f"s{i}"} for i in range(3)])
    found = [row.id for row in read_rows(f"2*{chats} + 1*{sorting}")]
    assert found == ["c0", "s0", "c1", "c2", "s1", "c3", "c4", "s2", "c5", "c6"]
    check_rows(f"2*{chats} + 1*{sorting}")
    with pytest.raises(InputError, match="no such file 'gone'"):
        check_rows(f"2*{chats} + 1*gone")
