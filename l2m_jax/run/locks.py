"""One run at a time in a folder."""

import contextlib
import datetime
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from l2m_jax import files
from l2m_jax.errors import InputError
from l2m_jax.multihost import first
from l2m_jax.progress import console

_LOCK, _OWNER = ".lock", ".lock_owner.json"


class InUse(InputError):
    """Another run works in the folder."""


@contextlib.contextmanager
def held(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds `folder` for this run, and creates it. A process that holds it already may do so again.

    The operating system releases the lock when its process ends, however it ends, and a network file system when the
    lock's host is gone. A file that is left behind blocks nobody.

    Args:
        wait: wait for another run, instead of refusing this one.

    Raises:
        InputError: another run holds the folder; names its host, process and start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock((folder / _LOCK).resolve(), thread_local=False, is_singleton=True)
    first(lambda: _acquire(lock, folder, wait))
    try:
        yield
    finally:
        if lock.lock_counter == 1:  # the next to wait must not be told of this process
            with contextlib.suppress(OSError):
                (folder / _OWNER).unlink()
        lock.release()


def _acquire(lock: FileLock, folder: Path, wait: bool) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise InUse(
                f"{folder}: in use by {_owner(folder)}; wait for it, end it, or choose another --workdir"
            ) from None
        console.print(f"  waiting for {_owner(folder)}, which works in {folder}", markup=False)
        lock.acquire()
    now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    with contextlib.suppress(OSError):  # on a full disk the owner is not named, but holds the lock
        files.write_json(
            folder / _OWNER, {"host": socket.gethostname(), "process": os.getpid(), "since": now}
        )


def _owner(folder: Path) -> str:
    try:
        found = json.loads((folder / _OWNER).read_text(encoding="utf-8"))
        return f"process {found['process']} on {found['host']} since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"  # which has just begun
