"""Fills the disk at several moments of a run, makes room, and starts the run again.

The work directory is on a small file system in memory (`mount`, so root only). A file fills it at a moment of the run
but for a few bytes, so that later writes break off in different places. The run must end with status 2 and one sentence,
or finish if these bytes suffice. After room is made, the same command must finish with the results of an undisturbed
run.
"""

import contextlib
import itertools
import subprocess
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from l2m_jax import files, progress
from l2m_jax.bench.faults.common import Outcome, Setting, Trial
from l2m_jax.bench.faults.damage import MOMENTS, flags_of, reference, results_of, small_shards, train
from l2m_jax.progress import console

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

    def advance_and_fill(bar: progress.Bar, steps: int = 1, **fields: str) -> None:
        nonlocal seen
        advance(bar, steps, **fields)
        seen += bar._title == title
        if seen == number and not ballast.exists():
            fill(ballast, left)

    progress.Bar.advance = advance_and_fill  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        progress.Bar.advance = advance


def full_disk(setting: Setting, outcomes: Sequence[Outcome]) -> Iterator[Trial]:
    """Every moment, each with several numbers of bytes left. There are no trials without the right to mount."""
    del outcomes
    with small_disk(setting.folder / "disk") as mounted:
        pass
    if not mounted:
        console.print("  full disk: mounting a small file system needs root; not tried")
        return
    for (title, at), left in itertools.product([(_START, 0), *MOMENTS.items()], _LEFT):
        scenario = "on-policy" if title == "student" else "run"
        yield Trial(
            f"{title}, {left} bytes left", scenario, partial(_try, setting, scenario, title, at, left)
        )


def _try(setting: Setting, scenario: str, title: str, at: int, left: int, folder: Path) -> Outcome:
    flags = flags_of(setting, scenario)
    _, expected = reference(setting, scenario)
    with small_disk(folder / "disk"), small_shards():
        workdir, ballast = folder / "disk" / "run", folder / "disk" / "ballast"
        with filled_at(title, at, ballast, left):
            status, said = train(flags, workdir)
        lost = _wrong(status, said)
        ballast.unlink()
        again, said = train(flags, workdir)
        if again or results_of(workdir) != expected:
            lost += (f"after room was made: status {again}, {said[-1500:] or 'other results'}",)
    return Outcome(1, lost, {"outcome": "refused" if status else "finished"})


def _wrong(status: int, said: str) -> tuple[str, ...]:
    if status == 0:
        return ()
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    if status != 2 or "Traceback" in said or len(lines) != 1 or "disk" not in lines[0]:
        return (f"status {status}: {said[-1500:]}",)
    return ()
