"""Encodes rows as tokens: prompt, response and end of sequence, within given limits.

`Encoder` makes the tokens, which is what takes time. `Fitter` drops and cuts examples, so that the tokens of a row are
made once, whatever the limits of the part that it belongs to.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from l2m_jax.data.chat import ChatTemplate, Span
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
        tokens: int32; none for a row without a response.
        prompt: of a chat, its prompt as text.
        turns: of a chat, start and end of the tokens that carry loss, in place of all that follow the prompt.
    """

    row: Row
    tokens: np.ndarray
    prompt_length: int
    prompt: str | None = None
    turns: tuple[Span, ...] = ()

    @property
    def spans(self) -> tuple[Span, ...]:
        """Start and end of the tokens that carry loss, within what the limits have left of them."""
        if self.prompt is None:
            return ((self.prompt_length, len(self.tokens)),)
        return tuple(
            (start, min(end, len(self.tokens))) for start, end in self.turns if start < len(self.tokens)
        )


def encode_rows(
    rows: Iterable[Row], tokenizer: "PreTrainedTokenizerBase", limits: TokenLimits, counts: Counts
) -> Iterator[Encoded]:
    """Encodes the rows that fit, in order, and updates `counts` along the way.

    Raises:
        InputError: as `Encoder` and `Fitter`.
    """
    fitter, encoder = Fitter(limits, tokenizer), Encoder(tokenizer, limits.prompt)
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, ROWS_AT_ONCE)):
        yield from fitter.fitted(encoder(chunk), counts)


class Encoder:
    """Makes the tokens of rows, whatever their number: prompt, response and end of sequence.

    Raises:
        InputError: with the prompt "chat", there is no chat template that can be used.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", prompt: str = "alpaca"):
        self.tokenizer, self.prompt = tokenizer, prompt
        self._template = ChatTemplate(tokenizer) if prompt == "chat" else None

    def __call__(self, rows: Sequence[Row]) -> Iterator[Encoded]:
        """The rows with their tokens, in order.

        Raises:
            InputError: a row that the prompt has no room for, or that the chat template refuses.
        """
        answered = [row for row in rows if row.references]
        encoded = iter(self._encoded(answered) if answered else ())
        for row in rows:
            yield next(encoded) if row.references else Encoded(row, np.zeros(0, np.int32), 0)

    def _encoded(self, rows: Sequence[Row]) -> Iterator[Encoded]:
        if self._template is None:
            yield from _alpaca(rows, self.tokenizer)
            return
        for row, found in zip(rows, self._template.encode(rows), strict=True):
            tokens = np.array(found.tokens, np.int32)
            yield Encoded(row, tokens, found.prompt_length, found.prompt, found.spans)


class Fitter:
    """Fits encoded rows into the limits of a part, and begins them as the part does.

    Raises:
        InputError: `limits.bos` is set, but the tokenizer has no beginning-of-sequence token.
    """

    def __init__(self, limits: TokenLimits, tokenizer: "PreTrainedTokenizerBase"):
        if limits.bos and tokenizer.bos_token_id is None:
            raise InputError("bos: the tokenizer has no beginning-of-sequence token; switch bos off")
        self.limits = limits
        start: Any = [tokenizer.bos_token_id] if limits.bos else []
        self._start = np.array(start, np.int32)
        # Leave room for at least one target.
        self._max_prompt = min(limits.max_prompt_length or limits.max_length, limits.max_length - 1)
        self._prompt_end = len(_encode(tokenizer, [PROMPT_END])[0])

    def keeps(self, lengths: np.ndarray, prompt_lengths: np.ndarray) -> np.ndarray:
        """bool [n], which of n encoded rows are kept, given their numbers of tokens."""
        too_long = len(self._start) + lengths > self.limits.max_length
        long_prompt = len(self._start) + prompt_lengths > self._max_prompt
        dropped = (too_long & (self.limits.long_response == "drop")) | (
            long_prompt & (self.limits.long_prompt == "drop")
        )
        return (lengths > 0) & ~dropped

    def fitted(self, encoded: Iterable[Encoded], counts: Counts) -> Iterator[Encoded]:
        """The rows that are kept, in order; updates `counts` along the way."""
        for one in encoded:
            if (found := self._fit(one, counts)) is not None:
                yield found

    def _fit(self, encoded: Encoded, counts: Counts) -> Encoded | None:
        if not len(encoded.tokens):
            counts.empty_response += 1
            return None
        tokens = np.concatenate([self._start, encoded.tokens]) if len(self._start) else encoded.tokens
        prompt_length, truncated = len(self._start) + encoded.prompt_length, False
        if prompt_length > self._max_prompt:
            if self.limits.long_prompt == "drop":
                counts.long_prompt += 1
                return None
            prompt, response = tokens[:prompt_length], tokens[prompt_length:]
            kept_end = self._prompt_end if self._prompt_end < self._max_prompt else 0
            cut = prompt_length - kept_end
            tokens = np.concatenate([prompt[: self._max_prompt - kept_end], prompt[cut:], response])
            prompt_length, truncated = self._max_prompt, True
        if len(tokens) > self.limits.max_length:
            if self.limits.long_response == "drop":
                counts.too_long += 1
                return None
            tokens, truncated = tokens[: self.limits.max_length], True
        counts.kept += 1
        counts.truncated += truncated
        return encoded._replace(tokens=tokens, prompt_length=prompt_length)


def _alpaca(rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase") -> Iterator[Encoded]:
    """Tokens are encode(prompt + response) without special tokens, then the end of sequence.

    The prompt's tokens are always those of the prompt alone, because generation starts from these. If the tokens of the
    whole text do not begin with them, the response is tokenised separately: a line break at its start can merge with
    the prompt's last one.
    """
    for row in rows:
        require_single_turn(row)
    eos: Any = tokenizer.eos_token_id
    prompts = [format_prompt(row.instruction, row.input) for row in rows]
    of_prompt = _encode(tokenizer, prompts)
    of_text = _encode(tokenizer, [p + row.references[0] for p, row in zip(prompts, rows, strict=True)])
    for row, prompt, whole in zip(rows, of_prompt, of_text, strict=True):
        if whole[: len(prompt)] == prompt:
            response = whole[len(prompt) :]
        else:
            response = _encode(tokenizer, [row.references[0]])[0]
        yield Encoded(row, np.array([*prompt, *response, eos], np.int32), len(prompt))


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    # verbose=False: no warning about texts longer than the tokenizer's model allows; the limits handle them.
    encoded: Any = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return encoded["input_ids"]
