"""The phase of the data as a whole: what counts as content, and what a restart has left to do."""

import json

import pytest

from l2m_jax.data import shards
from l2m_jax.data.encoding import Encoder
from l2m_jax.data.settings import Data
from l2m_jax.data.tokenizer import train_tokenizer
from l2m_jax.run import data, sources, tokenizers
from l2m_jax.run.artefacts import Artefact


def _rows(file, count, answer="it"):
    rows = [{"id": f"r{i}", "instruction": f"say {i}", "output": answer} for i in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_mixture_counts_by_weights_and_contents(tmp_path):
    a, b = _rows(tmp_path / "a.jsonl", 3), _rows(tmp_path / "b.jsonl", 4)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(a.read_bytes())
    found = sources.given(f"1*{a} + 2*{b}")
    assert found == sources.given(f"1*{copy} + 2.0*{b}")
    assert found != sources.given(f"2*{a} + 2*{b}")
    assert found != sources.given(f"2*{b} + 1*{a}")
    _rows(b, 4, answer="that")
    assert found != sources.given(f"1*{a} + 2*{b}")


def test_the_number_of_processes_is_in_no_key(tmp_path):
    rows, tokenizer = str(_rows(tmp_path / "rows.jsonl", 9)), data.Source("x", "tokenizer")
    keys = {
        Artefact(data.corpus_inputs(Data(train=rows, processes=n), "train", tokenizer), tmp_path).key
        for n in (0, 3)
    }
    assert len(keys) == 1


@pytest.fixture
def parts(tmp_path):
    """The artefacts of three parts of 60 rows, in a folder."""
    rows = _rows(tmp_path / "rows.jsonl", 60)
    train_tokenizer(["say it 0 1 2"], 300).save_pretrained(tmp_path / "tokenizer")
    settings = Data(
        train=str(rows), validation_rows=5, test_rows=5, tokenizer=str(tmp_path / "tokenizer"), processes=1
    )
    tokenizer = tokenizers.given_tokenizer(settings, "")
    return lambda folder: [
        Artefact(data.corpus_inputs(settings, part, tokenizer), tmp_path / folder / part)
        for part in data.PARTS
    ]


def test_a_restart_tokenises_nothing_again(parts, tmp_path, monkeypatch):
    whole, made, write = data.make_corpora(parts("whole"), 1), [], data.write_corpus

    def killed(folder, *rest):
        if folder.name.startswith(".validation"):
            raise KeyboardInterrupt
        return write(folder, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(data, "write_corpus", killed)
        with pytest.raises(KeyboardInterrupt):
            data.make_corpora(parts("killed"), 1)

    class Counting(Encoder):
        def __call__(self, rows):
            made.extend(rows)
            return super().__call__(rows)

    monkeypatch.setattr(shards, "Encoder", Counting)
    resumed = data.make_corpora(parts("killed"), 1)
    assert not made
    for again, expected in zip(resumed, whole, strict=True):
        for file in set(expected.folder.iterdir()) - {expected.folder / "inputs.json"}:  # which has times
            assert (again.folder / file.name).read_bytes() == file.read_bytes()
    assert {file.name for file in (tmp_path / "killed").iterdir()} == {"train", "validation", "test"}
