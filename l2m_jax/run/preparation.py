"""What all methods have in common: teacher, initial student, difficulty of the examples, teacher store."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from l2m_jax import files, methods
from l2m_jax.config import Training
from l2m_jax.curriculum import Difficulty, single_stage
from l2m_jax.curriculum.scoring import score
from l2m_jax.evaluation.sets import from_corpus
from l2m_jax.losses import Objective
from l2m_jax.models import DecoderConfig
from l2m_jax.multihost import first
from l2m_jax.progress import console
from l2m_jax.run import build
from l2m_jax.run.context import FinishedModel, Run
from l2m_jax.training.checkpoint import Checkpoints
from l2m_jax.training.loop import Task, Term, train
from l2m_jax.training.step import StepSettings, target_hidden
from l2m_jax.training.teacher import TeacherStore, build_store
from l2m_jax.types import Params


def _sft(
    run: Run,
    phase: str,
    training: Training,
    config: DecoderConfig,
    params: Params,
    folder: Path,
    made_from: str,
) -> Params:
    """Fine-tuning on the reference responses: of a teacher, or of a student before it is ranked."""
    size = len(run.splits.train)
    task = Task(
        phase=phase,
        settings=StepSettings(config, None, config.valid_vocab_size, run.config.chunk_size),
        stages=single_stage(np.arange(size), training.epochs * size, beta=0.0),
        shapes=run.shapes,
        optimizer=build.optimizer(training),
        batch_size=training.batch_size,
        seed=run.config.seed,
        checkpoint_every=run.config.checkpoint_every,
    )
    terms = (Term(Objective(beta=0.0), run.splits.train),)
    checkpoints = Checkpoints(folder, made_from)
    placed = run.parallel.place(params)
    last, _ = train(task, run.parallel, placed, lambda *_: terms, None, checkpoints, run.metrics)
    checkpoints.close()
    return run.parallel.collect(last)


def fine_tuned_teacher(run: Run) -> FinishedModel:
    settings, folder = run.config.teacher, run.shared / "teacher"
    finetune = settings.finetune
    made_from = files.fingerprint(
        "teacher", settings.model, finetune, run.splits.fingerprint, run.config.seed
    )

    def make() -> tuple[DecoderConfig, Params]:
        config, params = build.build_model(settings.model, run.tokenizer, run.config.seed)
        if finetune.epochs:
            checkpoints = run.shared / "checkpoints" / "teacher"
            params = _sft(run, "teacher", finetune, config, params, checkpoints, made_from)
        return config, params

    return run.finished_model(folder, made_from, settings.model, make)


def initial_student(run: Run, teacher: FinishedModel) -> FinishedModel:
    settings, folder = run.config.student, run.shared / "initial_student"
    made_from = files.fingerprint(
        "student",
        settings.model,
        settings.warmup,
        run.splits.fingerprint,
        run.config.seed,
        teacher.fingerprint,
    )

    def make() -> tuple[DecoderConfig, Params]:
        # Another key than the teacher's: equal weights would make the pair a special case.
        config, params = build.build_model(
            settings.model, run.tokenizer, run.config.seed + 1, (teacher.config, teacher.params)
        )
        if settings.warmup.epochs:
            checkpoints = run.shared / "checkpoints" / "initial_student"
            params = _sft(run, "initial student", settings.warmup, config, params, checkpoints, made_from)
        return config, params

    return run.finished_model(folder, made_from, settings.model, make)


def check_pair(teacher: DecoderConfig, student: DecoderConfig) -> None:
    if teacher.family != student.family:
        console.print(f"  note: a {teacher.family} teacher and a {student.family} student with one tokenizer")


def ranked(run: Run, initial: FinishedModel) -> tuple[Difficulty, str]:
    c, path = run.config.curriculum, run.shared / "difficulty.parquet"
    ranking_model = (initial.config, initial.params)
    if c.ranking_model:
        ranking_model = run.load(c.ranking_model, run.config.student.model)
    made_from = files.fingerprint(
        "difficulty", c.ranking_model or initial.fingerprint, c.ranking, c.stages, run.rules, run.config.seed
    )
    mark = path.with_name(".difficulty")
    if not first(lambda: files.is_finished(mark, made_from) and path.is_file()):
        train = run.splits.train
        prompts = from_corpus("train", train, longest_prompt=run.longest_prompt(ranking_model[0]))
        # The initial student's answers may serve as training data as well: see `rollouts.generated_once`.
        name = "difficulty" if c.ranking_model else "initial_student"
        rouge_l, cross_entropy = score(
            *ranking_model,
            train,
            prompts,
            run.tokenizer,
            run.rules,
            run.config.evaluation.seeds[0],
            output=run.shared / f"{name}_responses.jsonl",
            made_from=files.fingerprint(c.ranking_model or initial.fingerprint, run.splits.fingerprint),
            **run.placement,
        )
        difficulty = Difficulty.of(
            train.ids, rouge_l, cross_entropy, subsets=c.stages, method=c.ranking, seed=run.config.seed
        )

        def write() -> None:
            difficulty.write(path)
            with files.writing(mark, made_from):
                pass

        first(write)
    difficulty = Difficulty.read(path)
    for number, indices in enumerate(difficulty.subsets, start=1):
        console.print(
            f"  subset {number}: {len(indices):,} examples, Rouge-L {100 * difficulty.rouge_l[indices].mean():.1f}, "
            f"cross-entropy {difficulty.cross_entropy[indices].mean():.2f}"
        )
    return difficulty, made_from


def reads_store(run: Run, name: str, difficulty: Difficulty) -> bool:
    """Whether a method learns from the teacher's hidden states at reference responses, which the store holds."""
    method = methods.get(name, run.config)
    stages = methods.stages(method, run.config, difficulty.order)
    return method.on_references_alone and methods.needs_teacher(method, run.config, stages)


def teacher_store(run: Run, teacher: FinishedModel) -> TeacherStore:
    hidden = run.parallel.map(functools.partial(_forward, teacher.config))
    placed = run.parallel.place(teacher.params, may_alias=True)
    return build_store(
        run.shared / "teacher_store",
        lambda batch: run.parallel.gather(hidden(placed, run.parallel.feed(batch))),
        run.splits.train,
        teacher=teacher.fingerprint,
        width=teacher.config.embed_size,
        dtype=run.config.teacher.store_dtype,
        num_devices=run.parallel.num_devices,
    )


def _forward(config: DecoderConfig, params: Params, batch: Any, *, axis_name: str | None = None) -> jax.Array:
    del axis_name
    return target_hidden(config, params, batch)
