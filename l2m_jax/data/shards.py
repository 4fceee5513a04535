"""Rows tokenised by several processes, also of several hosts, in files of a few thousand rows: shards.

The name of a shard ends with the hash of its content, and it appears under this name once it is complete. A pass that
was interrupted therefore goes on with the shards that are missing, and makes those anew that are damaged. What is in
them depends neither on the number of processes nor on interruptions. Examples are stored without limits (see
`encoding.py`), so that the parts of a split source share them.
"""

import functools
import hashlib
import itertools
import os
import signal
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from l2m_jax import files
from l2m_jax.data.encoding import ROWS_AT_ONCE, Encoded, Encoder
from l2m_jax.data.rows import Row
from l2m_jax.errors import InputError
from l2m_jax.progress import Bar, bar

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

_COMPLETE = "complete.json"
_DIGITS = 16
_TEXTS = ("id", "instruction", "input", "category")
# Starting a process takes as long as tokenising a shard or two.
_FEWEST_FOR_PROCESSES = 4
# The process that reads the rows keeps no more busy.
_MOST_PROCESSES = 16


class Numbered(NamedTuple):
    """A row and its number in its source, from 0."""

    number: int
    row: Row


@dataclass(frozen=True)
class Tokeniser:
    """Makes the tokens of rows, and keeps them in `folder` until it is deleted.

    Attributes:
        prompt: "alpaca" or "chat".
        processes: how many tokenise on each host; 0: one for each core that this process may use, at most 16.
    """

    tokenizer: "PreTrainedTokenizerBase"
    prompt: str
    folder: Path
    processes: int = 0

    def shards(self, name: str, rows: Iterable[Numbered], total: int | None = None) -> "Shards":
        """The rows tokenised, in the folder `name`; `rows` are read only if any shard is missing.

        All processes of the run call it together: each reads the rows, and makes every n-th shard of n processes.

        Args:
            name: says, within `folder`, which rows they are.
            total: the number of rows, if it is known.

        Raises:
            InputError: from reading rows; from the `Encoder`; or a process has ended.
        """
        # jax takes seconds to import, and the processes that tokenise do without it.
        from l2m_jax.multihost import every_process, first, share

        folder = self.folder / name
        there, is_complete = first(functools.partial(_found, folder))
        if not is_complete:
            with bar("rows tokenised", total) as shown:
                own = share(_chunks(rows, shown))
                missing = (chunk for chunk in own if chunk[0] not in there)
                every_process(lambda: self._write(folder, missing))
            first(lambda: files.write_json(folder / _COMPLETE, {"shards": len(_shards(folder))}))
        return Shards(folder)

    def finished(self, prefix: str) -> list[int]:
        """What follows `prefix` in the names of finished shards: a number. All processes call it together."""
        from l2m_jax.multihost import first

        def find() -> list[int]:
            found = self.folder.glob(f"{prefix}*/{_COMPLETE}")
            return [int(file.parent.name.removeprefix(prefix)) for file in found]

        return first(find)

    def _write(self, folder: Path, chunks: Iterator["_Chunk"]) -> None:
        processes = self.processes or min(_cores(), _MOST_PROCESSES)
        first = list(itertools.islice(chunks, _FEWEST_FOR_PROCESSES))
        are_few = len(first) < _FEWEST_FOR_PROCESSES
        chunks = itertools.chain(first, chunks)
        del first  # a chunk lives until it is written
        if processes == 1 or are_few:
            encoder = Encoder(self.tokenizer, self.prompt)
            for chunk in chunks:
                _write_shard(folder, chunk, encoder)
            return
        # Forked, a process would inherit the locks of JAX's threads.
        setup = (folder, self.tokenizer, self.prompt)
        pool = ProcessPoolExecutor(processes, get_context("spawn"), _begin, setup)
        try:
            waiting: set[Future] = set()
            for chunk in chunks:
                waiting.add(pool.submit(_work, chunk))
                if len(waiting) > processes:
                    finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    _results(finished)
            _results(waiting)
        except BrokenProcessPool as error:
            raise InputError(
                "a process that tokenises has ended, perhaps for lack of memory, or because a script starts a run outside "
                "`if __name__ == '__main__':`; run it again, with data.processes=1 if this persists"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


class Shards:
    """The tokenised rows in a folder, in the order of their numbers."""

    def __init__(self, folder: Path):
        self._files = [file for _, file in sorted(_shards(folder).items())]

    def lengths(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Numbers, numbers of tokens (0 without a response) and of prompt tokens of the rows, each [n], file by file."""
        for file in self._files:
            table = _table(file)
            lengths = np.diff(table["tokens"].chunk(0).offsets)
            yield table["number"].to_numpy(), lengths, table["prompt_length"].to_numpy()

    def examples(self, is_wanted: np.ndarray | None = None) -> Iterator[tuple[int, Encoded]]:
        """The rows with their numbers, read lazily.

        Args:
            is_wanted: bool, by number; None: all.
        """
        for file in self._files:
            table = _table(file)
            if is_wanted is not None:
                wanted = is_wanted[table["number"].to_numpy()]
                if not wanted.any():
                    continue
                table = table.filter(wanted)
            yield from _from_table(table.combine_chunks())


_Chunk = tuple[int, list[Numbered]]  # the number of a shard, and its rows


def _chunks(rows: Iterable[Numbered], shown: Bar) -> Iterator[_Chunk]:
    """The rows of one shard after another; shows how many have been read."""
    rows = iter(rows)
    for index in itertools.count():
        chunk = list(itertools.islice(rows, ROWS_AT_ONCE))
        if not chunk:
            return
        shown.advance(len(chunk))
        yield index, chunk


def _found(folder: Path) -> tuple[list[int], bool]:
    """The numbers of the shards that are there, and whether they are all."""
    folder.mkdir(parents=True, exist_ok=True)
    there = _intact(folder)
    return sorted(there), _is_complete(folder, there)


def _shards(folder: Path) -> dict[int, Path]:
    """The files of a folder, by number."""
    return {int(file.name.partition("-")[0]): file for file in folder.glob("*-*.arrow")}


def _intact(folder: Path) -> set[int]:
    """The numbers of shards whose content is what their name says. Deletes the others."""
    found = set()
    for index, file in _shards(folder).items():
        status = file.stat()
        if _digest(file, status.st_size, status.st_mtime_ns) == file.stem.partition("-")[2]:
            found.add(index)
        else:
            file.unlink()
    return found


def _is_complete(folder: Path, there: Collection[int]) -> bool:
    if not (folder / _COMPLETE).is_file():
        return False
    return there == set(range(files.read_json(folder / _COMPLETE, f"delete {folder}")["shards"]))


@functools.lru_cache(maxsize=1 << 16)  # several parts of the data read the same shards
def _digest(file: Path, size: int, modified: int) -> str:
    return files.digest(file)[:_DIGITS]


def _write_shard(folder: Path, chunk: _Chunk, encoder: Encoder) -> None:
    import pyarrow as pa

    index, numbered = chunk
    table = _to_table([number for number, _ in numbered], list(encoder([row for _, row in numbered])))
    written = pa.BufferOutputStream()
    with pa.ipc.new_file(written, table.schema) as file:
        file.write_table(table)
    content = written.getvalue()
    digest = hashlib.sha256(content).hexdigest()[:_DIGITS]
    with files.replacing(folder / f"{index:06d}-{digest}.arrow") as unfinished:
        unfinished.write_bytes(content)


def _to_table(numbers: Sequence[int], examples: Sequence[Encoded]) -> "pa.Table":
    import pyarrow as pa

    rows = [example.row for example in examples]
    columns = {
        "number": pa.array(numbers, pa.int64()),
        **{name: pa.array([getattr(row, name) for row in rows], pa.string()) for name in _TEXTS},
        "references": pa.array([row.references for row in rows], pa.list_(pa.string())),
        "prompt": pa.array([example.prompt for example in examples], pa.string()),
        "prompt_length": pa.array([example.prompt_length for example in examples], pa.int32()),
        "tokens": _lists([example.tokens for example in examples]),
        # Start, end, start, end, ...
        "turns": _lists([np.array(example.turns, np.int32).reshape(-1) for example in examples]),
    }
    return pa.table(columns)


def _lists(arrays: Sequence[np.ndarray]) -> "pa.ListArray":
    import pyarrow as pa

    ends = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(np.concatenate(arrays)))


def _table(file: Path) -> "pa.Table":
    """A shard, mapped into memory."""
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(str(file))).read_all()


def _from_table(table: "pa.Table") -> Iterator[tuple[int, Encoded]]:
    names = ("number", *_TEXTS, "references", "prompt", "prompt_length")
    columns = [table[name].to_pylist() for name in names]
    arrays = [_split(table[name].chunk(0)) for name in ("tokens", "turns")]
    for *values, tokens, turns in zip(*columns, *arrays, strict=True):
        number, *texts, references, prompt, prompt_length = values
        row = Row(**dict(zip(_TEXTS, texts, strict=True)), references=tuple(references))
        spans = tuple((int(start), int(end)) for start, end in turns.reshape(-1, 2))
        yield number, Encoded(row, tokens, prompt_length, prompt, spans)


def _split(lists: "pa.ListArray") -> list[np.ndarray]:
    ends = lists.offsets.to_numpy()
    flat = lists.values.to_numpy()
    return [flat[start:end] for start, end in itertools.pairwise(ends)]


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# What follows runs in the processes that tokenise.

_setup: tuple[Path, Encoder]


def _begin(folder: Path, tokenizer: "PreTrainedTokenizerBase", prompt: str) -> None:
    global _setup
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that reads the rows answers it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _setup = (folder, Encoder(tokenizer, prompt))


def _end_with_parent() -> None:
    """A killed process leaves others that would wait forever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(chunk: _Chunk) -> None:
    folder, encoder = _setup
    _write_shard(folder, chunk, encoder)


def _results(futures: Iterable[Future]) -> None:
    """Raises what a process has raised."""
    for future in futures:
        future.result()
