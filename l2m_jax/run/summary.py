"""The end of a run: the report, the model cards, and a table on screen."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from l2m_jax.config import Config, Student
from l2m_jax.curriculum import Difficulty, examples_seen, steps
from l2m_jax.data.sources import Row
from l2m_jax.evaluation.protocol import Results
from l2m_jax.models.freezing import Part
from l2m_jax.models.lora import Lora
from l2m_jax.progress import console
from l2m_jax.reporting.card import ModelCard
from l2m_jax.reporting.diagnostics import sample_rows
from l2m_jax.reporting.report import extremes, write_report
from l2m_jax.run import data
from l2m_jax.run.context import Context
from l2m_jax.run.distillation import exposure_file, plan_of
from l2m_jax.run.resolve import Artefacts
from l2m_jax.run.stages import read_exposures
from l2m_jax.training.metrics import missing_steps, read_metrics


def card(
    config: Config, artefacts: Artefacts, name: str, rouge_l: dict[str, float] | None = None
) -> ModelCard:
    """The model card of a student. Its ranking must be finished."""
    stages = plan_of(artefacts.students[name].inputs).stages
    return ModelCard(
        name=f"{name} student",
        student=start_of(config.student),
        teacher=_named(config.teacher.model.path) or "a teacher trained on the same data",
        method=name,
        alpha=tuple(stage.alpha for stage in stages),
        beta=tuple(stage.beta for stage in stages),
        data=("synthetic tasks",) if config.data.source == "synthetic" else (_named(config.data.train),),
        rouge_l=rouge_l or {},
        answers=config.sampling.described(),
        trained=trained_part(config.student_part),
    )


def trained_part(part: Part | None) -> str:
    """What distillation trained of the student, for its card; empty: all of it."""
    if isinstance(part, Lora):
        layers = ", ".join(part.targets) or "all dense layers"
        return f"LoRA adapters of rank {part.rank} and alpha {part.alpha:g} beside {layers}"
    return f"the top {part.layers} layers" if part else ""


def start_of(student: Student) -> str:
    """What a student started from, for its card."""
    model, pretrained = student.model, ", pretrained on plain text" if student.pretrain.text else ""
    if model.init == "teacher_layers":
        return f"layers {', '.join(map(str, model.layers))} of the teacher{pretrained}"
    if model.init == "random" or not model.path:
        return f"random weights{pretrained}"
    return _named(model.path)


def _named(path: str) -> str:
    """A hub name as it is; of a path on this machine the last part, marked as such."""
    if not path or not Path(path).exists():
        return path
    return f"{Path(path).name} (a local {'folder' if Path(path).is_dir() else 'file'})"


def write(
    config: Config,
    artefacts: Artefacts,
    context: Context,
    results: dict[str, Results],
    difficulty: Difficulty | None,
) -> None:
    """Writes report.md with its figures, hands it to the trackers, and prints the scores."""
    workdir, train = context.workdir, data.open_corpus(artefacts.corpora["train"])
    student = artefacts.students[config.method]
    stages = plan_of(student.inputs).stages
    easiest, hardest = extremes(difficulty) if difficulty is not None else ((), ())
    devices, batch_size = context.placement.devices, config.training.batch_size
    listed = {
        "student/": "the distilled student, a Hugging Face folder",
        f"{os.path.relpath(artefacts.teacher.path, workdir)}/": "the fine-tuned teacher",
        "metrics.jsonl": "losses, rates and validations",
        "exposure/": "how often each student saw each subset and category",
        "evaluation/": "scores and answers of each model",
        "config.json": "every setting of this run",
    }
    metrics = read_metrics(workdir / "metrics.jsonl")
    sampled = _sampled(artefacts, metrics)
    if sampled:
        listed["samples.md"] = "greedy answers to a few validation prompts as training goes"
    if artefacts.ranking is not None:
        listed[os.path.relpath(artefacts.ranking.path, workdir)] = (
            "Rouge-L, cross-entropy, rank and subset of each training example"
        )
    write_report(
        workdir,
        title=f"Distillation by {config.method}",
        results=results,
        student=config.method,
        teacher="teacher",
        facts={
            "method": config.method,
            "training examples": f"{len(train):,}",
            "examples seen": f"{examples_seen(stages):,} in {steps(stages, batch_size):,} updates",
            "devices": f"{len(devices)} × {devices[0].device_kind}, {context.placement.mapping}",
            "seed": config.student_seed,
            **_irregular(config, artefacts, workdir, metrics),
        },
        metrics=metrics,
        stages=stages,
        batch_size=batch_size,
        seconds=context.seconds,
        difficulty=difficulty,
        exposures=read_exposures(exposure_file(workdir, student)),
        rows={i: train.row(i) for i in (*easiest, *hardest)},
        sampled=sampled,
        files=listed,
    )
    answers, samples = sample_rows(metrics, sampled, config.method), workdir / "samples.md"
    context.metrics.report(
        {
            name: {found.title: found.rouge_l.mean for found in result.sets}
            for name, result in results.items()
        },
        sorted((workdir / "figures").glob("*.png")),
        answers,
        samples.read_text(encoding="utf-8") if answers else "",
    )
    sets = next(iter(results.values())).sets
    table = Table("model", *(found.title for found in sets), title="Rouge-L × 100, mean ± std over seeds")
    for name, result in results.items():
        table.add_row(name, *(f"{s.rouge_l.mean:.1f} ± {s.rouge_l.std:.1f}" for s in result.sets))
    console.print(table)
    console.print(f"student: {workdir / 'student'}\nreport:  {workdir / 'report.md'}")


def _sampled(artefacts: Artefacts, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Row]:
    """The validation rows whose answers are in `metrics`, by id."""
    validation = data.open_corpus(artefacts.corpora["validation"])
    ids = dict.fromkeys(sample["id"] for line in metrics for sample in line.get("samples", ()))
    return {name: validation.row(validation.ids.index(name)) for name in ids if name in validation.ids}


def _irregular(
    config: Config, artefacts: Artefacts, workdir: Path, metrics: list[dict[str, Any]]
) -> dict[str, str]:
    """Facts for the report: skipped batches, and updates whose lines in metrics.jsonl are gone."""
    found = {}
    if skipped := sum(line.get("skipped", 0) for line in metrics):
        found["skipped batches"] = f"{skipped:,} with a loss or gradient that was not finite"
    # A stage that patience ended has fewer updates than planned.
    planned = 0
    if config.curriculum.patience == 0:
        planned = steps(plan_of(artefacts.students[config.method].inputs).stages, config.training.batch_size)
    at_least = {"student": planned}
    phases = dict.fromkeys([*at_least, *(line["phase"] for line in metrics)])
    if missing := sum(missing_steps(metrics, phase, at_least.get(phase, 0)) for phase in phases):
        found["metrics"] = f"incomplete: metrics.jsonl lacks {missing:,} updates"
        console.print(
            f"  note: {workdir / 'metrics.jsonl'} is damaged and lacks {missing:,} updates; the curves in the report "
            "are incomplete, models and scores are not affected",
            markup=False,
        )
    return found
