"""The training loop over stages, epochs and batches: runs steps, logs, validates, saves and resumes."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from l2m_jax import preemption, progress
from l2m_jax.curriculum import Schedule, Stage, steps
from l2m_jax.data.batches import Examples, micro_batches, prefetch
from l2m_jax.data.packing import Shape
from l2m_jax.losses import Objective
from l2m_jax.models.freezing import TopLayers
from l2m_jax.models.lora import attach
from l2m_jax.parallel import Placement
from l2m_jax.training import step as step_functions
from l2m_jax.training.checkpoint import Checkpoints, Position
from l2m_jax.training.metrics import MetricsLog
from l2m_jax.training.optimizer import OptimizerSettings, learning_rate_schedule, make_optimizer
from l2m_jax.training.step import StepSettings, Teacher, TrainState
from l2m_jax.training.step_log import Batch, StepLog
from l2m_jax.types import MicroBatch, Params, TeacherRows

PREFETCHED_BATCHES = 4  # on the devices, ahead of the batch that is trained on


@dataclass(frozen=True)
class Part:
    """A part of an epoch: consecutive batches during which the data stays the same.

    Attributes:
        epoch, number: 0-based; the number is that of the part within its epoch.
        indices: the part's examples, in the order of training.
        first_batch: the index of the part's first batch within the epoch.
        started: whether updates of this part are in the parameters already, from an earlier start.
    """

    stage: Stage
    epoch: int
    number: int
    indices: np.ndarray
    first_batch: int
    started: bool = False


@dataclass(frozen=True)
class Term:
    """A term of the loss. Most methods have one; with several, every term uses all examples of a batch.

    The loss of a batch is the weighted mean of the objectives over the targets of all terms.

    Attributes:
        examples: token arrays by example number.
        teacher_rows: returns what is stored of the teacher for an example; None if the teacher runs live or is not
            needed.
        equal_examples: average over the targets of each example first, then over examples.
    """

    objective: Objective
    examples: Examples
    teacher_rows: Callable[[int], TeacherRows] | None = None
    equal_examples: bool = False


@dataclass(frozen=True)
class Task:
    """One training phase: fine-tuning a teacher, warming up or distilling a student.

    Attributes:
        phase: the task's name in metrics.jsonl and on screen.
        settings: what the compiled step depends on, besides the objective.
        stages: in order; single-stage methods have one.
        shapes: the micro-batch shapes.
        parts: the number of parts of an epoch; the data may change before each.
        by_step: "alpha", "beta" or "temperature" where it varies by step, over the updates of all stages.
        restart_optimizer: start each stage with a new schedule and optimiser state.
        patience: end a stage after this many validations without a better Rouge-L; 0: never.
        validations: the number over the whole task, evenly spaced, the last one at its end.
        validate_every: updates from one validation to the next instead, and one at the end; 0: by `validations`.
        keep_best: return the best parameters by validation instead of the last.
        skip_nonfinite: skip batches whose loss or gradient is not finite, instead of ending the run.
        name: of an example by its number, for messages.
    """

    phase: str
    settings: StepSettings
    stages: tuple[Stage, ...]
    shapes: tuple[Shape, ...]
    optimizer: OptimizerSettings
    batch_size: int
    seed: int
    parts: int = 1
    by_step: Mapping[str, Schedule] = field(default_factory=dict)
    restart_optimizer: bool = True
    patience: int = 0
    validations: int = 0
    validate_every: int = 0
    keep_best: bool = False
    skip_nonfinite: bool = False
    name: Callable[[int], str] = str


class Trainer:
    """Trains through all stages of a task.

    Args:
        data: returns the terms of a part of an epoch, given the placed parameters at its start. A run that resumes
            within the part passes later parameters, and must get the same terms.
        teacher: placed; None without one.
        validate: returns what to log of placed parameters, by name, with at least "validation_rouge_l".
        begin: returns the stage that begins, given its number in `task.stages` and the placed parameters at its start;
            as long as the planned one, perhaps with other examples. A run that resumes within the stage passes later
            parameters, and must get the same stage. None: the planned stage.
    """

    def __init__(
        self,
        task: Task,
        placement: Placement,
        data: Callable[[Part, Params], Sequence[Term]],
        teacher: Teacher | None,
        checkpoints: Checkpoints,
        metrics: MetricsLog,
        validate: Callable[[Params], dict[str, Any]] | None = None,
        begin: Callable[[int, Params], Stage] | None = None,
    ):
        self._task, self._placement, self._data, self._teacher = task, placement, data, teacher
        self._checkpoints, self._metrics, self._validate = checkpoints, metrics, validate
        self._begin = begin or (lambda number, params: task.stages[number])
        self._optimizer = make_optimizer(task.optimizer)
        self._accumulate = placement.map(step_functions.accumulate)
        self._update = placement.map(step_functions.update)
        self._init_optimizer = placement.map(step_functions.init_optimizer)
        self._init_average = placement.map(step_functions.init_average)
        self._zero_sums = placement.map(step_functions.zero_sums)
        self._frozen: Params | None = None
        self._position = Position()
        self._validated_at = frozenset(_validation_steps(task) if validate is not None else ())

    def run(self, initial: Callable[[], Params]) -> Params:
        """Trains from the latest checkpoint, or from `initial()`: placed parameters, whose buffers are donated.

        Returns:
            What is trained (`whole` adds what is not), placed, or its average: the best by validation if
            `task.keep_best`, otherwise the last.

        Raises:
            InputError: a loss or gradient that is not finite, unless `task.skip_nonfinite`; a damaged checkpoint.
        """
        task = self._task
        shapes = step_functions.state_shapes(
            self._optimizer,
            task.settings.student,
            averaged=task.optimizer.ema > 0,
            part=task.settings.part,
        )
        found = self._checkpoints.restore_latest(shapes, needs_best=task.keep_best)
        if found is None:
            params = self._split(initial())
            average = self._init_average(params) if task.optimizer.ema else None
            self._state = TrainState(params, self._init_optimizer(self._optimizer, params), average)
            del params, average
        else:
            self._state, self._position = found
            del found
            if task.settings.part is not None:
                self._split(initial())  # what is frozen is in no checkpoint
        self._metrics.drop_after(task.phase, self._position.step, self._position.validated)
        try:
            with preemption.deferred():
                for number in range(self._position.stage, len(task.stages)):
                    with preemption.at_once():
                        stage = self._begin(number, self.whole(self._state.params))
                    self._train_stage(number, stage)
        except preemption.Preempted:
            self._checkpoints.close()  # the last one may still be written
            raise
        params = self._state.result
        best = self._position.best_step
        if task.keep_best and 0 <= best < self._position.step:
            # The devices have room for only one state.
            del params, self._state
            return self._checkpoints.restore_best(shapes, best)
        del self._state
        return params

    def _split(self, params: Params) -> Params:
        """The parameters to train; keeps the others."""
        task, placement, part = self._task, self._placement, self._task.settings.part
        if part is None:
            return params
        if isinstance(part, TopLayers):
            trained, self._frozen = placement.map(step_functions.split)(part.layers, params)
            return trained
        model = task.settings.student
        self._frozen = attach(placement.initialise(lambda: part.scales(model)), params)
        return placement.initialise(lambda: part.init(model, jax.random.key(task.seed)))

    def whole(self, trained: Params) -> Params:
        """All parameters of the model, given what `run` returns. With adapters, these lie beside their kernels."""
        part = self._task.settings.part
        if part is None:
            return trained
        assert self._frozen is not None
        if isinstance(part, TopLayers):
            return self._placement.map(step_functions.join)(trained, self._frozen)
        return attach(trained, self._frozen)

    def _train_stage(self, number: int, stage: Stage) -> None:
        task = self._task
        if self._position.stage_step == 0 and self._position.step > 0 and task.restart_optimizer:
            params, average = self._state.params, self._state.average
            del self._state
            self._state = TrainState(params, self._init_optimizer(self._optimizer, params), average)
            del params, average
        scheduled = (stage,) if task.restart_optimizer else task.stages
        rate = learning_rate_schedule(task.optimizer, steps(scheduled, task.batch_size))
        before = steps(task.stages[:number], task.batch_size)
        title = task.phase
        if len(task.stages) > 1:
            title = f"{task.phase}, stage {stage.index}/{len(task.stages)}"
        self._sums = self._zero_sums(self._state.params)

        with progress.bar(title, steps((stage,), task.batch_size)) as bar:
            bar.resume_at(self._position.stage_step)
            log = StepLog(
                task.phase,
                stage,
                self._metrics,
                bar,
                self._placement,
                skip_nonfinite=task.skip_nonfinite,
                name=task.name,
            )
            try:
                self._train_batches(stage, before, rate, log)
            except preemption.Preempted:
                log.flush()
                if self._position.step > 0:
                    self._checkpoints.save(self._state, self._position)
                raise
            log.flush()
        del self._sums

    def _train_batches(self, stage: Stage, before: int, rate: Callable[[int], float], log: StepLog) -> None:
        """Trains from the current position to the end of the stage.

        Args:
            before: updates planned in earlier stages.
            rate: the learning rate by step.

        Raises:
            Preempted: the run is asked to end. The state is that of the current position.
        """
        task = self._task
        # A run may have been asked to end after an update whose validation was due.
        if self._position.stage_step > 0 and self._after_update(stage, before, log):
            return
        for batch in self._batches_of_stage(stage, log):
            # As planned: a stage that patience ends early leaves no schedule short of its end.
            at = self._position.stage_step + (0 if task.restart_optimizer else before)
            learning_rate = np.float32(rate(at))
            values = self._train_batch(batch, learning_rate)
            self._position = _after_batch(task, stage, self._position)
            log.add(self._position.step, float(learning_rate), batch, values)
            if preemption.requested(self._position.step):
                raise preemption.Preempted
            if self._after_update(stage, before, log):
                return

    def _after_update(self, stage: Stage, before: int, log: StepLog) -> bool:
        """Validates and saves, where it is time for it. Returns whether the stage has ended."""
        task, improved = self._task, False
        ended = self._position.epoch == stage.epochs
        validates = before + self._position.stage_step in self._validated_at
        if validates and self._position.validated < self._position.step:
            log.flush()
            improved = self._validate_now(stage)
            log.restart_clock()
            ended = ended or 0 < task.patience <= self._position.not_better
        if ended:
            self._position = _next_stage(self._position)
        if ended or improved or self._checkpoints.due(self._position.step):
            log.flush()
            self._checkpoints.save(self._state, self._position)
            log.restart_clock()
        return ended

    def _train_batch(self, batch: Batch, learning_rate: np.float32) -> Any:
        task, params = self._task, self._state.params
        if self._frozen is not None:
            params = params | {"frozen": self._frozen}
        for number, (objective, micro_batch) in enumerate(batch.micro_batches):
            key = _dropout_key(task, self._position.step, number)
            self._sums = self._accumulate(
                task.settings, objective, params, self._sums, micro_batch, self._teacher, key
            )
        del params
        self._state, self._sums, values = self._update(
            self._optimizer, task.optimizer.ema, task.skip_nonfinite, self._state, self._sums, learning_rate
        )
        return values

    def _validate_now(self, stage: Stage) -> bool:
        """Validates. Returns whether this is the best validation so far, and the best one is kept."""
        assert self._validate is not None
        # The sums are zero between batches, and generation needs their memory.
        del self._sums
        with preemption.at_once():
            values = self._validate(self.whole(self._state.result))
        self._sums = self._zero_sums(self._state.params)
        position, rouge_l = self._position, values["validation_rouge_l"]
        self._metrics.write(self._task.phase, position.step, stage=stage.index, **values)
        if rouge_l > position.best_rouge_l:
            position = dataclasses.replace(position, best_rouge_l=rouge_l, best_step=position.step)
        better_in_stage = rouge_l > position.stage_best
        self._position = dataclasses.replace(
            position,
            stage_best=max(position.stage_best, rouge_l),
            not_better=0 if better_in_stage else position.not_better + 1,
            validated=position.step,
        )
        return self._task.keep_best and position.best_step == position.step

    def _batches_of_stage(self, stage: Stage, log: StepLog) -> Iterator[Batch]:
        """The batches from the current position on. Within a part they are packed and fed to the devices in advance."""
        while self._position.epoch < stage.epochs:
            for part in _parts(self._task, stage, self._position):
                log.flush()
                # Zeros between batches: rollouts need their memory beside the state, as validations do.
                del self._sums
                with preemption.at_once():
                    terms = self._data(part, self.whole(self._state.params))
                self._sums = self._zero_sums(self._state.params)
                log.restart_clock()
                yield from prefetch(self._batches(part, terms, self._position), depth=PREFETCHED_BATCHES)

    def _batches(self, part: Part, terms: Sequence[Term], position: Position) -> Iterator[Batch]:
        """The batches of `part`, from `position` on, which lies in it or before it."""
        task, feed = self._task, self._placement.feed
        size = task.batch_size
        first = max(position.batch - part.first_batch, 0)
        total = steps(task.stages, size)
        before = steps((s for s in task.stages if s.index < part.stage.index), size) + position.stage_step
        for number, start in enumerate(range(first * size, len(part.indices), size)):
            chosen = part.indices[start : start + size]
            by_step = {name: s.at_step(before + number, total) for name, s in task.by_step.items()}
            by_sample = {} if part.stage.samples is None else part.stage.samples.by_name
            varying = by_step | by_sample
            yield Batch(
                part.epoch,
                by_step,
                chosen,
                [(term.objective, feed(m)) for term in terms for m in self._packed(term, chosen, varying)],
                sum(int(term.examples.lengths[chosen].sum()) for term in terms),
                sum(int(_targets(term.examples, chosen).sum()) for term in terms),
            )

    def _packed(
        self, term: Term, chosen: np.ndarray, coefficients: Mapping[str, float | np.ndarray]
    ) -> list[MicroBatch]:
        return micro_batches(
            term.examples,
            chosen,
            self._task.shapes,
            self._placement.num_devices,
            term.teacher_rows,
            filled=self._placement.local,
            equal_examples=term.equal_examples,
            coefficients=coefficients,
        )


def _validation_steps(task: Task) -> list[int]:
    """The updates after which to validate, independent of the stages."""
    total = steps(task.stages, task.batch_size)
    if task.validate_every:
        return [*range(task.validate_every, total, task.validate_every), total]
    return [max(1, round(total * k / task.validations)) for k in range(1, task.validations + 1)]


def _after_batch(task: Task, stage: Stage, position: Position) -> Position:
    batches = math.ceil(stage.examples_in_epoch(position.epoch) / task.batch_size)
    epoch_ended = position.batch + 1 == batches
    return dataclasses.replace(
        position,
        epoch=position.epoch + epoch_ended,
        batch=0 if epoch_ended else position.batch + 1,
        stage_step=position.stage_step + 1,
        step=position.step + 1,
    )


def _next_stage(position: Position) -> Position:
    return dataclasses.replace(
        position, stage=position.stage + 1, epoch=0, batch=0, stage_step=0, stage_best=-1.0, not_better=0
    )


def _dropout_key(task: Task, step: int, micro_batch: int) -> jax.Array | None:
    if not task.settings.student.has_dropout:
        return None
    key = jax.random.fold_in(jax.random.key(task.seed), step)
    return jax.random.fold_in(key, micro_batch)


def _parts(task: Task, stage: Stage, position: Position) -> Iterator[Part]:
    """The parts of an epoch that are not finished at `position`."""
    order = stage.order(position.epoch, task.seed)
    batches = math.ceil(len(order) / task.batch_size)
    for number in range(task.parts):
        first, end = (batches * n // task.parts for n in (number, number + 1))
        if max(first, position.batch) < end:
            chosen = order[first * task.batch_size : end * task.batch_size]
            yield Part(stage, position.epoch, number, chosen, first, started=first < position.batch)


def _targets(examples: Examples, chosen: np.ndarray) -> np.ndarray:
    return examples.response_lengths[chosen]
