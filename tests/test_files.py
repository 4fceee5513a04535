"""Durable files, and hashes of values and contents."""

import dataclasses
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from l2m_jax import files


@dataclasses.dataclass(frozen=True)
class Inputs:
    rate: float
    workers: int = dataclasses.field(default=1, compare=False)


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it, and no later step runs."""


def test_a_fingerprint_covers_what_is_compared():
    assert files.fingerprint(Inputs(0.1)) == files.fingerprint(Inputs(0.1, workers=8))
    assert files.fingerprint(Inputs(0.1)) != files.fingerprint(Inputs(0.2))
    assert files.fingerprint([Inputs(0.1, 2)]) == files.fingerprint((Inputs(0.1, 3),))
    rows = [[1, 2], [], [3]]
    assert files.fingerprint("a", rows) == files.fingerprint("a", (np.array(row, np.int32) for row in rows))
    assert files.fingerprint("a", []) == files.fingerprint("a", iter(())) != files.fingerprint("a")


# Hashes of content


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "l2m_jax" / "content_hashes.json"


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The names of the files whose content is read."""
    names, digest = [], files.hashlib.file_digest

    def file_digest(content, name):
        names.append(Path(content.name).name)
        return digest(content, name)

    monkeypatch.setattr(files.hashlib, "file_digest", file_digest)
    return names


def written(path: Path, text: str, mtime: int = 1_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (mtime, mtime))
    return path


def test_an_unchanged_file_is_read_once(tmp_path, cache, opened):
    file = written(tmp_path / "rows.jsonl", "abc")
    first = files.content_hash(file)
    assert len(first) == 16 and int(first, 16)
    assert files.content_hash(file) == first
    assert opened == ["rows.jsonl"] and cache.is_file()


def test_a_changed_file_has_another_hash(tmp_path, cache, opened):
    first = files.content_hash(written(tmp_path / "rows.jsonl", "abc"))
    other = files.content_hash(written(tmp_path / "rows.jsonl", "abd", mtime=2_000))
    assert other != first
    assert files.content_hash(written(tmp_path / "rows.jsonl", "abc", mtime=3_000)) == first
    assert len(opened) == 3


def test_a_replaced_file_has_another_hash(tmp_path, cache):
    """Of the same size and time, as `cp -p` and archives leave them."""
    first = files.content_hash(written(tmp_path / "rows.jsonl", "abc"))
    written(tmp_path / "new", "abd").rename(tmp_path / "rows.jsonl")
    assert files.content_hash(tmp_path / "rows.jsonl") != first


def test_the_files_of_a_folder_are_remembered_one_by_one(tmp_path, cache, opened):
    for name in "abc":
        written(tmp_path / "folder" / name, name)
    first = files.content_hash(tmp_path / "folder")
    assert files.content_hash(tmp_path / "folder") == first
    written(tmp_path / "folder" / "b", "x", mtime=2_000)
    assert files.content_hash(tmp_path / "folder") != first
    assert opened == ["a", "b", "c", "b"]


def test_a_hash_follows_the_content_and_not_the_place(tmp_path, cache):
    for folder in ("a", "b"):
        written(tmp_path / folder / "config.json", "{}")
        written(tmp_path / folder / "sub" / "weights", "1")
    assert files.content_hash(tmp_path / "a" / "config.json") == files.content_hash(
        tmp_path / "b" / "config.json"
    )
    same = files.content_hash(tmp_path / "a")
    assert files.content_hash(tmp_path / "b") == same
    (tmp_path / "b" / "sub" / "weights").rename(tmp_path / "b" / "sub" / "renamed")
    assert files.content_hash(tmp_path / "b") != same
    written(tmp_path / "a" / "sub" / "weights", "2", mtime=2_000)
    assert files.content_hash(tmp_path / "a") != same


def test_patterns_choose_the_files_of_a_folder(tmp_path, cache, opened):
    written(tmp_path / "model" / "a.safetensors", "1")
    written(tmp_path / "model" / "config.json", "{}")
    written(tmp_path / "model" / "README.md", "text")
    patterns = ("*.safetensors", "config.json")
    chosen = files.content_hash(tmp_path / "model", patterns=patterns)
    assert opened == ["a.safetensors", "config.json"]
    written(tmp_path / "model" / "README.md", "other", mtime=2_000)
    assert files.content_hash(tmp_path / "model", patterns=patterns) == chosen
    written(tmp_path / "model" / "a.safetensors", "2", mtime=2_000)
    assert files.content_hash(tmp_path / "model", patterns=patterns) != chosen


@pytest.mark.parametrize("content", ['{"/some/fi', "[1, 2]", '"text"', b"\xff\xfe"])
def test_a_damaged_cache_is_ignored(tmp_path, cache, content):
    file = written(tmp_path / "rows.jsonl", "abc")
    first = files.content_hash(file)
    cache.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert files.content_hash(file) == first
    assert str(file) in json.loads(cache.read_text())


@pytest.mark.parametrize("entry", [None, [3], [3, 10**12, 5], "text"])
def test_a_damaged_entry_is_ignored(tmp_path, cache, entry):
    file = written(tmp_path / "rows.jsonl", "abc")
    first = files.content_hash(file)
    cache.write_text(json.dumps({str(file): entry}))
    assert files.content_hash(file) == first


def test_a_cache_that_cannot_be_written_is_ignored(tmp_path, monkeypatch):
    written(tmp_path / "no_folder", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no_folder"))
    file = written(tmp_path / "rows.jsonl", "abc")
    assert files.content_hash(file) == files.content_hash(file)


def test_files_that_are_gone_are_forgotten(tmp_path, cache):
    gone = written(tmp_path / "gone", "abc")
    files.content_hash(gone)
    gone.unlink()
    files.content_hash(written(tmp_path / "here", "abc"))
    assert list(json.loads(cache.read_text())) == [str(tmp_path / "here")]


def test_no_such_file(tmp_path, cache):
    with pytest.raises(FileNotFoundError):
        files.content_hash(tmp_path / "nothing")


# Files written completely or not at all


def test_text_is_replaced_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "sub" / "facts.json"
    files.write_json(path, {"a": Inputs(0.5), "b": (Path("x"),)})
    assert json.loads(path.read_text()) == {"a": {"rate": 0.5}, "b": ["x"]}
    old = path.read_text()

    def crash(*_):
        raise Killed

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(Killed):
        files.write_text(path, "new")
    assert path.read_text() == old and list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks the system for the name of an open file")
def test_contents_are_durable_before_they_have_their_name(tmp_path, monkeypatch):
    """Content first, then the name, then the folder that holds the name."""
    steps, fsync = [], os.fsync

    def sync(handle):
        steps.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name.partition(".txt")[0].lstrip("."))
        fsync(handle)

    def renaming(rename):
        def step(source, target):
            steps.append(f"rename to {Path(target).name}")
            rename(source, target)

        return step

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", renaming(os.replace))
    monkeypatch.setattr(os, "rename", renaming(os.rename))
    files.write_text(tmp_path / "facts.txt", "x")
    assert steps == ["facts", "rename to facts.txt", tmp_path.name]
    steps.clear()
    with files.writing(tmp_path / "model") as folder:
        (folder / "weights.txt").write_text("x")
    assert steps == ["weights", "model.unfinished", "rename to model", tmp_path.name]


def write(folder: Path, text: str) -> None:
    with files.writing(folder) as unfinished:
        (unfinished / "a").write_text(text)
        (unfinished / "b").write_text(text)


def content(folder: Path) -> list[str]:
    return [(folder / name).read_text() for name in ("a", "b")]


def test_a_folder_is_replaced(tmp_path):
    folder = tmp_path / "sub" / "model"
    for text in ("old", "new"):
        write(folder, text)
        assert content(folder) == [text, text]
        assert list(folder.parent.iterdir()) == [folder]
    with files.writing(folder) as unfinished:
        (unfinished / "a").write_text("x")
    assert [file.name for file in folder.iterdir()] == ["a"]


def test_an_error_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "model"
    write(folder, "old")
    with pytest.raises(KeyError), files.writing(folder) as unfinished:
        (unfinished / "a").write_text("new")
        raise KeyError
    assert content(folder) == ["old", "old"] and list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("step", range(9))
def test_a_kill_at_any_step_loses_no_complete_folder(tmp_path, monkeypatch, step):
    """The process ends before its n-th step on the file system, and another one goes on from what is there."""
    folder = tmp_path / "model"
    write(folder, "old")
    steps = []

    def until_killed(do):
        def counted(*args, **kwargs):
            if len(steps) >= step:
                raise Killed
            steps.append(do)
            return do(*args, **kwargs)

        return counted

    with monkeypatch.context() as patch:
        for module, name in ((os, "rename"), (os, "fsync"), (files.shutil, "rmtree")):
            patch.setattr(module, name, until_killed(getattr(module, name)))
        with pytest.raises(Killed):
            write(folder, "new")
    complete = [
        place for place in tmp_path.iterdir() if {"a", "b"} <= {file.name for file in place.iterdir()}
    ]
    assert any(content(place) in (["old", "old"], ["new", "new"]) for place in complete)
    # A second attempt that fails finds the old folder again, or has the new one.
    with pytest.raises(KeyError), files.writing(folder):
        raise KeyError
    assert content(folder) in (["old", "old"], ["new", "new"])
    assert list(tmp_path.iterdir()) == [folder]


def _caused(cause: Exception) -> Exception:
    error = ValueError("a library's own")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "no room"), True),
        (OSError(errno.EDQUOT, "no room"), True),
        (_caused(OSError(errno.ENOSPC, "no room")), True),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EIO, "broken"), False),
        (_caused(OSError(errno.ENOENT, "no such file")), False),
    ],
)
def test_a_full_disk_is_recognised_in_the_errors_of_all_libraries(error, full):
    assert files.disk_is_full(error) is full


def test_a_file_that_cannot_be_completed_takes_no_room(tmp_path):
    with pytest.raises(OSError), files.replacing(tmp_path / "file") as temporary:
        temporary.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "no room")
    assert not list(tmp_path.iterdir())
