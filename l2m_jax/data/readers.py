"""Reads the files that rows come in: JSON lines, plain or compressed, Parquet and Arrow."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from l2m_jax import files
from l2m_jax.data.rows import COLUMNS
from l2m_jax.errors import InputError, reason

if TYPE_CHECKING:
    import pyarrow as pa

FILE_FORM = "JSON lines, also .gz or .zst; Parquet; Arrow"
_ROWS_AT_ONCE = 1024
_BUFFER = 1 << 20  # bytes of a Parquet column that are read at once


class Value(NamedTuple):
    """One row as it is in a file.

    Attributes:
        default_id: "file/number".
        place: "FILE, line 3" or "FILE, row 3", for messages.
    """

    default_id: str
    place: str
    value: Any


def read_values(file: Path) -> Iterator[Value]:
    """The rows of a file, read lazily. `.parquet`, `.arrow` and `.feather` are what they say; others are JSON lines.

    Raises:
        InputError: the file cannot be read, or a line is not JSON.
    """
    kinds = {".parquet": ("Parquet", _parquet), ".arrow": ("Arrow", _arrow), ".feather": ("Arrow", _arrow)}
    if file.suffix in kinds:
        yield from _columnar(file, *kinds[file.suffix])
        return
    stem = file.with_suffix("").stem if file.suffix in files.COMPRESSED else file.stem
    for place, value in files.json_lines(file):
        yield Value(f"{stem}/{place.rpartition(' ')[2]}", place, value)


def _columnar(file: Path, kind: str, read: Any) -> Iterator[Value]:
    import pyarrow as pa

    number = 0
    try:
        with contextlib.closing(read(file)) as batches:
            for batch in batches:
                for start in range(0, len(batch), _ROWS_AT_ONCE):
                    for value in batch.slice(start, _ROWS_AT_ONCE).to_pylist():
                        number += 1
                        yield Value(f"{file.stem}/{number}", f"{file}, row {number}", value)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise InputError(
            f"{file} cannot be read as {kind} behind row {number} ({reason(error)}); check the file and its permissions"
        ) from error


def _parquet(file: Path) -> Iterator["pa.RecordBatch"]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file, buffer_size=_BUFFER) as opened:
        columns = _relevant(opened.schema_arrow.names)
        yield from opened.iter_batches(_ROWS_AT_ONCE, columns=columns)


def _arrow(file: Path) -> Iterator["pa.RecordBatch"]:
    """The batches of an IPC file, or of a stream, as the library `datasets` writes it."""
    import pyarrow as pa

    with pa.memory_map(str(file)) as mapped:
        try:
            opened = pa.ipc.open_file(mapped)
        except pa.ArrowInvalid:
            mapped.seek(0)
            for batch in pa.ipc.open_stream(mapped):
                yield batch.select(_relevant(batch.schema.names))
            return
        for i in range(opened.num_record_batches):
            batch = opened.get_batch(i)
            yield batch.select(_relevant(batch.schema.names))


def _relevant(names: list[str]) -> list[str]:
    """The columns that rows are made of; all, for the message, if there are none of these."""
    return [name for name in names if name in COLUMNS] or names
