"""The phases of a run, in order: data, pretraining, teacher, initial student, ranking, teacher store, diagnostics,
generated responses, students, evaluation.

Each makes an artefact that is identified by its inputs, and is skipped if that artefact is finished.
"""

import contextlib
import functools
from collections.abc import Iterable
from pathlib import Path

from l2m_jax import files
from l2m_jax.config import Config, to_dict
from l2m_jax.curriculum import Difficulty
from l2m_jax.errors import InputError
from l2m_jax.evaluation.protocol import Results
from l2m_jax.multihost import first
from l2m_jax.run import checks, data, disk, locks, summary, tokenizers
from l2m_jax.run.artefacts import Artefact
from l2m_jax.run.context import Context, start
from l2m_jax.run.diagnostics import Diagnostics, make_states
from l2m_jax.run.distillation import make_student, validation_inputs
from l2m_jax.run.evaluation import make_evaluation, write_summary
from l2m_jax.run.models import make_model
from l2m_jax.run.pretraining import make_pretrained
from l2m_jax.run.ranking import make_ranking
from l2m_jax.run.resolve import Artefacts, folder_of_world, resolve
from l2m_jax.run.responses import make_responses
from l2m_jax.run.store import import_store, make_store
from l2m_jax.training.outputs import Outputs

# The models that runs share.
_BEFORE = ("teacher", "student before")


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
    context = _start(config, workdir)
    with locks.held(workdir), contextlib.ExitStack() as tracked:
        with _sharing(config, workdir, shared):
            artefacts = _resolve(config, workdir, shared, context)
            tracked.enter_context(context.metrics.tracked(config.tracking, to_dict(config)))
            with disk.full_disk_explained(config, artefacts):
                difficulty = _prepare(config, artefacts, context)
        with disk.full_disk_explained(config, artefacts):
            return _run(config, workdir, shared, context, artefacts, difficulty)


def _run(
    config: Config,
    workdir: Path,
    shared: Path,
    context: Context,
    artefacts: Artefacts,
    difficulty: Difficulty | None,
) -> dict[str, Results]:
    """The phases from the students' training on."""
    first(lambda: files.write_json(workdir / "config.json", config))
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
            diagnostics = None
            if artefacts.diagnostics is not None and not student.is_finished:
                diagnostics = Diagnostics(artefacts.diagnostics, artefacts.ranking, context)
            make_student(student, phase, monitored, readme, context, diagnostics)
    with _sharing(config, workdir, shared):
        results = _evaluate(artefacts, context, _BEFORE)
    results |= _evaluate(artefacts, context, artefacts.students)
    write_summary(workdir, results, {name: artefacts.evaluations[name].path for name in results})
    for name, student in artefacts.students.items():
        rouge_l = {found.title: found.rouge_l.mean for found in results[name].sets}
        text = summary.card(config, artefacts, name, rouge_l).render()
        first(functools.partial(files.write_text, student.path / "README.md", text))
    first(lambda: summary.write(config, artefacts, context, results, difficulty))
    return results


def _sharing(config: Config, workdir: Path, shared: Path) -> contextlib.AbstractContextManager[None]:
    if shared == workdir:
        return contextlib.nullcontext()
    return _held_unless_finished(shared, resolve(config, workdir, shared).common)


def _held_unless_finished(
    shared: Path, needed: Iterable[Artefact]
) -> contextlib.AbstractContextManager[None]:
    """Waits for other runs that make what is shared. Where all that is needed is there, reading it takes no lock."""
    if all(artefact.is_finished for artefact in needed):
        return contextlib.nullcontext()
    return locks.held(shared, wait=True)


def prepare(config: Config, shared: str | Path) -> dict[str, Results]:
    """Makes in `shared` everything that `run` needs besides the students, and evaluates teacher and initial student.

    Afterwards several calls of `run` may read it at the same time.

    Returns:
        The evaluation of teacher and student before.

    Raises:
        InputError: as `run`.
    """
    shared = Path(shared)
    folder = folder_of_world(shared, config.world)
    context = _start(config, folder)
    with locks.held(shared, wait=True):
        artefacts = _resolve(config, folder, shared, context)
        with (
            disk.full_disk_explained(config, artefacts),
            context.metrics.tracked(config.tracking, to_dict(config)),
        ):
            _prepare(config, artefacts, context)
            return _evaluate(artefacts, context, _BEFORE)


def build_store(
    config: Config, workdir: str | Path, shared: str | Path | None = None, outputs: Outputs | None = None
) -> None:
    """Makes the teacher store of a run, and what it is made from: rows and teacher. A second call resumes.

    Args:
        workdir, shared: as of `run`, which then finds the store.
        outputs: of the teacher, as another tool has written them; None: the teacher runs here.

    Raises:
        InputError: as `run`; the run needs no store; or as `store.import_store`.
    """
    workdir, shared = Path(workdir), Path(shared or workdir)
    context = _start(config, workdir)
    with locks.held(workdir), _sharing(config, workdir, shared):
        artefacts = _resolve(config, workdir, shared, context)
        if artefacts.store is None:
            raise InputError(
                f"config.teacher.signal: {config.teacher.signal!r} with method {config.method!r} needs no store; nothing "
                "is built"
            )
        with disk.full_disk_explained(config, artefacts):
            if outputs is not None:
                with context.phase("teacher store"):
                    import_store(artefacts.store, outputs, context)
                return
            if (pretrained := artefacts.pretrained.get("teacher")) is not None:
                with context.phase("pretrained teacher"):
                    make_pretrained(pretrained, "pretrained teacher", context.teacher, context)
            with context.phase("teacher"):
                make_model(artefacts.teacher, "teacher", config.teacher.compute, context)
            with context.phase("teacher store"):
                make_store(artefacts.store, context)


def check(config: Config, shared: str | Path) -> Path:
    """Makes the tokenizer and the rows in `shared`, and all checks.

    Returns:
        The folder of the training rows.

    Raises:
        InputError: as `run`.
    """
    shared = Path(shared)
    folder = folder_of_world(shared, config.world)
    context = _start(config, folder)
    with _held_unless_finished(shared, resolve(config, folder, shared).all_corpora):
        return _resolve(config, folder, shared, context).corpora["train"].path


def _start(config: Config, workdir: Path) -> Context:
    checks.check_files(config)
    return start(config, workdir)


def _resolve(config: Config, workdir: Path, shared: Path, context: Context) -> Artefacts:
    """All further checks, and between them the tokenizer and the rows, which the last check needs."""
    artefacts = resolve(config, workdir, shared)
    with disk.full_disk_explained(config, artefacts):
        if isinstance(artefacts.tokenizer, Artefact):
            checks.refuse_changed([artefacts.tokenizer])
            tokenizers.make_tokenizer(artefacts.tokenizer)
        checks.check_models(config, artefacts)
        with context.phase("data"):
            data.make_corpora(artefacts.all_corpora, config.data.processes)
        checks.check_rows(config, artefacts)
        first(lambda: disk.check_room(config, artefacts))
    return artefacts


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
    unfinished = [student for student in artefacts.students.values() if not student.is_finished]
    if artefacts.diagnostics is not None and unfinished:
        with context.phase("diagnostics"):
            make_states(artefacts.diagnostics, context)
    if artefacts.generated:
        with context.phase("generated responses"):
            for name, responses in artefacts.generated.items():
                compute = context.teacher if name == "teacher" else context.student
                make_responses(responses, compute, context, f"responses of the {name.replace('_', ' ')}")
    return difficulty


def _evaluate(artefacts: Artefacts, context: Context, names: Iterable[str]) -> dict[str, Results]:
    with context.phase("evaluation"):
        found = {}
        for name in names:
            evaluation = artefacts.evaluations[name]
            compute = context.teacher if evaluation.inputs.model == artefacts.teacher else context.student
            found[name] = make_evaluation(evaluation, name, compute, context.placement, context.slots)
    return found
