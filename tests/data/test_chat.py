"""Conversations as tokens: against transformers' own rendering, tokens and masks."""

import numpy as np
import pytest

from l2m_jax.data.batches import AnsweredExamples, micro_batches
from l2m_jax.data.chat import ChatTemplate
from l2m_jax.data.corpus import build_corpus
from l2m_jax.data.encoding import Counts, TokenLimits, encode_rows
from l2m_jax.data.packing import Shape
from l2m_jax.data.rows import Message, Row, parse_row, row_format
from l2m_jax.errors import InputError

TURNS = (
    ("system", "Be brief."),
    ("user", "Name a fruit."),
    ("assistant", "an apple"),
    ("user", "And another, in 東京?"),
    ("assistant", "a pear — naïve\n"),
    ("user", "One more"),
    ("assistant", " a plum"),
)


def conversation(turns=TURNS, **changes):
    messages = tuple(Message(*turn) for turn in turns)
    return Row("7", "", "", (messages[-1].content,), messages=messages)._replace(**changes)


def encode(tokenizer, *rows):
    return list(ChatTemplate(tokenizer).encode(rows))


def given(row):
    return [message._asdict() for message in row.conversation]


def marked(tokenizer, row):
    """The tokens of transformers, and 1 for those that the template marks."""
    found = tokenizer.apply_chat_template(given(row), return_dict=True, return_assistant_tokens_mask=True)
    return found["input_ids"], found["assistant_masks"]


def mask_of(conversation):
    mask = np.zeros(len(conversation.tokens), int)
    for start, end in conversation.spans:
        mask[start:end] = 1
    return mask.tolist()


def text(tokenizer, conversation):
    return [tokenizer.decode(conversation.tokens[start:end]) for start, end in conversation.spans]


@pytest.mark.parametrize("turns", [TURNS, TURNS[:3], TURNS[1:3], TURNS[1:5]])
@pytest.mark.parametrize("template", ["chatml", "chatml_marked"])
def test_tokens_and_mask_are_those_of_transformers(chat_tokenizer, template, turns):
    row, reference = conversation(turns), chat_tokenizer("chatml_marked")
    (found,) = encode(chat_tokenizer(template), row)
    tokens, mask = marked(reference, row)
    assert 1 in mask and tokens[-1] == reference.encode("\n")[-1]
    assert (found.tokens, mask_of(found)) == (
        tokens[:-1],
        mask[:-1],
    )  # without what follows the end of the turn
    prompt = given(row)[:-1]
    assert found.tokens[: found.prompt_length] == list(
        reference.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    )


def test_mask_with_gpt2s_tokens(shared, chat_tokenizer):
    from l2m_jax.data.tokenizer import load_tokenizer

    gpt2 = load_tokenizer(shared / "tokenizers" / "gpt2")
    gpt2.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    gpt2.chat_template = chat_tokenizer("chatml").chat_template
    (found,) = encode(gpt2, conversation())
    gpt2.chat_template = chat_tokenizer("chatml_marked").chat_template
    tokens, mask = marked(gpt2, conversation())
    assert (found.tokens, mask_of(found)) == (tokens[:-1], mask[:-1])


def test_turns_end_with_their_end_token(chat_tokenizer):
    tokenizer = chat_tokenizer("chatml")
    (found,) = encode(tokenizer, conversation())
    assert text(tokenizer, found) == ["an apple<|im_end|>", "a pear — naïve\n<|im_end|>", " a plum<|im_end|>"]
    assert ChatTemplate(tokenizer).end_of_turn == tokenizer.convert_tokens_to_ids("<|im_end|>")
    (last,) = encode(tokenizer, conversation(last_turn_only=True))
    assert (last.tokens, text(tokenizer, last)) == (found.tokens, [" a plum<|im_end|>"])


def test_a_template_with_headers_and_a_date(chat_tokenizer):
    tokenizer = chat_tokenizer("headers")
    (found,) = encode(tokenizer, conversation())
    assert text(tokenizer, found) == ["an apple<|eot|>", "a pear — naïve<|eot|>", "a plum<|eot|>"]
    assert found.tokens[0] == tokenizer.bos_token_id and found.tokens.count(tokenizer.bos_token_id) == 1
    assert "Today: 26 Jul 2024" in found.prompt
    with pytest.raises(
        InputError, match=r"row '7': the chat template refuses it \(user and assistant must alt"
    ):
        encode(tokenizer, conversation((TURNS[1], TURNS[3], TURNS[4])))


def test_a_template_that_rewrites_earlier_turns(chat_tokenizer):
    tokenizer = chat_tokenizer("thinking")
    turns = (TURNS[1], ("assistant", "<think>hm</think>\n\nan apple"), TURNS[3], TURNS[4])
    (single,) = encode(tokenizer, conversation(turns[:2]))
    assert text(tokenizer, single) == ["<think>hm</think>\n\nan apple<|im_end|>"]
    with pytest.raises(
        InputError, match=r"row '7', message 2: the chat template writes this turn otherwise.*'an apple"
    ):
        encode(tokenizer, conversation(turns))
    (last,) = encode(tokenizer, conversation(turns, last_turn_only=True))
    assert text(tokenizer, last) == ["a pear — naïve\n<|im_end|>"] and "think" not in last.prompt
    # Without reasoning, nothing is rewritten.
    assert len(encode(tokenizer, conversation())[0].spans) == 3


def test_a_rewriting_template_that_marks_the_turns(chat_tokenizer):
    tokenizer = chat_tokenizer("thinking")
    plain = "{{- '<|im_start|>' + turn.role + '\\n' + said + '<|im_end|>\\n' -}}"
    assert plain in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(
        plain,
        "{{- '<|im_start|>' + turn.role + '\\n' -}}{%- if turn.role == 'assistant' -%}"
        "{%- generation -%}{{- said -}}{%- endgeneration -%}{%- else -%}{{- said -}}{%- endif -%}{{- '<|im_end|>\\n' -}}",
    )
    turns = (TURNS[1], ("assistant", "<think>hm</think>\n\nan apple"), TURNS[3], TURNS[4])
    (found,) = encode(tokenizer, conversation(turns))
    # The template leaves the end tokens out of its marks; they are learnt all the same.
    assert text(tokenizer, found) == ["an apple<|im_end|>", "a pear — naïve\n<|im_end|>"]
    (last,) = encode(tokenizer, conversation(turns, last_turn_only=True))
    assert text(tokenizer, last) == ["a pear — naïve\n<|im_end|>"]


def test_prompt_keeps_its_own_tokens(chat_tokenizer):
    tokenizer = chat_tokenizer("chatml")
    row = conversation((TURNS[1], ("assistant", "\nan apple")))
    assert marked(chat_tokenizer("chatml_marked"), row)[0] != encode(tokenizer, row)[0].tokens
    (found,) = encode(tokenizer, row)
    prompt = tokenizer.apply_chat_template(given(row)[:1], add_generation_prompt=True)["input_ids"]
    assert found.tokens[: found.prompt_length] == list(prompt)
    assert tokenizer.decode(found.tokens) == found.prompt + "\nan apple<|im_end|>"


def test_instruction_rows_are_two_turns(chat_tokenizer):
    tokenizer = chat_tokenizer("chatml")
    (found,) = encode(tokenizer, Row("1", "Sort.", "b a", ("a b", "other")))
    assert tokenizer.decode(found.tokens) == (
        "<|im_start|>user\nSort.\n\nb a<|im_end|>\n<|im_start|>assistant\na b<|im_end|>"
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the tokenizer has no chat template"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "no special token"),
        ("{{ strftime_now('%d') }}", "writes the day's date"),
        ("{% if", "the chat template refuses it"),
        (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}<model>{% endif %}",
            r"row '7', message 2: the chat template begins .* \('assistant>.*' instead of 'model>'\)",
        ),
    ],
)  # fmt: skip
def test_templates_that_cannot_be_used(chat_tokenizer, template, message):
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=message):
        encode(tokenizer, conversation(TURNS[1:3]))


def test_limits_and_counts(chat_tokenizer):
    tokenizer = chat_tokenizer("chatml")
    row = conversation()
    (whole,) = encode(tokenizer, row)

    def kept(**limits):
        counts = Counts()
        return list(encode_rows([row], tokenizer, TokenLimits(prompt="chat", **limits), counts)), counts

    (found,), _ = kept(max_length=len(whole.tokens))
    assert (found.tokens.tolist(), found.prompt_length, found.spans) == (
        whole.tokens,
        whole.prompt_length,
        whole.spans,
    )
    assert kept(max_length=len(whole.tokens) - 1)[1] == Counts(too_long=1)
    assert kept(max_prompt_length=whole.prompt_length - 1)[1] == Counts(long_prompt=1)
    (cut,), _ = kept(max_length=whole.prompt_length + 1, long_response="truncate")
    assert cut.spans == (*whole.spans[:-1], (whole.prompt_length, whole.prompt_length + 1))


def test_all_turns_are_targets_in_batches(chat_tokenizer, tmp_path):
    tokenizer = chat_tokenizer("chatml_marked")
    rows = [conversation(TURNS[: 3 + 2 * (i % 3)], id=str(i)) for i in range(7)]
    corpus, counts = build_corpus(rows, tokenizer, tmp_path / "c", TokenLimits(prompt="chat"))
    masks = [np.array(marked(tokenizer, row)[1][:-1]) for row in rows]
    assert counts.kept == 7 and corpus.response_lengths.tolist() == [mask.sum() for mask in masks]
    for i, mask in enumerate(masks):
        np.testing.assert_array_equal(corpus.target_positions(i), np.flatnonzero(mask))
    assert corpus.prompt_text(0) == tokenizer.decode(corpus.prompt_tokens(0))
    assert corpus.references(0) == ["an apple"]

    (batch,) = micro_batches(corpus, range(7), [Shape(4, 256)])
    real = batch.weights_T[0] > 0
    assert real.sum() == sum(map(np.sum, masks))
    flat, segments = batch.tokens_RxL[0].reshape(-1), batch.segment_ids_RxL[0].reshape(-1)
    before = batch.target_index_T[0][real]
    np.testing.assert_array_equal(flat[before + 1], batch.labels_T[0][real])
    np.testing.assert_array_equal(segments[before + 1], segments[before])

    reply = np.append(corpus.prompt_tokens(5), [9, 9])
    replaced = AnsweredExamples(corpus, {5: reply})
    assert replaced.target_positions(5).tolist() == [len(reply) - 2, len(reply) - 1]
    assert replaced.response_lengths.tolist() == [
        2 if i == 5 else n for i, n in enumerate(corpus.response_lengths)
    ]
    np.testing.assert_array_equal(replaced.target_positions(2), corpus.target_positions(2))


@pytest.mark.parametrize(
    ("value", "messages", "last_only"),
    [
        ({"messages": [{"role": r, "content": c, "name": None} for r, c in TURNS], "prompt": "x"}, TURNS, False),
        ({"prompt": "Name a fruit.", "completion": "an apple"}, TURNS[1:3], False),
        (
            {"prompt": [{"role": r, "content": c} for r, c in TURNS[:-1]],
             "completion": [{"role": "assistant", "content": " a plum"}]},
            TURNS,
            True,
        ),
    ],
)  # fmt: skip
def test_formats(value, messages, last_only):
    row = parse_row(value | {"id": 3, "category": "food"}, row_format(value, "here"), "x", "here")
    assert row == Row(
        "3", messages[-2][1], "", (messages[-1][1],), "food", tuple(Message(*m) for m in messages), last_only
    )
