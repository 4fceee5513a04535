"""The phase that a run is for: a student trained by one method."""

import numpy as np

from l2m_jax import files, methods, models
from l2m_jax.curriculum import Difficulty, Stage, examples_seen, steps
from l2m_jax.evaluation.protocol import evaluate
from l2m_jax.evaluation.sets import from_corpus
from l2m_jax.models import DecoderConfig
from l2m_jax.progress import console
from l2m_jax.run import build, rollouts
from l2m_jax.run.context import FinishedModel, Run
from l2m_jax.training.checkpoint import Checkpoints
from l2m_jax.training.loop import Task, train
from l2m_jax.training.step import StepSettings, Teacher
from l2m_jax.training.teacher import TeacherStore
from l2m_jax.types import Params


def distilled(
    run: Run,
    name: str,
    phase: str,
    teacher: FinishedModel,
    initial: FinishedModel,
    difficulty: Difficulty,
    difficulty_made_from: str,
    store: TeacherStore | None,
) -> FinishedModel:
    config, method = run.config, methods.get(name, run.config)
    order = difficulty.order
    if method.ranking == "random":
        order = np.random.default_rng(config.student_seed).permutation(len(order))
    stages = methods.stages(method, config, order)
    console.print(
        f"  {name}: {steps(stages, config.training.batch_size):,} updates on {examples_seen(stages):,} examples"
        + ", two responses to each" * (method.contrast > 0)
    )
    folder = run.workdir / "student" if phase == "student" else run.workdir / "baselines" / name
    e = config.evaluation
    made_from = files.fingerprint(
        phase.partition(":")[0], method, config.curriculum, config.overrides, config.training, config.student_seed,
        config.rollouts if method.on_policy else None, rollouts.longest_example(run, teacher, initial),
        (e.select, e.validation_every, e.validation_rows, e.seeds[0]), run.rules, config.teacher.signal,
        teacher.fingerprint, initial.fingerprint, difficulty_made_from, run.splits.fingerprint,
    )  # fmt: skip

    def make() -> tuple[DecoderConfig, Params]:
        return initial.config, _distil(run, method, phase, stages, teacher, initial, store, made_from)

    model_card = card(run, name, stages)
    return run.finished_model(folder, made_from, config.student.model, make, model_card)


def card(
    run: Run, name: str, stages: tuple[Stage, ...], rouge_l: dict[str, float] | None = None
) -> models.ModelCard:
    config = run.config
    return models.ModelCard(
        name=f"{name} student",
        student=config.student.model.path or "random weights",
        teacher=config.teacher.model.path or "a teacher trained on the same data",
        method=name,
        alpha=tuple(stage.alpha for stage in stages),
        beta=tuple(stage.beta for stage in stages),
        data=("synthetic tasks",) if config.data.source == "synthetic" else (config.data.train,),
        rouge_l=rouge_l or {},
    )


def _distil(
    run: Run,
    method: methods.Method,
    phase: str,
    stages: tuple[Stage, ...],
    teacher: FinishedModel,
    initial: FinishedModel,
    store: TeacherStore | None,
    made_from: str,
) -> Params:
    config, parallel = run.config, run.parallel
    signal = None
    if methods.needs_teacher(method, config, stages):
        live = store is None or not method.on_references_alone
        head = parallel.place(models.head(teacher.config, teacher.params))
        signal = Teacher(head, parallel.place(teacher.params, may_alias=True) if live else None)
    task = Task(
        phase=phase,
        settings=StepSettings(
            initial.config,
            teacher.config,
            min(initial.config.valid_vocab_size, teacher.config.valid_vocab_size),
            config.chunk_size,
        ),
        stages=stages,
        shapes=rollouts.shapes(run, method, rollouts.longest_example(run, teacher, initial)),
        parts=method.refreshes if method.on_policy else 1,
        optimizer=build.optimizer(config.training),
        batch_size=config.training.batch_size,
        seed=config.student_seed,
        restart_optimizer=config.curriculum.restart_optimizer,
        patience=config.curriculum.patience,
        checkpoint_every=config.checkpoint_every,
        validation_every=config.evaluation.validation_every,
    )
    validation = from_corpus(
        "validation",
        run.splits.validation,
        rows=config.evaluation.validation_rows,
        longest_prompt=run.longest_prompt(initial.config),
    )

    def validate(params: Params) -> dict[str, float]:
        seeds = config.evaluation.seeds[:1]
        found = evaluate(
            initial.config,
            params,
            run.tokenizer,
            [validation],
            run.rules,
            seeds,
            title="validation",
            **run.placement,
        )
        return {"rouge_l": found.rouge_l}

    folder = run.workdir / "checkpoints" / phase.replace(":", "_")
    checkpoints = Checkpoints(folder, made_from)
    stored = store if signal is not None else None
    data = rollouts.training_data(run, method, teacher, initial, stored, folder / "rollouts")
    last, best = train(
        task,
        parallel,
        parallel.place(initial.params),
        data,
        signal,
        checkpoints,
        run.metrics,
        validate,
    )
    checkpoints.close()
    return parallel.collect(best if config.evaluation.select == "best" else last)
