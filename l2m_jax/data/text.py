"""Plain text to learn a language from: documents, and their tokens cut into sequences that all carry loss."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from l2m_jax import files
from l2m_jax.data.encoding import ROWS_AT_ONCE
from l2m_jax.errors import InputError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_FORM = "a text file with blank lines between documents, or JSON lines (.jsonl) with text"


class TextExamples:
    """A stream of tokens as training examples of `length` tokens; the last one may be shorter.

    Each example starts with the last token of the one before, which is its prompt. So every token of the stream but
    the first is a target exactly once, in order.

    Raises:
        InputError: fewer than two tokens.
    """

    def __init__(self, tokens: np.ndarray, length: int):
        if len(tokens) < 2:
            raise InputError(f"{len(tokens)} tokens of text: there must be at least 2")
        self._tokens, self._length = tokens, length
        self._starts = np.arange(0, len(tokens) - 1, length - 1)
        self.lengths = np.minimum(length, len(tokens) - self._starts).astype(np.int32)
        self.prompt_lengths = np.ones(len(self), np.int32)
        self.response_lengths = self.lengths - 1

    def __len__(self) -> int:
        return len(self._starts)

    def example_tokens(self, i: int) -> np.ndarray:
        return self._tokens[self._starts[i] : self._starts[i] + self._length]

    def target_positions(self, i: int) -> np.ndarray:
        return np.arange(1, self.lengths[i])


def read_documents(path: str | Path) -> Iterator[str]:
    """The documents of a text file or of JSON lines, read lazily.

    Raises:
        InputError: the file does not exist, is not UTF-8, has no text, or has a line that is not a JSON object with
            `text`.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such file '{path}' ({TEXT_FORM}; or 'synthetic')")
    documents = _json_lines(path) if path.suffix == ".jsonl" else _paragraphs(path)
    first = next(documents, None)
    if first is None:
        raise InputError(f"{path} has no text ({TEXT_FORM})")
    return itertools.chain((first,), documents)


def _json_lines(path: Path) -> Iterator[str]:
    for place, value in files.json_lines(path):
        if not isinstance(value, dict) or "text" not in value:
            raise InputError(f"{place}: expected a JSON object with 'text'")
        if not isinstance(value["text"], str):
            raise InputError(f"{place}: 'text' must be a string")
        if value["text"].strip():
            yield value["text"]


def _paragraphs(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for blank, lines in itertools.groupby(file, key=lambda line: not line.strip()):
                if not blank:
                    yield "".join(lines).rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 ({reason(error)}); give {TEXT_FORM}") from error


def encode_text(documents: Iterable[str], tokenizer: "PreTrainedTokenizerBase", limit: int) -> np.ndarray:
    """The stream of tokens, int32: an end-of-sequence token, then each document followed by one, cut after `limit`.

    Args:
        limit: the maximum number of tokens after the first (0: all).
    """
    eos: int = tokenizer.eos_token_id  # pyright: ignore[reportAssignmentType]
    parts, size, documents = [np.array([eos], np.int32)], 0, iter(documents)
    while (not limit or size < limit) and (chunk := list(itertools.islice(documents, ROWS_AT_ONCE))):
        encoded = tokenizer(chunk, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for ids in encoded["input_ids"]:
            parts.append(np.array([*ids, eos], np.int32))
            size += len(parts[-1])
    return np.concatenate(parts)[: limit + 1 if limit else None]
