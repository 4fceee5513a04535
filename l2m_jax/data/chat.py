"""A tokenizer's own chat template: the tokens of a conversation, and which of them are the assistant's.

The assistant's turns carry loss, each with the token that ends it. What a template writes behind that token, such as a
line break, belongs to the next turn. A conversation ends with the last turn's end token.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from l2m_jax.data.rows import Message, Row
from l2m_jax.errors import InputError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The date that Llama 3's template writes unless it is told one; the day of the run would change the prompts.
_DATE = "26 Jul 2024"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "probe"

Span = tuple[int, int]


class Conversation(NamedTuple):
    """A conversation as tokens.

    Attributes:
        prompt: what comes before the assistant's last turn, as text: where generation begins.
        tokens: of the whole conversation; the first `prompt_length` are those of the prompt.
        spans: start and end of the tokens that carry loss, ascending; the last one is the last turn's.
    """

    prompt: str
    tokens: list[int]
    prompt_length: int
    spans: tuple[Span, ...]


class ChatTemplate:
    """
    Attributes:
        end_of_turn: the token that ends the assistant's turn.
        fingerprint: changes with the template.

    Raises:
        InputError: the tokenizer has no template, or one that cannot be used.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._tokenizer: Any = tokenizer
        if not tokenizer.chat_template:
            raise InputError(
                "the tokenizer has no chat template; give one whose folder has a chat_template.jinja, or set data.prompt to "
                "'alpaca'"
            )
        if not tokenizer.is_fast:
            raise InputError("the tokenizer tells no offsets; give one with a tokenizer.json")
        try:
            template = tokenizer.get_chat_template()
        except ValueError as error:
            raise InputError(f"no default chat template ({reason(error)})") from error
        if "strftime_now" in template and "date_string" not in template:
            raise InputError(
                "the chat template writes the day's date, so that prompts would differ from day to day; give a "
                "chat_template.jinja with a fixed one"
            )
        self.fingerprint = hashlib.sha256(template.encode()).hexdigest()[:16]
        self._has_generation = bool(_GENERATION.search(template))
        self.end_of_turn = self._find_end_of_turn()
        self._end_text: str = self._tokenizer.convert_ids_to_tokens(self.end_of_turn)

    def encode(self, rows: Sequence[Row]) -> Iterator[Conversation]:
        """The conversations of rows, in order.

        Tokens are those of the whole conversation's text. The prompt's are always those of the prompt alone, because
        generation starts from these: where a token would span the prompt's end, the last turn is tokenised by itself.

        Raises:
            InputError: names a row that the template refuses, or renders such that turns cannot be told apart.
        """
        chats = [self._render(row) for row in rows]
        prompts = self._tokens([prompt for prompt, _ in chats], return_offsets_mapping=True)
        wholes = self._tokens([whole for _, whole in chats])["input_ids"]
        encoded = zip(rows, chats, prompts["input_ids"], prompts["offset_mapping"], wholes, strict=True)
        for row, (prompt, text), of_prompt, offsets, whole in encoded:
            fits = whole[: len(of_prompt)] == of_prompt
            last_turn = (
                whole[len(of_prompt) :] if fits else self._tokens([text[len(prompt) :]])["input_ids"][0]
            )
            if self.end_of_turn not in last_turn:
                raise InputError(
                    f"row '{row.id}': the chat template ends its last turn without {self._end_text}"
                )
            end = len(last_turn) - last_turn[::-1].index(self.end_of_turn)
            tokens = of_prompt + last_turn[:end]
            last = (len(of_prompt), len(tokens))
            if self._has_generation:
                spans = self._marked(row, tokens, last)
            elif row.last_turn_only:
                spans = (last,)
            else:
                spans = (*self._earlier_turns(row, text, offsets), last)
            yield Conversation(prompt, tokens, len(of_prompt), spans)

    def _find_end_of_turn(self) -> int:
        """The first special token behind the content of an assistant's turn."""
        text = self._apply(
            [Message("user", "hello"), Message("assistant", _PROBE)], "an example conversation"
        )
        _, found, after = text.rpartition(_PROBE)
        special = {*self._tokenizer.all_special_ids, *self._tokenizer.added_tokens_decoder}
        ids = self._tokens([after])["input_ids"][0] if found and after else []
        end = next((token for token in ids if token in special), None)
        if end is None:
            raise InputError(
                f"the chat template ends an assistant's turn with {after!r}, in which there is no special token, so that "
                "generation could not tell where an answer ends; give another template"
            )
        return end

    def _tokens(self, texts: list[str], **options: Any) -> Any:
        # The template writes the special tokens. verbose=False: the limits handle long texts.
        return self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False, **options
        )

    def _apply(self, messages: Sequence[Message], place: str, prompt: bool = False, **options: Any) -> Any:
        given = [message._asdict() for message in messages]
        options = {"tokenize": False, "add_generation_prompt": prompt, "date_string": _DATE} | options
        try:
            return self._tokenizer.apply_chat_template(given, **options)
        except Exception as error:  # a template may fail in any way
            raise InputError(f"{place}: the chat template refuses it ({reason(error)})") from error

    def _render(self, row: Row) -> tuple[str, str]:
        """The text of the prompt, and of the whole conversation."""
        messages, place = row.conversation, f"row '{row.id}'"
        prompt, whole = self._apply(messages[:-1], place, prompt=True), self._apply(messages, place)
        if not whole.startswith(prompt):
            raise InputError(
                f"{place}, message {len(messages)}: the chat template begins the assistant's turn otherwise than "
                f"its generation prompt does ({_around(whole, prompt)}); give another template"
            )
        return prompt, whole

    def _earlier_turns(self, row: Row, whole: str, offsets: list[Span]) -> Iterator[Span]:
        """The tokens of the assistant's turns but the last, found where the text so far ends with each."""
        messages, place = row.conversation, f"row '{row.id}'"
        for i, message in enumerate(messages[:-1]):
            if message.role != "assistant":
                continue
            before = self._apply(messages[:i], place, prompt=True)
            until = self._apply(messages[: i + 1], place)
            for text in (before, until):
                if not whole.startswith(text):
                    raise InputError(
                        f"{place}, message {i + 1}: the chat template writes this turn otherwise once others follow "
                        f"({_around(whole, text)}), so that it cannot be trained on as it was generated; give the row as "
                        "prompt (all messages but the last) and completion (the last) to train on the last turn only, or a "
                        "template that marks the turns with {% generation %}"
                    )
            end = until.rfind(self._end_text, len(before))
            if end < 0:
                raise InputError(
                    f"{place}, message {i + 1}: the chat template ends it without {self._end_text}"
                )
            yield _overlapping(offsets, len(before), end + len(self._end_text))

    def _marked(self, row: Row, tokens: list[int], last: Span) -> tuple[Span, ...]:
        """The tokens that the template marks with {% generation %}, each part with the end token behind it."""
        found = self._apply(
            row.conversation,
            f"row '{row.id}'",
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        mask = found["assistant_masks"]
        spans, start = [], 0
        while 1 in mask[start:]:
            start = mask.index(1, start)
            end = mask.index(0, start) if 0 in mask[start:] else len(mask)
            spans.append((start, end))
            start = end
        if not spans or spans[-1][1] <= last[0]:
            raise InputError(
                f"row '{row.id}': the chat template marks other turns with {{% generation %}}, but not the last one"
            )
        if found["input_ids"][: last[1]] != tokens:  # the last turn was tokenised by itself
            spans[-1] = last
        follows = [(s, e + (e < len(tokens) and tokens[e] == self.end_of_turn)) for s, e in spans]
        return tuple(
            (s, min(e, last[1]))
            for s, e in follows
            if s < last[1] and (s >= last[0] or not row.last_turn_only)
        )


def _overlapping(offsets: list[Span], start: int, end: int) -> Span:
    """The tokens that share a character with text[start:end], as in transformers' masks."""
    chosen = [t for t, (first, after) in enumerate(offsets) if first < end and after > start]
    return chosen[0], chosen[-1] + 1


def _around(whole: str, text: str) -> str:
    """Where two texts differ."""
    at = next((i for i, (a, b) in enumerate(zip(whole, text, strict=False)) if a != b), len(whole))
    return f"{whole[at : at + 24]!r} instead of {text[at : at + 24]!r}"
