import mmap
import os

import datasets
import numpy as np
import pytest

from l2m_jax.data import corpus as corpus_module
from l2m_jax.data.corpus import Corpus, build_corpus, write_corpus
from l2m_jax.data.encoding import Counts, TokenLimits, encode_rows
from l2m_jax.data.prompts import format_prompt
from l2m_jax.data.sources import Row, read_file
from l2m_jax.data.tokenizer import train_tokenizer
from l2m_jax.errors import InputError

ROWS = [
    Row("a", "Name a colour.", "", ("red", "blue"), "naming"),
    Row("b", "Sort.", "dog cat", ("cat dog",), "sorting"),
    Row("c", "Say nothing.", "", (), "silence"),
    Row("d", "Count.", "x y z", ("three",)),
]
LIMITS = TokenLimits(max_length=200)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([format_prompt(row.instruction, row.input) for row in ROWS], 300)


@pytest.fixture
def corpus(tokenizer, tmp_path):
    return build_corpus(ROWS, tokenizer, tmp_path / "train", LIMITS).corpus


def test_rows_come_back(corpus):
    kept = [ROWS[0], ROWS[1], ROWS[3]]
    assert len(corpus) == 3
    assert corpus.ids == ["a", "b", "d"]
    assert [corpus.row(i) for i in range(3)] == kept
    assert corpus.references(0) == ["red", "blue"]
    assert [corpus.category(i) for i in range(3)] == ["naming", "sorting", ""]
    names, category_N = corpus.categories
    assert (names, category_N.tolist()) == (["", "naming", "sorting"], [1, 2, 0])
    assert corpus.prompt_text(1) == format_prompt("Sort.", "dog cat")
    assert corpus.counts == Counts(kept=3, empty_response=1)


def test_tokens_lie_flat(corpus, tokenizer):
    for i, text in enumerate(["red", "cat dog", "three"]):
        prompt = tokenizer.encode(corpus.prompt_text(i))
        assert corpus.prompt_tokens(i).tolist() == prompt
        assert corpus.example_tokens(i).tolist() == [*prompt, *tokenizer.encode(text), tokenizer.eos_token_id]
    assert corpus.tokens.dtype == np.int32 and corpus.offsets.dtype == np.int64
    np.testing.assert_array_equal(corpus.tokens, np.concatenate([corpus.example_tokens(i) for i in range(3)]))
    np.testing.assert_array_equal(corpus.lengths, np.diff(corpus.offsets))
    np.testing.assert_array_equal(corpus.response_lengths, corpus.lengths - corpus.prompt_lengths)


def test_opening_maps_files_and_reads_no_row(corpus):
    opened = Corpus.open(corpus.folder)
    for array in (opened.tokens, opened.offsets, opened.prompt_lengths):
        base = array
        while isinstance(base, np.ndarray):
            base = base.base
        assert isinstance(base, mmap.mmap)
    assert {"rows", "ids", "_lengths"}.isdisjoint(vars(opened))


def test_tokens_of_a_huge_corpus_stay_on_disk(corpus):
    # A sparse file stands in for 8 GB of tokens: only a mapping can open it in no memory to speak of.
    os.truncate(corpus.folder / "tokens.int32", 2 * 2**32)
    opened = Corpus.open(corpus.folder)
    assert len(opened.tokens) == 2**31
    np.testing.assert_array_equal(opened.example_tokens(0), corpus.example_tokens(0))


def test_rows_are_an_arrow_dataset(corpus):
    assert isinstance(corpus.rows, datasets.Dataset)
    assert corpus.rows.column_names == ["id", "instruction", "input", "references", "category"]


def test_many_chunks_make_the_same_arrays(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "ROWS_AT_ONCE", 2)
    in_chunks = build_corpus(ROWS, tokenizer, tmp_path / "chunks", LIMITS).corpus
    assert len(in_chunks.rows.data.to_batches()) == 2
    for name in ("tokens", "offsets", "prompt_lengths"):
        np.testing.assert_array_equal(getattr(in_chunks, name), getattr(corpus, name))
    assert [in_chunks.row(i) for i in range(3)] == [corpus.row(i) for i in range(3)]
    names, category_N = in_chunks.categories
    assert (names, category_N.tolist()) == (["", "naming", "sorting"], [1, 2, 0])


def test_writing_into_a_folder(corpus, tokenizer, tmp_path):
    folder = tmp_path / "written"
    folder.mkdir()
    counts = Counts()
    examples = encode_rows(ROWS, tokenizer, LIMITS, counts)
    assert write_corpus(folder, examples, LIMITS, counts) == corpus.counts
    written, built = (
        {file.name: file.read_bytes() for file in made.iterdir()} for made in (folder, corpus.folder)
    )
    assert written == built


def test_failing_rows_leave_the_old_corpus(corpus, tokenizer, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"instruction": "Sort.", "output": "a"}\nnot json\n')
    with pytest.raises(InputError, match=r"bad\.jsonl, line 2"):
        build_corpus(read_file(path), tokenizer, corpus.folder, LIMITS)
    assert Corpus.open(corpus.folder).ids == ["a", "b", "d"]


def test_no_rows(tokenizer, tmp_path):
    with pytest.raises(InputError, match="train: there are no rows"):
        build_corpus([], tokenizer, tmp_path / "train", LIMITS)


def test_nothing_left(tokenizer, tmp_path):
    with pytest.raises(
        InputError,
        match=r"train: no example is left: 0 rows kept, 4 dropped \(1 empty response, 3 too long",
    ):
        build_corpus(ROWS, tokenizer, tmp_path / "train", TokenLimits(3, long_prompt="truncate"))


def test_opening_nothing(tmp_path):
    with pytest.raises(InputError, match="contains no corpus"):
        Corpus.open(tmp_path)
