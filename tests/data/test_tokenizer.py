import json

import huggingface_hub.constants
import pytest

from l2m_jax.data.prompts import format_prompt
from l2m_jax.data.tokenizer import load_tokenizer, tokenizer_fingerprint, train_tokenizer
from l2m_jax.errors import InputError

TEXTS = [
    format_prompt("Sort the words.", "red blue green") + "blue green red",
    format_prompt("Greet.") + "hello",
] * 3


def test_training_is_deterministic():
    assert tokenizer_fingerprint(train_tokenizer(TEXTS, 300)) == tokenizer_fingerprint(
        train_tokenizer(TEXTS, 300)
    )


def test_fingerprint_tells_vocabularies_apart():
    assert tokenizer_fingerprint(train_tokenizer(TEXTS, 300)) != tokenizer_fingerprint(
        train_tokenizer(TEXTS, 301)
    )


def test_every_text_survives_encoding():
    tokenizer = train_tokenizer(TEXTS, 300)
    text = TEXTS[0] + " naïve\t東京\n\n  two  spaces"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_template_costs_three_tokens():
    tokenizer = train_tokenizer(TEXTS, 300)
    empty = len(tokenizer.encode(format_prompt("", "x"))) - len(tokenizer.encode("x"))
    assert empty == 3
    assert len(tokenizer) <= 300


def test_end_of_sequence():
    tokenizer = train_tokenizer(TEXTS, 300)
    assert tokenizer.eos_token == "<|endoftext|>"
    assert (
        tokenizer.decode([*tokenizer.encode("hello"), tokenizer.eos_token_id], skip_special_tokens=True)
        == "hello"
    )


def test_saved_and_loaded_again(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    assert (len(loaded), loaded.eos_token_id) == (len(tokenizer), tokenizer.eos_token_id)
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_too_small_a_vocabulary():
    with pytest.raises(InputError, match="vocab_size: 100 is too small"):
        train_tokenizer(TEXTS, 100)


def test_gpt2_from_bare_files(shared):
    tokenizer = load_tokenizer(shared / "tokenizers" / "gpt2")
    assert (len(tokenizer), tokenizer.eos_token_id) == (50257, 50256)
    # As published for GPT-2.
    assert tokenizer.encode("Hello world") == [15496, 995]


def test_opt_from_bare_files(shared):
    tokenizer = load_tokenizer(shared / "tokenizers" / "opt")
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert (len(tokenizer), *ids) == (50265, 2, 2, 1)
    # No beginning of sequence unless it is asked for.
    assert tokenizer.encode("Hello world", add_special_tokens=False) == [31414, 232]


def test_missing_folder(tmp_path):
    with pytest.raises(InputError, match=r"no such folder '.*nowhere'"):
        load_tokenizer(tmp_path / "nowhere")


def test_folder_without_tokenizer(tmp_path):
    with pytest.raises(InputError, match="contains no tokenizer"):
        load_tokenizer(tmp_path)


def test_broken_file(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer\.json is not JSON"):
        load_tokenizer(tmp_path)


def test_vocabulary_without_end_of_sequence(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(InputError, match="no end-of-sequence entry"):
        load_tokenizer(tmp_path)


def test_hub_name_offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=r"cannot download 'nobody/nothing' \(HF_HUB_OFFLINE is set\): pass a folder"
    ):
        load_tokenizer("nobody/nothing")


def test_the_fingerprint_covers_the_merges(tmp_path):
    """Two tokenizers of one vocabulary that join its pieces in another order give other ids."""
    tokenizer = train_tokenizer(["the old apple and the older pear"] * 3, 300)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    described = json.loads(file.read_text())
    described["model"]["merges"].reverse()
    file.write_text(json.dumps(described))
    other = load_tokenizer(tmp_path)
    assert other.get_vocab() == tokenizer.get_vocab()
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)
