"""Rows tokenised in shards: the same bytes for any number of processes and after any interruption."""

import numpy as np
import pytest

from l2m_jax.data import shards
from l2m_jax.data.corpus import build_corpus, write_corpus
from l2m_jax.data.encoding import Counts, Encoder, Fitter, TokenLimits
from l2m_jax.data.prompts import format_prompt
from l2m_jax.data.rows import Message, Row
from l2m_jax.data.shards import Numbered, Tokeniser
from l2m_jax.data.tokenizer import load_tokenizer, train_tokenizer
from l2m_jax.errors import InputError

# Every fifth has no response; lengths differ.
ROWS = [
    Row(f"r{i}", "say", "x " * (i % 7), ("it " * (i % 11 + 1),) if i % 5 else (), f"c{i % 3}")
    for i in range(38)
]
LIMITS = TokenLimits(max_length=34)
ROWS_AT_ONCE = 8
_TURNS = (Message("user", "a"), Message("assistant", "b")) * 2  # more than the prompt "alpaca" has room for


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([format_prompt("say", "") + "it x"], 300)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "ROWS_AT_ONCE", ROWS_AT_ONCE)
    monkeypatch.setattr(shards, "_FEWEST_FOR_PROCESSES", 2)


def numbered(rows=ROWS):
    return (Numbered(number, row) for number, row in enumerate(rows))


def content(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def written(found, tokenizer, folder) -> dict[str, bytes]:
    """The files of the corpus of these shards."""
    folder.mkdir()
    counts = Counts()
    examples = Fitter(LIMITS, tokenizer).fitted((example for _, example in found.examples()), counts)
    write_corpus(folder, examples, LIMITS, counts)
    return content(folder)


def refused(rows=()):
    yield from rows
    raise AssertionError("read on")


def test_two_processes_make_what_one_makes_and_raise_what_goes_wrong(tokenizer, tmp_path):
    long = Row("long", "a", "", ("b",), messages=_TURNS)
    rows = [*ROWS[:32], long]
    two = Tokeniser(tokenizer, "alpaca", tmp_path / "two", 2)
    with pytest.raises(InputError, match="row 'long': 4 messages"):
        two.shards("all", numbered(rows))
    one = Tokeniser(tokenizer, "alpaca", tmp_path / "one", 1)
    found = one.shards("all", numbered())
    of_one, of_two = (content(tmp_path / name / "all") for name in ("one", "two"))
    assert len(of_two) == 4 and of_two.items() <= of_one.items()

    expected = content(build_corpus(ROWS, tokenizer, tmp_path / "direct", LIMITS).corpus.folder)
    assert written(found, tokenizer, tmp_path / "corpus") == expected


def tokenise_as_one_of_two(folder) -> dict:
    """The shards that this process writes, and how the run ends if the last one of the second process is refused."""
    shards.ROWS_AT_ONCE = ROWS_AT_ONCE
    written, write = [], shards._write_shard

    def noted(folder, chunk, encoder):
        write(folder, chunk, encoder)
        written.append(chunk[0])

    shards._write_shard = noted
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    Tokeniser(tokenizer, "alpaca", folder / "two", 1).shards("all", numbered())
    shared = list(written)
    rows = [*ROWS[:24], Row("long", "a", "", ("b",), messages=_TURNS), *ROWS[25:]]
    try:
        Tokeniser(tokenizer, "alpaca", folder / "refused", 1).shards("all", numbered(rows))
    except InputError as error:
        return {"shared": shared, "error": str(error)}
    return {"shared": shared, "error": ""}


def test_two_hosts_share_the_shards_and_end_together(tokenizer, in_two_processes, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    first, second = in_two_processes(tokenise_as_one_of_two, tmp_path)
    assert (first["shared"], second["shared"]) == ([0, 2, 4], [1, 3])
    assert "row 'long': 4 messages" in first["error"] and first["error"] == second["error"]
    Tokeniser(tokenizer, "alpaca", tmp_path / "one", 1).shards("all", numbered())
    assert content(tmp_path / "two" / "all") == content(tmp_path / "one" / "all")
    # What was finished stays, and the pass is not complete.
    left = sorted(name.partition("-")[0] for name in content(tmp_path / "refused" / "all"))
    assert left == ["000000", "000001", "000002", "000004"]


@pytest.mark.parametrize("read", [0, 7, 20, 38])
def test_an_interrupted_pass_goes_on(tokenizer, tmp_path, read):
    whole = Tokeniser(tokenizer, "alpaca", tmp_path / "whole", 1)
    whole.shards("all", numbered())
    part = Tokeniser(tokenizer, "alpaca", tmp_path / "part", 1)
    with pytest.raises(AssertionError, match="read on"):
        part.shards("all", refused(numbered(ROWS[:read])))
    assert not part.finished("a")
    part.shards("all", numbered())
    assert content(tmp_path / "part" / "all") == content(tmp_path / "whole" / "all")
    part.shards("all", refused())  # nothing is left to do


def test_only_missing_and_damaged_shards_are_made_again(tokenizer, tmp_path, monkeypatch):
    tokeniser = Tokeniser(tokenizer, "alpaca", tmp_path, 1)
    tokeniser.shards("all", numbered())
    before = content(tmp_path / "all")
    files = sorted((tmp_path / "all").glob("*.arrow"))
    files[1].unlink()
    files[3].write_bytes(files[3].read_bytes()[:-1] + b"?")
    (tmp_path / "all" / ".000001.unfinished").write_bytes(b"cut")
    made = []
    encode = Encoder.__call__
    monkeypatch.setattr(
        Encoder, "__call__", lambda self, rows: made.extend(row.id for row in rows) or encode(self, rows)
    )
    tokeniser.shards("all", numbered())
    assert made == [row.id for i in (1, 3) for row in ROWS[8 * i : 8 * i + 8]]
    assert content(tmp_path / "all").items() >= before.items()


@pytest.mark.parametrize("wanted", [None, [], [0], [3, 9, 37], range(38)])
def test_examples_come_back(tokenizer, tmp_path, wanted):
    found = Tokeniser(tokenizer, "alpaca", tmp_path, 1).shards("all", numbered())
    is_wanted = None
    if wanted is not None:
        is_wanted = np.zeros(38, bool)
        is_wanted[list(wanted)] = True
    numbers = list(range(38)) if wanted is None else list(wanted)
    expected = list(Encoder(tokenizer)(ROWS))
    read = list(found.examples(is_wanted))
    assert [number for number, _ in read] == numbers
    for number, example in read:
        assert example._replace(tokens=0) == expected[number]._replace(tokens=0)
        np.testing.assert_array_equal(example.tokens, expected[number].tokens)
    numbers, lengths, prompt_lengths = (np.concatenate(parts) for parts in zip(*found.lengths(), strict=True))
    assert numbers.tolist() == list(range(38))
    assert lengths.tolist() == [len(example.tokens) for example in expected]
    assert prompt_lengths.tolist() == [example.prompt_length for example in expected]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("long_prompt", ["drop", "truncate"])
@pytest.mark.parametrize("long_response", ["drop", "truncate"])
@pytest.mark.parametrize(("max_length", "max_prompt_length"), [(34, None), (34, 26), (30, 29), (200, None)])
def test_what_fits_is_known_from_lengths(
    tokenizer, bos, long_prompt, long_response, max_length, max_prompt_length
):
    limits = TokenLimits(max_length, max_prompt_length, long_prompt, long_response, bos)
    fitter, encoded = Fitter(limits, tokenizer), list(Encoder(tokenizer)(ROWS))
    lengths = np.array([len(example.tokens) for example in encoded])
    prompt_lengths = np.array([example.prompt_length for example in encoded])
    kept = [len(list(fitter.fitted([example], Counts()))) == 1 for example in encoded]
    assert fitter.keeps(lengths, prompt_lengths).tolist() == kept
