"""Files that survive a crash: each is written completely or not at all. And hashes of values and of files."""

import contextlib
import dataclasses
import errno
import hashlib
import io
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from l2m_jax.errors import InputError, reason

_DIGITS = 16
# No row of text is longer; a file without line ends must not be read into memory as one line.
_LONGEST_LINE = 1 << 26
COMPRESSED = (".gz", ".zst")  # JSON lines that are decompressed as they are read


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.compare}
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    as_list = getattr(value, "tolist", None)  # of NumPy's arrays
    return value if as_list is None else as_list()


def fingerprint(*values: Any) -> str:
    """16 hexadecimal digits that change with any of `values` (dataclasses, dicts, sequences, arrays, numbers, strings).

    Dataclass fields declared with `compare=False` do not count. An iterator counts as the list of its items, and holds
    one of them at a time.
    """
    found = hashlib.sha256()
    for piece in _json_pieces(values):
        found.update(piece.encode())
    return found.hexdigest()[:_DIGITS]


def _json_pieces(values: Iterable[Any]) -> Iterator[str]:
    """The JSON of a list, piece by piece."""
    yield "["
    for i, value in enumerate(values):
        if i:
            yield ", "
        if isinstance(value, Iterator):
            yield from _json_pieces(value)
        else:
            yield json.dumps(_plain(value), sort_keys=True, ensure_ascii=False)
    yield "]"


def content_hash(path: Path, *, patterns: Sequence[str] | None = None) -> str:
    """16 hexadecimal digits that change with the content of a file, or with the files of a folder.

    Each file is read once: its hash is remembered, by path, size, modification time and inode, in `cache_folder()`.

    Args:
        path: a file, or a folder whose relative file names and contents count.
        patterns: globs relative to the folder, such as "*.safetensors"; only files that match one of them count.
            None: all files, subfolders included. Ignored for a file.

    Raises:
        FileNotFoundError: no such file or folder.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        return _hashes([path])[0][:_DIGITS]
    matches = {file for pattern in patterns or ("**/*",) for file in path.glob(pattern) if file.is_file()}
    found = sorted(matches)
    names = [file.relative_to(path).as_posix() for file in found]
    return fingerprint(list(zip(names, _hashes(found), strict=True)))


def _hashes(found: Sequence[Path]) -> list[str]:
    """The SHA-256 of files, whose content is read only where it is not remembered."""
    known, read = _remembered_hashes(), {}
    hashes = []
    for file in found:
        # The status from before reading: had the file changed meanwhile, the entry would never match.
        status = file.stat()
        match known.get(str(file)):
            case [status.st_size, status.st_mtime_ns, status.st_ino, str(remembered)]:
                hashes.append(remembered)
                continue
        hashes.append(digest(file))
        read[str(file)] = [status.st_size, status.st_mtime_ns, status.st_ino, hashes[-1]]
    if read:
        kept = {name: entry for name, entry in known.items() if os.path.exists(name)}
        with contextlib.suppress(OSError, RuntimeError):
            write_text(_hash_cache(), json.dumps(kept | read))
    return hashes


def checksums(place: Path, *, without: Collection[str] = ()) -> dict[str, list]:
    """Size, modification time and hash of a file, or of each file of a folder, by name relative to `place`.

    Args:
        without: names relative to the folder that do not count.
    """
    found = {}
    for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
        name = file.relative_to(place).as_posix()
        if file.is_file() and name not in without:
            status = file.stat()
            found[name] = [status.st_size, status.st_mtime_ns, digest(file)]
    return found


def damaged(place: Path, recorded: Mapping[str, Sequence]) -> Path | None:
    """The first file that is missing or differs from what `checksums` recorded; None if all are intact.

    Reads only files with another size or modification time, such as copies.
    """
    for name, (size, modified, hexadecimal) in recorded.items():
        file = place / name if name != "." else place
        if not file.is_file():
            return file
        status = file.stat()
        if status.st_size != size or (
            status.st_mtime_ns != modified and _hashes([file.absolute()]) != [hexadecimal]
        ):
            return file
    return None


def digest(file: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits. Always reads the file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/l2m_jax`, or `~/.cache/l2m_jax`: hashes and compiled programs, which are made again if lost.

    Raises:
        RuntimeError: there is no home folder.
    """
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "l2m_jax"


def _hash_cache() -> Path:
    return cache_folder() / "content_hashes.json"


def _remembered_hashes() -> dict[str, Any]:
    """Empty where the cache is missing, unreadable or damaged: files are then read again."""
    try:
        known = json.loads(_hash_cache().read_text(encoding="utf-8"))
    except (OSError, RuntimeError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that a disk or a quota is full.

    Libraries that write from Rust or C++ keep only the words of the system's error.
    """
    words = [os.strerror(number) for number in _FULL_DISK]
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL_DISK:
            return True
        if any(said in str(error) for said in words):
            return True
        error = error.__cause__ or error.__context__
    return False


def parse_json(text: bytes) -> Any:
    """The value of JSON in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: not UTF-8, not JSON, nested too deeply, or with half of a surrogate pair, which no file can hold.
    """
    decoded = text.decode("utf-8-sig")
    try:
        value = json.loads(decoded)
        if "\\u" in decoded:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def read_json(file: Path, way_out: str = "fetch it again") -> Any:
    """The value of a JSON file.

    Raises:
        InputError: the file cannot be read, or is not JSON; the message ends with `way_out`.
    """
    try:
        return parse_json(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file} cannot be read ({reason(error)}); {way_out}") from error
    except ValueError as error:
        raise InputError(f"{file} is not JSON ({reason(error)}); {way_out}") from error


def json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    """The value of each line that is not blank, with its place ("FILE, line 3"). Read lazily, also if compressed.

    Raises:
        InputError: the file cannot be read, or a line is not JSON; the place is named.
    """
    try:
        with _opened(file) as lines:
            for number in itertools.count(1):
                line, place = lines.readline(_LONGEST_LINE), f"{file}, line {number}"
                if not line:
                    return
                if len(line) == _LONGEST_LINE:
                    raise InputError(
                        f"{place}: longer than {_LONGEST_LINE >> 20} MiB; expected one object per line"
                    )
                if not line.strip():
                    continue
                try:
                    value = parse_json(line)
                except ValueError as error:
                    raise InputError(
                        f"{place}: not JSON ({reason(error)}); expected one object per line, in UTF-8"
                    ) from error
                yield place, value
    except OSError as error:
        raise InputError(
            f"{file} cannot be read ({reason(error)}); check the file and its permissions"
        ) from error


def _opened(file: Path) -> IO[bytes]:
    if file.suffix not in COMPRESSED:
        return file.open("rb")
    import pyarrow

    stream: Any = pyarrow.input_stream(str(file), compression="detect")  # by the suffix
    return io.BufferedReader(stream)


def write_text(path: Path, text: str) -> None:
    """Replaces `path` atomically: a reader sees the old text or the new one, even after a power failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write instead of `path`, which it replaces atomically and durably if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.unfinished")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """As `write_text`, for dataclasses, dicts, sequences, numbers and strings."""
    write_text(path, json.dumps(_plain(value), indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which replaces `folder` once the block ends without an error.

    What was at `folder` is deleted only after the new folder is complete and in place. A process that is killed
    between the two renames leaves the old folder under another name; the next call puts it back.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished, old = (folder.parent / f".{folder.name}.{state}" for state in ("unfinished", "old"))
    if old.exists() and not folder.exists():
        os.rename(old, folder)
    for leftover in (unfinished, old):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        _sync_tree(unfinished)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if folder.exists():
        os.rename(folder, old)
    os.rename(unfinished, folder)
    _sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(parent, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(parent))


def _sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
