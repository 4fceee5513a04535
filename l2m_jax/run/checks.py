"""Checks before the first phase: files, models, tokenizers, evaluation sets and rows."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from l2m_jax import methods, models
from l2m_jax.config import Config
from l2m_jax.data.splits import check_sources
from l2m_jax.data.text import read_documents
from l2m_jax.data.tokenizer import tokenizer_fingerprint
from l2m_jax.errors import InputError
from l2m_jax.evaluation.sets import check_set, require_prompts
from l2m_jax.models import DecoderConfig
from l2m_jax.models.freezing import trained_shapes
from l2m_jax.multihost import first
from l2m_jax.progress import console
from l2m_jax.run import data, tokenizers
from l2m_jax.run.artefacts import Artefact, Source, refuse_changed
from l2m_jax.run.models import initial_config, read_config
from l2m_jax.run.pretraining import SYNTHETIC
from l2m_jax.run.resolve import Artefacts
from l2m_jax.run.responses import longest_prompt
from l2m_jax.run.stages import strata_of
from l2m_jax.training.optimizer import Pretraining
from l2m_jax.training.trackers import require_packages


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
    teacher, student = architectures(config, artefacts)
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


def architectures(config: Config, artefacts: Artefacts) -> tuple[DecoderConfig, DecoderConfig]:
    """Of teacher and student.

    Raises:
        InputError: naming the setting.
    """
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
    """Checks that there are enough rows for the subsets, and prompts that leave room for answers.

    Raises:
        InputError: naming the setting.
    """
    train = data.open_corpus(artefacts.corpora["train"])
    for student in artefacts.students.values():
        of = student.inputs
        strata_N = strata_of(train, of.curriculum.stratify)
        curriculum = of.curriculum.in_examples(train.lengths)
        methods.stages(of.method, curriculum, np.arange(len(train)), of.seed, strata_N)
    _, student = architectures(config, artefacts)
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


def _check_prompts(config: Config, artefacts: Artefacts, tokenizer: Any) -> None:
    """Every set must have a prompt that fits each model: the sets are tokenised only after the training."""
    room = min(
        longest_prompt(model, config.sampling, config.data.max_prompt_length)
        for model in architectures(config, artefacts)
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
