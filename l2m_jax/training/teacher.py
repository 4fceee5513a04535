"""The teacher's final hidden states at the response positions, computed once and read back by sample.

E numbers a token instead of V logits: with the teacher's head, which stays on the devices, they give its exact
distribution. They lie in one flat, memory-mapped array `[Σ r_i, E]`, r_i targets of example i after one another.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from l2m_jax import artefacts, progress
from l2m_jax.data.batches import forward_batches, prefetch
from l2m_jax.data.corpus import Corpus
from l2m_jax.errors import InputError
from l2m_jax.types import MicroBatch

_HIDDEN, _DONE = "hidden.bin", "done.json"
_BLOCK = 4096  # examples between two notes of progress
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class TeacherStore:
    """A finished store.

    Attributes:
        hidden_TxE: memory-mapped, all targets of all examples.
        offsets: int64 [n + 1], example i has rows offsets[i] to offsets[i + 1].
    """

    def __init__(self, folder: Path, offsets: np.ndarray, width: int, dtype: str):
        self.offsets = offsets
        self.hidden_TxE = np.memmap(
            folder / _HIDDEN, _DTYPES[dtype], mode="r", shape=(int(offsets[-1]), width)
        )

    def read(self, example: int) -> np.ndarray:
        """`[r_i, E]`."""
        return np.asarray(self.hidden_TxE[self.offsets[example] : self.offsets[example + 1]])


def build_store(
    folder: Path,
    forward: Callable[[MicroBatch], np.ndarray],
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
        teacher: fingerprint of the teacher's parameters.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        InputError: a finished store of another teacher, data set or dtype is there; or the disk is too full.
    """
    made_from = artefacts.fingerprint("teacher store", teacher, corpus.fingerprint, width, dtype)
    offsets = np.concatenate([[0], np.cumsum(corpus.response_lengths, dtype=np.int64)])
    size = int(offsets[-1]) * width * np.dtype(_DTYPES[dtype]).itemsize
    file, marks = folder / _HIDDEN, folder / _DONE
    progress_made: dict[str, Any] = json.loads(marks.read_text()) if marks.is_file() else {}
    if progress_made and progress_made["made_from"] != made_from:
        raise InputError(
            f"{folder}: holds the hidden states of another teacher, data set or dtype; delete it, or choose another "
            "workdir"
        )
    done = progress_made.get("examples", 0)
    if done and (not file.is_file() or file.stat().st_size != size):
        done = 0  # the data is cut short or gone: its note of progress is worth nothing
    if done < len(corpus):
        folder.mkdir(parents=True, exist_ok=True)
        _allocate(file, size)
        _compute(file, marks, made_from, done, forward, corpus, offsets, width, dtype, num_devices)
    return TeacherStore(folder, offsets, width, dtype)


def _allocate(file: Path, size: int) -> None:
    present = file.stat().st_size if file.is_file() else 0
    free = shutil.disk_usage(file.parent).free
    progress.console.print(f"  takes {size / 1e9:.3f} GB on disk ({free / 1e9:.1f} GB free)")
    if size - present > free:
        raise InputError(
            f"{file}: needs {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; make room, choose a smaller "
            "teacher.store_dtype, or set teacher.signal to 'live'"
        )
    with file.open("ab") as opened:
        opened.truncate(size)


def _compute(
    file: Path,
    marks: Path,
    made_from: str,
    done: int,
    forward: Callable[[MicroBatch], np.ndarray],
    corpus: Corpus,
    offsets: np.ndarray,
    width: int,
    dtype: str,
    num_devices: int,
) -> None:
    hidden = np.memmap(file, _DTYPES[dtype], mode="r+", shape=(int(offsets[-1]), width))
    with progress.bar("teacher's hidden states", len(corpus)) as bar:
        bar.resume_at(done)
        # Block by block, so that a number says what is done, and a resumed pass packs as an uninterrupted one.
        for start in range(done, len(corpus), _BLOCK):
            block = np.arange(start, min(start + _BLOCK, len(corpus)))
            for batch in prefetch(forward_batches(corpus, block, num_devices)):
                real = batch.example_AxT >= 0
                rows = offsets[batch.example_AxT[real]] + batch.target_AxT[real]
                hidden[rows] = forward(batch.micro_batch)[real].astype(hidden.dtype)
                bar.advance(len(batch.indices))
            hidden.flush()
            artefacts.write_json(marks, {"made_from": made_from, "examples": int(block[-1]) + 1})
