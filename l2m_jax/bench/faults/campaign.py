"""The campaign: goes through the trials of all kinds, keeps each result as it comes, and counts."""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from l2m_jax.bench.faults import damage, disk, kills
from l2m_jax.bench.faults.common import Outcome, Setting, Trial
from l2m_jax.errors import InputError
from l2m_jax.progress import console

_TRIALS = "trials.jsonl"

# A kind yields its trials one after another; it sees the outcomes of those before, in the same order in each call.
Kind = Callable[[Setting, Sequence[Outcome]], Iterator[Trial]]
KINDS: Mapping[str, Kind] = {
    "killed": kills.killed,
    "preempted": kills.preempted,
    "damaged": damage.damaged,
    "full disk": disk.full_disk,
}


def run(*, workdir: Path, kills: int = 50, seed: int = 0, only: str = "") -> dict[str, Any]:
    """Tries all kinds of faults on tiny runs in `workdir`. Trials that are recorded there are not repeated.

    The folder of a trial is kept if something was lost.

    Args:
        kills: the minimum number of processes to kill; a quarter as many are preempted.
        seed: of the instants and places of all faults.
        only: the only kind to try; empty for all.

    Returns:
        `rows`, one for each kind and scenario: trials, faults, and how many trials survived or lost something; and
        `lost`, what was lost, by trial.
    """
    if only and only not in KINDS:
        raise InputError(f"--only {only}: no such kind (known: {', '.join(KINDS)})")
    if kills < 1:
        raise InputError(f"--kills {kills}: must be at least 1")
    setting = Setting(workdir.absolute(), kills, seed)
    workdir.mkdir(parents=True, exist_ok=True)
    records = []
    for kind, trials in KINDS.items():
        if only in ("", kind):
            records += _try_all(kind, trials, setting)
    lost = {f"{r['kind']}: {r['trial']}": r["lost"] for r in records if r["lost"]}
    return {"seed": seed, "rows": _rows(records), "lost": lost}


def _try_all(kind: str, trials: Kind, setting: Setting) -> list[dict[str, Any]]:
    file = setting.folder / _TRIALS
    known = {}
    if file.is_file():
        found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        known = {r["trial"]: r for r in found if (r["kind"], r["seed"]) == (kind, setting.seed)}
    records, outcomes = [], []
    for trial in trials(setting, outcomes):
        record = known.get(trial.name)
        if record is None:
            record = {"kind": kind, "seed": setting.seed} | _try(trial, setting.folder / "trial")
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")
            console.print(
                f"  {kind}: {trial.name}: {'lost: ' + '; '.join(record['lost']) if record['lost'] else 'survived'} "
                f"({record['faults']} faults, {record['seconds']:.0f} s)",
                markup=False,
            )
        outcomes.append(Outcome(record["faults"], tuple(record["lost"]), record["facts"]))
        records.append(record)
    return records


def _try(trial: Trial, folder: Path) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    start = time.monotonic()
    outcome = trial.run(folder)
    if outcome.lost:
        kept = folder.with_name("lost") / trial.name.replace(" ", "_").replace("/", "-")
        shutil.rmtree(kept, ignore_errors=True)
        kept.parent.mkdir(exist_ok=True)
        folder.rename(kept)
    else:
        shutil.rmtree(folder)
    return {
        "trial": trial.name,
        "scenario": trial.scenario,
        "faults": outcome.faults,
        "lost": list(outcome.lost),
        "seconds": time.monotonic() - start,
        "facts": dict(outcome.facts),
    }


def _rows(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for kind, scenario in dict.fromkeys((r["kind"], r["scenario"]) for r in records):
        of = [r for r in records if (r["kind"], r["scenario"]) == (kind, scenario)]
        lost = sum(bool(r["lost"]) for r in of)
        rows.append(
            {
                "kind": kind,
                "scenario": scenario,
                "faults": sum(r["faults"] for r in of),
                "tried": len(of),
                "survived": len(of) - lost,
                "lost": lost,
            }
        )
    return rows
