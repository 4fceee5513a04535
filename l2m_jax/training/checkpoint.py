"""Checkpoints of a training phase: the latest one to resume from, and the best one by validation."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from l2m_jax.errors import InputError
from l2m_jax.multihost import first


@dataclass(frozen=True)
class Position:
    """Where training stands: the next batch to train on, and what the validations so far decided.

    Attributes:
        stage: 0-based place in the list of stages.
        epoch: epochs finished in this stage.
        batch: batches finished in this epoch.
        stage_step: updates done in this stage.
        step: updates done in all.
        best_rouge_l: the best validation Rouge-L in all; -1 before the first validation.
        stage_best: the best one in this stage.
        not_better: validations in this stage since its best one.
    """

    stage: int = 0
    epoch: int = 0
    batch: int = 0
    stage_step: int = 0
    step: int = 0
    best_rouge_l: float = -1.0
    stage_best: float = -1.0
    not_better: int = 0


def _claim(folder: Path, made_from: str) -> None:
    owner = folder / "made_from.json"
    if owner.is_file() and json.loads(owner.read_text())["fingerprint"] != made_from:
        raise InputError(
            f"{folder}: these checkpoints belong to other settings or data; choose another --workdir, or "
            "delete this folder to train anew"
        )
    folder.mkdir(parents=True, exist_ok=True)
    owner.write_text(json.dumps({"fingerprint": made_from}) + "\n")


class Checkpoints:
    """Checkpoints in `folder`, all made from what `made_from` (a fingerprint) stands for.

    Raises:
        InputError: the folder holds checkpoints of another run.
    """

    def __init__(self, folder: Path, made_from: str):
        first(lambda: _claim(folder, made_from))
        # The latest to resume from, and the best; Orbax's own best_fn would delete the latest.
        keep = policies.AnyPreservationPolicy(
            [
                policies.LatestN(1),
                policies.BestN(
                    get_metric_fn=lambda m: m["rouge_l"], n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        self._manager = ocp.CheckpointManager(
            folder.resolve(),
            options=ocp.CheckpointManagerOptions(preservation_policy=keep),
            item_names=("state", "position"),
        )

    def save(self, state: Any, position: Position, rouge_l: float | None = None) -> None:
        """Writes in the background; a checkpoint is there completely or not at all."""
        if self._manager.latest_step() == position.step:
            return
        self._manager.save(
            position.step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(asdict(position))
            ),
            metrics=None if rouge_l is None else {"rouge_l": rouge_l},
        )

    def restore_latest(self, like: Any) -> tuple[Any, Position] | None:
        """The newest state, with the shapes and shardings of `like`; None when there is no checkpoint yet."""
        step = self._manager.latest_step()
        return None if step is None else self._restore(step, like)

    def restore_best(self, like: Any) -> tuple[Any, Position]:
        """The state with the best validation Rouge-L, the earliest of equals; the latest without validations."""
        self._manager.wait_until_finished()
        measured = {step: self._manager.metrics(step) for step in self._manager.all_steps()}
        scored = [(metrics["rouge_l"], -step) for step, metrics in measured.items() if metrics]
        step = -max(scored)[1] if scored else self._manager.latest_step()
        assert step is not None, "restore_best before the first checkpoint"
        return self._restore(step, like)

    def _restore(self, step: int, like: Any) -> tuple[Any, Position]:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        found: Any = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore()
            ),
        )
        return found.state, Position(**found.position)

    def close(self) -> None:
        """Waits for what is still being written."""
        self._manager.wait_until_finished()
        self._manager.close()
