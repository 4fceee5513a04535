"""The teacher's final hidden states at the response positions, computed once and read by example.

E numbers per token instead of V logits. Together with the teacher's head, which stays on the devices, they give its
distribution. They are stored in one flat, memory-mapped array `[Σ r_i, E]`: the r_i targets of each example i in turn.
"""

import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import jax
import ml_dtypes
import numpy as np

from l2m_jax import files, progress
from l2m_jax.data.batches import Examples, ForwardBatch, forward_batches, prefetch
from l2m_jax.errors import InputError
from l2m_jax.multihost import first, is_first
from l2m_jax.parallel import Placement
from l2m_jax.types import MicroBatch

_HIDDEN, _MARK = "hidden.bin", "store.json"
_BLOCK = 4096  # examples between two records of progress
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


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
    """The store of one teacher's hidden states for the examples of one corpus, in `folder`.

    Attributes:
        offsets: int64 [n + 1]; the rows of example i are offsets[i] to offsets[i + 1].

    Args:
        key: identifies the teacher and the corpus.
        width: E.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        InputError: `folder` contains a store with another key, width or dtype.
    """

    def __init__(self, folder: Path, corpus: Corpus, *, key: str, width: int, dtype: str):
        self.offsets = np.concatenate([[0], np.cumsum(corpus.response_lengths, dtype=np.int64)])
        self._folder, self._corpus, self._width, self._dtype = folder, corpus, width, dtype
        self._made_from = {"key": key, "width": width, "dtype": dtype}
        self._blocks: list[str] = []  # the hash of each finished block
        self._done = first(self._examples_done)

    @property
    def is_complete(self) -> bool:
        return self._done == len(self._corpus)

    @functools.cached_property
    def hidden_TxE(self) -> np.memmap:
        """All targets of all examples, memory-mapped."""
        return self._mapped("r")

    def read(self, example: int) -> np.ndarray:
        """`[r_i, E]` in the store's dtype, a view of the file: only what is used is read from the disk."""
        return np.asarray(self.hidden_TxE[self.offsets[example] : self.offsets[example + 1]])

    def fill(self, placement: Placement, forward: Callable[[MicroBatch], jax.Array]) -> None:
        """Computes what is missing. After an interruption, a second call resumes.

        The devices compute one batch while the states of the previous one are written. With several processes, the
        first one writes.

        Args:
            forward: returns the teacher's hidden states at the targets of a micro-batch that is fed to the devices,
                `[A, T, E]`.

        Raises:
            InputError: there is not enough room on the disk, or a hidden state is not finite in the store's dtype.
        """
        if self.is_complete:
            return
        first(self._prepare)
        # Network file systems write whole pages, so two hosts cannot write adjacent rows.
        target = self._mapped("r+") if is_first() else None
        count = len(self._corpus)
        with progress.bar("teacher's hidden states", count) as bar:
            bar.resume_at(self._done)
            # By blocks: one number records the progress, and a resumed pass packs like an uninterrupted one.
            for start in range(self._done, count, _BLOCK):
                block = np.arange(start, min(start + _BLOCK, count))
                self._fill_block(block, target, placement, forward, bar)
                if target is not None:
                    target.flush()
                    end = int(block[-1]) + 1
                    self._blocks.append(self._hash(target, start, end))
                    self._note(end)
        first(lambda: None)  # the others wait until it is complete
        self._done = count

    def _fill_block(
        self,
        block: np.ndarray,
        target_TxE: np.ndarray | None,
        placement: Placement,
        forward: Callable[[MicroBatch], jax.Array],
        bar: progress.Bar,
    ) -> None:
        start, tokens = time.monotonic(), 0

        def write(batch: ForwardBatch, hidden_AxTxE: jax.Array) -> None:
            nonlocal tokens
            states = placement.gather(hidden_AxTxE)
            if target_TxE is None:
                return
            real = batch.example_AxT >= 0
            rows = self.offsets[batch.example_AxT[real]] + batch.target_AxT[real]
            with np.errstate(over="ignore"):
                stored = states[real].astype(target_TxE.dtype)
            if not np.isfinite(stored).all():
                self._refuse(batch.example_AxT[real][~np.isfinite(stored).all(axis=1)][0])
            target_TxE[rows] = stored
            tokens += int(self._corpus.lengths[batch.indices].sum())
            rate = tokens / (time.monotonic() - start)
            bar.advance(len(batch.indices), **{"tokens/s": f"{rate:,.0f}"})

        unwritten = None
        for batch in prefetch(forward_batches(self._corpus, block, placement.num_devices)):
            started = (batch, forward(placement.feed(batch.micro_batch)))
            if unwritten is not None:
                write(*unwritten)
            unwritten = started
        if unwritten is not None:
            write(*unwritten)

    def _mapped(self, mode: Any) -> np.memmap:
        shape = (int(self.offsets[-1]), self._width)
        return np.memmap(self._folder / _HIDDEN, _DTYPES[self._dtype], mode=mode, shape=shape)

    @property
    def _bytes(self) -> int:
        return int(self.offsets[-1]) * self._width * np.dtype(_DTYPES[self._dtype]).itemsize

    def _examples_done(self) -> int:
        mark, file = self._folder / _MARK, self._folder / _HIDDEN
        if not mark.is_file():
            return 0
        try:
            noted = json.loads(mark.read_text(encoding="utf-8"))
            done, self._blocks = int(noted["examples"]), list(noted["blocks"])
        except (ValueError, KeyError, TypeError):
            return 0  # damaged: computed again
        differing = [name for name, value in self._made_from.items() if noted.get(name) != value]
        if differing:
            raise InputError(
                f"{self._folder}: contains hidden states made with another {' and '.join(differing)}; choose another "
                "--workdir, or move this folder away"
            )
        if not file.is_file() or file.stat().st_size != self._bytes:
            self._blocks = []
            return 0  # the data is incomplete or gone, whatever was recorded
        if done == len(self._corpus):
            return done  # the artefact has checksums of finished files
        return self._intact(done)

    def _intact(self, done: int) -> int:
        """The number of examples in the first blocks that are still as they were written. Reads them."""
        hidden_TxE = self._mapped("r")
        for number, start in enumerate(range(0, done, _BLOCK)):
            end = min(start + _BLOCK, done)
            if number >= len(self._blocks) or self._hash(hidden_TxE, start, end) != self._blocks[number]:
                progress.console.print(
                    f"  note: {self._folder / _HIDDEN} is damaged from example {start} on; computing these again",
                    markup=False,
                )
                self._blocks = self._blocks[:number]
                return start
        return done

    def _hash(self, hidden_TxE: np.ndarray, start: int, end: int) -> str:
        """The hash of the states of the examples from `start` to `end`."""
        rows = hidden_TxE[self.offsets[start] : self.offsets[end]]
        return hashlib.sha256(rows.view(np.uint8).data).hexdigest()

    def _refuse(self, example: int) -> NoReturn:
        raise InputError(
            f"{self._folder}: the teacher's hidden states of training example {self._corpus.ids[example]} are not "
            f"finite in {self._dtype}; check the teacher's weights, or choose another teacher.store_dtype and "
            "teacher.compute.dtype, such as bfloat16"
        )

    def _prepare(self) -> None:
        _reserve(self._folder / _HIDDEN, self._bytes)
        self._note(self._done)

    def _note(self, examples: int) -> None:
        files.write_json(
            self._folder / _MARK, self._made_from | {"examples": examples, "blocks": self._blocks}
        )


def _reserve(file: Path, size: int) -> None:
    """Reserves the disk space: if the disk ran full later, the process would get a signal and no exception."""
    file.parent.mkdir(parents=True, exist_ok=True)
    taken = file.stat().st_blocks * 512 if file.is_file() else 0
    free = shutil.disk_usage(file.parent).free
    progress.console.print(f"  takes {size / 1e9:.3f} GB on disk ({free / 1e9:.1f} GB free)")
    if size - taken > free:
        raise InputError(
            f"{file}: needs {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; make room, choose a smaller "
            "teacher.store_dtype, or set teacher.signal to 'live'"
        )
    with file.open("ab") as opened:
        opened.truncate(size)
        # macOS lacks this call, and some network file systems refuse it.
        try:
            os.posix_fallocate(opened.fileno(), 0, size)
        except (AttributeError, OSError) as error:
            if files.disk_is_full(error):
                raise
