import json

import pytest

from l2m_jax.data.corpus import build_corpus
from l2m_jax.data.encoding import TokenLimits
from l2m_jax.data.sources import Row, read_file
from l2m_jax.data.tokenizer import load_tokenizer, train_tokenizer
from l2m_jax.errors import InputError
from l2m_jax.evaluation.sets import from_corpus, read_set


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["copy these words", "say something else"], 300)


ROWS = [
    Row("r1", "copy", "some words", ("some words", "words"), "copying"),
    Row("r2", "say a very long thing " * 20, "it", ("thing",), "saying"),
    Row("r3", "say it", "it", ("it is said " * 10,), ""),
]


@pytest.fixture
def corpus(tokenizer, tmp_path):
    return build_corpus(ROWS, tokenizer, tmp_path / "corpus", TokenLimits(1024)).corpus


def test_prompts_and_references_of_a_corpus(corpus, tokenizer):
    prompts = from_corpus("test", corpus)
    assert (prompts.name, prompts.title, len(prompts)) == ("test", "test", 3)
    assert prompts.ids == ("r1", "r2", "r3")
    assert prompts.references[0] == ("some words", "words")
    assert prompts.categories == ("copying", "saying", "")
    assert prompts.texts[0].endswith("### Input:\nsome words\n\n### Response:\n")
    assert tokenizer.decode(list(prompts.prompts[0])) == prompts.texts[0]
    assert prompts.left_out == 0 and not prompts.unreportable


def test_long_prompts_are_left_out_and_counted(corpus):
    prompts = from_corpus("test", corpus, longest_prompt=60)
    assert prompts.ids == ("r1", "r3") and prompts.left_out == 1
    assert prompts.indices == (0, 2)
    assert prompts.references == (ROWS[0].references, ROWS[2].references)
    assert from_corpus("test", corpus, rows=2, longest_prompt=60).ids == ("r1",)
    with pytest.raises(InputError, match="none of 3 prompts has at most 3 tokens"):
        from_corpus("test", corpus, longest_prompt=3)


def test_the_papers_sets_demand_their_shortest_reference(corpus):
    # Two of three references are far below 11 tokens: these rows are not the paper's UnNI.
    assert from_corpus("un_ni", corpus).unreportable
    assert from_corpus("un_ni", corpus).title == "UnNI"
    # SelfInst has no such rule.
    assert not from_corpus("self_inst", corpus).unreportable


def test_reading_a_file(tokenizer, tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [
        {"instruction": "one", "input": "1", "output": "a"},
        {"instruction": "far too long " * 30, "input": "2", "output": "b"},
        {"instruction": "three", "output": ["", "  "]},
        {"instruction": "four", "input": "4", "output": "a long answer that needs no room " * 30},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for source, name in ((str(path), "mine"), (f"vicuna={path}", "vicuna")):
        prompts = read_set(source, tokenizer, tmp_path / "sets", max_prompt_length=50)
        assert (prompts.name, prompts.ids, prompts.left_out) == (name, ("mine/1", "mine/4"), 2)
    short = read_set(
        str(path), tokenizer, tmp_path / "sets", max_prompt_length=50, long_prompt="truncate", rows=2
    )
    assert short.ids == ("mine/1", "mine/2") and len(short.prompts[1]) == 50
    assert tokenizer.decode(list(short.prompts[1])).endswith("\n\n### Response:\n")


def test_a_row_limit_counts_the_rows_that_are_dropped(tokenizer, corpus, tmp_path):
    """As in the test part of the data, so that the same rows are scored either way."""
    path = tmp_path / "mine.jsonl"
    rows = [
        {"id": r.id, "instruction": r.instruction, "input": r.input, "output": r.references} for r in ROWS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = read_set(str(path), tokenizer, tmp_path / "sets", max_prompt_length=60, rows=2)
    of_corpus = from_corpus("test", corpus, longest_prompt=60, rows=2)
    assert found.ids == of_corpus.ids == ("r1",)
    assert found.left_out == of_corpus.left_out == 1


def test_bad_sources(tokenizer, tmp_path):
    def read(source):
        return read_set(source, tokenizer, tmp_path / "sets", max_prompt_length=50)

    with pytest.raises(InputError, match=r"'dolly2' is neither an evaluation set \(dolly, self_inst, vicuna"):
        read("dolly2")
    with pytest.raises(InputError, match="no such file"):
        read("vicuna=none.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"instruction": "one", "output": []}\n', encoding="utf-8")
    with pytest.raises(InputError, match="1 empty response"):
        read(str(empty))
    empty.write_text('{"instruction": "one"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="line 1: no field 'output'"):
        read(str(empty))


def test_the_real_sets(shared, tmp_path):
    tokenizer = load_tokenizer(shared / "tokenizers/gpt2")
    short = read_set(
        f"un_ni={shared}/data/un_ni/short_subset.jsonl", tokenizer, tmp_path, max_prompt_length=256, rows=200
    )
    assert short.unreportable
    s_ni = read_set(
        f"s_ni={shared}/data/s_ni/test.jsonl", tokenizer, tmp_path, max_prompt_length=512, rows=200
    )
    assert not s_ni.unreportable and max(map(len, s_ni.references)) > 1
    rows = list(read_file(shared / "data/vicuna/test.jsonl"))
    vicuna = read_set(f"vicuna={shared}/data/vicuna/test.jsonl", tokenizer, tmp_path, max_prompt_length=256)
    assert len(vicuna) == 80 and vicuna.references[3] == rows[3].references
