"""Damages every file of a run, one at a time, at several moments, and starts the run again.

The damage must change nothing, be mended, or be refused in one sentence that names the file. In the last case the way
out that the sentence offers is followed. At the end weights, scores, difficulty and answers must equal those of the
undamaged run, byte for byte.

Trials run one after another in this process, which has compiled the programs already.
"""

import contextlib
import io
import itertools
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from l2m_jax import progress
from l2m_jax.cli import main as command
from l2m_jax.run import data
from l2m_jax.training import store


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def overwrite(file: Path) -> None:
    """Other bytes in the middle; the size stays."""
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.seek(size // 3)
        opened.write(b"\xa7Z" * max(1, min(64, size // 6)))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "emptied": empty,
    "overwritten": overwrite,
    "removed": os.unlink,
}

# A copy of the run is taken at the n-th advance of the bar with this title.
MOMENTS = {
    "teacher": 2,
    "the student's own answers": 1,
    "teacher's hidden states": 2,
    "student, stage 2/4": 2,
    "student, stage 4/4": 2,
    "l2m: test": 1,
}
FINISHED = "finished"
_RESULTS = ("*/model.safetensors", "difficulty.parquet", "*_responses.jsonl", "evaluation/*/*.jsonl")
_SCORES = "evaluation/*/results.json"
_ALONE = "--config.devices.num_processes=1"  # JAX has started already
_BLOCK = 16  # examples of a block of the teacher store, so that a tiny one has several


def results_of(workdir: Path) -> dict[str, bytes]:
    """What must not change: weights, scores, difficulty and answers, by their names."""
    files = [file for pattern in (*_RESULTS, _SCORES) for file in workdir.glob(pattern)]
    return {file.relative_to(workdir).as_posix(): file.read_bytes() for file in sorted(files)}


def train(flags: Sequence[str], workdir: Path) -> tuple[int, str]:
    """`l2m train` in this process. Returns the exit status (1 with a traceback) and what was printed as errors."""
    data.open_corpus.cache_clear()
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), open(os.devnull, "w") as nowhere:
        before, progress.console.file = progress.console.file, nowhere
        try:
            command.main(["train", *flags, f"--workdir={workdir}", _ALONE])
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            traceback.print_exc()
            status = 1
        finally:
            progress.console.file = before
    return status, errors.getvalue()


@contextlib.contextmanager
def small_blocks() -> Iterator[None]:
    before, store._BLOCK = store._BLOCK, _BLOCK
    try:
        yield
    finally:
        store._BLOCK = before


@contextlib.contextmanager
def copied_at(moments: dict[str, int], workdir: Path, copies: Path) -> Iterator[None]:
    """Copies `workdir` to `copies`/TITLE at each moment of a run in the block, as a kill would leave it."""
    seen: dict[str, int] = {}
    advance = progress.Bar.advance

    def advance_and_copy(bar: progress.Bar, *arguments, **fields) -> None:
        advance(bar, *arguments, **fields)
        seen[bar._title] = seen.get(bar._title, 0) + 1
        if seen[bar._title] == moments.get(bar._title):
            copy(workdir, copies / bar._title.replace("/", " of "))

    progress.Bar.advance = advance_and_copy
    try:
        yield
    finally:
        progress.Bar.advance = advance


def copy(folder: Path, to: Path) -> None:
    """With modification times. A file that is renamed or deleted meanwhile is left out."""

    def copy_file(source: str, target: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.copy2(source, target)

    with contextlib.suppress(shutil.Error):
        shutil.copytree(folder, to, copy_function=copy_file, dirs_exist_ok=True)


def files_of(folder: Path, before: Path | None) -> list[str]:
    """The files of a copy that the one before has not, or has with another content."""
    found = []
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and not (
            before and (before / name).is_file() and (before / name).read_bytes() == file.read_bytes()
        ):
            found.append(name)
    return found


def trial(flags: Sequence[str], copy_of: Path, name: str, damage: str, folder: Path, expected: dict) -> str:
    """One damaged file. Returns "equal", "refused" (and equal after the way out), or what is wrong."""
    shutil.rmtree(folder, ignore_errors=True)
    copy(copy_of, folder)
    DAMAGES[damage](folder / name)
    status, said = train(flags, folder)
    outcome = "equal"
    if status == 2:
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        if "Traceback" in said or len(lines) != 1 or str(folder) not in lines[0]:
            return f"refused without naming a file: {said[-300:]}"
        outcome = "refused"
        out = re.search(
            r"(?:delete|move these away to make them anew:) (.+?)(?: to (?:make|train|evaluate)|$)", lines[0]
        )
        if out is None:
            return f"refused without a way out: {lines[0]}"
        for place in re.split(r" and |, ", out[1]):
            shutil.rmtree(place) if Path(place).is_dir() else Path(place).unlink(missing_ok=True)
        status, said = train(flags, folder)
    if status != 0:
        return f"status {status}: {said[-2000:]}"
    found = results_of(folder)
    differing = [key for key in sorted(expected.keys() | found.keys()) if found.get(key) != expected.get(key)]
    return f"silently different: {', '.join(differing)}" if differing else outcome


def run(flags: Sequence[str], folder: Path, moments: dict[str, int] = MOMENTS, share: int = 1) -> dict:
    """All trials of one configuration.

    Args:
        flags: of `l2m train`, without --workdir.
        folder: for the run, its copies and the trials.
        share: only every n-th trial, for a quick look.

    Returns:
        How many trials ended in each way, and the defects.
    """
    whole, copies = folder / "run", folder / "copies"
    with small_blocks():
        with copied_at(moments, whole, copies):
            status, said = train(flags, whole)
        if status:
            raise RuntimeError(f"the undamaged run failed: {said}")
        expected = results_of(whole)
        stages = [
            (name, copies / name)
            for title in moments
            if (copies / (name := title.replace("/", " of "))).is_dir()
        ]
        counts, defects, before = {"equal": 0, "refused": 0}, [], None
        number = itertools.count()
        for moment, place in [*stages, (FINISHED, whole)]:
            names = files_of(place, None if place == whole else before)
            before = place
            for name, damage in itertools.product(names, DAMAGES):
                if next(number) % share:
                    continue
                outcome = trial(flags, place, name, damage, folder / "trial", expected)
                if outcome in counts:
                    counts[outcome] += 1
                else:
                    defects.append({"moment": moment, "file": name, "damage": damage, "outcome": outcome})
                    print(f"{moment}: {name} {damage}: {outcome}", file=sys.stderr, flush=True)
    return {**counts, "defects": defects, "moments": [name for name, _ in stages]}
