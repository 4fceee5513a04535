import json

import pytest

from l2m_jax.data.sources import Row, read_file
from l2m_jax.data.tokenizer import load_tokenizer
from l2m_jax.errors import InputError
from l2m_jax.evaluation import sources
from l2m_jax.evaluation.sets import check_set
from l2m_jax.evaluation.sources import long_references, parse_set, read_evaluation_set

REFERENCES = {
    "ten": " the" * 10,
    "eleven": " the" * 11,
    "long": "a sentence of more than eleven tokens, by any count",
}


def test_names_and_paths():
    assert parse_set("dolly") == ("dolly", "")
    assert parse_set("data/mine.jsonl") == ("mine", "data/mine.jsonl")
    assert parse_set("vicuna=data/a=b.jsonl") == ("vicuna", "data/a=b.jsonl")
    for source in ("=rows.jsonl", "mine=", "a/b=rows.jsonl", "..=rows.jsonl"):
        with pytest.raises(InputError, match=f"evaluation set '{source}': expected name=file"):
            parse_set(source)


@pytest.mark.parametrize("use", [check_set, read_evaluation_set])
def test_unknown_set(use):
    with pytest.raises(
        InputError,
        match=r"'dollly' is neither an evaluation set \(dolly, self_inst, vicuna, s_ni.*; did you mean 'dolly'\?",
    ):
        use("dollly")
    with pytest.raises(InputError, match=r"'xyz' is neither [^?]*$"):
        use("xyz")
    with pytest.raises(InputError, match=r"no such file 'none\.jsonl'"):
        use("vicuna=none.jsonl")


def test_a_check_asks_no_hub_and_reads_all_rows_of_a_file(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("no network in a check")

    monkeypatch.setattr("l2m_jax.data.sources.require_hub", refuse)
    monkeypatch.setattr(sources, "load_tokenizer", refuse)
    file = tmp_path / "rows.jsonl"
    file.write_text('{"instruction": "a", "output": "b"}\n' * 3)
    for source in ("test", "dolly", "s_ni", str(file), f"mine={file}"):
        check_set(source)
    file.write_text('{"instruction": "a", "output": "b"}\nnot json\n')
    with pytest.raises(InputError, match="line 2: not JSON"):
        check_set(f"mine={file}")


def test_file_without_references(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"instruction": "Sort.", "input": "b a"}) + "\n")
    with pytest.raises(InputError, match="line 1: no field 'output'"):
        list(read_evaluation_set(str(file)))


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
    found = list(read_evaluation_set(f"{name}={shared}/data/{file}.jsonl"))
    assert len(found) == rows
    assert all(row.references for row in found)
    assert len({row.id for row in found}) == rows


def test_rule_for_short_references(shared):
    tokenizer = load_tokenizer(shared / "tokenizers" / "gpt2")
    long = list(read_file(shared / "data" / "s_ni" / "test.jsonl"))
    # The published subset was selected by this rule, and one token more would leave some of it out.
    assert list(long_references(long, tokenizer, 11)) == long
    assert len(list(long_references(long, tokenizer, 12))) < len(long)
    assert len(list(long_references(long, tokenizer, 11, max_rows=100))) == 100


def test_the_hubs_rows_are_selected_in_gpt2_tokens(shared, monkeypatch):
    """Each " the" is one token of GPT-2's."""
    rows = [Row(name, "say", "", (reference,)) for name, reference in REFERENCES.items()]
    loaded = []

    def load(name):
        loaded.append(name)
        return load_tokenizer(shared / "tokenizers" / "gpt2")

    monkeypatch.setattr(sources, "load_tokenizer", load)
    monkeypatch.setattr(sources, "read_rows", lambda *_: iter(rows))
    for name in ("s_ni", "un_ni"):
        assert [row.id for row in read_evaluation_set(name)] == ["eleven", "long"]
    assert loaded == ["gpt2", "gpt2"]
    assert [row.id for row in read_evaluation_set("dolly")] == list(REFERENCES)
    # A file is used as it is.
    assert [row.id for row in read_evaluation_set("s_ni=selected.jsonl")] == list(REFERENCES)


def test_no_gpt2_tokenizer_says_what_to_pass(monkeypatch):
    def load(name):
        raise InputError("cannot download 'gpt2' (HF_HUB_OFFLINE is set): pass a folder")

    monkeypatch.setattr(sources, "load_tokenizer", load)
    with pytest.raises(
        InputError, match=r"evaluation set 's_ni': .*cannot download 'gpt2'.* pass a file .* s_ni=FILE"
    ):
        read_evaluation_set("s_ni")
