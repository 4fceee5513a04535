"""Rows of text, read from files and folders, from data sets on the hub, and from mixtures of them."""

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from l2m_jax.data.mixtures import interleave, is_mixture, parse_mixture
from l2m_jax.data.online import require_hub
from l2m_jax.data.readers import FILE_FORM, Value, read_values
from l2m_jax.data.rows import (
    FORMATS,
    Row,
    parse_row,
    refuse_mixture,
    require_single_turn,
    row_format,
)
from l2m_jax.errors import InputError, reason

DOLLY = "databricks/databricks-dolly-15k"
ROW_FORM = f"JSON lines with {'; or '.join(FORMATS.values())}"
_SPLITS_BY_USE = {
    "train": ("train",),
    "validation": ("validation", "valid", "dev", "test", "train"),
    "test": ("test", "validation", "valid", "dev", "train"),
}


def is_hub_name(source: str | Path) -> bool:
    """Whether `source` is a data set on the hub ("owner/name") and not a file, folder or mixture."""
    path, text = Path(source), str(source)
    looks_like_a_name = text.count("/") == 1 and not path.suffix and not text.startswith((".", "/"))
    return looks_like_a_name and not is_mixture(source) and not path.exists()


def read_rows(source: str | Path, use: str = "train") -> Iterator[Row]:
    """The rows of a source, read lazily.

    Args:
        source: a file (see `read_file`), a folder of such files, a data set on the hub ("owner/name"), which is
            streamed, or a mixture of these (see `mixtures.py`).
        use: "train", "validation" or "test", which selects the split of a folder or of a data set on the hub. A
            folder's splits are told apart by the names of its files, as by the library `datasets`.

    Raises:
        InputError: as in `read_file`; a folder has no such files; the hub cannot be reached; or the mixture has no
            weights.
    """
    if is_mixture(source):
        shares = parse_mixture(str(source))
        parts = [read_rows(share.source, use) for share in shares]
        return interleave([share.weight for share in shares], parts)
    if is_hub_name(source):
        return _read_hub(str(source), use)
    path = Path(source)
    if path.is_dir():
        found = _files(path, use)
        return _rows(itertools.chain.from_iterable(read_values(file) for file in found), path)
    return read_file(path)


def check_rows(source: str | Path, prompt: str = "alpaca", use: str = "train") -> None:
    """Raises InputError if a file is missing, or the first row of a source does not parse or fit the prompt.

    Does not use the hub.
    """
    if is_mixture(source):
        for share in parse_mixture(str(source)):
            check_rows(share.source, prompt, use)
    elif not is_hub_name(source):
        row = next(read_rows(source, use))
        if prompt == "alpaca":
            require_single_turn(row)


def read_file(path: str | Path) -> Iterator[Row]:
    """Rows of a file in one of the formats of `rows.py`: one JSON object per line, Parquet or Arrow.

    A row without an `id` is called "file/line".

    Raises:
        InputError: the file does not exist, has no rows, mixes formats, or has a row that is of none.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"'{path}' is a folder; give a file ({ROW_FORM})")
    if not path.is_file():
        raise InputError(f"no such file '{path}' ({ROW_FORM}; or a name on the hub such as {DOLLY})")
    return _rows(read_values(path), path)


def _rows(values: Iterable[Value], path: Path) -> Iterator[Row]:
    rows = _parsed(values)
    first = next(rows, None)
    if first is None:
        raise InputError(f"{path} has no rows ({ROW_FORM})")
    yield first
    yield from rows


def _parsed(values: Iterable[Value]) -> Iterator[Row]:
    """Rows, all in the format of the first."""
    kind = None
    for default_id, place, value in values:
        found = row_format(value, place)
        kind = kind or found
        refuse_mixture(value, found, kind, place)
        yield parse_row(value, kind, default_id, place)


def split_of(source: str | Path, use: str) -> str:
    """The split for `use` of a folder or a data set on the hub; "" of a file or a mixture."""
    if is_hub_name(source):
        return _split_of(_load_hub(str(source)), str(source), use)
    path = Path(source)
    return _split_of(_data_files(path), str(path), use) if path.is_dir() else ""


def _files(folder: Path, use: str) -> list[Path]:
    """The files of a folder that hold the split for `use`."""
    found = _data_files(folder)
    return [Path(file) for file in found[_split_of(found, str(folder), use)]]


def _data_files(folder: Path) -> Any:
    """The files of a folder by split."""
    import datasets

    try:
        return datasets.load_dataset_builder(str(folder)).config.data_files
    except Exception as error:  # loaders raise errors of many kinds
        raise InputError(
            f"'{folder}' is a folder without files of rows ({reason(error)}); give one with {FILE_FORM}; or a file "
            f"({ROW_FORM})"
        ) from error


def _split_of(parts: Any, name: str, use: str) -> str:
    splits: Sequence[str] = _SPLITS_BY_USE[use]
    split = next((split for split in splits if split in parts), None)
    if split is None:
        raise InputError(f"'{name}' has no split {' or '.join(splits)} (it has {', '.join(parts)})")
    return split


@functools.lru_cache(maxsize=1)  # a source is read several times
def _load_hub(name: str) -> Any:
    require_hub(name, f"a file ({ROW_FORM})")
    import datasets

    try:
        return datasets.load_dataset(name, streaming=True)
    except Exception as error:  # loaders raise errors of many kinds
        raise InputError(f"cannot load '{name}' ({reason(error)}): pass a file ({ROW_FORM})") from error


def _read_hub(name: str, use: str) -> Iterator[Row]:
    parts = _load_hub(name)
    split = _split_of(parts, name, use)
    numbered = enumerate(_streamed(name, parts[split]), start=1)
    yield from _parsed(Value(f"{split}/{n}", f"{name}, {split} row {n}", value) for n, value in numbered)


def _streamed(name: str, values: Iterable[Any]) -> Iterator[Any]:
    try:
        yield from values
    except Exception as error:  # the network may fail anywhere, and loaders raise errors of many kinds
        raise InputError(
            f"'{name}' cannot be read on ({reason(error)}): run the command again, or download it and pass its folder"
        ) from error
