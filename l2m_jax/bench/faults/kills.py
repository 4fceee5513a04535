"""Kills (SIGKILL) and preemptions (SIGTERM) at random instants, spread over all phases of each scenario."""

import random
import signal
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from l2m_jax.bench.faults.common import SCENARIOS, Outcome, Setting, Trial
from l2m_jax.preemption import EXIT_STATUS

_MOST_IN_A_TRIAL = 3
_OTHERS_END = 120  # seconds in which the other processes of a run must notice that one is gone


def killed(setting: Setting, outcomes: Sequence[Outcome]) -> Iterator[Trial]:
    """Trials until `setting.kills` processes were killed; each kills up to three times before it runs to the end."""
    yield from _trials(setting, outcomes, signal.SIGKILL, setting.kills)


def preempted(setting: Setting, outcomes: Sequence[Outcome]) -> Iterator[Trial]:
    """A quarter as many preemptions."""
    yield from _trials(setting, outcomes, signal.SIGTERM, -(-setting.kills // 4))


def _trials(
    setting: Setting, outcomes: Sequence[Outcome], number: signal.Signals, wanted: int
) -> Iterator[Trial]:
    names = list(SCENARIOS)
    offsets = {name: random.Random(f"{setting.seed} {name}").random() for name in names}
    count = 0
    while sum(outcome.faults for outcome in outcomes) < wanted:
        scenario = names[count % len(names)]
        own = random.Random(f"{setting.seed} {number.name} {count}")
        # Golden-ratio steps through the phases: any number of trials spreads them evenly.
        first = (offsets[scenario] + (count // len(names)) * 0.6180339887) % 1
        places = sorted([first, *(own.uniform(first, 1) for _ in range(own.randrange(_MOST_IN_A_TRIAL)))])
        instants = [(place, own.random()) for place in places]
        yield Trial(
            f"{count:03} {scenario}", scenario, partial(_try, setting, scenario, number, instants, own)
        )
        count += 1


def _try(
    setting: Setting,
    scenario: str,
    number: signal.Signals,
    instants: Sequence[tuple[float, float]],
    own: random.Random,
    folder: Path,
) -> Outcome:
    """Sends the signal at each of `instants` (phase and instant within it, each from 0 to 1), then runs to the end."""
    workdir, timeline = folder / "run", setting.reference(scenario).timeline
    facts: dict = {"phases": []}
    lost: list[str] = []
    for place, fraction in instants:
        phase, seconds = timeline[int(place * len(timeline))]
        started = setting.start(scenario, workdir)
        if started.wait_for(phase):
            time.sleep(fraction * seconds)
        struck = own.choice(started.processes)
        if struck.poll() is not None:
            started.wait()
            break  # it was faster than the reference, and has ended
        facts["phases"].append(started.phases[-1][0])
        struck.send_signal(number)
        begun = time.monotonic()
        statuses = started.wait(_OTHERS_END)
        facts.setdefault("seconds_to_end", []).append(time.monotonic() - begun)
        allowed = {EXIT_STATUS}
        # Before the program has begun and after its results are written, signals are not handled.
        if facts["phases"][-1] in ("start", timeline[-1][0]):
            allowed |= {0, -signal.SIGTERM}
        # The other processes wait for one that they never met, and then say so.
        if facts["phases"][-1] == "start" and len(statuses) > 1:
            allowed |= {1}
        lost += _wrong(number, statuses, started.processes.index(struck), allowed)
    lost += setting.finish(scenario, workdir)
    return Outcome(len(facts["phases"]), tuple(lost), facts)


def _wrong(number: signal.Signals, statuses: list[int], struck: int, allowed: set[int]) -> list[str]:
    """What is wrong with the statuses after a signal; `allowed` are those after SIGTERM."""
    if number == signal.SIGTERM:
        return [] if set(statuses) <= allowed else [f"{number.name}: ended with {statuses}"]
    others = [status for rank, status in enumerate(statuses) if rank != struck]
    return [f"another process hung after a kill: {statuses}"] if -signal.SIGKILL in others else []
