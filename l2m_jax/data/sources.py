"""Rows of text, read from JSON-lines files and from data sets on the hub."""

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from l2m_jax import files
from l2m_jax.data.online import require_hub
from l2m_jax.errors import InputError

DOLLY = "databricks/databricks-dolly-15k"
ROW_FORM = "JSON lines with instruction, input, output"
_SPLITS_BY_USE = {"train": ("train",), "evaluation": ("test", "validation", "valid", "dev", "train")}


class Row(NamedTuple):
    """One example as text. `references` are its correct answers; training uses the first."""

    id: str
    instruction: str
    input: str
    references: tuple[str, ...]
    category: str = ""


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


def check_rows(source: str | Path) -> None:
    """Raises InputError if the file `source` is missing, or its first row does not parse. Does not use the hub."""
    if not is_hub_name(source):
        next(read_jsonl(source))


def read_jsonl(path: str | Path) -> Iterator[Row]:
    """Rows of a file in either of Dolly's forms, one JSON object per line.

    The fields are `instruction`; `input` or `context`, which may be missing or empty; `output` or `response`, a
    string or a list of equally correct strings; and optionally `category` or `topic`. Other fields are ignored,
    including `prompt`, which is made from the first two. A row without an `id` is called "file/line".

    Raises:
        InputError: the file does not exist, has no rows, or has a line that is not of this form.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"'{path}' is a folder; give a file ({ROW_FORM})")
    if not path.is_file():
        raise InputError(f"no such file '{path}' ({ROW_FORM}; or a name on the hub such as {DOLLY})")
    return _read_lines(path)


def _read_lines(path: Path) -> Iterator[Row]:
    empty = True
    for place, value in files.json_lines(path):
        yield _row(value, f"{path.stem}/{place.rpartition(' ')[2]}", place)
        empty = False
    if empty:
        raise InputError(f"{path} has no rows ({ROW_FORM})")


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
    for number, value in enumerate(parts[split], start=1):
        yield _row(value, f"{split}/{number}", f"{name}, {split} row {number}")


def _row(value: Any, default_id: str, place: str) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{place}: expected a JSON object, not {_shown(value)}")

    def text(*names: str, needed: bool = False) -> str:
        found = next((value[name] for name in names if value.get(name) is not None), None)
        if found is None and needed:
            raise InputError(f"{place}: no field '{names[0]}' (fields: {', '.join(value) or 'none'})")
        if found is not None and not isinstance(found, str):
            raise InputError(f"{place}: '{names[0]}' must be a string, not {_shown(found)}")
        return found or ""

    answer = next((value[name] for name in ("output", "response") if value.get(name) is not None), None)
    if answer is None:
        raise InputError(f"{place}: no field 'output' (or 'response'; fields: {', '.join(value) or 'none'})")
    references = [answer] if isinstance(answer, str) else answer
    if not isinstance(references, list) or not all(isinstance(reference, str) for reference in references):
        raise InputError(f"{place}: 'output' must be a string or a list of strings, not {_shown(answer)}")
    return Row(
        id=default_id if value.get("id") is None else str(value["id"]),
        instruction=text("instruction", needed=True),
        input=text("input", "context"),
        references=tuple(reference for reference in references if reference.strip()),
        category=text("category", "topic"),
    )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else text[:37] + "..."
