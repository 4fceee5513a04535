"""Files that a phase leaves behind: written completely or not at all, and tied to what they were made from."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FINGERPRINT_FILE = "fingerprint.json"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


def fingerprint(*values: Any) -> str:
    """16 hexadecimal digits that change with any of `values` (dataclasses, dicts, sequences, numbers, strings)."""
    text = json.dumps([_plain(v) for v in values], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_text(path: Path, text: str) -> None:
    """Replaces `path` in one step, so that a reader sees the old text or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(_plain(value), indent=2, ensure_ascii=False) + "\n")


def is_finished(folder: Path, expected: str) -> bool:
    """Whether `folder` holds a finished artefact made from exactly the inputs behind `expected`."""
    file = folder / FINGERPRINT_FILE
    return file.is_file() and json.loads(file.read_text())["fingerprint"] == expected


@contextlib.contextmanager
def writing(folder: Path, made_from: str) -> Iterator[Path]:
    """A folder to write into that takes the place of `folder` once the block ends without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.unfinished"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    yield temporary
    (temporary / FINGERPRINT_FILE).write_text(json.dumps({"fingerprint": made_from}) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
