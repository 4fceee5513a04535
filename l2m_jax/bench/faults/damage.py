"""Damages every file of a run, one at a time, at several moments, and starts the run again.

The damage must change nothing, be repaired, or be refused in one sentence that names the file. In the last case the
way out that the sentence offers is followed. At the end weights, scores, difficulty and answers must equal those of the
undamaged run, byte for byte.

Trials run one after another in this process, which has compiled the programs already.
"""

import contextlib
import importlib
import io
import itertools
import os
import re
import shutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from l2m_jax import progress
from l2m_jax.bench.faults.common import SCENARIOS, Outcome, Setting, Trial
from l2m_jax.run import data
from l2m_jax.training import store


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def overwrite(file: Path) -> None:
    """Writes other bytes in the middle; the size stays the same."""
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

# A copy of the run is taken at the n-th advance of the bar with this title. On-policy training has a single stage.
MOMENTS = {
    "teacher": 3,
    "the student's own answers": 1,
    "teacher's hidden states": 2,
    "student, stage 1/2": 3,
    "student, stage 2/2": 4,
    "student": 8,
    "student before: test": 1,
}
_SCENARIOS = ("run", "on-policy")
_RESULTS = ("*/model.safetensors", "difficulty.parquet", "*_responses.jsonl", "evaluation/*/*.jsonl")
_SCORES = "evaluation/*/results.json"
_ALONE = "--config.devices.num_processes=1"  # JAX has started already
_SHARD_EXAMPLES = 16  # of the teacher store, so that a tiny one has several shards


def results_of(workdir: Path) -> dict[str, bytes]:
    """What must not change: weights, scores, difficulty and answers, by their names."""
    files = [file for pattern in (*_RESULTS, _SCORES) for file in workdir.glob(pattern)]
    return {file.relative_to(workdir).as_posix(): file.read_bytes() for file in sorted(files)}


def train(flags: Sequence[str], workdir: Path) -> tuple[int, str]:
    """`l2m train` in this process. Returns the exit status (1 with a traceback) and what was printed as errors."""
    # By name, as a shell would: the commands are above this module.
    command = importlib.import_module("l2m_jax.cli.main")
    data.close_corpora()
    errors = io.StringIO()
    with (
        contextlib.redirect_stderr(errors),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        try:
            command.main(["train", *flags, f"--workdir={workdir}", _ALONE])
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            traceback.print_exc()
            status = 1
    return status, errors.getvalue()


@contextlib.contextmanager
def small_shards() -> Iterator[None]:
    before, store._SHARD_EXAMPLES = store._SHARD_EXAMPLES, _SHARD_EXAMPLES
    try:
        yield
    finally:
        store._SHARD_EXAMPLES = before


@contextlib.contextmanager
def copied_at(moments: dict[str, int], workdir: Path, copies: Path) -> Iterator[None]:
    """Copies `workdir` to `copies`/TITLE at each moment of a run in the block, as a kill would leave it."""
    seen: dict[str, int] = {}
    advance = progress.Bar.advance

    def advance_and_copy(bar: progress.Bar, steps: int = 1, **fields: str) -> None:
        advance(bar, steps, **fields)
        seen[bar._title] = seen.get(bar._title, 0) + 1
        if seen[bar._title] == moments.get(bar._title):
            copy(workdir, copies / bar._title.replace("/", " of "))

    progress.Bar.advance = advance_and_copy  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        progress.Bar.advance = advance


def copy(folder: Path, to: Path) -> None:
    """Copies with modification times. A file that is renamed or deleted meanwhile is left out."""

    def copy_file(source: str, target: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.copy2(source, target)

    with contextlib.suppress(shutil.Error):
        shutil.copytree(folder, to, copy_function=copy_file, dirs_exist_ok=True)


def files_of(folder: Path, before: Path | None) -> list[str]:
    """The files of a copy that are new or have changed since the copy before."""
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


def reference(setting: Setting, scenario: str) -> tuple[Path, dict[str, bytes]]:
    """The folder of an undamaged run in this process, with its copies, made once; and its results."""
    folder = setting.folder / "damage" / scenario
    if not (folder / "finished").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        with small_shards(), copied_at(MOMENTS, folder / "run", folder / "copies"):
            status, said = train(flags_of(setting, scenario), folder / "run")
        if status:
            raise RuntimeError(f"an undamaged {scenario} ended with {status}: {said}")
        (folder / "finished").touch()
    return folder, results_of(folder / "run")


def flags_of(setting: Setting, scenario: str) -> list[str]:
    """The flags of the scenario's command, without --workdir."""
    filled = [part.format(config=setting.config, workdir="") for part in SCENARIOS[scenario].command]
    return [part for part in filled if part.startswith("--config")]


def damaged(setting: Setting, outcomes: Sequence[Outcome]) -> Iterator[Trial]:
    """Every file at every moment at which it is new or has changed, with each kind of damage."""
    del outcomes
    for scenario in _SCENARIOS:
        folder, _ = reference(setting, scenario)
        before = None
        for place in (*sorted(folder.glob("copies/*"), key=lambda f: f.stat().st_mtime_ns), folder / "run"):
            names = files_of(place, None if place.name == "run" else before)
            before = place
            for name, damage in itertools.product(names, DAMAGES):
                run = partial(_try, setting, scenario, place, name, damage)
                yield Trial(f"{scenario}: {place.name}: {name} {damage}", scenario, run)


def _try(setting: Setting, scenario: str, place: Path, name: str, damage: str, folder: Path) -> Outcome:
    _, expected = reference(setting, scenario)
    with small_shards():
        found = trial(flags_of(setting, scenario), place, name, damage, folder / "run", expected)
    return Outcome(1, () if found in ("equal", "refused") else (found,), {"outcome": found[:7]})
