"""Checks the header of a GGUF file before the `gguf` package reads it, which trusts every count in it.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from collections.abc import Callable
from pathlib import Path

_VERSIONS = (2, 3)
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_MOST_AXES = 4
# The reader makes an object for each entry of an array. The largest vocabularies have a million entries in all.
_MOST_ENTRIES = 1 << 22


def check(file: Path, tensor_bytes: Callable[[int, int], int]) -> None:
    """Walks through the header without keeping any of it.

    Args:
        tensor_bytes: (type, elements) -> the bytes of a tensor; raises ValueError for an unknown type.

    Raises:
        ValueError: something in the header is wrong, or refers beyond the end of the file.
        OSError: the file cannot be read.
    """
    with file.open("rb") as opened:
        if not (size := file.stat().st_size):
            raise ValueError("the file is empty")
        with mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_READ) as data:
            _Header(data).check(tensor_bytes)


class _Header:
    def __init__(self, data: mmap.mmap):
        self.data, self.size, self.at, self.entries = data, len(data), 0, 0

    def check(self, tensor_bytes: Callable[[int, int], int]) -> None:
        if self.data[:4] != b"GGUF":
            raise ValueError(f"it begins with {bytes(self.data[:4])!r} and not with b'GGUF'")
        self.skip(4)
        if (version := self.number("I")) not in _VERSIONS:
            raise ValueError(f"version {version} is not supported; 2 and 3 are")
        tensors, fields = self.number("Q"), self.number("Q")
        alignment = 32
        for _ in range(fields):
            name, kind = self.text(), self.number("I")
            if name == b"general.alignment" and kind == 4:
                alignment = self.number("I")
                if not alignment or alignment & (alignment - 1):
                    raise ValueError(f"alignment {alignment} is not a power of two")
            else:
                self.value(kind)
        ends = [self.tensor(tensor_bytes) for _ in range(tensors)]
        start = -(-self.at // alignment) * alignment
        if ends and start + max(ends) > self.size:
            raise ValueError(f"its tensors end at byte {start + max(ends):,}, the file at {self.size:,}")

    def tensor(self, tensor_bytes: Callable[[int, int], int]) -> int:
        """Where a tensor ends, counted from the first one."""
        self.text()
        if not 1 <= (axes := self.number("I")) <= _MOST_AXES:
            raise ValueError(f"a tensor of {axes} axes at byte {self.at}")
        elements = math.prod(self.number("Q") for _ in range(axes))
        kind, offset = self.number("I"), self.number("Q")
        return offset + tensor_bytes(kind, elements)

    def value(self, kind: int, nested: int = 0) -> None:
        if kind == _STRING:
            self.text()
        elif kind in _SCALAR_BYTES:
            self.skip(_SCALAR_BYTES[kind])
        elif kind == _ARRAY and nested < 2:
            inner, length = self.number("I"), self.number("Q")
            self.entries += length
            if self.entries > _MOST_ENTRIES:
                raise ValueError(f"an array of {length:,} entries at byte {self.at}")
            if inner in _SCALAR_BYTES:
                self.skip(length * _SCALAR_BYTES[inner])
            else:
                for _ in range(length):
                    self.value(inner, nested + 1)
        else:
            raise ValueError(f"a value of unknown type {kind} at byte {self.at}")

    def text(self) -> bytes:
        length, start = self.number("Q"), self.at
        self.skip(length)
        return self.data[start : min(start + length, start + 64)]

    def number(self, code: str) -> int:
        start = self.at
        self.skip(struct.calcsize(code))
        return struct.unpack_from(f"<{code}", self.data, start)[0]

    def skip(self, count: int) -> None:
        self.at += count
        if self.at > self.size:
            raise ValueError(f"it ends within its header, at byte {self.size:,}")
