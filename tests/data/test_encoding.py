import pytest

from l2m_jax.data.encoding import Counts, TokenLimits, encode_rows
from l2m_jax.data.prompts import PROMPT_END, format_prompt
from l2m_jax.data.sources import Row
from l2m_jax.data.tokenizer import train_tokenizer
from l2m_jax.errors import InputError

TEXTS = [format_prompt("Sort the words.", "red blue green") + "blue green red" + "\n\n\nend" * 200] * 3


@pytest.fixture(scope="module")
def tokenizer():
    # Without whole phrases, so that line breaks can fuse across the end of the prompt.
    return train_tokenizer(TEXTS, 320, phrases=())


def encode(tokenizer, *rows, **limits):
    counts = Counts()
    found = encode_rows(rows, tokenizer, TokenLimits(**limits), counts)
    # Lists of tokens compare as a whole.
    return [one._replace(tokens=one.tokens.tolist()) for one in found], counts


def row(response="blue green red", instruction="Sort the words.", input="red blue green"):
    return Row("1", instruction, input, (response,))


def test_prompt_response_and_end_of_sequence(tokenizer):
    [encoded], counts = encode(tokenizer, row())
    prompt = format_prompt("Sort the words.", "red blue green")
    assert encoded.tokens == [*tokenizer.encode(prompt + "blue green red"), tokenizer.eos_token_id]
    assert encoded.tokens[: encoded.prompt_length] == tokenizer.encode(prompt)
    assert str(counts) == "1 rows kept, 0 dropped"


def test_first_reference_is_trained_on(tokenizer):
    [encoded], _ = encode(tokenizer, row()._replace(references=("red", "blue")))
    assert tokenizer.decode(encoded.tokens[encoded.prompt_length :]) == "red<|endoftext|>"


@pytest.mark.parametrize("response", ["\n\nblue", "\n blue", "\n", " blue"])
def test_prompt_keeps_its_own_tokens_at_the_boundary(tokenizer, response):
    [encoded], _ = encode(tokenizer, row(response))
    prompt = format_prompt("Sort the words.", "red blue green")
    assert encoded.tokens[: encoded.prompt_length] == tokenizer.encode(prompt)
    assert tokenizer.decode(encoded.tokens) == prompt + response + "<|endoftext|>"


def test_boundary_case_is_a_real_one(tokenizer):
    prompt = format_prompt("Sort the words.", "red blue green")
    whole = tokenizer.encode(prompt + "\n\nblue")
    assert whole[: len(tokenizer.encode(prompt))] != tokenizer.encode(prompt)


def test_real_boundary(shared):
    from l2m_jax.data.tokenizer import load_tokenizer

    gpt2 = load_tokenizer(shared / "tokenizers" / "gpt2")
    [encoded], _ = encode(gpt2, row("\n\nblue"))
    prompt = gpt2.encode(format_prompt("Sort the words.", "red blue green"))
    assert encoded.tokens == [*prompt, *gpt2.encode("\n\nblue"), 50256]


def test_empty_responses_are_dropped_and_counted(tokenizer):
    empty = row()._replace(references=())
    kept, counts = encode(tokenizer, empty, row(), empty)
    assert len(kept) == 1
    assert counts == Counts(kept=1, empty_response=2)
    assert str(counts) == "1 rows kept, 2 dropped (2 empty response)"


def test_limits_count_the_end_of_sequence(tokenizer):
    [encoded], _ = encode(tokenizer, row())
    length = len(encoded.tokens)
    assert encode(tokenizer, row(), max_length=length)[1] == Counts(kept=1)
    assert encode(tokenizer, row(), max_length=length - 1)[1] == Counts(too_long=1)


def test_long_prompts_are_dropped(tokenizer):
    [encoded], _ = encode(tokenizer, row())
    limit = encoded.prompt_length
    assert encode(tokenizer, row(), max_prompt_length=limit)[1] == Counts(kept=1)
    assert encode(tokenizer, row(), max_prompt_length=limit - 1)[1] == Counts(long_prompt=1)


def test_truncated_response_ends_without_end_of_sequence(tokenizer):
    [whole], _ = encode(tokenizer, row())
    [cut], counts = encode(tokenizer, row(), max_length=len(whole.tokens) - 2, long_response="truncate")
    assert cut.tokens == whole.tokens[:-2]
    assert counts == Counts(kept=1, truncated=1)


def test_truncated_prompt_keeps_its_beginning_and_its_end(tokenizer):
    [whole], _ = encode(tokenizer, row(input="red blue " * 20))
    [cut], counts = encode(
        tokenizer, row(input="red blue " * 20), max_prompt_length=90, long_prompt="truncate"
    )
    end = tokenizer.encode(PROMPT_END)
    assert cut.prompt_length == 90 < whole.prompt_length
    assert cut.tokens[: 90 - len(end)] == whole.tokens[: 90 - len(end)]
    assert cut.tokens[90 - len(end) : 90] == end
    assert cut.tokens[90:] == whole.tokens[whole.prompt_length :]
    assert counts == Counts(kept=1, truncated=1)


def test_truncated_prompt_leaves_room_for_a_target(tokenizer):
    [cut], _ = encode(tokenizer, row(), max_length=10, long_prompt="truncate", long_response="truncate")
    assert (len(cut.tokens), cut.prompt_length) == (10, 9)


def test_bos_belongs_to_the_prompt(tokenizer):
    [without], _ = encode(tokenizer, row())
    [with_bos], _ = encode(tokenizer, row(), bos=True)
    assert with_bos.tokens == [tokenizer.bos_token_id, *without.tokens]
    assert with_bos.prompt_length == without.prompt_length + 1


def test_bos_without_such_a_token():
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.bos_token = None
    with pytest.raises(InputError, match="bos: the tokenizer has no"):
        encode(tokenizer, row(), bos=True)


@pytest.mark.parametrize("limits", [{"max_length": 2}, {"max_prompt_length": 0}, {"long_prompt": "cut"}])
def test_impossible_limits(limits):
    with pytest.raises(InputError, match=next(iter(limits))):
        TokenLimits(**limits)
