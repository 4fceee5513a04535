"""Checks before the first phase: files, models, tokenizers, evaluation sets, rows and room on the disk."""

import contextlib
import functools
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from l2m_jax import files, methods, models
from l2m_jax.config import Config
from l2m_jax.data.splits import check_sources
from l2m_jax.data.text import read_documents
from l2m_jax.data.tokenizer import tokenizer_fingerprint
from l2m_jax.errors import InputError
from l2m_jax.evaluation.sets import check_set, require_prompts
from l2m_jax.models import DecoderConfig
from l2m_jax.models.freezing import Part, trained_shapes
from l2m_jax.multihost import first
from l2m_jax.progress import console
from l2m_jax.run import data, tokenizers
from l2m_jax.run.artefacts import Artefact, Source, refuse_changed
from l2m_jax.run.models import ModelInputs, initial_config, read_config
from l2m_jax.run.pretraining import SYNTHETIC
from l2m_jax.run.resolve import Artefacts
from l2m_jax.run.responses import longest_prompt
from l2m_jax.run.stages import strata_of
from l2m_jax.training.optimizer import OptimizerSettings, Pretraining, make_optimizer
from l2m_jax.training.shards import bytes_per_target
from l2m_jax.training.step import state_shapes
from l2m_jax.training.store_format import store_format
from l2m_jax.training.trackers import require_packages

CHECKPOINTS = ", checkpoints"  # follows the name of a model
# A checkpoint is written before an older one is deleted: the latest, the best, and the next.
CHECKPOINTS_AT_ONCE = 3


def check_files(config: Config) -> None:
    """Checks that data files, evaluation sets and the trackers' packages exist, and that the first rows of the data and
    all of the sets can be read.

    Raises:
        InputError: naming the setting.
    """
    first(lambda: _check_files(config))


def _check_files(config: Config) -> None:
    try:
        require_packages(config.tracking)
        check_sources(config.data)
    except InputError as error:
        raise InputError(f"config.{error}") from error
    for who, pretrain in _pretraining(config):
        if pretrain.text != SYNTHETIC:
            try:
                read_documents(pretrain.text)
            except InputError as error:
                raise InputError(f"config.{who}.pretrain.text: {error}") from error
    for source in config.evaluation.sets:
        if source != "test":
            try:
                check_set(source)
            except InputError as error:
                raise InputError(f"config.evaluation.sets: {error}") from error


def _pretraining(config: Config) -> list[tuple[str, Pretraining]]:
    both = (("teacher", config.teacher.pretrain), ("student", config.student.pretrain))
    return [(who, pretrain) for who, pretrain in both if pretrain.text]


def check_models(config: Config, artefacts: Artefacts) -> None:
    """Checks the architectures of teacher and student, their tokenizers, and that they have room for answers.

    Raises:
        InputError: naming the model.
    """
    refuse_changed(artefacts)
    _check_tokenizers(config, artefacts.tokenizer)
    teacher, student = _architectures(config, artefacts)
    _check_weights(config, artefacts)
    common = min(teacher.valid_vocab_size, student.valid_vocab_size)
    if artefacts.store is not None and not artefacts.store.inputs.top_k < common:
        raise InputError(
            f"config.teacher.store_top_k: {artefacts.store.inputs.top_k} is not below the {common} tokens of the "
            "vocabulary; lower it, or set 0 to store hidden states"
        )
    if teacher.family != student.family:
        console.print(f"  note: a {teacher.family} teacher and a {student.family} student with one tokenizer")
    found = [("teacher", teacher), ("student", student)]
    if ranking := _ranking_model(config, artefacts):
        found.append(("ranking model", ranking))
    for who, pretrain in _pretraining(config):
        read_by = [student] if who == "student" else [teacher]
        read_by += [teacher] * pretrain.from_teacher
        most = min([m.max_positions for m in read_by if m.rope is None], default=pretrain.sequence_length)
        if pretrain.sequence_length > most:
            raise InputError(
                f"config.{who}.pretrain.sequence_length: {pretrain.sequence_length} exceeds the {most} positions of the "
                "model; lower it"
            )
    for setting, model, settings in (
        ("teacher.pretrain", teacher, config.teacher.pretrain),
        ("teacher.finetune", teacher, config.teacher.finetune),
        ("student.pretrain", student, config.student.pretrain),
        ("student.warmup", student, config.student.warmup),
        ("training", student, config.training),
    ):
        if settings.trainable_layers > model.num_layers:
            raise InputError(
                f"config.{setting}.trainable_layers: {settings.trainable_layers} exceeds the {model.num_layers} layers of "
                "the model; lower it, or set 0 to train all"
            )
    if config.student.lora.rank:
        try:
            trained_shapes(config.student.lora, student)
        except InputError as error:
            raise InputError(f"config.student.lora.{error}") from error
    for who, model in found:
        if longest_prompt(model, config.sampling, config.data.max_prompt_length) < 1:
            raise InputError(
                f"config.sampling.max_new_tokens: {config.sampling.max_new_tokens} leaves no room for a prompt in the "
                f"{who}'s {model.max_positions} positions; lower it"
            )
        if model.rope is None and config.data.max_length > model.max_positions:
            raise InputError(
                f"config.data.max_length: {config.data.max_length} exceeds the {who}'s {model.max_positions} "
                "positions; lower it"
            )


def _architectures(config: Config, artefacts: Artefacts) -> tuple[DecoderConfig, DecoderConfig]:
    found = []
    for who, artefact, compute in (
        ("teacher", artefacts.teacher, config.teacher.compute),
        ("student", artefacts.initial_student, config.student.compute),
    ):
        try:
            found.append(initial_config(artefact.inputs, compute))
        except InputError as error:
            raise InputError(f"config.{who}.model: {error}") from error
    return found[0], found[1]


def _check_weights(config: Config, artefacts: Artefacts) -> None:
    """The student's weights are read only after the teacher's training."""
    given: list[tuple[str, str, Artefact]] = [
        (f"{who}.model.path", model.path, artefact)
        for who, model, artefact in (
            ("teacher", config.teacher.model, artefacts.teacher),
            ("student", config.student.model, artefacts.initial_student),
        )
        if model.init == "pretrained"
    ]
    if artefacts.ranking is not None:
        given.append(("curriculum.ranking_model", config.curriculum.ranking_model, artefacts.ranking))
    for setting, path, artefact in given:
        if path and not artefact.is_finished:
            try:
                first(functools.partial(models.check, path))
            except InputError as error:
                raise InputError(f"config.{setting}: {error}") from error


def _ranking_model(config: Config, artefacts: Artefacts) -> DecoderConfig | None:
    """The architecture of `curriculum.ranking_model`, if one is given and used."""
    if artefacts.ranking is None or not isinstance(model := artefacts.ranking.inputs.model, Source):
        return None
    try:
        return read_config(model, config.student.compute, artefacts.tokenizer)
    except InputError as error:
        raise InputError(f"config.curriculum.ranking_model: {error}") from error


def _check_tokenizers(config: Config, tokenizer: tokenizers.Tokenizer) -> None:
    """A pretrained model is useless with a tokenizer that produces other ids than its own."""
    given = {
        f"{who}.model.path": model.path
        for who, model in (("teacher", config.teacher.model), ("student", config.student.model))
        if model.init == "pretrained"
    }
    for setting, path in (given | {"curriculum.ranking_model": config.curriculum.ranking_model}).items():
        if not path or path.endswith(".gguf"):
            continue
        folder = Path(path)
        if folder.is_dir() and not any(
            (folder / name).is_file() for name in ("tokenizer.json", "vocab.json")
        ):
            continue  # weights without a tokenizer
        own = tokenizers.tokenizer_source(path, f"config.{setting}").content
        if own != tokenizer_fingerprint(tokenizers.load(tokenizers.untrimmed(tokenizer))):
            raise InputError(
                f"config.{setting}: the tokenizer of '{path}' produces other ids than the run's "
                f"('{config.data.tokenizer or config.teacher.model.path}'); all models must share one"
            )


def check_rows(config: Config, artefacts: Artefacts) -> None:
    """Checks that there are enough rows for the subsets, prompts that leave room for answers, and room on the disk.

    Raises:
        InputError: naming the setting.
    """
    train = data.open_corpus(artefacts.corpora["train"])
    for student in artefacts.students.values():
        of = student.inputs
        strata_N = strata_of(train, of.curriculum.stratify)
        curriculum = of.curriculum.in_examples(train.lengths)
        methods.stages(of.method, curriculum, np.arange(len(train)), of.seed, strata_N)
    _, student = _architectures(config, artefacts)
    room = longest_prompt(student, config.sampling, config.data.max_prompt_length)
    used: dict[data.Part, int] = {
        "validation": config.evaluation.validation_rows,
        "test": config.evaluation.rows,
    }
    for part, rows in used.items():
        prompt_lengths = data.open_corpus(artefacts.corpora[part]).prompt_lengths[: rows or None]
        if not (prompt_lengths <= room).any():
            raise InputError(
                f"config.data.{part}: none of {len(prompt_lengths)} prompts has at most {room} tokens; set data.truncate, "
                "or lower sampling.max_new_tokens to leave them more of the model's positions"
            )
    tokenizer = tokenizers.load(artefacts.tokenizer)
    if not all(evaluation.is_finished for evaluation in artefacts.evaluations.values()):
        first(lambda: _check_prompts(config, artefacts, tokenizer))
    needed, there = bytes_needed(config, artefacts), _bytes_there(artefacts)
    shared, workdir = artefacts.teacher.path.parent, artefacts.evaluations[config.method].path.parents[1]
    first(lambda: _check_room(needed, there, shared, workdir))


@contextlib.contextmanager
def full_disk_explained(config: Config, artefacts: Artefacts) -> Iterator[None]:
    """Says what the run has yet to write if the disk fills up within the block, in any library.

    Raises:
        InputError: the disk or the quota is full; the run can be resumed.
    """
    try:
        yield
    except Exception as error:
        if not files.disk_is_full(error):
            raise
        raise InputError(_full_disk(config, artefacts)) from error


def _full_disk(config: Config, artefacts: Artefacts) -> str:
    folders = artefacts.teacher.path.parent, artefacts.evaluations[config.method].path.parents[1]
    free = ", ".join(
        f"{folder} has {_size(shutil.disk_usage(folder).free)} free"
        for folder in dict.fromkeys(folders)
        if folder.is_dir()
    )
    try:
        sizes = bytes_needed(config, artefacts)
        needed = f"about {_size(max(0, peak_bytes(sizes) - _bytes_there(artefacts)))}"
        listed = ", ".join(f"{name} {_size(size)}" for name, size in sizes.items()) or "answers and reports"
    except InputError:
        needed, listed = "the tokenised rows", "and what is made from them"
    return (
        f"the disk or the quota is full: {free}, and the run has yet to write {needed} ({listed}); make room and run "
        "the same command again, which resumes"
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _check_prompts(config: Config, artefacts: Artefacts, tokenizer: Any) -> None:
    """Every set must have a prompt that fits each model: the sets are tokenised only after the training."""
    room = min(
        longest_prompt(model, config.sampling, config.data.max_prompt_length)
        for model in _architectures(config, artefacts)
    )
    for source in config.evaluation.sets:
        if source != "test":
            try:
                require_prompts(
                    source,
                    tokenizer,
                    max_prompt_length=room,
                    long_prompt="truncate" if config.data.truncate else "drop",
                    bos=config.data.bos in ("evaluation", "both"),
                    prompt=config.data.prompt,
                    rows=config.evaluation.rows,
                )
            except InputError as error:
                raise InputError(f"config.evaluation.sets: {error}") from error


def bytes_needed(config: Config, artefacts: Artefacts) -> dict[str, int]:
    """Bytes that the run has yet to write, by artefact. Answers and reports are negligible."""
    teacher, student = _architectures(config, artefacts)
    sizes = {}
    for name, artefact, model, training in (
        *(
            (
                f"pretrained {role}",
                artefact,
                teacher if role == "teacher" else student,
                artefact.inputs.pretrain,
            )
            for role, artefact in artefacts.pretrained.items()
        ),
        ("teacher", artefacts.teacher, teacher, config.teacher.finetune),
        ("initial student", artefacts.initial_student, student, config.student.warmup),
        *((name, artefact, student, config.training) for name, artefact in artefacts.students.items()),
    ):
        if artefact.is_finished:
            continue
        part = config.student_part if name in artefacts.students else training.part
        sizes[name], state = state_bytes(model, training, part)
        if not isinstance(artefact.inputs, ModelInputs) or artefact.inputs.finetune is not None:
            sizes[f"{name}{CHECKPOINTS}"] = CHECKPOINTS_AT_ONCE * state
    if artefacts.store is not None and not artefacts.store.is_finished:
        targets = int(data.open_corpus(artefacts.corpora["train"]).response_lengths.sum())
        found = artefacts.store.inputs
        sizes["teacher store"] = targets * store_bytes_per_target(teacher, found.dtype, found.top_k)
    return sizes


def state_bytes(model: DecoderConfig, training: OptimizerSettings, part: Part | None) -> tuple[int, int]:
    """Bytes of a model's float32 weights, and of one checkpoint of its training, which trains `part` of it."""
    optimizer = make_optimizer(training)
    state = state_shapes(optimizer, model, averaged=training.ema > 0, part=part)
    return _bytes(state_shapes(optimizer, model).params), _bytes(state)


def store_bytes_per_target(teacher: DecoderConfig, dtype: str, top_k: int) -> int:
    """Bytes of what a store of these settings keeps of a target."""
    return bytes_per_target(store_format(teacher.embed_size, dtype, top_k).tensors)


def peak_bytes(sizes: Mapping[str, int]) -> int:
    """The most bytes on disk at a time, given those of `bytes_needed`: checkpoints go with their finished model."""
    checkpoints = [size for name, size in sizes.items() if name.endswith(CHECKPOINTS)]
    return sum(sizes.values()) - sum(checkpoints) + max(checkpoints, default=0)


def _bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _bytes_there(artefacts: Artefacts) -> int:
    """What unfinished work takes already: checkpoints, and shards of the teacher store."""
    places = [artefact.progress for artefact in artefacts if artefact.progress is not None]
    if artefacts.store is not None and not artefacts.store.is_finished:
        places.append(artefacts.store.path)
    return sum(file.stat().st_blocks * 512 for place in places for file in place.rglob("*") if file.is_file())


def _check_room(sizes: dict[str, int], there: int, shared: Path, workdir: Path) -> None:
    """Against the room on both file systems, if they are not one."""
    for folder in (shared, workdir):
        folder.mkdir(parents=True, exist_ok=True)
    free = sum(
        {folder.stat().st_dev: shutil.disk_usage(folder).free for folder in (shared, workdir)}.values()
    )
    needed = peak_bytes(sizes) - there
    if needed > free:
        listed = ", ".join(f"{name} {_size(size)}" for name, size in sizes.items())
        raise InputError(
            f"{shared}: the run needs about {_size(needed)} ({listed}), and {_size(free)} are free; make room, choose another --workdir, or set teacher.signal to 'live'"
        )
