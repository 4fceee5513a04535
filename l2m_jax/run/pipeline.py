"""The phases of a run, in order: data, pretraining, teacher, initial student, ranking, teacher store, students, evaluation.

Each makes an artefact that is identified by its inputs, and is skipped if that artefact is finished.
"""

import functools
from pathlib import Path

from l2m_jax import files
from l2m_jax.config import Config
from l2m_jax.curriculum import Difficulty
from l2m_jax.evaluation.protocol import Results
from l2m_jax.multihost import first
from l2m_jax.run import checks, data, summary
from l2m_jax.run.artefacts import Artefact
from l2m_jax.run.context import Context, start
from l2m_jax.run.distillation import make_student, validation_inputs
from l2m_jax.run.evaluation import make_evaluation, write_summary
from l2m_jax.run.models import make_model
from l2m_jax.run.pretraining import make_pretrained
from l2m_jax.run.ranking import make_ranking
from l2m_jax.run.resolve import Artefacts, resolve
from l2m_jax.run.responses import make_responses
from l2m_jax.run.store import make_store


def run(config: Config, workdir: str | Path, shared: str | Path | None = None) -> dict[str, Results]:
    """Distils a student and keeps everything in `workdir`. A second call resumes.

    Args:
        shared: the folder of data, teacher, initial student, ranking and teacher store, for several runs to share;
            None: `workdir`.

    Returns:
        The evaluation of each model: teacher, student before, student after, baselines.

    Raises:
        InputError: settings, files or models that do not fit together, or that differ from those of earlier work
            in these folders. That work is left unchanged.
    """
    workdir, shared = Path(workdir), Path(shared or workdir)
    context, artefacts = _start(config, workdir, shared)
    first(lambda: files.write_json(workdir / "config.json", config))
    difficulty = _prepare(config, artefacts, context)
    for name, student in artefacts.students.items():
        phase = "student" if name == config.method else f"student:{name}"
        with context.phase(phase):
            monitored = validation_inputs(
                config.evaluation,
                artefacts.corpora["validation"],
                config.sampling,
                config.data.max_prompt_length,
            )
            readme = summary.card(config, artefacts, name).render()
            make_student(student, phase, monitored, readme, context)
    results = _evaluate(artefacts, context, artefacts.evaluations)
    write_summary(workdir, results, {name: artefacts.evaluations[name].path for name in results})
    for name, student in artefacts.students.items():
        rouge_l = {found.title: found.rouge_l.mean for found in results[name].sets}
        text = summary.card(config, artefacts, name, rouge_l).render()
        first(functools.partial(files.write_text, student.path / "README.md", text))
    first(lambda: summary.write(config, artefacts, context, results, difficulty))
    return results


def prepare(config: Config, shared: str | Path) -> dict[str, Results]:
    """Makes in `shared` everything that `run` needs besides the students, and evaluates teacher and initial student.

    Afterwards several calls of `run` may read it at the same time.

    Returns:
        The evaluation of teacher and student before.

    Raises:
        InputError: as `run`.
    """
    context, artefacts = _start(config, Path(shared), Path(shared))
    _prepare(config, artefacts, context)
    before = {name: artefacts.evaluations[name] for name in ("teacher", "student before")}
    return _evaluate(artefacts, context, before)


def _start(config: Config, workdir: Path, shared: Path) -> tuple[Context, Artefacts]:
    """All checks, and between them the tokenizer and the rows, which the last check needs."""
    checks.check_files(config)
    context = start(config, workdir)
    artefacts = resolve(config, workdir, shared)
    if isinstance(artefacts.tokenizer, Artefact):
        checks.refuse_changed([artefacts.tokenizer])
        data.make_tokenizer(artefacts.tokenizer)
    checks.check_models(config, artefacts)
    with context.phase("data"):
        for corpus in artefacts.corpora.values():
            data.make_corpus(corpus)
    checks.check_rows(config, artefacts)
    return context, artefacts


def _prepare(config: Config, artefacts: Artefacts, context: Context) -> Difficulty | None:
    """The phases before the students' training."""
    for role, pretrained in artefacts.pretrained.items():
        with context.phase(f"pretrained {role}"):
            make_pretrained(pretrained, f"pretrained {role}", getattr(context, role), context)
    with context.phase("teacher"):
        make_model(artefacts.teacher, "teacher", config.teacher.compute, context)
    with context.phase("initial student"):
        make_model(artefacts.initial_student, "initial student", config.student.compute, context)
    difficulty = None
    if artefacts.ranking is not None:
        with context.phase("difficulty"):
            difficulty = make_ranking(artefacts.ranking, context)
    if artefacts.store is not None:
        with context.phase("teacher store"):
            make_store(artefacts.store, context)
    if artefacts.generated:
        with context.phase("generated responses"):
            for name, responses in artefacts.generated.items():
                compute = context.teacher if name == "teacher" else context.student
                make_responses(responses, compute, context, f"responses of the {name.replace('_', ' ')}")
    return difficulty


def _evaluate(artefacts: Artefacts, context: Context, evaluations: dict[str, Artefact]) -> dict[str, Results]:
    with context.phase("evaluation"):
        found = {}
        for name, evaluation in evaluations.items():
            compute = context.teacher if evaluation.inputs.model == artefacts.teacher else context.student
            found[name] = make_evaluation(evaluation, name, compute, context.placement, context.slots)
    context.metrics.close()
    return found
