"""The teacher's signal at the targets of a corpus, computed once and read by example.

A store is a folder of shards, each with the targets of 4,096 consecutive examples (`shards.py`); `store_format.py` says
what is stored of a target. Processes share out the shards, and each packs its examples by themselves, so that neither
the number of processes nor an interruption changes a byte.
"""

import functools
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import jax
import numpy as np

from l2m_jax import progress
from l2m_jax.data.batches import Examples, ForwardBatch, forward_batches, prefetch
from l2m_jax.errors import InputError
from l2m_jax.multihost import every_process, first
from l2m_jax.parallel import Placement
from l2m_jax.training.shards import Shard, bytes_per_target
from l2m_jax.training.store_format import StoreFormat
from l2m_jax.types import MicroBatch, TeacherRows

# Changing it changes how examples are packed, and so the rounding of what is stored.
_SHARD_EXAMPLES = 4096
# Shards that are mapped at a time: each is an open file, of which a process may have about a thousand.
_MAPPED = 128
_OF_ANOTHER_VERSION = "hidden.bin"


class Corpus(Examples, Protocol):
    """The data set of a store, such as `data.corpus.Corpus`."""

    @property
    def ids(self) -> Sequence[str]:
        """Names of the examples, for messages."""
        ...

    @property
    def response_lengths(self) -> np.ndarray:
        """Targets of each example, [n]."""
        ...

    def __len__(self) -> int: ...


class TeacherStore:
    """The store of one teacher's signal for the examples of one corpus, in `folder`.

    Attributes:
        offsets: int64 [n + 1]; example i has the targets offsets[i] to offsets[i + 1] of the corpus.
        shards: in the order of their examples.

    Args:
        key: identifies the teacher and the corpus.

    Raises:
        InputError: `folder` contains a store with another key or format, or one of an earlier version.
    """

    def __init__(self, folder: Path, corpus: Corpus, *, key: str, form: StoreFormat):
        self.offsets = np.concatenate([[0], np.cumsum(corpus.response_lengths, dtype=np.int64)])
        self.shards = _shards(folder, self.offsets, form)
        self._folder, self._corpus, self._form = folder, corpus, form
        self._made_from = {"key": key, "dtype": form.dtype, "bytes": bytes_per_target(form.tensors)}
        self._missing: set[int] = set(first(self._find_missing))
        self._mapped = functools.lru_cache(_MAPPED)(lambda number: self.shards[number].arrays())

    @property
    def is_complete(self) -> bool:
        return not self._missing

    @property
    def files(self) -> list[str]:
        """The names of its files, which it checks itself whenever it is opened."""
        return [file.name for shard in self.shards for file in (shard.file, shard.note)]

    def read(self, example: int) -> TeacherRows:
        """What a micro-batch has of the targets of an example, `[r_i, ...]`, by its fields.

        Hidden states are views of the file: only what is used is read from the disk.
        """
        number = example // _SHARD_EXAMPLES
        rows = slice(*self.offsets[example : example + 2] - self.offsets[self.shards[number].start])
        return self._form.decode({name: array[rows] for name, array in self._mapped(number).items()})

    def fill(self, placement: Placement, forward: Callable[[MicroBatch], Any]) -> None:
        """Computes what is missing. After an interruption, a second call resumes.

        Each process computes every P-th shard on its own devices, and waits for the others at the end. The devices
        compute one batch while the states of the previous one are written.

        Args:
            placement: over the devices of all processes. Their number decides how examples are packed.
            forward: returns what the format encodes of the targets of a micro-batch, `[A, T, ...]`, which is fed to
                the devices of `placement.own`.

        Raises:
            InputError: there is not enough room on the disk, or a number is not finite in the store's dtype.
        """
        self._fill_missing(
            "teacher's hidden states",
            lambda shard, arrays, bar: self._fill_shard(shard, arrays, placement, forward, bar),
        )

    def fill_from(self, read: Callable[[np.ndarray], Iterable[tuple[int, Any]]]) -> None:
        """Copies what is missing. Resumes, and is shared by processes, as `fill`.

        Args:
            read: yields, for each of the examples of a shard, in any order, its number, and what the format encodes of its
                targets, `[r_i, ...]`.

        Raises:
            InputError: as `fill`; and from `read`.
        """

        def copy(shard: Shard, arrays: dict[str, np.ndarray], bar: progress.Bar) -> None:
            for example, found in read(np.arange(shard.start, shard.end)):
                targets = np.arange(self.offsets[example + 1] - self.offsets[example])
                self._put(arrays, shard, np.full_like(targets, example), targets, found)
                bar.advance()

        self._fill_missing("teacher's outputs", copy)

    def _fill_missing(
        self, title: str, fill: Callable[[Shard, dict[str, np.ndarray], progress.Bar], None]
    ) -> None:
        if self.is_complete:
            return
        first(self._prepare)
        missing = [self.shards[number] for number in sorted(self._missing)]
        own = missing[jax.process_index() :: jax.process_count()]

        def fill_own() -> None:
            done = len(self._corpus) - sum(shard.end - shard.start for shard in own)
            with progress.bar(title, len(self._corpus)) as bar:
                bar.resume_at(done)
                for shard in own:
                    with shard.writing(self._made_from) as arrays:
                        fill(shard, arrays, bar)

        every_process(fill_own)
        self._missing = set()

    def _fill_shard(
        self,
        shard: Shard,
        arrays: dict[str, np.ndarray],
        placement: Placement,
        forward: Callable[[MicroBatch], Any],
        bar: progress.Bar,
    ) -> None:
        start, tokens, own = time.monotonic(), 0, placement.own

        def write(batch: ForwardBatch, found: Any) -> None:
            nonlocal tokens
            real = batch.example_AxT >= 0
            found = jax.tree.map(lambda x: x[real], own.gather(found))
            self._put(arrays, shard, batch.example_AxT[real], batch.target_AxT[real], found)
            tokens += int(self._corpus.lengths[batch.indices].sum())
            rate = tokens / (time.monotonic() - start)
            bar.advance(len(batch.indices), **{"tokens/s": f"{rate:,.0f}"})

        unwritten = None
        batches = forward_batches(self._corpus, np.arange(shard.start, shard.end), placement.num_devices)
        for batch in prefetch(_divided(batches, own.num_devices)):
            started = (batch, forward(own.feed(batch.micro_batch)))
            if unwritten is not None:
                write(*unwritten)
            unwritten = started
        if unwritten is not None:
            write(*unwritten)

    def _put(
        self,
        arrays: dict[str, np.ndarray],
        shard: Shard,
        examples: np.ndarray,
        targets: np.ndarray,
        found: Any,
    ) -> None:
        """Writes what was found at targets, by the examples that they belong to and their numbers in these."""
        rows = self.offsets[examples] - self.offsets[shard.start] + targets
        for name, values in self._form.encode(found).items():
            with np.errstate(over="ignore"):
                stored = values.astype(arrays[name].dtype)
            finite = np.isfinite(stored).reshape(len(stored), -1).all(axis=1)
            if not finite.all():
                self._refuse(examples[~finite][0])
            arrays[name][rows] = stored

    def _find_missing(self) -> list[int]:
        """The numbers of the shards that are absent, incomplete or damaged."""
        if (self._folder / _OF_ANOTHER_VERSION).exists():
            raise InputError(
                f"{self._folder / _OF_ANOTHER_VERSION} is a teacher store of an earlier version, in one file; delete "
                f"{self._folder} to make it again"
            )
        missing = []
        for shard in self.shards:
            noted = shard.noted()
            if noted is not None:
                self._require_same(noted)
                if shard.damaged(noted):
                    progress.console.print(
                        f"  note: {shard.file} is damaged or missing; computing it again", markup=False
                    )
                    noted = None
            if noted is None:
                missing.append(shard.number)
        return missing

    def _require_same(self, noted: dict[str, Any]) -> None:
        differing = [name for name, value in self._made_from.items() if noted.get(name) != value]
        if differing:
            raise InputError(
                f"{self._folder}: contains a teacher store made with another {' and '.join(differing)}; choose another "
                "--workdir, or move this folder away"
            )

    def _refuse(self, example: int) -> NoReturn:
        raise InputError(
            f"{self._folder}: the teacher's hidden states of training example {self._corpus.ids[example]} are not "
            f"finite in {self._form.dtype}; check the teacher's weights, or choose another teacher.store_dtype and "
            "teacher.compute.dtype, such as bfloat16"
        )

    def _prepare(self) -> None:
        """Checks that there is room for all that is missing."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for leftover in self._folder.glob(".*.unfinished"):
            leftover.unlink()
        size = sum(self.shards[number].size for number in self._missing)
        there = sum(shard.file.stat().st_size for shard in self.shards if shard.file.is_file())
        free = shutil.disk_usage(self._folder).free
        progress.console.print(f"  takes {(size + there) / 1e9:.3f} GB on disk ({free / 1e9:.1f} GB free)")
        if size > free:
            raise InputError(
                f"{self._folder}: needs {size / 1e9:.1f} GB more and {free / 1e9:.1f} GB are free; make room, choose a "
                "smaller teacher.store_dtype, or set teacher.signal to 'live'"
            )


def _shards(folder: Path, offsets: np.ndarray, form: StoreFormat) -> list[Shard]:
    examples = len(offsets) - 1
    found = []
    for number, start in enumerate(range(0, examples, _SHARD_EXAMPLES)):
        end = min(start + _SHARD_EXAMPLES, examples)
        found.append(Shard(folder, number, start, end, int(offsets[end] - offsets[start]), form.tensors))
    return found


def _divided(batches: Iterator[ForwardBatch], num_devices: int) -> Iterator[ForwardBatch]:
    """Micro-batches for all devices as several for `num_devices` each; those without an example are left out."""
    for batch in batches:
        for start in range(0, len(batch.example_AxT), num_devices):
            part: ForwardBatch = jax.tree.map(
                lambda x, start=start: x[start : start + num_devices], batch._replace(indices=None)
            )
            examples = np.unique(part.example_AxT)
            if examples[-1] >= 0:
                yield part._replace(indices=examples[examples >= 0])
