"""The loop over stages, epochs and batches: feeds the step, logs, validates, checkpoints, resumes."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from l2m_jax import progress
from l2m_jax.curriculum import Stage, steps
from l2m_jax.data.batches import Examples, micro_batches, order_of_examples, prefetch
from l2m_jax.data.packing import Shape
from l2m_jax.losses import Objective
from l2m_jax.parallel import Parallel
from l2m_jax.training import step as step_functions
from l2m_jax.training.checkpoint import Checkpoints, Position
from l2m_jax.training.metrics import MetricsLog
from l2m_jax.training.optimizer import OptimizerSettings, learning_rate_schedule, make_optimizer
from l2m_jax.training.step import StepSettings, Teacher, TrainState
from l2m_jax.types import MicroBatch, Params


@dataclass(frozen=True)
class Part:
    """A part of an epoch: the batches between two moments at which its data may change.

    Attributes:
        epoch, number: counted from 0, the number within the epoch.
        indices: its examples, in the order of training.
        first_batch: of the epoch's batches.
    """

    stage: Stage
    epoch: int
    number: int
    indices: np.ndarray
    first_batch: int


@dataclass(frozen=True)
class Term:
    """A term of the loss. Most methods have one; with several, each batch's examples take part in every one.

    The loss of a batch is the weighted mean of the objectives over the targets of all terms.

    Attributes:
        examples: token arrays by example number.
        teacher_rows: gives the stored hidden states of the teacher for an example, `[r_i, E]`; None when the
            teacher runs live or is not needed.
        equal_examples: the mean is first over an example's targets, then over examples.
    """

    objective: Objective
    examples: Examples
    teacher_rows: Callable[[int], np.ndarray] | None = None
    equal_examples: bool = False


@dataclass(frozen=True)
class Task:
    """One training phase: fine-tuning a teacher, warming up or distilling a student.

    Attributes:
        phase: its name in metrics.jsonl and on screen.
        settings: what the compiled step depends on, besides the objective.
        stages: in order; single-stage methods have one.
        shapes: the micro-batch shapes of the run.
        parts: parts of an epoch, before each of which the data may change.
        validation_every: epochs between validations, and at the end of each stage.
    """

    phase: str
    settings: StepSettings
    stages: tuple[Stage, ...]
    shapes: tuple[Shape, ...]
    optimizer: OptimizerSettings
    batch_size: int
    seed: int
    parts: int = 1
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
    data: Callable[[Part, Params], Sequence[Term]],
    teacher: Teacher | None,
    checkpoints: Checkpoints,
    metrics: MetricsLog,
    validate: Callable[[Params], dict[str, float]] | None = None,
) -> tuple[Params, Params]:
    """Trains through all stages, from the latest checkpoint when there is one.

    Args:
        params: initial parameters, placed on the devices; their buffers are taken over.
        data: what a part of an epoch trains on, given the placed parameters at its start. A run resumed within
            the part gives it later ones, and must get the same data.
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
    data: Callable[[Part, Params], Sequence[Term]],
    teacher: Teacher | None,
    checkpoints: Checkpoints,
    metrics: MetricsLog,
    validate: Callable[[Params], dict[str, float]] | None,
) -> tuple[TrainState, Position]:
    if position.stage_step == 0 and position.step > 0 and task.restart_optimizer:
        state = TrainState(state.params, functions.start(state.params))
    scheduled = (stage,) if task.restart_optimizer else task.stages
    rate = learning_rate_schedule(task.optimizer, steps(scheduled, task.batch_size))
    sums = functions.zeros(state.params)
    title = task.phase if len(task.stages) == 1 else f"{task.phase}, stage {stage.index}/{len(task.stages)}"

    with progress.bar(title, steps((stage,), task.batch_size)) as bar:
        bar.resume_at(position.stage_step)
        log = _StepLog(task, stage, metrics, bar, parallel)
        while position.epoch < stage.epochs:
            batches = math.ceil(stage.examples_in_epoch(position.epoch) / task.batch_size)
            for part in _parts(task, stage, position):
                terms = data(part, state.params)
                log.restart_clock()
                for batch in _batches(task, parallel, part, terms, position.batch):
                    at = position.stage_step if task.restart_optimizer else position.step
                    learning_rate = np.float32(rate(at))
                    for number, (objective, micro_batch) in enumerate(batch.micro_batches):
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


def _parts(task: Task, stage: Stage, position: Position) -> Iterator[Part]:
    """The parts of an epoch that are not over at `position`."""
    order = order_of_examples(task.seed, stage.index, position.epoch, stage.indices)
    order = order[: stage.examples_in_epoch(position.epoch)]
    batches = math.ceil(len(order) / task.batch_size)
    for number in range(task.parts):
        first, end = (batches * n // task.parts for n in (number, number + 1))
        if max(first, position.batch) < end:
            chosen = order[first * task.batch_size : end * task.batch_size]
            yield Part(stage, position.epoch, number, chosen, first)


@dataclass(frozen=True)
class _Batch:
    micro_batches: list[tuple[Objective, MicroBatch]]  # on the devices
    examples: int
    tokens: int
    target_tokens: int


def _batches(
    task: Task, parallel: Parallel, part: Part, terms: Sequence[Term], batch: int
) -> Iterator[_Batch]:
    """The batches of `part` from number `batch` of its epoch on, packed and fed to the devices ahead of time."""

    def make() -> Iterator[_Batch]:
        skipped = max(batch - part.first_batch, 0) * task.batch_size
        for start in range(skipped, len(part.indices), task.batch_size):
            chosen = part.indices[start : start + task.batch_size]
            yield _Batch(
                [(term.objective, parallel.feed(m)) for term in terms for m in packed(term, chosen)],
                len(chosen),
                sum(int(term.examples.lengths[chosen].sum()) for term in terms),
                sum(int(_targets(term.examples, chosen).sum()) for term in terms),
            )

    def packed(term: Term, chosen: np.ndarray) -> list[MicroBatch]:
        return micro_batches(
            term.examples,
            chosen,
            task.shapes,
            parallel.num_devices,
            term.teacher_rows,
            filled=parallel.local,
            equal_examples=term.equal_examples,
        )

    return prefetch(make(), depth=4)


def _targets(examples: Examples, chosen: np.ndarray) -> np.ndarray:
    return examples.lengths[chosen] - examples.prompt_lengths[chosen]


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
        del values[
            "weight"
        ]  # what the sums were divided by: the target tokens or the examples, counted below
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
            target_tokens=batch.target_tokens,
            micro_batches=len(batch.micro_batches),
            **values,
            **rates,
        )
        self._bar.advance(
            loss=f"{values['loss']:.3f}",
            examples=f"{rates['examples_per_second']:.0f}/s",
            tokens=f"{rates['tokens_per_second']:.0f}/s",
        )
