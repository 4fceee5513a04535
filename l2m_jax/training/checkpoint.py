"""Checkpoints of a training phase: the latest to resume from, and the best by validation."""

import errno
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import jax
import orbax.checkpoint as ocp

from l2m_jax import files
from l2m_jax.errors import InputError
from l2m_jax.multihost import first, is_first
from l2m_jax.parallel import Placement
from l2m_jax.progress import console

# In the folder of each checkpoint: checksums of its files.
_CHECKSUMS = "checksums.json"
# Orbax writes these after the checksums are made, and nothing here reads them.
_NOT_CHECKED = ("_CHECKPOINT_METADATA", "commit_success.txt")

_METADATA = 100_000  # bytes of a checkpoint besides the state, at most

# All processes must save at the same step, so they ask for the first one's clock, this often.
_STEPS_BETWEEN_LOOKS = 32


@dataclass(frozen=True)
class Position:
    """The position in a training: the next batch, and the results of the validations so far.

    Attributes:
        stage: 0-based index into the list of stages.
        epoch: epochs finished in this stage.
        batch: batches finished in this epoch.
        stage_step: updates finished in this stage.
        step: updates finished in total.
        best_step: the step with the best validation Rouge-L, the earliest of equals; -1 before the first validation.
        best_rouge_l: the best validation Rouge-L.
        stage_best: the best one of this stage.
        not_better: validations since the best one of this stage.
        validated: the step of the latest validation.
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
    validated: int = 0


class _LatestAndBest:
    """Decides which checkpoints Orbax keeps. Its own BestN forgets the metrics when the process restarts."""

    best_step = -1

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        latest = max(checkpoint.step for checkpoint in checkpoints) if checkpoints else -1
        return [checkpoint.step in (latest, self.best_step) for checkpoint in checkpoints]


class Checkpoints:
    """Checkpoints in `folder` of a state that is placed by `placement`.

    Args:
        minutes: the interval at which `due` asks for a checkpoint; 0: after each step, or with several
            processes each time that they agree on it.
    """

    def __init__(self, folder: Path, placement: Placement, minutes: float = 10.0):
        self._placement, self._minutes = placement, minutes
        self._saved_at = time.monotonic()
        self._kept = _LatestAndBest()
        self._folder = folder.resolve()
        self._saving = -1
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._kept,
                cleanup_tmp_directories=True,  # what a kill or a full disk leaves behind takes room
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
            ),
            item_names=("state", "position"),
        )

    def due(self, step: int) -> bool:
        """Whether it is time for the next checkpoint. The same in all processes."""
        if jax.process_count() == 1:
            return self._time_is_up()
        return step % _STEPS_BETWEEN_LOOKS == 0 and first(self._time_is_up)

    def _time_is_up(self) -> bool:
        return time.monotonic() - self._saved_at >= 60 * self._minutes

    def save(self, state: Any, position: Position) -> None:
        """Saves the placed state. Its buffers may be donated afterwards; files are written in the background.

        A checkpoint exists completely or not at all. No device holds a second copy of the state. This checkpoint and
        that of `position.best_step` are kept.

        Raises:
            OSError: there is no room on the disk.
        """
        self._saved_at = time.monotonic()
        self._kept.best_step = position.best_step
        if self._manager.latest_step() == position.step:
            return
        # Orbax waits too, but only once a second copy of the state is on the host.
        self._manager.wait_until_finished()
        replicated = self._placement.mapping == "pmap"
        size = sum(x.nbytes // (x.shape[0] if replicated else 1) for x in jax.tree.leaves(state))
        first(lambda: self._check_room(size))
        self._saving = position.step
        self._manager.save(
            position.step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(self._placement.to_host(state) if replicated else state),
                position=ocp.args.JsonSave(asdict(position)),
            ),
        )
        if not replicated and self._placement.devices[0].platform == "cpu":
            self._manager.wait_until_finished()  # a host copy of a CPU buffer is the buffer itself

    def _check_room(self, size: int) -> None:
        """Orbax's threads print tracebacks if a write of theirs fails."""
        if shutil.disk_usage(self._folder).free < size + _METADATA:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder))

    def _write_checksums(self) -> None:
        """In Orbax's thread: all files of the checkpoint are written, and its folder does not have its final name yet."""
        if not is_first():
            return
        for unfinished in self._folder.glob(f"{self._saving}.*tmp*"):
            found = files.checksums(unfinished, without=_NOT_CHECKED)
            files.write_json(unfinished / _CHECKSUMS, found)

    def _damaged(self, step: int) -> str | None:
        """A file of a checkpoint that is missing or differs from what was written."""
        place = self._folder / str(step)
        try:
            recorded = json.loads((place / _CHECKSUMS).read_text(encoding="utf-8"))
            found = files.damaged(place, recorded)
        except (OSError, ValueError, TypeError, AttributeError):
            found = place / _CHECKSUMS
        return None if found is None else str(found)

    def restore_latest(self, shapes: Any, *, needs_best: bool = False) -> tuple[Any, Position] | None:
        """The latest state, placed, and its position; None before the first checkpoint.

        If files of the latest checkpoint are damaged, the other kept one is the latest, and the damaged one is deleted.

        Args:
            shapes: of the state, as from `jax.eval_shape`.
            needs_best: the best checkpoint so far must be there as well.

        Raises:
            InputError: no checkpoint is intact, or the best one is not; names a file.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not steps:
            return None
        damaged = {
            s: file for s, file in zip(steps, first(lambda: list(map(self._damaged, steps))), strict=True)
        }
        intact = [step for step in steps if damaged[step] is None]
        if not intact:
            self._refuse(damaged[steps[0]])
        found = self._restore(intact[0], shapes)
        position = Position(**found.position)
        best = position.best_step
        if needs_best and 0 <= best != position.step and best not in intact:
            self._refuse(damaged.get(best) or str(self._folder / str(best)))
        for step in steps:
            if step > intact[0]:
                console.print(
                    f"  note: {damaged[step]} is damaged; resuming from step {intact[0]} instead of {step}",
                    markup=False,
                )
                self._manager.delete(step)
        self._kept.best_step = best
        return self._placed(found.state), position

    def _refuse(self, file: str | None) -> NoReturn:
        raise InputError(
            f"{file}: missing, or not what was written; restore it, or delete {self._folder} to train from the start"
        )

    def restore_best(self, shapes: Any, step: int) -> Any:
        """The parameters to keep (`TrainState.result`) after `step`, that of the best validation, placed.

        Args:
            shapes: as in `restore_latest`.
        """
        self._manager.wait_until_finished()
        return self._placed(self._restore(step, shapes).state.result)

    def _restore(self, step: int, shapes: Any) -> Any:
        # Under "pmap" to the host, from where it is copied to each device; otherwise directly to the devices.
        like = shapes if self._placement.mapping == "pmap" else self._placement.abstract(shapes)
        return self._manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(like), position=ocp.args.JsonRestore()),
        )

    def _placed(self, tree: Any) -> Any:
        return self._placement.place(tree) if self._placement.mapping == "pmap" else tree

    def close(self) -> None:
        """Waits until all files are written."""
        self._manager.wait_until_finished()
        self._manager.close()
