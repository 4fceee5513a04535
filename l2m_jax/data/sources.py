"""Rows of text, read from JSON-lines files and from data sets on the hub."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from l2m_jax import files
from l2m_jax.data.online import require_hub
from l2m_jax.data.rows import (
    FORMATS,
    Row,
    parse_row,
    refuse_mixture,
    require_single_turn,
    row_format,
)
from l2m_jax.errors import InputError

DOLLY = "databricks/databricks-dolly-15k"
ROW_FORM = f"JSON lines with {'; or '.join(FORMATS.values())}"
_SPLITS_BY_USE = {"train": ("train",), "evaluation": ("test", "validation", "valid", "dev", "train")}


def is_hub_name(source: str | Path) -> bool:
    """Whether `source` is a data set on the hub ("owner/name") and not a file."""
    path, text = Path(source), str(source)
    looks_like_a_name = text.count("/") == 1 and not path.suffix and not text.startswith((".", "/"))
    return looks_like_a_name and not path.exists()


def read_rows(source: str | Path, use: str = "train") -> Iterator[Row]:
    """The rows of a JSON-lines file or of a data set on the hub ("owner/name"), read lazily.

    Args:
        source: path or name.
        use: "train" or "evaluation", which selects the split of a data set on the hub.

    Raises:
        InputError: as in `read_jsonl`; or the hub cannot be reached.
    """
    if is_hub_name(source):
        return _read_hub(str(source), _SPLITS_BY_USE[use])
    return read_jsonl(source)


def check_rows(source: str | Path, prompt: str = "alpaca") -> None:
    """Raises InputError if the file `source` is missing, or its first row does not parse or fit the prompt.

    Does not use the hub.
    """
    if not is_hub_name(source):
        row = next(read_jsonl(source))
        if prompt == "alpaca":
            require_single_turn(row)


def read_jsonl(path: str | Path) -> Iterator[Row]:
    """Rows of a file in one of the formats of `rows.py`, one JSON object per line.

    A row without an `id` is called "file/line".

    Raises:
        InputError: the file does not exist, has no rows, mixes formats, or has a line that is of none.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"'{path}' is a folder; give a file ({ROW_FORM})")
    if not path.is_file():
        raise InputError(f"no such file '{path}' ({ROW_FORM}; or a name on the hub such as {DOLLY})")
    return _read_lines(path)


def _read_lines(path: Path) -> Iterator[Row]:
    rows = _parsed(
        (f"{path.stem}/{place.rpartition(' ')[2]}", place, value) for place, value in files.json_lines(path)
    )
    first = next(rows, None)
    if first is None:
        raise InputError(f"{path} has no rows ({ROW_FORM})")
    yield first
    yield from rows


def _parsed(values: Iterable[tuple[str, str, Any]]) -> Iterator[Row]:
    """Rows from their default ids, places and values, all in the format of the first."""
    kind = None
    for default_id, place, value in values:
        found = row_format(value, place)
        kind = kind or found
        refuse_mixture(value, found, kind, place)
        yield parse_row(value, kind, default_id, place)


@functools.lru_cache(maxsize=1)  # a split reads its source several times; the rows themselves stay on disk
def _load_hub(name: str) -> Any:
    require_hub(name, f"a file ({ROW_FORM})")
    import datasets

    try:
        return datasets.load_dataset(name)
    except Exception as error:  # loaders raise errors of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot load '{name}' ({reason}): pass a file ({ROW_FORM})") from error


def _read_hub(name: str, splits: Sequence[str]) -> Iterator[Row]:
    parts = _load_hub(name)
    split = next((split for split in splits if split in parts), None)
    if split is None:
        raise InputError(f"'{name}' has no split {' or '.join(splits)} (it has {', '.join(parts)})")
    numbered = enumerate(parts[split], start=1)
    yield from _parsed((f"{split}/{n}", f"{name}, {split} row {n}", value) for n, value in numbered)
