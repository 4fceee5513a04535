"""A tokenised data set on disk: the text of its rows in Arrow, their tokens in flat arrays, all memory-mapped.

The tokens are not in the Arrow file, because Arrow splits long columns into record batches, which have no common flat
view.
"""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from l2m_jax.data.encoding import ROWS_AT_ONCE, Counts, Encoded, TokenLimits, encode_rows
from l2m_jax.data.prompts import format_prompt
from l2m_jax.data.sources import Row
from l2m_jax.errors import InputError
from l2m_jax.files import read_json, write_json, writing

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

_ROWS, _FACTS = "rows.arrow", "corpus.json"
_TOKENS, _OFFSETS, _PROMPT_LENGTHS = "tokens.int32", "offsets.int64", "prompt_lengths.int32"
_SPANS, _SPAN_OFFSETS = "spans.int32", "span_offsets.int64"
_COLUMNS = ("id", "instruction", "input", "references", "category")


class Corpus:
    """The examples of one part of the data, in the order of their rows. Opening a corpus reads only its metadata.

    Attributes:
        tokens: int32 [sum of lengths], the examples one after another: prompt, response and end of sequence.
        offsets: int64 [n + 1], example i is tokens[offsets[i] : offsets[i + 1]].
        prompt_lengths: int32 [n], number of prompt tokens of each example. The rest are targets.
        spans: int32 [m, 2], of chats: start and end, within its example, of each part that carries loss, with those of
            the assistant's earlier turns; example i has spans[span_offsets[i] : span_offsets[i + 1]]. None: the targets
            are what follows the prompts.
        span_offsets: int64 [n + 1], or None.
        counts: how many rows were kept and dropped when the corpus was built.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]):
        self.folder = folder
        self.counts = Counts(**facts["counts"])
        self.tokens = _mapped(folder / _TOKENS, np.int32)
        self.offsets = _mapped(folder / _OFFSETS, np.int64)
        self.prompt_lengths = _mapped(folder / _PROMPT_LENGTHS, np.int32)
        self.spans = self.span_offsets = None
        if (folder / _SPANS).is_file():
            self.spans = _mapped(folder / _SPANS, np.int32).reshape(-1, 2)
            self.span_offsets = _mapped(folder / _SPAN_OFFSETS, np.int64)

    @classmethod
    def open(cls, folder: str | Path) -> "Corpus":
        """Opens the corpus in `folder`. Raises InputError if there is no complete one."""
        folder = Path(folder)
        if not (folder / _FACTS).is_file():
            raise InputError(f"'{folder}' contains no corpus (there is no {_FACTS}); build it first")
        return cls(folder, read_json(folder / _FACTS, f"delete {folder} to make it again"))

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def lengths(self) -> np.ndarray:
        """int32 [n], number of tokens of each example."""
        return self._lengths

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.diff(self.offsets).astype(np.int32)

    @property
    def response_lengths(self) -> np.ndarray:
        """int32 [n], number of targets of each example: its response and end of sequence, or all turns of a chat."""
        return self._response_lengths

    @cached_property
    def _response_lengths(self) -> np.ndarray:
        if self.spans is None or self.span_offsets is None:
            return self.lengths - self.prompt_lengths
        before = np.concatenate([[0], np.cumsum(self.spans[:, 1] - self.spans[:, 0], dtype=np.int64)])
        return np.diff(before[self.span_offsets]).astype(np.int32)

    def target_positions(self, i: int) -> np.ndarray:
        """int [r_i], the places of an example's targets among its tokens, ascending."""
        if self.spans is None or self.span_offsets is None:
            return np.arange(self.prompt_lengths[i], self.lengths[i])
        parts = self.spans[self.span_offsets[i] : self.span_offsets[i + 1]]
        return np.concatenate([np.arange(start, end) for start, end in parts])

    def example_tokens(self, i: int) -> np.ndarray:
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    def prompt_tokens(self, i: int) -> np.ndarray:
        return self.example_tokens(i)[: self.prompt_lengths[i]]

    @cached_property
    def rows(self) -> "datasets.Dataset":
        """The texts: id, instruction, input, references (a list of strings), category; of chats, also prompt."""
        import datasets

        return datasets.Dataset.from_file(str(self.folder / _ROWS))

    @property
    def ids(self) -> list[str]:
        return self._ids

    @cached_property
    def _ids(self) -> list[str]:
        return list(self.rows["id"])

    @cached_property
    def categories(self) -> tuple[list[str], np.ndarray]:
        """The names of the categories, sorted, and the number of each example's, int64 [n]."""
        encoded = self.rows.data["category"].dictionary_encode().unify_dictionaries()
        found = encoded.chunk(0).dictionary.to_pylist()
        names = sorted(found)
        places = np.array([names.index(name) for name in found], np.int64)
        return names, places[np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks])]

    def row(self, i: int) -> Row:
        """The text of a row, without its messages."""
        found = {name: self.rows[int(i)][name] for name in _COLUMNS}
        return Row(**{**found, "references": tuple(found["references"])})

    def references(self, i: int) -> list[str]:
        return list(self.row(i).references)

    def references_of(self, indices: Sequence[int]) -> list[list[str]]:
        """The references of several examples, read at once, which is a hundred times faster than one by one."""
        return self._references[indices]["references"]

    @cached_property
    def _references(self) -> "datasets.Dataset":
        return self.rows.select_columns(["references"])

    def category(self, i: int) -> str:
        return self.row(i).category

    def prompt_text(self, i: int) -> str:
        if self.spans is not None:
            return self.rows[int(i)]["prompt"]
        row = self.row(i)
        return format_prompt(row.instruction, row.input)


class Built(NamedTuple):
    corpus: Corpus
    counts: Counts


def write_corpus(folder: Path, examples: Iterable[Encoded], limits: TokenLimits, counts: Counts) -> Counts:
    """Writes encoded rows into an existing, empty folder, in chunks.

    Args:
        examples: rows within `limits`.
        counts: those of `examples` once all of these are read.

    Raises:
        InputError: from reading `examples`; or there are none.
    """
    _write(folder, examples, chats=limits.prompt == "chat")
    if counts.kept == 0:
        raise InputError(f"no example is left: {counts}" if counts.dropped else "there are no rows")
    write_json(folder / _FACTS, {"counts": asdict(counts)})
    return counts


def build_corpus(
    rows: Iterable[Row],
    tokenizer: "PreTrainedTokenizerBase",
    folder: str | Path,
    limits: TokenLimits,
) -> Built:
    """Tokenises rows into a corpus that replaces `folder` once it is complete.

    Rows without a response or out of `limits` are dropped.

    Raises:
        InputError: from reading `rows`, or none of them is kept; names the folder. Its old content is then unchanged.
    """
    folder = Path(folder)
    try:
        with writing(folder) as unfinished:
            counts = Counts()
            write_corpus(unfinished, encode_rows(rows, tokenizer, limits, counts), limits, counts)
    except InputError as error:
        raise InputError(f"{folder.name}: {error}") from error
    return Built(Corpus.open(folder), counts)


def _mapped(path: Path, dtype: type[np.generic]) -> np.ndarray:
    return np.asarray(np.memmap(path, dtype, mode="r"))


def _write(folder: Path, examples: Iterable[Encoded], chats: bool) -> None:
    """Writes the arrays and the Arrow file."""
    import pyarrow as pa

    names = (*_COLUMNS, "prompt") if chats else _COLUMNS
    fields: dict[str, Any] = {name: pa.string() for name in names} | {"references": pa.list_(pa.string())}
    schema = pa.schema(list(fields.items()))
    arrays = [_TOKENS, _OFFSETS, _PROMPT_LENGTHS, *([_SPANS, _SPAN_OFFSETS] if chats else [])]
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context((folder / name).open("wb")) for name in arrays]
        texts = stack.enter_context(pa.ipc.new_stream(str(folder / _ROWS), schema))
        end = span_end = np.zeros(1, np.int64)
        opened[1].write(end.tobytes())
        if chats:
            opened[4].write(span_end.tobytes())
        for chunk in _chunks(examples):
            flat = np.concatenate([example.tokens for example in chunk])
            ends = end + np.cumsum([len(example.tokens) for example in chunk], dtype=np.int64)
            prompts = np.array([example.prompt_length for example in chunk], np.int32)
            parts = [flat, ends, prompts]
            if chats:
                spans = np.array([span for example in chunk for span in example.spans], np.int32)
                span_ends = span_end + np.cumsum([len(example.spans) for example in chunk], dtype=np.int64)
                parts += [spans, span_ends]
                span_end = span_ends[-1:]
            for file, array in zip(opened, parts, strict=True):
                file.write(array.tobytes())
            columns = {name: [getattr(example.row, name) for example in chunk] for name in _COLUMNS}
            if chats:
                columns["prompt"] = [example.prompt for example in chunk]
            texts.write_batch(pa.RecordBatch.from_pydict(columns, schema=schema))
            end = ends[-1:]


def _chunks(examples: Iterable[Encoded]) -> Iterable[Sequence[Encoded]]:
    chunk: list[Encoded] = []
    for example in examples:
        chunk.append(example)
        if len(chunk) == ROWS_AT_ONCE:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
