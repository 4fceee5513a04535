"""The phase that trains a student by one method."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from l2m_jax import methods, models
from l2m_jax.curriculum import Curriculum, Difficulty, Exposure, Stage, examples_seen, steps
from l2m_jax.data.packing import Shape
from l2m_jax.evaluation.cross_entropy import cross_entropy_by_example
from l2m_jax.evaluation.protocol import evaluate
from l2m_jax.evaluation.sets import PromptSet, from_corpus
from l2m_jax.evaluation.settings import Evaluation
from l2m_jax.generation import Generator, SamplingRules
from l2m_jax.methods import Method
from l2m_jax.models import DecoderConfig, Lora
from l2m_jax.models.settings import with_dropout
from l2m_jax.multihost import first
from l2m_jax.progress import console
from l2m_jax.run import data, responses, rollouts, tokenizers
from l2m_jax.run import stages as stages_module
from l2m_jax.run.artefacts import Artefact
from l2m_jax.run.context import Context
from l2m_jax.run.diagnostics import Diagnostics
from l2m_jax.run.models import load_frozen, load_to_train, read_config, save, save_adapted
from l2m_jax.run.ranking import RankingInputs
from l2m_jax.run.responses import ResponsesInputs, longest_prompt
from l2m_jax.run.stages import Plan
from l2m_jax.run.store import StoreInputs, open_store
from l2m_jax.training.checkpoint import Checkpoints
from l2m_jax.training.loop import Task, Trainer
from l2m_jax.training.optimizer import Training
from l2m_jax.training.step import StepSettings, Teacher
from l2m_jax.types import Params


@dataclass(frozen=True)
class ValidationInputs:
    """Validations that affect the student (its best checkpoint, or early ends of stages).

    Attributes:
        count: validations over the whole training, evenly spaced; ignored with `every`.
        every: updates from one validation to the next; 0: by `count`.
        rows: the maximum number of rows of `corpus` (0: all).
    """

    corpus: Artefact
    sampling: SamplingRules
    seed: int
    count: int
    rows: int
    max_prompt_length: int
    keep_best: bool
    every: int = field(default=0, metadata={"absent_at_default": True})


@dataclass(frozen=True)
class StudentInputs:
    """
    Attributes:
        method: with its overrides.
        curriculum: with the settings that this method ignores at their defaults.
        ranking: None for a method that ignores difficulty.
        teacher: None for a method without a teacher's signal.
        store: None if the teacher runs live.
        generated: responses generated once to train on, with the name of their model.
        rollouts: None unless the method is on-policy.
        sampling: how rollouts are sampled.
        max_length: the maximum number of tokens of an example with a generated response.
        max_prompt_length: prompts with more tokens get no rollout; 0: only those that leave no room for one.
        validation: None if it does not affect the student.
        lora: the adapters that are trained instead of the initial student's weights; None without.
        teacher_weights: "float" or "int8", of a teacher that runs live.
        store_tail: False if the store has top-k log-probabilities and the loss leaves the other tokens out.
    """

    method: Method
    curriculum: Curriculum
    training: Training
    seed: int
    initial: Artefact
    train: Artefact
    tokenizer: tokenizers.Tokenizer
    ranking: Artefact[RankingInputs] | None
    teacher: Artefact | None
    store: Artefact[StoreInputs] | None
    generated: tuple[tuple[str, Artefact[ResponsesInputs]], ...]
    rollouts: methods.Rollouts | None
    sampling: SamplingRules | None
    max_length: int | None
    max_prompt_length: int | None
    validation: ValidationInputs | None
    lora: Lora | None = field(default=None, metadata={"absent_at_default": True})
    teacher_weights: str = field(default="float", metadata={"absent_at_default": True})
    store_tail: bool = field(default=True, metadata={"absent_at_default": True})


def relevant_curriculum(method: Method, curriculum: Curriculum) -> Curriculum:
    """`curriculum` with the settings that the method ignores at their defaults. The ranking is a separate artefact."""
    kept = ["stages", "epochs_per_stage", "examples", "tokens", "subsets", "patience", "weight"]
    ranked = method.ranking != "random" and (method.staged or curriculum.subsets)
    if ranked:
        kept += ["stratify"]
    if method.staged:
        kept += ["temperatures", "loss_by"]
    if method.staged and curriculum.loss_by == "stage":
        kept += ["restart_optimizer", "temperature_by", "mix", "open_by"]
        kept += ["rerank"] if ranked and not method.shuffled else []
    if method.alpha in ("rising", "falling"):
        kept += ["alphas" if curriculum.alphas else "alpha", "alpha_by"]
    if method.beta == "rising":
        kept += ["betas", "beta_by"] if curriculum.betas else ["beta_first", "beta_last", "beta_by"]
    return Curriculum(**{name: getattr(curriculum, name) for name in kept})


def relevant_rollouts(method: Method, rollouts: methods.Rollouts) -> methods.Rollouts | None:
    """`rollouts` with what the method does not use, or holds itself, at its default; None off-policy."""
    if not method.on_policy:
        return None
    share = methods.Rollouts.student_share if method.contrast is not None else rollouts.student_share
    return methods.Rollouts(student_share=share, replay_share=rollouts.replay_share)


def plan_of(inputs: StudentInputs) -> Plan:
    """The stages of the student's training and what decides them. Its ranking must be finished."""
    ranking = None if inputs.ranking is None else Difficulty.read(inputs.ranking.path)
    train = data.open_corpus(inputs.train)
    return Plan.of(inputs.method, inputs.curriculum, inputs.seed, train, ranking)


def make_student(
    artefact: Artefact[StudentInputs],
    phase: str,
    monitored: ValidationInputs,
    readme: str,
    context: Context,
    diagnostics: Diagnostics | None = None,
) -> None:
    """Trains the student by its method and saves it as a Hugging Face folder.

    Args:
        phase: its name in metrics.jsonl and on screen.
        monitored: the validations to make, whether or not they affect the student.
        readme: its model card.
        diagnostics: what else to measure at each validation.
    """
    if artefact.is_finished:
        console.print(f"  already there: {artefact.path}")
        first(artefact.drop_progress)
        return
    artefact.begin()
    student = Student(artefact, phase, monitored, context, diagnostics)
    params, placement, sampling = student.train(), context.placement, monitored.sampling
    if (lora := artefact.inputs.lora) is None:
        save(artefact, student.saved_config, params, placement, readme, sampling)
    else:
        initial = artefact.inputs.initial
        save_adapted(artefact, student.saved_config, initial, lora, params, placement, readme, sampling)


class Student:
    """One training of a student, from the artefacts that it reads to its parameters."""

    def __init__(
        self,
        artefact: Artefact[StudentInputs],
        phase: str,
        monitored: ValidationInputs,
        context: Context,
        diagnostics: Diagnostics | None = None,
    ):
        self._artefact, self._inputs, self._phase, self._context = artefact, artefact.inputs, phase, context
        self._monitored, self._diagnostics = monitored, diagnostics
        inputs = self._inputs
        self.saved_config = read_config(inputs.initial, context.student, inputs.tokenizer)
        self._config = with_dropout(self.saved_config, inputs.training.dropout)
        self._references = data.open_corpus(inputs.train)
        self._tokenizer = tokenizers.load(inputs.tokenizer)

    def train(self) -> Params:
        """The student's parameters, placed; with LoRA, its adapters alone."""
        inputs, context, artefact = self._inputs, self._context, self._artefact
        plan = plan_of(inputs)
        stages = plan.stages
        console.print(
            f"  {steps(stages, inputs.training.batch_size):,} updates on {examples_seen(stages):,} examples"
            + ", two responses to each" * (inputs.method.contrast is not None)
        )
        shapes = self._shapes()
        # Of passes without gradients beside the training state: no larger than its micro-batches, so that they fit too.
        slots = min(shape.slots for shape in shapes)
        reranking = self._reranking(plan, slots) if inputs.curriculum.rerank else None
        # A run that resumes behind its last stage begins none, so what is known is recorded here too.
        stages_module.show(self._record(plan if reranking is None else reranking.known()))
        teacher_config, teacher = self._teacher()
        task = self._task(stages, shapes, teacher_config)
        assert artefact.progress is not None
        checkpoints = Checkpoints(artefact.progress, context.placement, context.checkpoint_minutes)
        trainer = Trainer(
            task,
            context.placement,
            self._data(),
            teacher,
            checkpoints,
            context.metrics,
            lambda params: self._validate(params, teacher, slots),
            None if reranking is None else reranking.begin,
        )
        params = trainer.run(self._initial)
        checkpoints.close()
        return params if inputs.lora is not None else trainer.whole(params)

    def _initial(self) -> Params:
        """The initial student's parameters, placed: float32, or frozen under adapters."""
        inputs, context = self._inputs, self._context
        if inputs.lora is None:
            return load_to_train(inputs.initial, context.placement)
        return load_frozen(inputs.initial, context.student, inputs.tokenizer, context.placement)[1]

    def _record(self, plan: Plan) -> dict[str, Exposure]:
        """Keeps for the report what the student will see how often."""
        found = stages_module.exposures(plan, self._references, self._inputs.training.batch_size)
        stages_module.write_exposures(exposure_file(self._context.workdir, self._artefact), found)
        return found

    def _reranking(self, plan: Plan, slots: int) -> stages_module.Reranking:
        config, context, references = self._config, self._context, self._references

        def cross_entropy(params: Params, indices: np.ndarray) -> np.ndarray:
            found = cross_entropy_by_example(
                config,
                params,
                references,
                context.placement,
                chunk_size=context.chunk_size,
                indices=indices,
                slots=slots,
            )
            return found[indices]

        return stages_module.Reranking(plan, self._kept("rerankings"), cross_entropy, self._record)

    def _kept(self, what: str) -> Path:
        """A folder for what is made during the training and outlives its checkpoints."""
        assert self._artefact.progress is not None
        # The key is in the name: a run with other settings must not read it.
        name = f"{self._artefact.progress.name}-{self._artefact.key[:8]}"
        return self._artefact.progress.parent.parent / what / name

    def _task(
        self, stages: tuple[Stage, ...], shapes: tuple[Shape, ...], teacher: DecoderConfig | None
    ) -> Task:
        inputs, method = self._inputs, self._inputs.method
        vocabulary = self._config.valid_vocab_size
        if teacher is not None:
            vocabulary = min(vocabulary, teacher.valid_vocab_size)
        return Task(
            phase=self._phase,
            settings=StepSettings(
                self._config,
                teacher,
                vocabulary,
                self._context.chunk_size,
                inputs.lora or inputs.training.part,
            ),
            stages=stages,
            shapes=shapes,
            optimizer=inputs.training,
            batch_size=inputs.training.batch_size,
            seed=inputs.seed,
            parts=method.refreshes if method.on_policy else 1,
            by_step=methods.by_step(method, inputs.curriculum),
            restart_optimizer=inputs.curriculum.restart_optimizer,
            patience=inputs.curriculum.patience,
            validations=self._monitored.count,
            validate_every=self._monitored.every,
            keep_best=self._monitored.keep_best,
            skip_nonfinite=self._context.skip_nonfinite,
            name=lambda i: self._references.row(i).id,
        )

    def _teacher(self) -> tuple[DecoderConfig | None, Teacher | None]:
        """The teacher in its compute dtype; only its head if its hidden states are stored, nothing if its top k are."""
        inputs, context = self._inputs, self._context
        if inputs.teacher is None:
            return None, None
        config = read_config(inputs.teacher, context.teacher, inputs.tokenizer)
        if inputs.store is not None and inputs.store.inputs.top_k:
            return config, None
        if inputs.store is not None:
            put = context.placement.put
            return config, Teacher(models.load_head(str(inputs.teacher.path), dtype=config.dtype, put=put))
        _, params = load_frozen(
            inputs.teacher, context.teacher, inputs.tokenizer, context.placement, inputs.teacher_weights
        )
        return config, Teacher(models.head(config, params), params)

    def _data(self):
        inputs, context, references = self._inputs, self._context, self._references
        end = tokenizers.end_of_response(inputs.tokenizer)
        fixed = {}
        for name, generated in inputs.generated:
            compute = context.teacher if name == "teacher" else context.student
            answers = responses.make_responses(generated, compute, context, f"responses of the {name}")
            fixed[name] = answers.tokens(generated.inputs.sampling, end)
        rows = None
        if inputs.store is not None:
            rows = open_store(inputs.store, context, tail=inputs.store_tail).read
        return rollouts.training_data(
            inputs.method, references, fixed, self._rollouts(), self._longest_example, rows
        )

    def _rollouts(self) -> rollouts.Rollouts | None:
        inputs, context = self._inputs, self._context
        if inputs.rollouts is None:
            return None
        assert inputs.sampling is not None
        longest = longest_prompt(self._config, inputs.sampling, inputs.max_prompt_length or 0)
        sampler = rollouts.Sampler(
            self._config,
            context.placement,
            self._tokenizer,
            tokenizers.end_of_response(inputs.tokenizer),
            context.slots,
            inputs.sampling,
            longest,
            inputs.seed,
        )

        def decode(tokens: tuple[int, ...]) -> str:
            return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

        return rollouts.Rollouts(inputs.rollouts, self._references, sampler, decode, self._kept("rollouts"))

    @property
    def _longest_example(self) -> int:
        positions = [self._config.max_positions]
        if self._inputs.teacher is not None:
            read = read_config(self._inputs.teacher, self._context.teacher, self._inputs.tokenizer)
            positions.append(read.max_positions)
        return min(self._inputs.max_length or positions[0], *positions)

    def _shapes(self) -> tuple[Shape, ...]:
        """Micro-batch shapes whose rows can hold any generated response."""
        train, inputs = self._references, self._inputs
        rules = [generated.inputs.sampling for _, generated in inputs.generated]
        rules += [inputs.sampling] if inputs.sampling is not None else []
        longest = longest_row(train.lengths, train.prompt_lengths, rules, self._longest_example)
        return self._context.shapes(train.lengths, inputs.training.batch_size, longest)

    def _validate(self, params: Params, teacher: Teacher | None, slots: int) -> dict[str, Any]:
        v, context = self._monitored, self._context
        generator = Generator(self._config, params, context.placement, self._tokenizer, context.slots)
        found = evaluate(generator, [self._prompts], v.sampling, [v.seed], title="validation")
        values: dict[str, Any] = {"validation_rouge_l": found.rouge_l}
        if self._diagnostics is not None:
            values |= self._diagnostics.measure(self._config, params, teacher, slots)
            values |= self._diagnostics.answer(generator, v.sampling, self._room)
        return values

    @property
    def _room(self) -> int:
        """The most tokens of a prompt of a validation."""
        return longest_prompt(self._config, self._monitored.sampling, self._monitored.max_prompt_length)

    @functools.cached_property
    def _prompts(self) -> PromptSet:
        v = self._monitored
        return from_corpus("validation", data.open_corpus(v.corpus), rows=v.rows, longest_prompt=self._room)


def exposure_file(workdir: Path, student: Artefact[StudentInputs]) -> Path:
    return workdir / "exposure" / f"{student.path.name}.json"


def longest_row(
    lengths: np.ndarray, prompt_lengths: np.ndarray, rules: Sequence[SamplingRules], limit: int
) -> int:
    """Tokens of the longest example, also with a response that is generated by any of `rules` and cut at `limit`."""
    generated = [min(limit, int(prompt_lengths.max()) + rule.max_new_tokens) for rule in rules]
    return max(int(lengths.max()), *generated, 0)


def validation_inputs(
    evaluation: Evaluation, corpus: Artefact, sampling: SamplingRules, max_prompt_length: int
) -> ValidationInputs:
    return ValidationInputs(
        corpus=corpus,
        sampling=sampling,
        seed=evaluation.seeds[0],
        count=evaluation.validations,
        rows=evaluation.validation_rows,
        max_prompt_length=max_prompt_length,
        keep_best=evaluation.select == "best",
        every=evaluation.validation_steps,
    )
