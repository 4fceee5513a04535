"""Checkpoints of a training phase: the latest to resume from, and the best by validation."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from l2m_jax.multihost import first
from l2m_jax.parallel import Placement

# With several processes, all must save at the same step: they ask the first one's clock this often.
_STEPS_BETWEEN_LOOKS = 32


@dataclass(frozen=True)
class Position:
    """Where training stands: the next batch to train on, and what the validations so far decided.

    Attributes:
        stage: 0-based place in the list of stages.
        epoch: epochs finished in this stage.
        batch: batches finished in this epoch.
        stage_step: updates done in this stage.
        step: updates done in all.
        best_step: the step with the best validation Rouge-L in all, the earliest of equals; -1 before the first.
        best_rouge_l: that Rouge-L.
        stage_best: the best one in this stage.
        not_better: validations in this stage since its best one.
    """

    stage: int = 0
    epoch: int = 0
    batch: int = 0
    stage_step: int = 0
    step: int = 0
    best_step: int = -1
    best_rouge_l: float = -1.0
    stage_best: float = -1.0
    not_better: int = 0


class _LatestAndBest:
    """Which checkpoints Orbax keeps. Its own BestN forgets its metrics when the process restarts."""

    best_step = -1

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        latest = max(checkpoint.step for checkpoint in checkpoints) if checkpoints else -1
        return [checkpoint.step in (latest, self.best_step) for checkpoint in checkpoints]


class Checkpoints:
    """Checkpoints in `folder`, of a state that lies on devices as `placement` says.

    Args:
        minutes: between checkpoints, as far as `due` is asked. 0: one after each step.
    """

    def __init__(self, folder: Path, placement: Placement, minutes: float = 10.0):
        self._placement, self._minutes = placement, minutes
        self._saved_at = time.monotonic()
        self._kept = _LatestAndBest()
        self._manager = ocp.CheckpointManager(
            folder.resolve(),
            options=ocp.CheckpointManagerOptions(preservation_policy=self._kept),
            item_names=("state", "position"),
        )

    def due(self, step: int) -> bool:
        """Whether it is time for the next checkpoint; the same answer in all processes."""
        if jax.process_count() == 1:
            return self._time_is_up()
        return step % _STEPS_BETWEEN_LOOKS == 0 and first(self._time_is_up)

    def _time_is_up(self) -> bool:
        return time.monotonic() - self._saved_at >= 60 * self._minutes

    def save(self, state: Any, position: Position) -> None:
        """Saves the placed state. Afterwards its buffers may be donated: files are written in the background.

        A checkpoint exists completely or not at all. No device holds a copy of the state meanwhile. Besides this one,
        that of `position.best_step` is kept.
        """
        self._saved_at = time.monotonic()
        self._kept.best_step = position.best_step
        if self._manager.latest_step() == position.step:
            return
        # Orbax waits too, but only once a second copy of the state is on the host.
        self._manager.wait_until_finished()
        replicated = self._placement.mapping == "pmap"
        self._manager.save(
            position.step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(self._placement.to_host(state) if replicated else state),
                position=ocp.args.JsonSave(asdict(position)),
            ),
        )
        if not replicated and self._placement.devices[0].platform == "cpu":
            self._manager.wait_until_finished()  # a host copy of a CPU's buffer is the buffer itself

    def restore_latest(self, shapes: Any) -> tuple[Any, Position] | None:
        """The newest state, placed, and its position; None before the first checkpoint.

        Args:
            shapes: of the state, as `jax.eval_shape` gives them.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        found = self._restore(step, shapes)
        position = Position(**found.position)
        self._kept.best_step = position.best_step
        return self._placed(found.state), position

    def restore_best(self, shapes: Any, step: int) -> Any:
        """The parameters after `step`, the best of the validations, placed. `shapes` as in `restore_latest`."""
        self._manager.wait_until_finished()
        return self._placed(self._restore(step, shapes).state.params)

    def _restore(self, step: int, shapes: Any) -> Any:
        # Under "pmap" to the host, for it goes to each device from there; else straight to the devices.
        like = shapes if self._placement.mapping == "pmap" else self._placement.abstract(shapes)
        return self._manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(like), position=ocp.args.JsonRestore()),
        )

    def _placed(self, tree: Any) -> Any:
        return self._placement.place(tree) if self._placement.mapping == "pmap" else tree

    def close(self) -> None:
        """Waits for what is still being written."""
        self._manager.wait_until_finished()
        self._manager.close()
