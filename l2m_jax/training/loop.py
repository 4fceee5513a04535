"""The loop over stages, epochs and batches: feeds the step, logs, validates, checkpoints, resumes."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from l2m_jax import progress
from l2m_jax.curriculum import Stage, steps
from l2m_jax.data.batches import Examples, micro_batches, order_of_examples, prefetch
from l2m_jax.data.packing import Shape
from l2m_jax.losses import Objective
from l2m_jax.training import step as step_functions
from l2m_jax.training.checkpoint import Checkpoints, Position
from l2m_jax.training.metrics import MetricsLog
from l2m_jax.training.optimizer import OptimizerSettings, learning_rate_schedule, make_optimizer
from l2m_jax.training.parallel import Parallel
from l2m_jax.training.step import StepSettings, Teacher, TrainState
from l2m_jax.types import MicroBatch, Params


@dataclass(frozen=True)
class EpochData:
    """What one epoch trains on.

    Attributes:
        examples: token arrays by example number.
        indices: the examples of this epoch, in any order: the loop shuffles them.
        teacher_rows: gives the stored hidden states of the teacher for an example, `[r_i, E]`; None when the
            teacher runs live or is not needed.
    """

    examples: Examples
    indices: np.ndarray
    teacher_rows: Callable[[int], np.ndarray] | None = None


@dataclass(frozen=True)
class Task:
    """One training phase: fine-tuning a teacher, warming up or distilling a student.

    Attributes:
        phase: its name in metrics.jsonl and on screen.
        settings: what the compiled step depends on, besides the objective.
        stages: in order; single-stage methods have one.
        objective: the stage's static objective.
        shapes: the micro-batch shapes of the run.
        validation_every: epochs between validations, and at the end of each stage.
    """

    phase: str
    settings: StepSettings
    stages: tuple[Stage, ...]
    objective: Callable[[Stage], Objective]
    shapes: tuple[Shape, ...]
    optimizer: OptimizerSettings
    batch_size: int
    seed: int
    restart_optimizer: bool = True
    patience: int = 0
    checkpoint_every: int = 200
    validation_every: int = 1


class StepFunctions:
    """The step, mapped over devices: compiled at the first call for each objective and shape."""

    def __init__(self, settings: OptimizerSettings, parallel: Parallel):
        optimizer = make_optimizer(settings)

        def update(state, sums, learning_rate, *, axis_name):
            return step_functions.update(optimizer, state, sums, learning_rate, axis_name=axis_name)

        def start(params, *, axis_name):
            del axis_name
            return optimizer.init(params)

        def zeros(params, *, axis_name):
            del axis_name
            return step_functions.zero_sums(params)

        # settings, objective, params, sums, batch, teacher, dropout key
        self.accumulate = parallel.map(step_functions.accumulate, static=(0, 1), donate=(3,), broadcast=(6,))
        self.update = parallel.map(update, donate=(0, 1), broadcast=(2,))
        self.start = parallel.map(start)
        self.zeros = parallel.map(zeros)


def train(
    task: Task,
    parallel: Parallel,
    params: Params,
    data: Callable[[Stage, int, Params], EpochData],
    teacher: Teacher | None,
    checkpoints: Checkpoints,
    metrics: MetricsLog,
    validate: Callable[[Params], dict[str, float]] | None = None,
) -> tuple[Params, Params]:
    """Trains through all stages, from the latest checkpoint when there is one.

    Args:
        params: initial parameters, placed on the devices; their buffers are taken over.
        data: what an epoch trains on, given the stage, the epoch and the parameters at its start.
        teacher: placed on the devices; None without one.
        validate: gives at least "rouge_l" for parameters.

    Returns:
        The last parameters and the best ones by validation (the last ones without validation), placed.
    """
    functions = StepFunctions(task.optimizer, parallel)
    state = TrainState(params, functions.start(params))
    position = Position()
    if (found := checkpoints.restore_latest(parallel.snapshot(state))) is not None:
        state, position = parallel.place(found[0]), found[1]
    metrics.drop_after(task.phase, position.step)

    for number, stage in enumerate(task.stages):
        if number < position.stage:
            continue
        state, position = _train_stage(
            task, stage, parallel, functions, state, position, data, teacher, checkpoints, metrics, validate
        )
    if position.best_rouge_l < 0:
        return state.params, state.params
    best, _ = checkpoints.restore_best(parallel.snapshot(state))
    return state.params, parallel.place(best.params)


def _train_stage(
    task: Task,
    stage: Stage,
    parallel: Parallel,
    functions: StepFunctions,
    state: TrainState,
    position: Position,
    data: Callable[[Stage, int, Params], EpochData],
    teacher: Teacher | None,
    checkpoints: Checkpoints,
    metrics: MetricsLog,
    validate: Callable[[Params], dict[str, float]] | None,
) -> tuple[TrainState, Position]:
    if position.stage_step == 0 and position.step > 0 and task.restart_optimizer:
        state = TrainState(state.params, functions.start(state.params))
    scheduled = (stage,) if task.restart_optimizer else task.stages
    rate = learning_rate_schedule(task.optimizer, steps(scheduled, task.batch_size))
    objective = task.objective(stage)
    sums = functions.zeros(state.params)
    title = task.phase if len(task.stages) == 1 else f"{task.phase}, stage {stage.index}/{len(task.stages)}"

    with progress.bar(title, steps((stage,), task.batch_size)) as bar:
        bar.resume_at(position.stage_step)
        log = _StepLog(task, stage, metrics, bar, parallel)
        while position.epoch < stage.epochs:
            epoch_data = data(stage, position.epoch, state.params)
            batches = math.ceil(stage.examples_in_epoch(position.epoch) / task.batch_size)
            for batch in _batches(task, stage, parallel, epoch_data, position):
                at = position.stage_step if task.restart_optimizer else position.step
                learning_rate = np.float32(rate(at))
                for number, micro_batch in enumerate(batch.micro_batches):
                    key = _dropout_key(task, position.step, number)
                    sums = functions.accumulate(
                        task.settings, objective, state.params, sums, micro_batch, teacher, key
                    )
                state, sums, values = functions.update(state, sums, learning_rate)
                position = dataclasses.replace(
                    position,
                    batch=position.batch + 1,
                    stage_step=position.stage_step + 1,
                    step=position.step + 1,
                )
                log.add(position, learning_rate, batch, values)
                # An epoch's end has a checkpoint of its own, which holds the validation too.
                if position.step % task.checkpoint_every == 0 and position.batch < batches:
                    checkpoints.save(parallel.snapshot(state), position)
            log.flush()
            position = dataclasses.replace(position, epoch=position.epoch + 1, batch=0)
            ended = position.epoch == stage.epochs
            if validate is not None and (ended or position.epoch % task.validation_every == 0):
                position, values = _validated(position, validate(parallel.unplace(state.params)))
                metrics.write(task.phase, position.step, stage=stage.index, **values)
                ended = ended or 0 < task.patience <= position.not_better
                position = _next_stage(position) if ended else position
                checkpoints.save(parallel.snapshot(state), position, values["validation_rouge_l"])
                log.restart_clock()
            elif ended:
                position = _next_stage(position)
                checkpoints.save(parallel.snapshot(state), position)
            if ended:
                break
    return state, position


def _next_stage(position: Position) -> Position:
    return dataclasses.replace(
        position, stage=position.stage + 1, epoch=0, batch=0, stage_step=0, stage_best=-1.0, not_better=0
    )


def _validated(position: Position, values: dict[str, float]) -> tuple[Position, dict[str, float]]:
    rouge_l = values["rouge_l"]
    better = rouge_l > position.stage_best
    position = dataclasses.replace(
        position,
        best_rouge_l=max(position.best_rouge_l, rouge_l),
        stage_best=max(position.stage_best, rouge_l),
        not_better=0 if better else position.not_better + 1,
    )
    return position, {f"validation_{name}": value for name, value in values.items()}


def _dropout_key(task: Task, step: int, micro_batch: int) -> jax.Array | None:
    model = task.settings.student
    if not max(model.embedding_dropout, model.attention_dropout, model.residual_dropout):
        return None
    key = jax.random.fold_in(jax.random.key(task.seed), step)
    return jax.random.fold_in(key, micro_batch)


@dataclass(frozen=True)
class _Batch:
    micro_batches: list[MicroBatch]  # on the devices
    examples: int
    tokens: int


def _batches(
    task: Task, stage: Stage, parallel: Parallel, data: EpochData, position: Position
) -> Iterator[_Batch]:
    """The batches of an epoch from `position` on, packed and fed to the devices ahead of time."""
    order = order_of_examples(task.seed, stage.index, position.epoch, data.indices)
    order = order[: stage.examples_in_epoch(position.epoch)]

    def make() -> Iterator[_Batch]:
        for start in range(position.batch * task.batch_size, len(order), task.batch_size):
            chosen = order[start : start + task.batch_size]
            packed = micro_batches(
                data.examples,
                chosen,
                task.shapes,
                parallel.num_devices,
                teacher_rows=data.teacher_rows,
                filled=parallel.local,
            )
            tokens = int(data.examples.lengths[chosen].sum())
            yield _Batch([parallel.feed(m) for m in packed], len(chosen), tokens)

    return prefetch(make(), depth=4)


class _StepLog:
    """Writes a step's metrics once the next step is dispatched, so that reading them holds nothing up."""

    def __init__(self, task: Task, stage: Stage, metrics: MetricsLog, bar: progress.Bar, parallel: Parallel):
        self._task, self._stage, self._metrics, self._bar = task, stage, metrics, bar
        self._parallel = parallel
        self._waiting: tuple[Position, Any, _Batch, Any] | None = None
        self.restart_clock()

    def restart_clock(self) -> None:
        """Time spent on anything but training does not count in the rates."""
        self._clock = time.monotonic()
        self._examples = self._tokens = 0

    def add(self, position: Position, learning_rate: Any, batch: _Batch, values: Any) -> None:
        self.flush()
        self._waiting = (position, learning_rate, batch, values)

    def flush(self) -> None:
        if self._waiting is None:
            return
        position, learning_rate, batch, values = self._waiting
        self._waiting = None
        values = {name: float(value) for name, value in self._parallel.read(values).items()}
        self._examples += batch.examples
        self._tokens += batch.tokens
        seconds = max(time.monotonic() - self._clock, 1e-9)
        rates = {
            "examples_per_second": self._examples / seconds,
            "tokens_per_second": self._tokens / seconds,
        }
        self._metrics.write(
            self._task.phase,
            position.step,
            stage=self._stage.index,
            epoch=position.epoch,
            alpha=self._stage.alpha,
            beta=self._stage.beta,
            learning_rate=float(learning_rate),
            examples=batch.examples,
            tokens=batch.tokens,
            micro_batches=len(batch.micro_batches),
            **values,
            **rates,
        )
        self._bar.advance(
            loss=f"{values['loss']:.3f}",
            examples=f"{rates['examples_per_second']:.0f}/s",
            tokens=f"{rates['tokens_per_second']:.0f}/s",
        )
