"""The teacher's final hidden states at the response positions, computed once and read back by sample.

E numbers a token instead of V logits: with the teacher's head, which stays on the devices, they give its exact
distribution. They lie in one flat, memory-mapped array `[Σ r_i, E]`, r_i targets of example i after one another.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np

from l2m_jax import files, progress
from l2m_jax.data.batches import Examples, ForwardBatch, forward_batches, prefetch
from l2m_jax.errors import InputError
from l2m_jax.multihost import first, is_first
from l2m_jax.types import MicroBatch

_HIDDEN, _MARK = "hidden.bin", "store.json"
_BLOCK = 4096  # examples between two notes of progress
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class Corpus(Examples, Protocol):
    """What the store needs of the data set; `data.corpus.Corpus` is one."""

    fingerprint: str

    @property
    def response_lengths(self) -> np.ndarray:
        """Targets of each example, [n]."""
        ...

    def __len__(self) -> int: ...


class TeacherStore:
    """A finished store.

    Attributes:
        hidden_TxE: memory-mapped, all targets of all examples.
        offsets: int64 [n + 1], example i has rows offsets[i] to offsets[i + 1].
    """

    def __init__(self, folder: Path, offsets: np.ndarray, width: int, dtype: str):
        self.offsets = offsets
        self.hidden_TxE = _mapped(folder, offsets, width, dtype, "r")

    def read(self, example: int) -> np.ndarray:
        """`[r_i, E]` in the store's dtype, a view of the file: only what is used of it is read from disk."""
        return np.asarray(self.hidden_TxE[self.offsets[example] : self.offsets[example + 1]])


def build_store(
    folder: Path,
    forward: Callable[[MicroBatch], jax.Array | np.ndarray],
    corpus: Corpus,
    *,
    teacher: str,
    width: int,
    dtype: str,
    num_devices: int = 1,
) -> TeacherStore:
    """The store of this teacher and corpus; computed, or finished, or only opened if it is there.

    Interrupted, it goes on from its last note of progress, which is written after the data it speaks of.

    Args:
        forward: the teacher's hidden states at the targets of a micro-batch with leading device axis, `[A, T, E]`.
            Where they are jax arrays still being computed, the device works on one batch while another is written.
            With several processes, all devices' states in each of them; the first one writes.
        teacher: fingerprint of the teacher's parameters.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        InputError: a store of another teacher, data set or dtype is there; or the disk is too full.
    """
    made_from = {"teacher": teacher, "data set": corpus.fingerprint, "width": width, "dtype": dtype}
    offsets = np.concatenate([[0], np.cumsum(corpus.response_lengths, dtype=np.int64)])
    mark = folder / _MARK
    size = int(offsets[-1]) * width * np.dtype(_DTYPES[dtype]).itemsize

    def prepare() -> int:
        done = _examples_done(mark, made_from)
        file = folder / _HIDDEN
        if not file.is_file() or file.stat().st_size != size:
            done = 0  # the data is cut short or gone: a note of progress is worth nothing
        if done < len(corpus):
            _reserve(file, size)
            files.write_json(mark, made_from | {"examples": done})
        return done

    done = first(prepare)
    if done < len(corpus):
        # Network file systems write whole pages, so two hosts could not write rows beside each other.
        hidden_TxE = _mapped(folder, offsets, width, dtype, "r+") if is_first() else None
        with progress.bar("teacher's hidden states", len(corpus)) as bar:
            bar.resume_at(done)
            # Block by block, so that a number says what is done, and a resumed pass packs as an uninterrupted one.
            for start in range(done, len(corpus), _BLOCK):
                block = np.arange(start, min(start + _BLOCK, len(corpus)))
                _compute(hidden_TxE, offsets, forward, corpus, block, num_devices, bar)
                if hidden_TxE is not None:
                    hidden_TxE.flush()
                    files.write_json(mark, made_from | {"examples": int(block[-1]) + 1})
        first(lambda: None)  # the others open it once it is complete
    return TeacherStore(folder, offsets, width, dtype)


def _mapped(folder: Path, offsets: np.ndarray, width: int, dtype: str, mode: Any) -> np.memmap:
    return np.memmap(folder / _HIDDEN, _DTYPES[dtype], mode=mode, shape=(int(offsets[-1]), width))


def _examples_done(mark: Path, made_from: dict[str, Any]) -> int:
    if not mark.is_file():
        return 0
    noted = json.loads(mark.read_text())
    differing = [name for name, value in made_from.items() if noted.get(name) != value]
    if differing:
        raise InputError(
            f"{mark.parent}: holds hidden states of another {' and '.join(differing)}; delete it, or choose another "
            "workdir"
        )
    return noted["examples"]


def _reserve(file: Path, size: int) -> None:
    """Takes the disk space now: a full disk during the pass would be a fatal signal, not an exception."""
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
        # Not everywhere: macOS has no such call, some network file systems refuse it.
        with contextlib.suppress(AttributeError, OSError):
            os.posix_fallocate(opened.fileno(), 0, size)


def _compute(
    hidden_TxE: np.ndarray | None,
    offsets: np.ndarray,
    forward: Callable[[MicroBatch], jax.Array | np.ndarray],
    corpus: Corpus,
    block: np.ndarray,
    num_devices: int,
    bar: progress.Bar,
) -> None:
    start, tokens = time.monotonic(), 0

    def write(batch: ForwardBatch, hidden_AxTxE: jax.Array | np.ndarray) -> None:
        nonlocal tokens
        if hidden_TxE is None:
            return
        real = batch.example_AxT >= 0
        rows = offsets[batch.example_AxT[real]] + batch.target_AxT[real]
        hidden_TxE[rows] = np.asarray(hidden_AxTxE)[real].astype(hidden_TxE.dtype)
        tokens += int(corpus.lengths[batch.indices].sum())
        rate = tokens / (time.monotonic() - start)
        bar.advance(len(batch.indices), **{"tokens/s": f"{rate:,.0f}"})

    unwritten = None
    for batch in prefetch(forward_batches(corpus, block, num_devices)):
        started = (batch, forward(batch.micro_batch))
        if unwritten is not None:
            write(*unwritten)
        unwritten = started
    if unwritten is not None:
        write(*unwritten)
