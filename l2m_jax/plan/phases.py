"""The phases of a run as a plan sees them: what each holds on a device, and how long it takes at best."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

from l2m_jax import methods
from l2m_jax.config import Training as TrainingSettings
from l2m_jax.data.packing import Shape
from l2m_jax.generation import SamplingRules
from l2m_jax.generation.engine import default_slots
from l2m_jax.losses import Objective
from l2m_jax.models import DecoderConfig
from l2m_jax.plan import programs
from l2m_jax.plan.estimate import seconds
from l2m_jax.plan.programs import Compiler, Decoding, Program, Training, device_bytes
from l2m_jax.plan.targets import Target
from l2m_jax.plan.workload import Workload, vocabulary_trips
from l2m_jax.training.optimizer import OptimizerSettings
from l2m_jax.training.step import StepSettings

_PASS_SLOTS, _PASS_ROW = 8192, 512  # as data.batches.forward_batches
_UTILISATION = 0.8  # of the decoder's slots
_SET_ROWS = {"self_inst": 242, "vicuna": 80, "s_ni": 1694, "un_ni": 10_000}


@dataclass(frozen=True)
class Memory:
    """Bytes on the device that holds most.

    Attributes:
        parameters, optimizer, gradients: of the model that trains, or the parameters of the one that runs.
        teacher: its head with the teacher store, all of it when it runs live.
        loaded: models as they were read, which the run keeps: on the first device, or sharded under "fsdp".
        activations_and_temporaries: what the program that needs most of it holds besides.
    """

    parameters: float = 0.0
    optimizer: float = 0.0
    gradients: float = 0.0
    teacher: float = 0.0
    loaded: float = 0.0
    activations_and_temporaries: float = 0.0

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Phase:
    """
    Attributes:
        seconds: of all of it, by the roofline.
        step_seconds: of one update, where it trains.
        flops_per_step: of one update, over all devices.
    """

    name: str
    memory: Memory
    programs: tuple[Program, ...]
    seconds: float
    step_seconds: float = 0.0
    flops_per_step: float = 0.0


@dataclass(frozen=True)
class Planner:
    """Compiles the phases of `workload` for `target`; with `dry`, counts only what stays on the devices."""

    workload: Workload
    target: Target
    compiler: Compiler
    dry: bool = False

    @property
    def _devices(self) -> int:
        return self.compiler.parallel.num_devices

    @property
    def teacher(self) -> DecoderConfig:
        return programs.attention_for(self.workload.teacher, self.target.platform)

    @property
    def student(self) -> DecoderConfig:
        return programs.attention_for(self.workload.student, self.target.platform)

    def phases(self) -> dict[str, Callable[[], Phase]]:
        """What a run goes through, by name; each is compiled when called."""
        found: dict[str, Callable[[], Phase]] = {}
        if self.workload.config.teacher.finetune.epochs:
            found["teacher fine-tuning"] = self.fine_tuning
        if self.workload.config.teacher.signal == "store":
            found["teacher pass"] = self.teacher_pass
        return found | {"student": self.distillation, "evaluation": self.evaluation}

    def fine_tuning(self) -> Phase:
        w, settings = self.workload, StepSettings(self.teacher, None, self.teacher.valid_vocab_size)
        finetune = w.config.teacher.finetune
        updates = finetune.epochs * math.ceil(len(w.lengths) / finetune.batch_size)
        return self._training(
            "teacher fine-tuning", settings, finetune, Objective(beta=0.0), "none", updates, [self.teacher]
        )

    def distillation(self) -> Phase:
        w, config = self.workload, self.workload.config
        vocabulary = min(self.student.valid_vocab_size, self.teacher.valid_vocab_size)
        settings = StepSettings(self.student, self.teacher, vocabulary, config.chunk_size)
        method = methods.get(config.method, config)
        # The last stage but one has everything in its loss: CE, divergence and mixture.
        objective = methods.objectives(method, config, w.stages[-2:][0])[0]
        teacher = config.teacher.signal if objective.needs_teacher else "none"
        loaded = [self.teacher, self.student]
        return self._training("student", settings, config.training, objective, teacher, w.updates, loaded)

    def _training(
        self,
        name: str,
        settings: StepSettings,
        training: TrainingSettings,
        objective: Objective,
        teacher: str,
        updates: int,
        loaded: list[DecoderConfig],
    ) -> Phase:
        w, devices = self.workload, self._devices
        optimizer = OptimizerSettings(
            weight_decay=training.weight_decay, adam_b1=training.adam_b1, adam_b2=training.adam_b2,
            clip_norm=training.clip_norm,
        )  # fmt: skip
        placed = Training.of(self.compiler, settings, optimizer, teacher)
        held = Memory(
            parameters=device_bytes(placed.params),
            optimizer=device_bytes(placed.optimizer),
            gradients=device_bytes(placed.sums),
            teacher=device_bytes(placed.teacher),
            loaded=self._loaded(loaded),
        )
        if self.dry:
            return Phase(name, held, (), 0.0)
        size, store_dtype = w.largest, w.config.teacher.store_dtype
        accumulate = programs.accumulate(
            self.compiler, settings, objective, placed, size, store_dtype, vocabulary_trips(w, size, devices)
        )
        update = programs.update(self.compiler, optimizer, placed)
        # The other shapes take as much less time as they take fewer operations.
        flops = {
            shape: programs.accumulate_flops(
                settings, objective, placed, shape, vocabulary_trips(w, shape, devices)
            )
            for shape in w.micro_batches
        }
        per_update = sum(count * flops[shape] for shape, count in w.micro_batches.items())
        step = seconds(accumulate, self.target, devices) * per_update / flops[size]
        step += seconds(update, self.target, devices)
        temporaries = max(p.feed + p.temporaries for p in (accumulate, update))
        return Phase(
            name,
            Memory(**asdict(held) | {"activations_and_temporaries": temporaries}),
            (accumulate, update),
            step * updates,
            step,
            per_update * devices,
        )

    def teacher_pass(self) -> Phase:
        w = self.workload
        held = self._placed(self.teacher)
        # Under "fsdp" the model lies on the devices as it was read.
        copies = self._loaded([self.teacher]) if self.compiler.parallel.mapping == "pmap" else 0.0
        if self.dry:
            return Phase("teacher pass", Memory(parameters=held, loaded=copies), (), 0.0)
        length = min(_PASS_ROW, -(-int(w.lengths.max()) // 64) * 64)
        shape = Shape(max(1, _PASS_SLOTS // length), length)
        program = programs.teacher_pass(self.compiler, self.teacher, shape)
        runs = math.ceil(float(w.lengths.sum()) / (shape.slots * self._devices))
        return Phase(
            "teacher pass",
            Memory(held, loaded=copies, activations_and_temporaries=program.feed + program.temporaries),
            (program,),
            runs * seconds(program, self.target, self._devices),
        )

    def evaluation(self) -> Phase:
        """Decoding: the ranking before training, validations during it, and the sets at the end."""
        w, config = self.workload, self.workload.config
        kept = self._loaded([self.teacher, self.student, self.student])
        if self.dry:
            return Phase("evaluation", Memory(loaded=kept), (), 0.0)
        student, student_seconds = self._decoding(self.student)
        teacher, teacher_seconds = self._decoding(self.teacher)
        e, response, longest = config.evaluation, w.response_tokens, config.sampling.max_new_tokens
        validations = sum(math.ceil(stage.epochs / e.validation_every) for stage in w.stages)
        rows = min(e.validation_rows or config.data.validation_rows, config.data.validation_rows)
        answers = sum(self._rows(source) for source in e.sets) * len(e.seeds)
        # Before it is trained, a model seldom ends an answer by itself.
        tokens = len(w.lengths) * longest + answers * longest + (validations * rows + answers) * response
        total = tokens * student_seconds + answers * response * teacher_seconds
        largest = max(student, teacher, key=lambda d: d.prepared + d.cache)
        temporaries = max(largest.decode.temporaries, largest.prefill.feed + largest.prefill.temporaries)
        return Phase(
            "evaluation",
            Memory(largest.prepared, loaded=kept, activations_and_temporaries=largest.cache + temporaries),
            (student.prefill, student.decode, teacher.prefill, teacher.decode),
            total,
        )

    def _decoding(self, config: DecoderConfig) -> tuple[Decoding, float]:
        """The programs, and seconds a token over all devices."""
        w, s = self.workload, self.workload.config.sampling
        rules = SamplingRules(
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            no_repeat_ngram=s.no_repeat_ngram,
            max_new_tokens=s.max_new_tokens,
        )
        length = min(w.longest_sequence, config.max_positions)
        slots = s.slots or default_slots(config, length)
        found = programs.decoding(self.compiler, config, rules, slots, length)
        step = seconds(found.decode, self.target, self._devices)
        return found, step / (slots * self._devices * _UTILISATION)

    def _rows(self, source: str) -> int:
        name, limit = source.partition("=")[0], self.workload.config.evaluation.rows
        rows = _SET_ROWS.get(name, self.workload.config.data.test_rows)
        return min(rows, limit) if limit else rows

    def _placed(self, config: DecoderConfig) -> float:
        return device_bytes(self.compiler.placed(programs.parameters(config)))

    def _loaded(self, configs: list[DecoderConfig]) -> float:
        return sum(self._placed(config) for config in configs)
