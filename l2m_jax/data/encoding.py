"""Encodes rows as tokens: prompt, response and end of sequence, within given limits."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from l2m_jax.data.chat import ChatTemplate, Conversation
from l2m_jax.data.prompts import PROMPT_END, format_prompt
from l2m_jax.data.rows import Row, require_single_turn
from l2m_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Rows passed to the tokenizer in one call, which uses all cores.
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class TokenLimits:
    """Length limits in tokens, and how longer rows are handled.

    Attributes:
        max_length: maximum length of prompt, response and end of sequence together.
        max_prompt_length: maximum length of the prompt; None sets no separate limit.
        long_prompt: "drop" rows with longer prompts, or "truncate" the prompt before its closing "### Response:".
        long_response: "drop" rows that are too long, or "truncate" the response, which then has no end of sequence.
        bos: begin with the tokenizer's beginning-of-sequence token, which counts as part of the prompt.
        prompt: "alpaca" or "chat", the tokenizer's own chat template, whose prompts cannot be truncated.
    """

    max_length: int = 1024
    max_prompt_length: int | None = None
    long_prompt: str = "drop"
    long_response: str = "drop"
    bos: bool = False
    prompt: str = "alpaca"

    def __post_init__(self):
        if self.prompt == "chat" and (self.bos or self.long_prompt == "truncate"):
            raise ValueError("a chat template writes the beginning itself, and its prompts cannot be cut")
        for name in ("long_prompt", "long_response"):
            if getattr(self, name) not in ("drop", "truncate"):
                raise InputError(f"{name}: {getattr(self, name)!r} must be 'drop' or 'truncate'")
        if self.max_length < 3 or (self.max_prompt_length is not None and self.max_prompt_length < 1):
            raise InputError(
                f"max_length: {self.max_length} with max_prompt_length {self.max_prompt_length} leaves no room for a "
                "prompt, a response and the end of sequence"
            )


@dataclass
class Counts:
    """How many rows were kept, how many of these were truncated, and how many were dropped for each reason."""

    kept: int = 0
    truncated: int = 0
    empty_response: int = 0
    long_prompt: int = 0
    too_long: int = 0

    @property
    def dropped(self) -> int:
        return self.empty_response + self.long_prompt + self.too_long

    def __str__(self) -> str:
        reasons = {name: count for name, count in asdict(self).items() if count and name != "kept"}
        described = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in reasons.items())
        return f"{self.kept} rows kept, {self.dropped} dropped" + (f" ({described})" if described else "")


class Encoded(NamedTuple):
    """A row with its tokens. The first `prompt_length` of them are the prompt, the others carry loss.

    Attributes:
        conversation: of a chat, its text and which tokens carry loss, in place of the other two. Its tokens are not cut.
    """

    row: Row
    tokens: list[int]
    prompt_length: int
    conversation: Conversation | None = None

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Start and end of the tokens that carry loss, within what the limits have left of them."""
        if self.conversation is None:
            return ((self.prompt_length, len(self.tokens)),)
        return tuple(
            (start, min(end, len(self.tokens)))
            for start, end in self.conversation.spans
            if start < len(self.tokens)
        )


def encode_rows(
    rows: Iterable[Row], tokenizer: "PreTrainedTokenizerBase", limits: TokenLimits, counts: Counts
) -> Iterator[Encoded]:
    """Encodes the rows that fit, in order, and updates `counts` along the way.

    Raises:
        InputError: `limits.bos` is set, but the tokenizer has no beginning-of-sequence token; or a row that the prompt
            has no room for, or that the chat template refuses.
    """
    if limits.bos and tokenizer.bos_token_id is None:
        raise InputError("bos: the tokenizer has no beginning-of-sequence token; switch bos off")
    prompt_end = len(_encode(tokenizer, [PROMPT_END])[0])
    template = ChatTemplate(tokenizer) if limits.prompt == "chat" else None
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, ROWS_AT_ONCE)):
        answered = [row for row in chunk if row.references]
        counts.empty_response += len(chunk) - len(answered)
        if not answered:
            continue
        if template is None:
            encoded = _alpaca(answered, tokenizer, limits.bos)
        else:
            encoded = (
                Encoded(row, c.tokens, c.prompt_length, c)
                for row, c in zip(answered, template.encode(answered), strict=True)
            )
        for one in encoded:
            prompt, response = one.tokens[: one.prompt_length], one.tokens[one.prompt_length :]
            fitted = _fit(prompt, response, limits, prompt_end, counts)
            if fitted is not None:
                yield one._replace(tokens=fitted[0], prompt_length=fitted[1])


def _alpaca(rows: list[Row], tokenizer: "PreTrainedTokenizerBase", bos: bool) -> Iterator[Encoded]:
    """Tokens are encode(prompt + response) without special tokens, then the end of sequence.

    The prompt's tokens are always those of the prompt alone, because generation starts from these. If the tokens of the
    whole text do not begin with them, the response is tokenised separately: a line break at its start can merge with
    the prompt's last one.
    """
    for row in rows:
        require_single_turn(row)
    start: Any = [tokenizer.bos_token_id] if bos else []
    eos: Any = tokenizer.eos_token_id
    prompts = [format_prompt(row.instruction, row.input) for row in rows]
    of_prompt = _encode(tokenizer, prompts)
    of_text = _encode(tokenizer, [p + row.references[0] for p, row in zip(prompts, rows, strict=True)])
    for row, prompt, whole in zip(rows, of_prompt, of_text, strict=True):
        if whole[: len(prompt)] == prompt:
            response = whole[len(prompt) :]
        else:
            response = _encode(tokenizer, [row.references[0]])[0]
        yield Encoded(row, [*start, *prompt, *response, eos], len(start) + len(prompt))


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    # verbose=False: no warning about texts longer than the tokenizer's model allows; the limits handle them.
    encoded: Any = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return encoded["input_ids"]


def _fit(
    prompt: list[int], response: list[int], limits: TokenLimits, prompt_end: int, counts: Counts
) -> tuple[list[int], int] | None:
    # Leave room for at least one target.
    max_prompt = min(limits.max_prompt_length or limits.max_length, limits.max_length - 1)
    truncated = False
    if len(prompt) > max_prompt:
        if limits.long_prompt == "drop":
            counts.long_prompt += 1
            return None
        kept_end = prompt[-prompt_end:] if prompt_end < max_prompt else []
        prompt = prompt[: max_prompt - len(kept_end)] + kept_end
        truncated = True
    tokens = prompt + response
    if len(tokens) > limits.max_length:
        if limits.long_response == "drop":
            counts.too_long += 1
            return None
        tokens = tokens[: limits.max_length]
        truncated = True
    counts.kept += 1
    counts.truncated += truncated
    return tokens, len(prompt)
