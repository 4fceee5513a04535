"""A trimmed tokenizer splits the text that it was made for as the whole one, and can encode any other."""

import numpy as np
import pytest

from l2m_jax.data.tokenizer import load_tokenizer, train_tokenizer
from l2m_jax.data.vocabulary import kept_tokens, trim
from l2m_jax.errors import InputError

WORDS = [
    "unhappiness",
    "happily",
    "hopping",
    "nation",
    "national",
    "internationally",
    "1,024",
    "über",
    "東京",
]


def _texts(seed: int, words: list[str], count: int) -> list[str]:
    random = np.random.RandomState(seed)
    return [" ".join(random.choice(words, 6)) for _ in range(count)]


@pytest.fixture(scope="module")
def whole():
    return train_tokenizer(_texts(0, WORDS, 50), 380)


def _encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def test_the_texts_keep_their_tokens_which_are_renumbered(whole):
    texts = _texts(1, WORDS[:5], 20)
    used = {token for text in texts for token in _encode(whole, text)}
    kept = kept_tokens(whole, used)
    trimmed = trim(whole, kept)
    assert len(trimmed) == len(kept) < len(whole)
    for text in texts:
        assert kept[_encode(trimmed, text)].tolist() == _encode(whole, text)


def test_any_text_can_be_encoded(whole):
    trimmed = trim(whole, kept_tokens(whole, []))
    text = " internationally naïve\n\t🙂 東京<|endoftext|>"
    tokens = _encode(trimmed, text)
    assert trimmed.decode(tokens) == text
    assert len(tokens) > len(_encode(whole, text))
    assert tokens[-1] == trimmed.eos_token_id


def test_the_parts_of_a_kept_token_are_kept(whole):
    (token,) = _encode(whole, " nation")
    trimmed = trim(whole, kept_tokens(whole, [token]))
    assert len(_encode(trimmed, " nation")) == 1
    assert len(_encode(trimmed, "nat")) == len(_encode(whole, "nat"))


def test_extra_tokens_are_those_with_the_lowest_ids(whole):
    bare, more = kept_tokens(whole, []), kept_tokens(whole, [], extra=3)
    added = sorted(set(more.tolist()) - set(bare.tolist()))
    assert added == [token for token in range(len(whole)) if token not in set(bare.tolist())][:3]


def test_it_is_saved_and_loaded_with_its_special_tokens(whole, tmp_path):
    kept = kept_tokens(whole, _encode(whole, "happily"))
    trimmed = trim(whole, kept)
    trimmed.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert kept[loaded.eos_token_id] == whole.eos_token_id
    text = "### Response:\nhappily 東京"
    assert _encode(loaded, text) == _encode(trimmed, text)


def test_ids_that_a_template_adds_are_renumbered(whole):
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(whole.backend_tokenizer.to_str())
    backend.add_special_tokens(["<s>"])
    start = backend.token_to_id("<s>")
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|endoftext|>")
    trimmed = trim(tokenizer, kept_tokens(tokenizer, []))
    assert trimmed.bos_token_id < start
    assert trimmed.encode("a")[0] == trimmed.bos_token_id


def test_another_kind_of_tokenizer_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(InputError, match="WordLevel; only the vocabulary of BPE"):
        kept_tokens(PreTrainedTokenizerFast(tokenizer_object=backend), [0])
