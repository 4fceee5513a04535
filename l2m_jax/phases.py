"""Each phase of a run: from finished artefacts to the next one, skipped where that is there and still matches."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from l2m_jax import artefacts, build, methods, models, rollouts
from l2m_jax.config import Training
from l2m_jax.curriculum import Difficulty, Stage, examples_seen, single_stage, steps
from l2m_jax.curriculum.scoring import score
from l2m_jax.evaluation.protocol import Results, evaluate
from l2m_jax.evaluation.sets import PromptSet, from_corpus, read_set
from l2m_jax.losses import Objective
from l2m_jax.models import DecoderConfig
from l2m_jax.processes import first, is_first
from l2m_jax.progress import console
from l2m_jax.runs import Model, Run
from l2m_jax.training.checkpoint import Checkpoints
from l2m_jax.training.loop import Task, Term, train
from l2m_jax.training.optimizer import OptimizerSettings
from l2m_jax.training.step import StepSettings, Teacher, target_hidden
from l2m_jax.training.teacher import TeacherStore, build_store
from l2m_jax.types import Params


def _optimizer(training: Training) -> OptimizerSettings:
    names = [field.name for field in dataclasses.fields(OptimizerSettings)]
    return OptimizerSettings(**{name: getattr(training, name) for name in names})


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
        optimizer=_optimizer(training),
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


def _saved(
    run: Run, folder: Path, made_from: str, make: Callable[[], tuple[DecoderConfig, Params]], card=None
):
    """The model of `folder`; made and saved there first unless it is there already."""
    if not first(lambda: artefacts.is_finished(folder, made_from)):
        config, params = make()

        def save() -> None:
            with artefacts.writing(folder, made_from) as unfinished:
                models.save(unfinished, config, params, tokenizer=run.tokenizer, card=card)

        first(save)
    else:
        console.print(f"  already there: {folder}")
    return run.load(folder)


def _as_set(run: Run, loaded: tuple[DecoderConfig, Params], model: Any) -> tuple[DecoderConfig, Params]:
    """What a folder does not say: compute type and remat."""
    config = dataclasses.replace(
        loaded[0],
        dtype=build.compute_dtype(model),
        remat=model.remat,
        valid_vocab_size=min(loaded[0].valid_vocab_size, len(run.tokenizer)),
    )
    return config, loaded[1]


def fine_tuned_teacher(run: Run) -> Model:
    settings, folder = run.config.teacher, run.shared / "teacher"
    finetune = settings.finetune
    made_from = artefacts.fingerprint(
        "teacher", settings.model, finetune, run.splits.fingerprint, run.config.seed
    )

    def make() -> tuple[DecoderConfig, Params]:
        config, params = build.build_model(settings.model, run.tokenizer, run.config.seed)
        if finetune.epochs:
            checkpoints = run.shared / "checkpoints" / "teacher"
            params = _sft(run, "teacher", finetune, config, params, checkpoints, made_from)
        return config, params

    loaded = _saved(run, folder, made_from, make)
    return Model(folder, made_from, *_as_set(run, loaded, settings.model))


def initial_student(run: Run, teacher: Model) -> Model:
    settings, folder = run.config.student, run.shared / "initial_student"
    made_from = artefacts.fingerprint(
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

    loaded = _saved(run, folder, made_from, make)
    return Model(folder, made_from, *_as_set(run, loaded, settings.model))


def check_pair(teacher: DecoderConfig, student: DecoderConfig) -> None:
    if teacher.family != student.family:
        console.print(f"  note: a {teacher.family} teacher and a {student.family} student with one tokenizer")


def ranked(run: Run, initial: Model) -> tuple[Difficulty, str]:
    c, path = run.config.curriculum, run.shared / "difficulty.parquet"
    ranking_model = (initial.config, initial.params)
    if c.ranking_model:
        loaded = run.load(c.ranking_model)
        ranking_model = _as_set(run, loaded, run.config.student.model)
    made_from = artefacts.fingerprint(
        "difficulty", c.ranking_model or initial.fingerprint, c.ranking, c.stages, run.rules, run.config.seed
    )
    mark = path.with_name(".difficulty")
    if not first(lambda: artefacts.is_finished(mark, made_from) and path.is_file()):
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
            made_from=artefacts.fingerprint(c.ranking_model or initial.fingerprint, run.splits.fingerprint),
            **run.placement,
        )
        difficulty = Difficulty.of(
            train.ids, rouge_l, cross_entropy, subsets=c.stages, method=c.ranking, seed=run.config.seed
        )

        def write() -> None:
            difficulty.write(path)
            with artefacts.writing(mark, made_from):
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
    return method.on_references_alone and _needs_teacher(run, method, stages)


def _needs_teacher(run: Run, method: methods.Method, stages: tuple[Stage, ...]) -> bool:
    return any(o.needs_teacher for stage in stages for o in methods.objectives(method, run.config, stage))


def teacher_store(run: Run, teacher: Model) -> TeacherStore:
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


def distilled(
    run: Run,
    name: str,
    phase: str,
    teacher: Model,
    initial: Model,
    difficulty: Difficulty,
    difficulty_made_from: str,
    store: TeacherStore | None,
) -> Model:
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
    made_from = artefacts.fingerprint(
        phase.partition(":")[0], method, config.curriculum, config.overrides, config.training, config.student_seed,
        config.rollouts if method.on_policy else None, rollouts.longest_example(run, teacher, initial),
        (e.select, e.validation_every, e.validation_rows, e.seeds[0]), run.rules, config.teacher.signal,
        teacher.fingerprint, initial.fingerprint, difficulty_made_from, run.splits.fingerprint,
    )  # fmt: skip

    def make() -> tuple[DecoderConfig, Params]:
        return initial.config, _distil(run, method, phase, stages, teacher, initial, store, made_from)

    model_card = card(run, name, stages)
    loaded = _saved(run, folder, made_from, make, model_card)
    return Model(folder, made_from, *_as_set(run, loaded, config.student.model))


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
    teacher: Model,
    initial: Model,
    store: TeacherStore | None,
    made_from: str,
) -> Params:
    config, parallel = run.config, run.parallel
    signal = None
    if _needs_teacher(run, method, stages):
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
        optimizer=_optimizer(config.training),
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


def _sets(run: Run, config: DecoderConfig) -> list[PromptSet]:
    e, data = run.config.evaluation, run.config.data
    found = []
    for source in e.sets:
        if source == "test":
            found.append(
                from_corpus("test", run.splits.test, rows=e.rows, longest_prompt=run.longest_prompt(config))
            )
        else:
            found.append(
                read_set(
                    source,
                    run.tokenizer,
                    run.workdir / "data" / "sets",
                    max_prompt_length=run.longest_prompt(config),
                    long_prompt="truncate" if data.truncate else "drop",
                    bos=data.bos in ("evaluation", "both"),
                    rows=e.rows,
                )
            )
    return found


def evaluated_models(
    run: Run, teacher: Model, initial: Model, students: dict[str, Model]
) -> dict[str, Results]:
    evaluated = {"teacher": teacher, "student before": initial, **students}
    sets = _sets(run, initial.config)
    folders = {
        name: (run.workdir if name in students else run.shared) / "evaluation" / name.replace(" ", "_")
        for name in evaluated
    }
    results = {}
    for name, model in evaluated.items():
        results[name] = evaluate(
            model.config,
            model.params,
            run.tokenizer,
            sets,
            run.rules,
            run.config.evaluation.seeds,
            folder=folders[name],
            made_from=model.fingerprint,
            title=name,
            **run.placement,
        )
    if is_first():
        summary = run.workdir / "evaluation"
        artefacts.write_json(summary / "results.json", results)
        artefacts.write_text(summary / "responses.jsonl", "".join(_responses(folders)))
    return results


def _responses(folders: dict[str, Path]) -> Iterator[str]:
    """The answers of all models, each line with its model."""
    for name, folder in folders.items():
        with (folder / "responses.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                yield json.dumps({"model": name, **json.loads(line)}, ensure_ascii=False) + "\n"
