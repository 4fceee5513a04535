"""The phases in which teacher and student learn a language from plain text, before any task."""

import dataclasses

import numpy as np

from l2m_jax import models
from l2m_jax.curriculum import single_stage
from l2m_jax.data.synthetic import synthetic_text
from l2m_jax.data.text import TextExamples, encode_text, read_documents
from l2m_jax.losses import ForwardKL, Objective
from l2m_jax.models import Compute, DecoderConfig, with_dropout
from l2m_jax.multihost import first
from l2m_jax.progress import console
from l2m_jax.run import sources, tokenizers
from l2m_jax.run.artefacts import Artefact, Source
from l2m_jax.run.context import Context
from l2m_jax.run.models import (
    ModelInputs,
    PretrainingInputs,
    initial_config,
    initial_params,
    load_frozen,
    run_task,
    save,
)
from l2m_jax.training.loop import Task, Term
from l2m_jax.training.optimizer import Pretraining
from l2m_jax.training.step import StepSettings, Teacher

SYNTHETIC = "synthetic"


def pretraining_inputs(
    pretrain: Pretraining, start: ModelInputs, teacher: Artefact | Source | None, seed: int
) -> PretrainingInputs:
    """The inputs of the pretraining of `start`.

    Args:
        teacher: the model to learn from, if `pretrain.from_teacher`.
    """
    return PretrainingInputs(
        start=start,
        pretrain=dataclasses.replace(pretrain.relevant, text="", seed=-1),
        text=None if pretrain.text == SYNTHETIC else sources.given(pretrain.text),
        teacher=teacher if pretrain.from_teacher else None,
        tokenizer=start.tokenizer,
        seed=seed,
    )


def make_pretrained(
    artefact: Artefact[PretrainingInputs], name: str, compute: Compute, context: Context
) -> None:
    """Trains a model on plain text, and saves it as a Hugging Face folder."""
    if artefact.is_finished:
        console.print(f"  already there: {artefact.path}")
        first(artefact.drop_progress)
        return
    artefact.begin()
    inputs, pretrain = artefact.inputs, artefact.inputs.pretrain
    config = initial_config(inputs.start, compute)
    teacher_config, teacher = _teacher(inputs, context)
    examples = text_examples(inputs)
    trained = with_dropout(config, pretrain.dropout)
    objective = Objective(ForwardKL(), beta=0.0 if teacher is None else 1.0)
    valid = min(c.valid_vocab_size for c in (config, teacher_config) if c is not None)
    task = Task(
        phase=name,
        settings=StepSettings(trained, teacher_config, valid, context.chunk_size, pretrain.part),
        stages=single_stage(
            np.arange(len(examples)), pretrain.examples_of(len(examples)), beta=objective.beta
        ),
        shapes=context.shapes(examples.lengths, pretrain.batch_size),
        optimizer=pretrain,
        batch_size=pretrain.batch_size,
        seed=inputs.seed,
        skip_nonfinite=context.skip_nonfinite,
    )
    params = run_task(
        artefact,
        task,
        Term(objective, examples),
        teacher,
        lambda: initial_params(inputs.start, config, context.placement),
        context,
    )
    save(artefact, config, params, context.placement)


def text_examples(inputs: PretrainingInputs) -> TextExamples:
    """The sequences of the text, tokenised in memory. Prints how many there are."""
    documents = synthetic_text(inputs.seed) if inputs.text is None else read_documents(inputs.text.path)
    tokens = encode_text(documents, tokenizers.load(inputs.tokenizer), inputs.pretrain.tokens)
    console.print(f"  {len(tokens) - 1:,} tokens of text")
    return TextExamples(tokens, inputs.pretrain.sequence_length)


def _teacher(inputs: PretrainingInputs, context: Context) -> tuple[DecoderConfig | None, Teacher | None]:
    """The teacher in its compute dtype. It runs live, because most texts are read once."""
    if inputs.teacher is None:
        return None, None
    config, params = load_frozen(inputs.teacher, context.teacher, inputs.tokenizer, context.placement)
    return config, Teacher(models.head(config, params), params)
