"""The phases of a run, in order: data, teacher, initial student, difficulty, teacher store, students, evaluation.

Each leaves an artefact with a fingerprint of what it was made from, and is skipped when that artefact is there.
"""

import functools
import os
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from l2m_jax import files, methods
from l2m_jax.config import Config
from l2m_jax.curriculum import Difficulty, examples_seen, steps
from l2m_jax.evaluation.protocol import Results
from l2m_jax.multihost import first
from l2m_jax.progress import console
from l2m_jax.reporting.report import extremes, write_report
from l2m_jax.run import rollouts
from l2m_jax.run.context import FinishedModel, Run, start
from l2m_jax.run.distillation import card, distilled
from l2m_jax.run.evaluation import evaluated_models
from l2m_jax.run.preparation import (
    check_pair,
    fine_tuned_teacher,
    initial_student,
    ranked,
    reads_store,
    teacher_store,
)
from l2m_jax.training.metrics import read_metrics
from l2m_jax.training.teacher import TeacherStore


def run(config: Config, workdir: str | Path, shared: str | Path | None = None) -> dict[str, Results]:
    """Distils a student and leaves everything in `workdir`; a second call goes on where the first stopped.

    Args:
        shared: where data, teacher, initial student, difficulty and teacher store are kept, so that several runs
            can have them in common; None: `workdir`.

    Returns:
        The evaluation of each model: teacher, student before, student after, baselines.

    Raises:
        InputError: settings, files or models that do not fit together; what was finished is kept.
    """
    run = _start(config, Path(workdir), Path(shared or workdir))
    teacher, initial, difficulty, difficulty_made_from, store = _prepared(run)

    students: dict[str, FinishedModel] = {}
    for name in _names(config):
        phase = "student" if name == config.method else f"student:{name}"
        with run.phase(phase):
            students[name] = distilled(
                run, name, phase, teacher, initial, difficulty, difficulty_made_from, store
            )
    with run.phase("evaluation"):
        results = evaluated_models(run, teacher, initial, students)
    run.metrics.close()
    for name, student in students.items():
        stages = methods.stages(methods.get(name, config), config, difficulty.order)
        rouge_l = {found.title: found.rouge_l.mean for found in results[name].sets}
        text = card(run, name, stages, rouge_l).render()
        first(functools.partial(files.write_text, student.folder / "README.md", text))
    first(lambda: _report(run, results, difficulty))
    return results


def prepare(config: Config, shared: str | Path) -> dict[str, Results]:
    """Leaves in `shared` what `run` needs besides the students of the config, teacher and initial student evaluated.

    After that, several `run` at the same time only read it.

    Returns:
        The evaluation of teacher and student before.

    Raises:
        InputError: as `run`.
    """
    run = _start(config, Path(shared), Path(shared))
    teacher, initial, *_ = _prepared(run)
    with run.phase("evaluation"):
        results = evaluated_models(run, teacher, initial, {})
    run.metrics.close()
    return results


def _names(config: Config) -> list[str]:
    return [config.method, *config.baselines]


def _start(config: Config, workdir: Path, shared: Path) -> Run:
    for name in _names(config):
        methods.get(name, config)
    return start(config, workdir, shared)


class _Prepared(NamedTuple):
    teacher: FinishedModel
    initial: FinishedModel
    difficulty: Difficulty
    difficulty_made_from: str
    store: TeacherStore | None


def _prepared(run: Run) -> _Prepared:
    """The phases that do not depend on how the student is trained."""
    with run.phase("teacher"):
        teacher = fine_tuned_teacher(run)
    with run.phase("initial student"):
        initial = initial_student(run, teacher)
    check_pair(teacher.config, initial.config)
    with run.phase("difficulty"):
        difficulty, difficulty_made_from = ranked(run, initial)
    store = None
    stored = run.config.teacher.signal == "store"
    if stored and any(reads_store(run, name, difficulty) for name in _names(run.config)):
        with run.phase("teacher store"):
            store = teacher_store(run, teacher)
    if wanted := rollouts.generated_for([methods.get(name, run.config) for name in _names(run.config)]):
        with run.phase("generated responses"):
            for name in wanted:
                rollouts.generated_once(run, {"teacher": teacher, "initial_student": initial}[name], name)
    return _Prepared(teacher, initial, difficulty, difficulty_made_from, store)


def _report(run: Run, results: dict[str, Results], difficulty: Difficulty) -> None:
    config = run.config
    stages = methods.stages(methods.get(config.method, config), config, difficulty.order)
    easiest, hardest = extremes(difficulty)
    shared = Path(os.path.relpath(run.shared, run.workdir))
    write_report(
        run.workdir,
        title=f"Distillation by {config.method}",
        results=results,
        teacher="teacher",
        facts={
            "method": config.method,
            "training examples": f"{len(run.splits.train):,}",
            "examples seen": f"{examples_seen(stages):,} in {steps(stages, config.training.batch_size):,} updates",
            "devices": f"{run.parallel.num_devices} × {run.parallel.devices[0].device_kind}, {config.devices.mapping}",
            "seed": config.student_seed,
        },
        metrics=read_metrics(run.workdir / "metrics.jsonl"),
        stages=stages,
        batch_size=config.training.batch_size,
        seconds=run.seconds,
        difficulty=difficulty,
        rows={i: run.splits.train.row(i) for i in (*easiest, *hardest)},
        files={
            "student/": "the distilled student, a Hugging Face folder",
            f"{shared / 'teacher'}/": "the fine-tuned teacher",
            f"{shared / 'difficulty.parquet'}": "Rouge-L, cross-entropy, rank and subset of each training example",
            "metrics.jsonl": "losses, rates and validations",
            "evaluation/": "scores and answers of each model",
            "config.json": "every setting of this run",
        },
    )
    sets = next(iter(results.values())).sets
    table = Table("model", *(found.title for found in sets), title="Rouge-L × 100, mean ± std over seeds")
    for name, result in results.items():
        table.add_row(name, *(f"{s.rouge_l.mean:.1f} ± {s.rouge_l.std:.1f}" for s in result.sets))
    console.print(table)
    console.print(f"student: {run.workdir / 'student'}\nreport:  {run.workdir / 'report.md'}")
