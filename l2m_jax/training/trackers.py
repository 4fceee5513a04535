"""Experiment trackers: TensorBoard, Weights & Biases, Trackio and MLflow.

They receive what metrics.jsonl receives, and the report's figures and sample answers. They never change a result: a
tracker that fails is left out with one warning, and the run goes on.
"""

import importlib.util
import json
import logging
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from l2m_jax import files
from l2m_jax.errors import InputError, reason
from l2m_jax.progress import console

PROJECT = "l2m_jax"  # unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME names another
_IDS = "tracking.json"
# After a signal there is little time.
_SECONDS_TO_FINISH = {True: 120.0, False: 20.0}
_SECRETS = (
    "WANDB_API_KEY",
    "TRACKIO_WRITE_TOKEN",
    "HF_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)

Row = Mapping[str, Any]


class Tracker(Protocol):
    """One run at a tracker.

    Args of the constructor:
        workdir: the folder of the run.
        run_id: of the run to continue; None for a new one.
        config: all settings, nested.
    """

    run_id: str

    def __init__(self, workdir: Path, run_id: str | None, config: Mapping[str, Any]) -> None: ...
    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None: ...
    def figure(self, name: str, file: Path) -> None: ...
    def table(self, name: str, rows: Sequence[Row], markdown: str) -> None: ...
    def finish(self, completed: bool) -> None: ...


class TensorBoard:
    """Event files in `workdir`/tensorboard."""

    def __init__(self, workdir: Path, run_id: str | None, config: Mapping[str, Any]):
        from tensorboardX import SummaryWriter

        self.run_id = run_id or "tensorboard"
        # Each start has an event file of its own, even two within a second.
        suffix = f".{uuid.uuid4().hex[:8]}"
        self._writer = SummaryWriter(str(workdir / "tensorboard"), flush_secs=10, filename_suffix=suffix)
        if run_id is None:
            settings = json.dumps(config, indent=2).replace("\n", "\n    ")
            self._writer.add_text("config", f"    {settings}")

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{phase}/{name}", value, step)

    def figure(self, name: str, file: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(file) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), dataformats="HWC")

    def table(self, name: str, rows: Sequence[Row], markdown: str) -> None:
        self._writer.add_text(name, markdown)

    def finish(self, completed: bool) -> None:
        self._writer.close()


class WandB:
    """A run at Weights & Biases, or with WANDB_MODE=offline in `workdir`/wandb. Phases have step axes of their own."""

    def __init__(self, workdir: Path, run_id: str | None, config: Mapping[str, Any]):
        import wandb  # pyright: ignore[reportMissingImports]

        self._wandb, self._phases = wandb, set()
        self.run_id = run_id or uuid.uuid4().hex[:16]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=self.run_id,
            name=_title(workdir),
            dir=str(workdir),
            config=dict(config),
            resume="allow",
            save_code=False,
            settings=wandb.Settings(console="off", disable_git=True),
        )

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        if phase not in self._phases:
            self._phases.add(phase)
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
        self._run.log({f"{phase}/step": step} | {f"{phase}/{name}": value for name, value in values.items()})

    def figure(self, name: str, file: Path) -> None:
        self._run.log({name: self._wandb.Image(str(file))})

    def table(self, name: str, rows: Sequence[Row], markdown: str) -> None:
        columns = list(rows[0])
        self._run.log({name: self._wandb.Table(columns, [list(row.values()) for row in rows])})

    def finish(self, completed: bool) -> None:
        self._run.finish(exit_code=0 if completed else 1)


class Trackio:
    """A run in Trackio's folder on this machine, or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL points."""

    def __init__(self, workdir: Path, run_id: str | None, config: Mapping[str, Any]):
        import trackio  # pyright: ignore[reportMissingImports]

        self._trackio = trackio
        self.run_id = run_id or f"{_title(workdir)}-{uuid.uuid4().hex[:8]}"
        self._run = trackio.init(PROJECT, name=self.run_id, config=dict(config), resume="allow", embed=False)

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        self._run.log({f"{phase}/step": step} | {f"{phase}/{name}": value for name, value in values.items()})

    def figure(self, name: str, file: Path) -> None:
        self._run.log({name: self._trackio.Image(str(file))})

    def table(self, name: str, rows: Sequence[Row], markdown: str) -> None:
        columns = list(rows[0])
        self._run.log({name: self._trackio.Table(columns, [list(row.values()) for row in rows])})

    def finish(self, completed: bool) -> None:
        self._run.finish()


class MLflow:
    """A run in the store that MLFLOW_TRACKING_URI names, by default MLflow's own in the current folder."""

    def __init__(self, workdir: Path, run_id: str | None, config: Mapping[str, Any]):
        # MLflow's own defaults wait for an unreachable server for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # each retry would be a warning
        from mlflow import MlflowClient, entities  # pyright: ignore[reportMissingImports]

        self._client, self._entities, self._last = MlflowClient(), entities, None
        if run_id is not None:
            self.run_id = run_id
            self._client.update_run(run_id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        self.run_id = self._client.create_run(experiment, run_name=_title(workdir)).info.run_id
        settings = [entities.Param(name, str(value)) for name, value in _flat(config)]
        for start in range(0, len(settings), 100):  # the most in one request
            self._client.log_batch(self.run_id, params=settings[start : start + 100])

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [
            self._entities.Metric(_mlflow_name(f"{phase}/{name}"), value, now, step)
            for name, value in values.items()
        ]
        self._last = self._client.log_batch(self.run_id, metrics=metrics, synchronous=False)

    def figure(self, name: str, file: Path) -> None:
        self._client.log_artifact(self.run_id, str(file), str(Path(name).parent))

    def table(self, name: str, rows: Sequence[Row], markdown: str) -> None:
        self._client.log_text(self.run_id, markdown, f"{name}.md")

    def finish(self, completed: bool) -> None:
        if self._last is not None:
            self._last.wait()
        self._client.set_terminated(self.run_id, "FINISHED" if completed else "KILLED")


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
    "mlflow": MLflow,
}
PACKAGES = {name: "tensorboardX" if name == "tensorboard" else name for name in TRACKERS}


def require_packages(names: Iterable[str]) -> None:
    """Raises InputError if the package of a tracker is not installed."""
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise InputError(
                f"tracking: {name!r} needs a package that is not installed; run pip install {PACKAGES[name]}, or leave "
                f"{name!r} out"
            )


class Trackers:
    """The trackers of a run. A thread of its own hands them what is logged, so that none delays the training.

    Their run ids are kept in `workdir`/tracking.json, so that a resumed run continues the same runs.

    Args:
        names: in `TRACKERS`.
        history: what was logged before, as (phase, step, values); a tracker that is new to the run receives it first.
    """

    def __init__(
        self,
        names: Iterable[str],
        workdir: Path,
        config: Mapping[str, Any],
        history: Iterable[tuple[str, int, Mapping[str, float]]] = (),
    ):
        self._trackers: dict[str, Tracker] = {}
        self._calls: queue.SimpleQueue[tuple[Callable[[Tracker], None], Sequence[str]] | None] = (
            queue.SimpleQueue()
        )
        known = _read_ids(workdir / _IDS)
        for name in names:
            try:
                self._trackers[name] = TRACKERS[name](workdir, known.get(name), config)
            except Exception as error:
                _warn(name, error)
        new = [name for name, tracker in self._trackers.items() if known.get(name) != tracker.run_id]
        if new:
            files.write_json(workdir / _IDS, known | {name: self._trackers[name].run_id for name in new})
            for logged in history:
                self._calls.put((lambda tracker, logged=logged: tracker.log(*logged), new))
        self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)
        self._thread.start()

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        self._send(lambda tracker: tracker.log(phase, step, values))

    def figure(self, name: str, file: Path) -> None:
        self._send(lambda tracker: tracker.figure(name, file))

    def table(self, name: str, rows: Sequence[Row], markdown: str) -> None:
        """Rows with the same columns, and the same as a Markdown text for trackers that have no tables."""
        self._send(lambda tracker: tracker.table(name, rows, markdown))

    def finish(self, completed: bool) -> None:
        """Waits until everything is handed over: at most two minutes, or 20 s if the run is not completed."""
        self._send(lambda tracker: tracker.finish(completed))
        self._calls.put(None)
        self._thread.join(_SECONDS_TO_FINISH[completed])
        if self._thread.is_alive():
            _warn(", ".join(self._trackers), TimeoutError("does not answer"))

    def _send(self, call: Callable[[Tracker], None]) -> None:
        self._calls.put((call, tuple(self._trackers)))

    def _work(self) -> None:
        while (work := self._calls.get()) is not None:
            call, names = work
            for name in names:
                if (tracker := self._trackers.get(name)) is None:
                    continue
                try:
                    call(tracker)
                except Exception as error:
                    del self._trackers[name]
                    _warn(name, error)


def _warn(name: str, error: Exception) -> None:
    said = re.sub(r"//[^/@\s]+@", "//***@", reason(error))
    for secret in filter(None, map(os.environ.get, _SECRETS)):
        said = said.replace(secret, "***")
    console.print(
        f"  note: tracking with {name} has stopped ({type(error).__name__}: {said[:300]}); the run goes on, and "
        "metrics.jsonl has everything",
        markup=False,
    )


def _read_ids(file: Path) -> dict[str, str]:
    """Run ids by tracker. A damaged file stops no run."""
    try:
        return {str(name): str(run_id) for name, run_id in json.loads(file.read_bytes()).items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _title(workdir: Path) -> str:
    """Such as "sft/seed0", as the last part alone often says little."""
    return "/".join(workdir.absolute().parts[-2:])


def _flat(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{name}.{key}" if name else key)


def _mlflow_name(name: str) -> str:
    """With the characters and the length that MLflow allows: categories are text of the data."""
    return re.sub(r"[^\w/ :.-]", "_", name)[:250]
