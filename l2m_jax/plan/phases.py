"""The phases of a run, named as the run names them: what they hold, compile and write, and how long they take at best."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from l2m_jax import methods, models
from l2m_jax.curriculum import Stage, single_stage, steps
from l2m_jax.evaluation.diagnostics import agreement_pass
from l2m_jax.losses import ForwardKL, Objective
from l2m_jax.models import DecoderConfig, with_dropout
from l2m_jax.parallel import Placement
from l2m_jax.plan import checkpoints, programs
from l2m_jax.plan.checkpoints import Written
from l2m_jax.plan.moments import Moment
from l2m_jax.plan.parts import Parts
from l2m_jax.plan.programs import Compiler, Program, TrainingShapes, share_bytes
from l2m_jax.plan.workload import Batches
from l2m_jax.run.distillation import relevant_curriculum
from l2m_jax.training.loop import PREFETCHED_BATCHES
from l2m_jax.training.optimizer import FineTuning, Pretraining
from l2m_jax.training.step import StepSettings, cross_entropy_pass, hidden_pass, top_k_pass
from l2m_jax.training.store_format import HiddenStates, StoreFormat, store_format

# What a training does beside its updates: what it holds then, the programs, and the seconds over the whole training.
Beside = tuple[Moment, tuple[Program, ...], float]


@dataclass(frozen=True)
class Training:
    """
    Attributes:
        updates: of the whole phase.
        step_seconds: of one update, by the roofline.
        flops_per_step: of one update, over all devices.
        written: its checkpoints.
    """

    batches: Batches
    accumulate: Program
    update: Program
    updates: int
    step_seconds: float
    flops_per_step: float
    written: Written


class Distillation(NamedTuple):
    """What the updates of a student's distillation compute.

    Attributes:
        objectives: each runs over the whole batch.
    """

    shapes: TrainingShapes
    objectives: tuple[Objective, ...]
    batches: Batches
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Phase:
    """
    Attributes:
        seconds: of all of it, by the roofline.
        training: None for a phase that trains nothing.
    """

    name: str
    moments: tuple[Moment, ...]
    programs: tuple[Program, ...] = ()
    seconds: float = 0.0
    training: Training | None = None

    def moment(self, name: str) -> Moment:
        return next(moment for moment in self.moments if moment.name == name)

    @property
    def fullest(self) -> Moment:
        """The moment that needs most on a device."""
        return max(self.moments, key=lambda moment: moment.device_bytes)


class Planner(Parts):
    """Plans the phases of `workload` on `target`, with the programs that `compiler` compiles."""

    def phases(self) -> dict[str, Callable[[], Phase]]:
        """What a run goes through, by name; each is compiled when it is called."""
        w, config = self._w, self._w.config
        chosen = {name: w.method(name) for name in config.method_names}
        found: dict[str, Callable[[], Phase]] = {}
        for role, model in (("teacher", self.teacher), ("student", self.student)):
            if w.pretraining(role).text:
                name = f"pretrained {role}"
                found[name] = lambda name=name, role=role, model=model: self._pretrained(name, role, model)
        found |= {
            "teacher": lambda: self._model("teacher", self.teacher, config.teacher.finetune),
            "initial student": lambda: self._model("initial student", self.student, config.student.warmup),
        }
        if any(methods.needs_ranking(method, config.curriculum) for method in chosen.values()):
            found["difficulty"] = self._difficulty
        if any(config.reads_store(method) for method in chosen.values()):
            found["teacher store"] = self._store
        if config.evaluation.diagnostic_rows:
            found["diagnostics"] = lambda: self._frozen_teacher("diagnostics", self._diagnosed)
        if self._generating(chosen):
            found["generated responses"] = lambda: self._generated(self._generating(chosen))
        for name in chosen:
            phase = "student" if name == config.method else f"student:{name}"
            found[phase] = lambda phase=phase, name=name: self._distillation(phase, name)
        return found | {"evaluation": self._evaluation}

    def _generating(self, chosen: dict[str, methods.Method]) -> list[tuple[str, DecoderConfig]]:
        """Whose responses are generated once and trained on."""
        names = {name for method in chosen.values() for name in methods.generated_by(method)}
        models = {"teacher": self.teacher, "initial_student": self.student}
        return [(name.replace("_", " "), model) for name, model in models.items() if name in names]

    def _model(self, name: str, model: DecoderConfig, finetune: FineTuning) -> Phase:
        """A model that is loaded or initialised, fine-tuned if asked for, and saved."""
        saving = self._moments.saving(model)
        if not finetune.trains:
            return Phase(name, (saving,))
        model = with_dropout(model, finetune.dropout)
        chunk_size = self._w.config.chunk_size
        settings = StepSettings(model, None, model.valid_vocab_size, chunk_size, finetune.part)
        planner, rows = self, self._w.config.teacher.train_rows
        if name == "teacher" and rows:
            planner = Planner(self._w.of_rows(rows), self._target, self._compiler)
        return planner._single_stage(
            name, TrainingShapes(settings, finetune), finetune, Objective(beta=0.0), saving
        )

    def _pretrained(self, name: str, role: str, model: DecoderConfig) -> Phase:
        """A model that learns from plain text, from the teacher if asked for, and is saved."""
        pretrain, saving = self._w.pretraining(role), self._moments.saving(model)
        model = with_dropout(model, pretrain.dropout)
        vocabulary = min(model.valid_vocab_size, self.teacher.valid_vocab_size)
        teacher, signal = (self.teacher, "live") if pretrain.from_teacher else (None, "none")
        chunk_size = self._w.config.chunk_size
        settings = StepSettings(model, teacher, vocabulary, chunk_size, pretrain.part)
        shapes = TrainingShapes(settings, pretrain, signal)
        objective = Objective(ForwardKL(), beta=float(pretrain.from_teacher))
        planner = Planner(self._w.of_text(pretrain), self._target, self._compiler)
        return planner._single_stage(name, shapes, pretrain, objective, saving)

    def _single_stage(
        self,
        name: str,
        shapes: TrainingShapes,
        settings: FineTuning | Pretraining,
        objective: Objective,
        saving: Moment,
    ) -> Phase:
        examples = settings.examples_of(len(self._w.lengths))
        updates = steps(single_stage(np.arange(len(self._w.lengths)), examples), settings.batch_size)
        batches = self._w.fine_tuning_batches(settings)
        training = self.training(shapes, (objective,), batches, updates, stages=1)
        return self._trained(name, shapes, training, (saving,))

    def distillation(self, name: str) -> Distillation:
        """What the updates of a method's student compute; nothing is compiled."""
        w, config = self._w, self._w.config
        method, student = w.method(name), with_dropout(self.student, config.training.dropout)
        stages = w.stages(method)
        vocabulary = min(student.valid_vocab_size, self.teacher.valid_vocab_size)
        signal = "none"
        if methods.needs_teacher(method, config.curriculum):
            signal = "store" if w.config.reads_store(method) else "live"
        teacher = None if signal == "none" else self.teacher
        settings = StepSettings(student, teacher, vocabulary, config.chunk_size, config.student_part)
        shapes = TrainingShapes(
            settings,
            config.training,
            signal,
            self._stored if signal == "store" else None,
            (*methods.by_step(method, config.curriculum), *_by_sample(stages[0])),
            config.teacher.weights,
        )
        # The last stage but one has everything in its loss: cross-entropy, divergence and mixture.
        objectives = methods.objectives(method, stages[-2:][0])
        return Distillation(shapes, objectives, w.batches(method), stages)

    def _distillation(self, phase: str, name: str) -> Phase:
        w, config = self._w, self._w.config
        method = w.method(name)
        shapes, objectives, batches, stages = self.distillation(name)
        student, vocabulary = shapes.settings.student, shapes.settings.valid_vocab_size
        validations = config.evaluation.validations_in(w.updates(method))
        improvements = validations if config.evaluation.select == "best" else 0
        training = self.training(shapes, objectives, batches, w.updates(method), len(stages), improvements)
        fed = self._fed(shapes, training)
        beside = [self._validation(shapes, fed, validations)]
        if config.evaluation.diagnostic_rows:
            beside.append(self._diagnostics(shapes, fed, batches, vocabulary, validations))
        if relevant_curriculum(method, config.curriculum).rerank:
            beside.append(self._reranking(shapes, batches, stages))
        if method.on_policy:
            beside.append(self._rollouts(shapes, method, stages))
        moments, listed, spent = zip(*beside, strict=True)
        saving = self._moments.saving(student, shapes.params if config.student.lora.rank else None)
        trained = self._trained(phase, shapes, training, (*moments, saving))
        return dataclasses.replace(
            trained,
            programs=(*trained.programs, *itertools.chain(*listed)),
            seconds=trained.seconds + sum(spent),
        )

    def _validation(self, shapes: TrainingShapes, fed: float, validations: int) -> Beside:
        """With the greedy answers of the diagnostics, whose programs differ only in how they choose a token."""
        w, evaluation = self._w, self._w.config.evaluation
        rows = self._validation_rows
        found = self._decoding(shapes.settings.student, shapes.whole, rows)
        answers = validations * (rows + min(rows, evaluation.diagnostic_rows))
        spent = self._decoding_seconds(found, answers * w.response_tokens)
        return self._moments.generation_beside("validation", shapes, fed, found), found.programs, spent

    def _diagnostics(
        self, shapes: TrainingShapes, fed: float, batches: Batches, vocabulary: int, validations: int
    ) -> Beside:
        config, student = self._w.config, shapes.settings.student
        shape, calls = self._forward(self._diagnosed, _slots(batches))
        head = models.head(self.teacher, programs.frozen(self.teacher))
        batch = programs.micro_batch(shape, HiddenStates(self.teacher.embed_size, "float32"))
        static = student, vocabulary, config.chunk_size
        found = self._pass("agreement", shape, agreement_pass, *static, shapes.whole, head, batch)
        moment = self._moments.beside("diagnostics", shapes, fed, share_bytes(batch), found, head)
        return moment, (found,), validations * calls * self._seconds(found)

    def _reranking(self, shapes: TrainingShapes, batches: Batches, stages: tuple[Stage, ...]) -> Beside:
        """Of the subsets that are not open yet, at the start of each stage between the first and the last."""
        lengths = self._w.lengths
        shape, calls = self._forward(lengths, _slots(batches))
        batch = programs.micro_batch(shape)
        static = shapes.settings.student, self._w.config.chunk_size
        found = self._pass("re-ranking", shape, cross_entropy_pass, *static, shapes.whole, batch)
        moment = self._moments.beside("re-ranking", shapes, 0.0, share_bytes(batch), found)
        return moment, (found,), max(0, len(stages) - 2) / 2 * calls * self._seconds(found)

    def _rollouts(self, shapes: TrainingShapes, method: methods.Method, stages: tuple[Stage, ...]) -> Beside:
        config = self._w.config
        share = 1.0 if method.contrast is not None else config.rollouts.student_share
        answers = math.ceil(share * sum(stage.examples for stage in stages))
        at_once = math.ceil(share * max(len(stage.indices) for stage in stages) / method.refreshes)
        found = self._decoding(shapes.settings.student, shapes.whole, at_once)
        spent = self._decoding_seconds(found, answers * config.sampling.max_new_tokens)
        return self._moments.generation_beside("rollouts", shapes, 0.0, found), found.programs, spent

    def _trained(
        self, name: str, shapes: TrainingShapes, training: Training, beside: tuple[Moment, ...]
    ) -> Phase:
        both = (training.accumulate, training.update)
        moments = self._moments.training(shapes, self._fed(shapes, training), both)
        return Phase(name, (*moments, *beside), both, training.step_seconds * training.updates, training)

    def training(
        self,
        shapes: TrainingShapes,
        objectives: tuple[Objective, ...],
        batches: Batches,
        updates: int,
        stages: int,
        improvements: int = 0,
    ) -> Training:
        """The programs of an update. With several objectives, each runs over the whole batch."""
        w, objective, largest = self._w, objectives[0], batches.largest
        model = shapes.settings.student

        def trips(shape):
            return w.vocabulary_trips(batches, shape, model.vocab_size)

        arguments = shapes.accumulate_arguments(objective, largest)
        accumulate = self._pass(
            "accumulate", largest, programs.step.accumulate, *arguments, trips=trips(largest)
        )
        arguments = shapes.update_arguments(w.config.skip_nonfinite)
        update = self._compiler.program("update", "once a step", programs.step.update, arguments)
        step = flops = 0.0
        if not self._compiler.dry:
            # The other shapes take as much less time as they take fewer operations.
            flops = len(objectives) * sum(
                count
                * programs.share_flops(
                    programs.step.accumulate, shapes.accumulate_arguments(objective, shape), trips(shape)
                )
                for shape, count in batches.micro_batches.items()
            )
            step = self._seconds(accumulate) * flops / accumulate.flops + self._seconds(update)
        minutes = w.config.checkpoint_minutes
        written = checkpoints.of_training(
            int(share_bytes(shapes.state)), minutes, step * updates, updates, stages, improvements
        )
        return Training(batches, accumulate, update, updates, step, flops * self._devices, written)

    def _fed(self, shapes: TrainingShapes, training: Training) -> float:
        """Bytes of batches on a device: those ahead, the one in hand, and one that waits to be queued."""
        of_batch = sum(
            count * share_bytes(shapes.batch(shape))
            for shape, count in training.batches.micro_batches.items()
        )
        return (PREFETCHED_BATCHES + 2) * of_batch

    def _difficulty(self) -> Phase:
        """The initial student's answers to the training prompts, and its cross-entropy of the references."""
        params, (shape, calls) = programs.frozen(self.student), self._forward(self._w.lengths)
        answers = min(self._w.config.curriculum.ranking_rows or len(self._w.lengths), len(self._w.lengths))
        found = self._decoding(self.student, params, answers)
        batch, chunk_size = programs.micro_batch(shape), self._w.config.chunk_size
        forward = self._pass(
            "cross-entropy", shape, cross_entropy_pass, self.student, chunk_size, params, batch
        )
        # Before it is trained, a model seldom ends an answer by itself.
        tokens = answers * self._w.config.sampling.max_new_tokens
        moments = (
            self._moments.generation("answers", params, found),
            self._moments.frozen_pass("cross-entropy", params, share_bytes(batch), forward),
        )
        spent = self._decoding_seconds(found, tokens) + calls * self._seconds(forward)
        return Phase("difficulty", moments, (*found.programs, forward), spent)

    @property
    def _stored(self) -> StoreFormat:
        teacher = self._w.config.teacher
        width = self.teacher.embed_size
        return store_format(width, teacher.store_dtype, teacher.store_top_k, teacher.store_tail)

    def _store(self) -> Phase:
        """Each process computes a part of the shards, on its own devices alone."""
        teacher, placement = self._w.config.teacher, self._compiler.placement
        processes = max(1, self._w.config.devices.num_processes)
        own = placement.devices[: placement.num_devices // processes]
        compiler = Compiler(Placement(placement.mapping, own), self._compiler.dry)
        planner = Planner(self._w, self._target, compiler) if processes > 1 else self
        lengths = self._w.lengths[::processes]
        return planner._frozen_teacher("teacher store", lengths, teacher.weights, teacher.store_top_k)

    def _frozen_teacher(
        self, name: str, lengths: np.ndarray, weights: str = "float", top_k: int = 0
    ) -> Phase:
        """The teacher's hidden states, or its top k, on examples of these lengths."""
        params, (shape, calls) = programs.frozen(self.teacher, weights), self._forward(lengths)
        batch = programs.micro_batch(shape)
        if top_k:
            static = self.teacher, top_k, self._w.config.chunk_size
            forward = self._pass("top k", shape, top_k_pass, *static, params, batch)
        else:
            forward = self._pass("hidden states", shape, hidden_pass, self.teacher, params, batch)
        moment = self._moments.frozen_pass(forward.name, params, share_bytes(batch), forward)
        return Phase(name, (moment,), (forward,), calls * self._seconds(forward))

    def _generated(self, chosen: list[tuple[str, DecoderConfig]]) -> Phase:
        """Responses that methods train on; those of the initial student may exist since the ranking."""
        answers = len(self._w.lengths)
        tokens = answers * self._w.response_tokens
        return self._generation_phase(
            "generated responses", [(title, model, answers, tokens) for title, model in chosen]
        )

    def _evaluation(self) -> Phase:
        e, response = self._w.config.evaluation, self._w.response_tokens
        answers = max(1, sum(self._set_rows(source) for source in e.sets) * len(e.seeds))
        longest = self._w.config.sampling.max_new_tokens
        students = answers * (longest + len(self._w.config.method_names) * response)
        return self._generation_phase(
            "evaluation",
            [
                ("teacher", self.teacher, answers, answers * response),
                ("student", self.student, answers, students),
            ],
        )

    def _generation_phase(self, name: str, models: list[tuple[str, DecoderConfig, int, float]]) -> Phase:
        """Models that generate one after another: title, model, answers, tokens."""
        moments, listed, spent = [], [], 0.0
        for title, model, answers, tokens in models:
            params = programs.frozen(model)
            found = self._decoding(model, params, answers)
            moments.append(self._moments.generation(title, params, found))
            listed += found.programs
            spent += self._decoding_seconds(found, tokens)
        return Phase(name, tuple(moments), tuple(listed), spent)


def _by_sample(stage: Stage) -> list[str]:
    """The coefficients of the loss that differ by sample; weights are there in any case."""
    return [name for name in (stage.samples.by_name if stage.samples else ()) if name != "weight"]


def _slots(batches: Batches) -> int:
    """Of passes beside the training state, as `distillation.Student` chooses them."""
    return min(shape.slots for shape in batches.shapes)
