"""Artefacts: what a run makes, each identified by its inputs.

The inputs of a phase are a frozen dataclass of exactly what changes its result: settings, other artefacts, and the
content of given files. Their hash is the artefact's key. What changes only cost or rounding is in the `Context`, and
in no key.
"""

import contextlib
import dataclasses
import functools
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from l2m_jax import files
from l2m_jax.errors import InputError, require_type
from l2m_jax.losses import Divergence
from l2m_jax.multihost import first

_RECORD = "inputs.json"
_RECORDED = {"key": str, "finished": bool, "inputs": dict, "files": dict}
# Written again when scores are known, and not read here.
_NOT_CHECKED = (_RECORD, "README.md")
_ANOTHER = "another "

Inputs = TypeVar("Inputs")


@dataclass(frozen=True)
class Source:
    """Something given to a run, identified by its content.

    Attributes:
        path: a file, a folder, or a hub name.
        content: hash of the file or folder; for a hub name, the name.
    """

    path: str = field(compare=False)
    content: str


@dataclass(frozen=True)
class Artefact(Generic[Inputs]):
    """A folder or file that a phase makes.

    Attributes:
        inputs: what it is made from, a frozen dataclass.
        path: where it is kept.
        progress: a folder for unfinished work, such as checkpoints; deleted when the artefact is finished.
        settings: maps fields of `inputs` to the config's names, for messages.
    """

    inputs: Inputs
    path: Path = field(compare=False)
    progress: Path | None = field(default=None, compare=False)
    settings: Mapping[str, str] = field(default_factory=dict, compare=False)

    @functools.cached_property
    def key(self) -> str:
        """16 hexadecimal digits that change with the inputs."""
        return files.fingerprint(type(self.inputs).__name__, described(self.inputs))

    @property
    def is_finished(self) -> bool:
        """Whether it exists, complete and made from these inputs. The first process looks, for all.

        Raises:
            InputError: a file of it is missing or has changed since it was written.
        """
        return first(lambda: self.is_finished_here)

    @property
    def is_finished_here(self) -> bool:
        """The same, as this process alone sees it. For one that may not communicate."""
        found = _read_record(self.path)
        if found is None or not found["finished"] or found["key"] != self.key or not self.path.exists():
            return False
        if (file := files.damaged(self.path, found["files"])) is not None:
            raise InputError(
                f"{file}: {'differs from what was written' if file.exists() else 'is missing'}; restore it, or "
                f"delete {self.path} to make it again"
            )
        return True

    def begin(self) -> None:
        """Records that the unfinished work belongs to this artefact."""
        first(lambda: self._write_record(_record_of(self.progress or self.path), finished=False))

    def finish(self, *, without: Collection[str] = ()) -> None:
        """Records that what is at `path` is complete.

        Args:
            without: names of files in the folder that have checksums of their own.
        """
        self._write_record(_record_of(self.path), finished=True, without=without)

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """For the first process: a folder to write into, which becomes `path` if the block ends without an error."""
        with files.writing(self.path) as folder:
            yield folder
            self._write_record(folder / _RECORD, finished=True, place=folder)
        self.drop_progress()

    def drop_progress(self) -> None:
        """Deletes what a finished artefact does not need any more: checkpoints, say."""
        if self.progress is not None:
            shutil.rmtree(self.progress, ignore_errors=True)

    def _write_record(
        self, file: Path, *, finished: bool, place: Path | None = None, without: Collection[str] = ()
    ) -> None:
        """Args: place: where the finished files are, if not at `path` yet."""
        record = {
            "key": self.key,
            "finished": finished,
            "inputs": described(self.inputs),
            "files": files.checksums(place or self.path, without={*_NOT_CHECKED, *without})
            if finished
            else {},
        }
        files.write_json(file, record)


def _record_of(place: Path) -> Path:
    """Within a folder, or beside a file (a path with a suffix)."""
    return place.with_name(f".{place.name}.{_RECORD}") if place.suffix else place / _RECORD


def _read_record(place: Path) -> dict[str, Any] | None:
    file = _record_of(place)
    if not (file.is_file() and place.exists()):  # a record beside a file may outlive it
        return None
    try:
        found = files.parse_json(file.read_bytes())
        for name, kind in _RECORDED.items():
            require_type(name, found[name], kind)
        for entry in found["files"].values():
            size, modified, digest = entry
            require_type("files", (size, modified), tuple[int, ...])
            require_type("files", digest, str)
        return {name: found[name] for name in _RECORDED}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file}: cannot read what {place} was made from ({error}); delete {place} to make it again"
        ) from error


def described(value: Any) -> Any:
    """Inputs as JSON: artefacts by their keys, sources by their content."""
    if isinstance(value, Artefact):
        return {"artefact": value.key}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f for f in dataclasses.fields(value) if f.compare and not _is_absent(f, value)]
        # Divergences without parameters differ in nothing but their class.
        kind = {"divergence": type(value).__name__} if isinstance(value, Divergence) else {}
        return kind | {f.name: described(getattr(value, f.name)) for f in fields}
    if isinstance(value, tuple | list):
        return [described(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): described(item) for name, item in value.items()}
    return value


def _is_absent(field: dataclasses.Field, value: Any) -> bool:
    """Whether a setting is at its default and newer than keys that must stay: its metadata says so."""
    return field.metadata.get("absent_at_default", False) and getattr(value, field.name) == field.default


def refuse_changed(artefacts: Iterable[Artefact]) -> None:
    """Refuses to continue if something exists that was made from other inputs. Changes nothing.

    Raises:
        InputError: says which settings differ, old and new, and what to do.
    """
    found = first(lambda: [change for artefact in artefacts for change in _changes(artefact)])
    if not found:
        return
    reasons = list(dict.fromkeys(reason for _, reasons in found for reason in reasons))
    # A change of an artefact among the inputs is reported for that artefact.
    reasons = [reason for reason in reasons if not reason.startswith(_ANOTHER)] or reasons
    raise InputError(
        f"what is kept was made with {', '.join(reasons)}. Choose another --workdir (with --shared for what should "
        f"stay in common), or move these away to make them anew: {', '.join(place for place, _ in found)}"
    )


def _changes(artefact: Artefact) -> Iterator[tuple[str, list[str]]]:
    """Places with something that was made from other inputs, and how these differ."""
    if artefact.is_finished_here:
        return  # a kill may have left a part of its progress
    for place in (artefact.path, artefact.progress):
        if place is None or not place.exists():
            continue
        record = _read_record(place)
        if record is None:
            # Hidden files are those of a write that a kill has ended.
            if place.is_file() or any(not file.name.startswith(".") for file in place.iterdir()):
                yield str(place), [f"no record of its inputs at {place}"]
        elif record["key"] != artefact.key:
            new = described(artefact.inputs)
            differing = list(_differences(record["inputs"], new, artefact.settings))
            replaced = [
                f"{_ANOTHER}{name.replace('_', ' ')}"
                for name in new
                if record["inputs"].get(name) != new[name]
            ]
            yield str(place), differing or replaced


def _differences(old: Any, new: Any, settings: Mapping[str, str], name: str = "") -> Iterator[str]:
    """ "training.batch_size 16 (now 32)" for each setting that differs, and what given files differ.

    Other artefacts among the inputs are left out. A name of `settings` with a space is a description: what differs
    below it is not listed.
    """
    if old == new:
        return
    setting = _setting(name, settings)
    dicts = [value for value in (old, new) if isinstance(value, dict)]
    if any("artefact" in value for value in dicts):
        return
    if any("content" in value for value in dicts):
        yield f"other content of {setting}"
    elif " " in setting or len(dicts) == 1:
        yield f"other settings of {setting}"
    elif dicts:
        for key in dict.fromkeys([*old, *new]):
            inner = f"{name}.{key}" if name else key
            yield from _differences(old.get(key), new.get(key), settings, inner)
    elif isinstance(old, list) and isinstance(new, list) and any(isinstance(v, dict) for v in [*old, *new]):
        if len(old) != len(new):
            yield f"other {setting}"
        for before, after in zip(old, new, strict=False):
            yield from _differences(before, after, settings, name)
    else:
        yield f"{setting} {old!r} (now {new!r})"


def _setting(name: str, settings: Mapping[str, str]) -> str:
    """The config's name of an input, by the longest part of its name that `settings` knows."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        head = ".".join(parts[:end])
        if head in settings:
            return ".".join([settings[head], *parts[end:]])
    return name
