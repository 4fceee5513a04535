"""The metrics of each step: read one step late, logged, and checked for numbers that are not finite."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from l2m_jax import progress
from l2m_jax.curriculum import Stage
from l2m_jax.errors import InputError
from l2m_jax.losses import Objective
from l2m_jax.parallel import Placement
from l2m_jax.training.metrics import MetricsLog
from l2m_jax.types import MicroBatch


@dataclass(frozen=True)
class Batch:
    """
    Attributes:
        by_step: the coefficients of the loss that vary by step.
        indices: of its examples.
        micro_batches: on the devices, each with its objective.
        tokens, target_tokens: without padding.
    """

    epoch: int
    by_step: dict[str, float]
    indices: np.ndarray
    micro_batches: list[tuple[Objective, MicroBatch]]
    tokens: int
    target_tokens: int


@dataclass(frozen=True)
class _Step:
    """A dispatched step: the number of updates including it, and the metrics, still on the devices."""

    number: int
    learning_rate: float
    batch: Batch
    values: Any


class StepLog:
    """Writes a step's metrics after the next step is dispatched, so that reading them does not delay it.

    Args:
        phase: its name in metrics.jsonl.
        skip_nonfinite: count batches whose loss or gradient is not finite, instead of ending the run.
        name: of an example by its number, for messages.
    """

    def __init__(
        self,
        phase: str,
        stage: Stage,
        metrics: MetricsLog,
        bar: progress.Bar,
        placement: Placement,
        *,
        skip_nonfinite: bool,
        name: Callable[[int], str],
    ):
        self._phase, self._stage, self._metrics, self._bar = phase, stage, metrics, bar
        self._placement, self._skip_nonfinite, self._name = placement, skip_nonfinite, name
        self._waiting: _Step | None = None
        self.restart_clock()

    def restart_clock(self) -> None:
        """Restarts the measurement of rates, so that only time spent on training counts."""
        self._clock = time.monotonic()
        self._examples = self._tokens = 0

    def add(self, step: int, learning_rate: float, batch: Batch, values: Any) -> None:
        self.flush()
        self._waiting = _Step(step, learning_rate, batch, values)

    def flush(self) -> None:
        """Writes the pending step. Checkpoints and validations call this first, so that no such step is kept.

        Raises:
            InputError: its loss or gradient is not finite, unless such batches are skipped.
        """
        if self._waiting is None:
            return
        step, self._waiting = self._waiting, None
        batch = step.batch
        values = {name: float(value) for name, value in self._placement.to_host(step.values).items()}
        # The divisor of the sums: target tokens or examples, which are counted below.
        del values["weight"]
        skipped = not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]))
        if skipped and not self._skip_nonfinite:
            raise InputError(self._not_finite(step, values))
        self._examples += len(batch.indices)
        self._tokens += batch.tokens
        seconds = max(time.monotonic() - self._clock, 1e-9)
        rates = {
            "examples_per_second": self._examples / seconds,
            "tokens_per_second": self._tokens / seconds,
        }
        self._metrics.write(
            self._phase,
            step.number,
            stage=self._stage.index,
            epoch=batch.epoch,
            **{"alpha": self._stage.alpha, "beta": self._stage.beta} | batch.by_step,
            learning_rate=step.learning_rate,
            examples=len(batch.indices),
            tokens=batch.tokens,
            target_tokens=batch.target_tokens,
            micro_batches=len(batch.micro_batches),
            **({"skipped": 1} if skipped else values),
            **rates,
        )
        self._bar.advance(
            loss="skipped" if skipped else f"{values['loss']:.3f}",
            examples=f"{rates['examples_per_second']:.0f}/s",
            tokens=f"{rates['tokens_per_second']:.0f}/s",
        )

    def _not_finite(self, step: _Step, values: Mapping[str, float]) -> str:
        blamed = ""
        if math.isfinite(values["cross_entropy"]) and not math.isfinite(values["divergence"]):
            blamed = " (the student's cross-entropy is finite, the divergence from the teacher is not: check the teacher)"
        names = ", ".join(self._name(int(i)) for i in step.batch.indices)
        return (
            f"{self._phase}, step {step.number}: the loss is {values['loss']:.4g} and the gradient's norm "
            f"{values['grad_norm']:.4g}{blamed}, at learning rate {step.learning_rate:.3g} on the examples {names}; "
            "lower the learning rate, check these examples, or set skip_nonfinite to skip such batches; the "
            "checkpoints are from before this step, so the same command resumes there"
        )
