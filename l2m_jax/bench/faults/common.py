"""The scenarios that faults are tried on: their commands, an uninterrupted run of each, and what must be equal to it."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from l2m_jax import files
from l2m_jax.training.metrics import read_metrics

TIMEOUT = 600  # seconds that one command may take before it counts as hanging

_CONFIG = """\
data:
  source: synthetic
  max_length: 160
  synthetic: {train: 40, validation: 4, test: 4, tokenizer_size: 400}
teacher:
  model: {architecture: {num_layers: 1, num_heads: 2, hidden_size: 24, max_positions: 192}}
  finetune: {epochs: 1}
student:
  model: {architecture: {num_layers: 1, num_heads: 2, hidden_size: 16, max_positions: 192}}
  warmup: {epochs: 1}
curriculum: {stages: 2, epochs_per_stage: 2}
sampling: {max_new_tokens: 4}
evaluation: {seeds: "10,20", validations: 4}
devices: {count: 0, timeout: 10}
max_shapes: 1
checkpoint_minutes: 0.002
"""


@dataclass(frozen=True)
class Scenario:
    """A command that makes something.

    Attributes:
        command: what follows `l2m`; `{config}` and `{workdir}` are filled in.
        results: globs of the files in the work directory that any number of faults must leave equal, byte for byte.
        processes: how many processes run the command together.
    """

    command: tuple[str, ...]
    results: tuple[str, ...]
    processes: int = 1


_TRAIN = ("train", "--config={config}", "--workdir={workdir}")
_RESULTS = (
    "**/student/model.safetensors", "**/difficulty.parquet", "**/teacher/model.safetensors",
    "evaluation/results.json", "*/seed*/evaluation/results.json",
    "evaluation/responses.jsonl", "*/seed*/evaluation/responses.jsonl", "table.csv",
)  # fmt: skip

SCENARIOS = {
    "run": Scenario(_TRAIN, _RESULTS),
    "sweep": Scenario(("sweep", "--methods=sft,l2m", "--seeds=0,1", *_TRAIN[1:]), _RESULTS),
    "on-policy": Scenario((*_TRAIN, "--config.method=skl_on_policy"), _RESULTS),
    "processes": Scenario(_TRAIN, _RESULTS, processes=2),
}


@dataclass(frozen=True)
class Outcome:
    """
    Attributes:
        faults: how many faults really happened.
        lost: what differs from the uninterrupted run, or what else went wrong; empty if all survived.
        facts: further figures, for the record.
    """

    faults: int
    lost: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """
    Attributes:
        name: unique within its kind, and the same each time the campaign is started.
        run: tries it in an empty folder.
    """

    name: str
    scenario: str
    run: Callable[[Path], Outcome]


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run.

    Attributes:
        results: hashes of the files that must be equal, by name.
        timeline: the phases that it showed, with the seconds that each took, in order.
    """

    workdir: Path
    results: Mapping[str, str]
    timeline: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Setting:
    """
    Attributes:
        folder: of the campaign.
        kills: how many kills are wanted.
    """

    folder: Path
    kills: int
    seed: int

    @property
    def config(self) -> Path:
        """The config of all scenarios."""
        file = self.folder / "tiny.yaml"
        if not file.is_file():
            files.write_text(file, _CONFIG)
        return file

    def reference(self, scenario: str) -> Reference:
        """The uninterrupted run of a scenario, made once."""
        folder = self.folder / "reference" / scenario
        file = folder / "reference.json"
        if not file.is_file():
            # The second run finds the compiled programs, as those after a fault do.
            for workdir in (folder / "cold", folder / "warm"):
                started = self.start(scenario, workdir)
                if any(status := started.wait()):
                    raise RuntimeError(
                        f"an uninterrupted {scenario} ended with {status}:\n{started.errors()}"
                    )
                found = {"results": results(SCENARIOS[scenario], workdir), "timeline": started.timeline()}
                files.write_json(workdir / "reference.json", found)
            cold = json.loads((folder / "cold" / "reference.json").read_text())["results"]
            if differing := different(cold, found["results"]):
                raise RuntimeError(f"two uninterrupted runs ({scenario}) differ in {', '.join(differing)}")
            files.write_json(file, found)
        found = json.loads(file.read_text())
        return Reference(folder / "warm", found["results"], tuple(map(tuple, found["timeline"])))

    def start(self, scenario: str, workdir: Path) -> "Started":
        """Starts the scenario's command in `workdir`."""
        return Started(SCENARIOS[scenario], self.config, workdir, self.folder / "compiled")

    def finish(self, scenario: str, workdir: Path) -> tuple[str, ...]:
        """Runs the scenario's command to its end. Returns what differs from the uninterrupted run."""
        started = self.start(scenario, workdir)
        if any(status := started.wait()):
            return (f"ended with {status}: {started.errors()[-2000:]}",)
        return different(self.reference(scenario).results, results(SCENARIOS[scenario], workdir))


class Started:
    """A command that runs, with what it has shown so far.

    Attributes:
        phases: the phases that the first process has shown, with their times since the start.
    """

    def __init__(self, scenario: Scenario, config: Path, workdir: Path, compiled: Path):
        self._start = time.monotonic()
        self.phases: list[tuple[str, float]] = [("start", 0.0)]
        self._changed = threading.Condition()
        self._logs = [workdir.with_name(f"{workdir.name}.{rank}.log") for rank in range(scenario.processes)]
        workdir.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "PYTHONUNBUFFERED": "1",
            "XLA_FLAGS": "",
        }
        command = [part.format(config=config, workdir=workdir) for part in scenario.command]
        port = _free_port()
        self.processes: list[subprocess.Popen] = []
        for rank, log in enumerate(self._logs):
            address = []
            if scenario.processes > 1:
                address = [
                    f"--config.devices.coordinator=127.0.0.1:{port}",
                    f"--config.devices.num_processes={scenario.processes}",
                    f"--config.devices.process_id={rank}",
                ]
            with log.open("ab") as errors:
                process = subprocess.Popen(
                    [sys.executable, "-m", "l2m_jax.cli.main", *command, *address],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
            self.processes.append(process)
            threading.Thread(target=self._read, args=(process, rank == 0), daemon=True).start()

    def _read(self, process: subprocess.Popen, is_first: bool) -> None:
        assert process.stdout is not None
        part = ""
        for line in process.stdout:
            title = _title(line)
            if title is None or not is_first:
                continue
            kind, title = title
            if kind == "═":
                part = title.partition(",")[0] + ": "
                title = "begins"
            self._note(part + title)
        if is_first:
            self._note("end")

    def _note(self, phase: str) -> None:
        with self._changed:
            self.phases.append((phase, time.monotonic() - self._start))
            self._changed.notify_all()

    def wait_for(self, phase: str) -> bool:
        """Waits until `phase` begins. False if the command ended without it."""

        def shown() -> set[str]:
            return {name for name, _ in self.phases}

        with self._changed:
            self._changed.wait_for(lambda: shown() & {phase, "end"}, timeout=TIMEOUT)
            return phase in shown()

    def wait(self, seconds: float = TIMEOUT) -> list[int]:
        """Waits for the end of all processes. Returns their statuses; those that hang are killed."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            try:
                process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return [process.returncode for process in self.processes]

    def timeline(self) -> list[tuple[str, float]]:
        """The phases with their durations, once the command has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self.phases[-1][0] == "end", timeout=10)
        return [
            (name, after - at) for (name, at), (_, after) in zip(self.phases, self.phases[1:], strict=False)
        ]

    def errors(self) -> str:
        """What the processes wrote to stderr, over all starts in this work directory."""
        return "\n".join(log.read_text(errors="replace") for log in self._logs)


def _title(line: str) -> tuple[str, str] | None:
    """The character and the title of a rule on screen."""
    words = line.split()
    for character in ("─", "═"):
        if len(words) > 1 and words[-1].startswith(character):
            return character, " ".join(word for word in words if not word.startswith(character))
    return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def results(scenario: Scenario, workdir: Path) -> dict[str, str]:
    """Hashes of what must be equal: the files, and the losses of each step."""
    found = {
        file.relative_to(workdir).as_posix(): files.checksums(file)["."][2]
        for pattern in scenario.results
        for file in workdir.glob(pattern)
    }
    for metrics in sorted(workdir.rglob("metrics.jsonl")):
        lines = [
            {name: value for name, value in line.items() if not name.endswith("_per_second")}
            for line in read_metrics(metrics)
        ]
        found[metrics.relative_to(workdir).as_posix()] = files.fingerprint(lines)
    return found


def different(expected: Mapping[str, str], found: Mapping[str, str]) -> tuple[str, ...]:
    """The names of results that differ, are missing or are too many."""
    return tuple(
        f"{name}: {'missing' if name not in found else 'not expected' if name not in expected else 'differs'}"
        for name in sorted({*expected, *found})
        if expected.get(name) != found.get(name)
    )
