"""Shards of a teacher store: safetensors files that are memory-mapped, each with a note of its checksum.

A shard holds what is stored of the targets of consecutive examples. It gets its name only once it is complete, and its
note after that, so a shard with a note that fits is whole.
"""

import contextlib
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from l2m_jax import files
from l2m_jax.errors import InputError

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]

_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8", "int32": "I32"}
_BY_CODE = {code: name for name, code in _NAMES.items()}


@dataclass(frozen=True)
class Shard:
    """The examples `start` to `end` of a store, in FOLDER/NUMBER.safetensors, with its note in FOLDER/NUMBER.json.

    Attributes:
        targets: of these examples.
        tensors: dtype and shape of what is stored of a target, by name.
    """

    folder: Path
    number: int
    start: int
    end: int
    targets: int
    tensors: Tensors

    @property
    def file(self) -> Path:
        return self.folder / f"{self.number:05}.safetensors"

    @property
    def note(self) -> Path:
        return self.file.with_suffix(".json")

    @property
    def size(self) -> int:
        """Bytes of its arrays."""
        return self.targets * bytes_per_target(self.tensors)

    @contextlib.contextmanager
    def writing(self, made_from: Mapping[str, Any]) -> Iterator[dict[str, np.ndarray]]:
        """Arrays to fill, in a file that becomes the shard, with its note, if the block ends without an error.

        Args:
            made_from: what identifies the store; goes into the note.
        """
        self.note.unlink(missing_ok=True)
        with files.replacing(self.file) as unfinished:
            _reserve(unfinished, self._header, self.size)
            arrays = _mapped(unfinished, mmap.ACCESS_WRITE)
            yield arrays.by_name
            arrays.memory.flush()
        checksum = files.checksums(self.file)["."]
        files.write_json(self.note, {**made_from, "examples": [self.start, self.end], "file": checksum})

    def noted(self) -> dict[str, Any] | None:
        """What its note says; None if there is no such note of this shard."""
        found = _read_note(self.note)
        return found if found is not None and found["examples"] == [self.start, self.end] else None

    def damaged(self, noted: Mapping[str, Any]) -> bool:
        """Whether the file is missing or not as noted. It is read only if its size or time are others."""
        return files.damaged(self.file, {".": noted["file"]}) is not None

    def arrays(self) -> dict[str, np.ndarray]:
        """Its arrays by name, memory-mapped, `[targets, ...]`. They keep the file open."""
        return _mapped(self.file, mmap.ACCESS_READ).by_name

    @property
    def _header(self) -> bytes:
        """That of a safetensors file. Wide types come first, so that each array is aligned."""
        described: dict[str, Any] = {}
        end = 0
        for name, (dtype, shape) in sorted(self.tensors.items(), key=lambda t: -_dtype(t[1][0]).itemsize):
            start, whole = end, (self.targets, *shape)
            end += math.prod(whole) * _dtype(dtype).itemsize
            described[name] = {"dtype": _NAMES[dtype], "shape": whole, "data_offsets": [start, end]}
        text = json.dumps(described).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def check(folder: Path) -> list[str]:
    """What is wrong with the finished shards in `folder`: a sentence each. Reads them.

    Raises:
        InputError: there are none.
    """
    notes = sorted(folder.glob("[0-9]*.json"))
    if not notes:
        raise InputError(
            f"{folder}: contains no finished shard of a teacher store; name the folder teacher_store of a run"
        )
    problems = []
    for note in notes:
        file = note.with_suffix(".safetensors")
        found = _read_note(note)
        if found is None:
            problems.append(f"{note}: cannot be read; the shard is computed again")
        elif not file.is_file():
            problems.append(f"{file}: is missing; it is computed again")
        elif files.digest(file) != found["file"][2]:
            problems.append(f"{file}: differs from what was written; delete it to compute it again")
    return problems


def _read_note(note: Path) -> dict[str, Any] | None:
    """None if it is absent or damaged: its shard is computed again."""
    try:
        found = files.parse_json(note.read_bytes())
        size, modified, digest = found["file"]
        if isinstance(found["examples"], list) and isinstance(digest, str):
            return found | {"file": [int(size), int(modified), digest]}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def bytes_per_target(tensors: Tensors) -> int:
    return sum(math.prod(shape) * _dtype(dtype).itemsize for dtype, shape in tensors.values())


@dataclass(frozen=True)
class _Mapped:
    memory: mmap.mmap
    by_name: dict[str, np.ndarray]


def _mapped(file: Path, access: int) -> _Mapped:
    with file.open("r+b" if access == mmap.ACCESS_WRITE else "rb") as opened:
        memory = mmap.mmap(opened.fileno(), 0, access=access)
    first = 8 + int.from_bytes(memory[:8], "little")
    found = {}
    for name, tensor in json.loads(memory[8:first]).items():
        dtype, count = _dtype(_BY_CODE[tensor["dtype"]]), math.prod(tensor["shape"])
        flat = np.frombuffer(memory, dtype, count, first + tensor["data_offsets"][0])
        found[name] = flat.reshape(tensor["shape"])
    return _Mapped(memory, found)


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def _reserve(file: Path, header: bytes, size: int) -> None:
    """Reserves the disk space: if the disk ran full later, the process would get a signal and no exception."""
    with file.open("wb") as opened:
        opened.write(header)
        opened.truncate(len(header) + size)
        # macOS lacks this call, and some network file systems refuse it.
        try:
            os.posix_fallocate(opened.fileno(), 0, len(header) + size)
        except (AttributeError, OSError) as error:
            if files.disk_is_full(error):
                raise
