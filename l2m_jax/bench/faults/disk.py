"""Fills the disk at several moments of a run, makes room, and starts the run again.

The work directory is on a small file system in memory (`mount`, so root only). A file fills it at a moment of the run,
up to a rest that breaks off later writes in different places. The run must end with status 2 and one sentence, or finish if
the rest suffices; after room is made, the same command must finish, with the results of an undisturbed run.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from l2m_jax import files, progress
from l2m_jax.bench.faults.damage import MOMENTS, results_of, small_blocks, train

_SIZE = "256m"
_LEFT = (0, 20_000, 60_000)  # bytes left free
_START = "start"


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of `_SIZE` at `folder`; False where it cannot be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(file: Path, left: int) -> None:
    """Writes `file` until the disk is full, and then frees `left` bytes."""
    size = 0
    with file.open("wb", buffering=0) as opened:
        try:
            while True:
                size += opened.write(b"\0" * 65536)
        except OSError as error:
            if not files.disk_is_full(error):
                raise
        opened.truncate(max(0, size - left))


@contextlib.contextmanager
def filled_at(title: str, number: int, ballast: Path, left: int) -> Iterator[None]:
    """Fills the disk of `ballast` at the n-th advance of the bar with this title, or at once (`_START`)."""
    if title == _START:
        fill(ballast, left)
        yield
        return
    seen, advance = 0, progress.Bar.advance

    def advance_and_fill(bar: progress.Bar, *arguments, **fields) -> None:
        nonlocal seen
        advance(bar, *arguments, **fields)
        seen += bar._title == title
        if seen == number and not ballast.exists():
            fill(ballast, left)

    progress.Bar.advance = advance_and_fill
    try:
        yield
    finally:
        progress.Bar.advance = advance


def run(flags: Sequence[str], folder: Path, expected: dict[str, bytes], left: Sequence[int] = _LEFT) -> dict:
    """All trials of one configuration.

    Args:
        flags: of `l2m train`, without --workdir.
        folder: where the small file systems are mounted.
        expected: `results_of` an undisturbed run.
    """
    counts, defects = {"refused": 0, "finished": 0}, []
    for number, ((title, at), rest) in enumerate(
        (m, r) for m in [(_START, 0), *MOMENTS.items()] for r in left
    ):
        with small_disk(folder / str(number)) as mounted, small_blocks():
            if not mounted:
                return {**counts, "skipped": "mounting a small file system needs root"}
            workdir, ballast = folder / str(number) / "run", folder / str(number) / "ballast"
            with filled_at(title, at, ballast, rest):
                status, said = train(flags, workdir)
            wrong = _wrong(status, said)
            ballast.unlink()
            again, said = train(flags, workdir)
            if again or results_of(workdir) != expected:
                wrong = wrong or f"after room was made: status {again}, {said[-1500:] or 'other results'}"
        if wrong:
            defects.append({"moment": title, "left": rest, "outcome": wrong})
            print(f"{title}, {rest} bytes left: {wrong}", file=sys.stderr, flush=True)
        else:
            counts["refused" if status else "finished"] += 1
    return {**counts, "defects": defects}


def _wrong(status: int, said: str) -> str | None:
    if status == 0:
        return None
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    if status != 2 or "Traceback" in said or len(lines) != 1 or "disk" not in lines[0]:
        return f"status {status}: {said[-1500:]}"
    return None
