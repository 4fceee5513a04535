"""The phases that make the teacher, and the student before distillation (see `pretraining.py` for their first phase)."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from l2m_jax import models
from l2m_jax.curriculum import single_stage
from l2m_jax.errors import InputError
from l2m_jax.generation import SamplingRules
from l2m_jax.losses import Objective
from l2m_jax.models import Compute, DecoderConfig, Lora, Model, random_config, with_compute, with_dropout
from l2m_jax.models.hf import peft
from l2m_jax.models.quantised import quantise
from l2m_jax.multihost import first
from l2m_jax.parallel import Placement
from l2m_jax.progress import console
from l2m_jax.run import data, sources, tokenizers
from l2m_jax.run.artefacts import Artefact, Source
from l2m_jax.run.context import Context
from l2m_jax.training.checkpoint import Checkpoints
from l2m_jax.training.loop import Task, Term, Trainer
from l2m_jax.training.optimizer import FineTuning, Pretraining
from l2m_jax.training.step import StepSettings, Teacher
from l2m_jax.types import Params


@dataclass(frozen=True)
class ModelInputs:
    """
    Attributes:
        role: "teacher" or "student".
        model: with the settings that don't matter at their defaults; `weights` replaces its path.
        weights: a folder, a GGUF file or a hub name; None for a random architecture or the teacher's layers.
        teacher: the model whose layers the student takes; None unless it takes some.
        pretrained: the model that it continues; then there is none of the three above.
        finetune: None for no fine-tuning.
        train: the rows to fine-tune on.
        seed: for random weights and fine-tuning; None without either.
    """

    role: str
    model: Model
    weights: Source | None
    teacher: Artefact | Source | None
    pretrained: "Artefact[PretrainingInputs] | None"
    finetune: FineTuning | None
    train: Artefact | None
    tokenizer: tokenizers.Tokenizer
    seed: int | None


@dataclass(frozen=True)
class PretrainingInputs:
    """
    Attributes:
        start: the model before.
        pretrain: without its text and seed.
        text: None for the synthetic text, which follows from `seed`.
        teacher: the model to learn from; None without one.
        seed: for the synthetic text, the order of sequences and dropout.
    """

    start: ModelInputs
    pretrain: Pretraining
    text: Source | None
    teacher: Artefact | Source | None
    tokenizer: tokenizers.Tokenizer
    seed: int


def model_inputs(
    role: str,
    model: Model,
    finetune: FineTuning,
    train: Artefact,
    tokenizer: tokenizers.Tokenizer,
    seed: int,
    teacher: Artefact | Source | None = None,
) -> ModelInputs:
    """The inputs of a model: only what changes its weights."""
    takes_layers = model.init == "teacher_layers"
    weights = None
    if model.path and not takes_layers:
        pretrained = model.init == "pretrained"
        weights = (
            sources.given_model(model.path) if pretrained else sources.given(model.path, ("config.json",))
        )
    random = weights is None and not takes_layers
    finetuned = finetune.relevant if finetune.trains else None
    return ModelInputs(
        role=role,
        model=dataclasses.replace(
            model,
            path="",
            layers=model.layers if takes_layers else (),
            architecture=model.architecture if random else Model().architecture,
        ),
        weights=weights,
        teacher=teacher if takes_layers else None,
        pretrained=None,
        finetune=finetuned,
        train=train if finetuned else None,
        tokenizer=tokenizer,
        seed=seed if finetuned or random or model.init == "random" else None,
    )


def continued(
    pretrained: Artefact[PretrainingInputs], finetune: FineTuning, train: Artefact, seed: int
) -> ModelInputs:
    """The inputs of a model that continues a pretrained one."""
    start = pretrained.inputs.start
    changes = {"seed": None}
    if finetune.trains:
        changes = {"finetune": finetune.relevant, "train": train, "seed": seed}
    return dataclasses.replace(
        start, model=Model(), weights=None, teacher=None, pretrained=pretrained, **changes
    )


def read_config(model: Artefact | Source, compute: Compute, tokenizer: tokenizers.Tokenizer) -> DecoderConfig:
    """The config of a model, with `compute`. Vocabulary entries beyond the tokenizer's are not valid tokens.

    In a chat the end of the assistant's turn ends an answer, too.
    """
    config = models.read_config(str(model.path), tokens=tokenizers.kept(model, tokenizer))
    return _completed(config, compute, tokenizer)


def load_frozen(
    model: Artefact | Source,
    compute: Compute,
    tokenizer: tokenizers.Tokenizer,
    placement: Placement,
    weights: str = "float",
) -> tuple[DecoderConfig, Params]:
    """The config and placed parameters of a model that is not trained, in its compute dtype, or with "int8" kernels."""
    config = read_config(model, compute, tokenizer)
    _, params = models.load(
        str(model.path),
        dtype=config.dtype,
        tokens=tokenizers.kept(model, tokenizer),
        frozen=True,
        put=placement.put,
        quantise=placement.map(quantise) if weights == "int8" else None,
    )
    return config, params


def load_to_train(model: Artefact, placement: Placement) -> Params:
    """The float32 parameters of a model, placed."""
    return models.load(str(model.path), put=placement.put)[1]


def _completed(config: DecoderConfig, compute: Compute, tokenizer: tokenizers.Tokenizer) -> DecoderConfig:
    tokens = len(tokenizers.load(tokenizer))
    if tokens > config.vocab_size:
        raise InputError(
            f"the tokenizer has {tokens} tokens, but the model's vocabulary only {config.vocab_size} entries; set "
            "config.data.tokenizer to the model's own"
        )
    end, ends = tokenizers.end_of_turn(tokenizer), config.eos_token_ids
    if end is not None and end not in ends:
        config = dataclasses.replace(config, eos_token_id=(end, *ends))
    config = dataclasses.replace(config, valid_vocab_size=min(config.valid_vocab_size, tokens))
    return with_compute(config, compute)


def initial_config(inputs: ModelInputs, compute: Compute) -> DecoderConfig:
    """The config of the model that `inputs` describe, before the model exists.

    Raises:
        InputError: a model that cannot be read, or whose vocabulary is smaller than the tokenizer's.
    """
    if inputs.pretrained is not None:
        return initial_config(inputs.pretrained.inputs.start, compute)
    if inputs.teacher is not None:
        teacher = config_before(inputs.teacher, compute, inputs.tokenizer)
        if absent := [layer for layer in inputs.model.layers if layer >= teacher.num_layers]:
            raise InputError(
                f"layers: {absent[0]} is not among the teacher's {teacher.num_layers}, counted from 0"
            )
        return teacher.keep_layers(inputs.model.layers)
    if inputs.weights is not None:
        return read_config(inputs.weights, compute, inputs.tokenizer)
    config = random_config(inputs.model.architecture, tokenizers.load(inputs.tokenizer))
    return _completed(config, compute, inputs.tokenizer)


def config_before(
    model: Artefact | Source, compute: Compute, tokenizer: tokenizers.Tokenizer
) -> DecoderConfig:
    """The config of a given model, or of one that need not exist yet."""
    if isinstance(model, Source):
        return read_config(model, compute, tokenizer)
    inputs = model.inputs
    return initial_config(inputs.start if isinstance(inputs, PretrainingInputs) else inputs, compute)


def make_model(artefact: Artefact[ModelInputs], name: str, compute: Compute, context: Context) -> None:
    """Loads or initialises a model, fine-tunes it if requested, and saves it as a Hugging Face folder."""
    if artefact.is_finished:
        console.print(f"  already there: {artefact.path}")
        first(artefact.drop_progress)
        return
    artefact.begin()
    inputs, placement = artefact.inputs, context.placement
    config = initial_config(inputs, compute)
    initial = functools.partial(initial_params, inputs, config, placement)
    params = initial() if inputs.finetune is None else _finetuned(artefact, name, config, initial, context)
    save(artefact, config, params, placement)


def save(
    artefact: Artefact,
    config: DecoderConfig,
    params: Params,
    placement: Placement,
    readme: str | None = None,
    sampling: SamplingRules | None = None,
) -> None:
    """Saves placed parameters as the artefact's Hugging Face folder; `sampling` is how it should answer by default."""
    host = placement.to_host(params)

    def write() -> None:
        with artefact.writing() as folder:
            _write(folder, artefact, config, host, readme, sampling)

    first(write)


def save_adapted(
    artefact: Artefact,
    config: DecoderConfig,
    base: Artefact[ModelInputs],
    lora: Lora,
    adapters: Params,
    placement: Placement,
    readme: str | None = None,
    sampling: SamplingRules | None = None,
) -> None:
    """Saves `base` with placed adapters merged into it, and the adapters alone in PEFT's format in the folder "adapter"."""
    host = placement.to_host(adapters)

    def write() -> None:
        merged = lora.merged(host, models.load(str(base.path), put=_on_host)[1])
        with artefact.writing() as folder:
            peft.save(folder / "adapter", config, lora, host, _base_name(base))
            _write(folder, artefact, config, merged, readme, sampling)

    first(write)


def _write(
    folder: Path,
    artefact: Artefact,
    config: DecoderConfig,
    host: Params,
    readme: str | None,
    sampling: SamplingRules | None,
) -> None:
    models.save(
        folder,
        config,
        host,
        tokenizer=tokenizers.load(artefact.inputs.tokenizer),
        end_of_turn=tokenizers.end_of_turn(artefact.inputs.tokenizer),
        readme=readme,
        generation=None if sampling is None else sampling.generation_config(),
    )


def _on_host(shape: tuple[int, ...], read: Callable, *, stacked: bool) -> Any:
    del stacked
    return read(tuple(slice(0, n) for n in shape))


def _base_name(model: Artefact[ModelInputs]) -> str:
    """Where PEFT finds the model: as it was given, if nothing was changed in it."""
    inputs = model.inputs
    given = inputs.weights if inputs.model.init == "pretrained" and inputs.finetune is None else None
    if given is None or given.path.endswith(".gguf") or tokenizers.kept(given, inputs.tokenizer) is not None:
        return str(model.path)
    return given.path


def initial_params(inputs: ModelInputs, config: DecoderConfig, placement: Placement) -> Params:
    """The placed parameters before any training of this phase."""
    if inputs.pretrained is not None:
        return load_to_train(inputs.pretrained, placement)
    given = inputs.teacher or (inputs.weights if inputs.model.init == "pretrained" else None)
    if given is not None:
        tokens = tokenizers.kept(given, inputs.tokenizer)
        path, layers = str(given.path), inputs.model.layers
        return models.load(path, layers=layers, tokens=tokens, put=placement.put)[1]
    assert inputs.seed is not None
    # Models of equal shape would otherwise start from equal weights, which makes the pair a special case.
    seed = inputs.seed + (inputs.role == "student")
    return placement.initialise(lambda: models.init(config, jax.random.key(seed)))


def _finetuned(
    artefact: Artefact[ModelInputs], name: str, config: DecoderConfig, initial, context: Context
) -> Params:
    """Supervised fine-tuning on the reference responses."""
    inputs, finetune = artefact.inputs, artefact.inputs.finetune
    assert finetune is not None and inputs.train is not None and inputs.seed is not None
    train = data.open_corpus(inputs.train)
    config = with_dropout(config, finetune.dropout)
    task = Task(
        phase=name,
        settings=StepSettings(config, None, config.valid_vocab_size, context.chunk_size, finetune.part),
        stages=single_stage(np.arange(len(train)), finetune.examples_of(len(train)), beta=0.0),
        shapes=context.shapes(train.lengths, finetune.batch_size),
        optimizer=finetune,
        batch_size=finetune.batch_size,
        seed=inputs.seed,
        skip_nonfinite=context.skip_nonfinite,
        name=lambda i: train.row(i).id,
    )
    return run_task(artefact, task, Term(Objective(beta=0.0), train), None, initial, context)


def run_task(
    artefact: Artefact,
    task: Task,
    term: Term,
    teacher: Teacher | None,
    initial: Callable[[], Params],
    context: Context,
) -> Params:
    """The placed parameters after a training on one term, which resumes from the artefact's checkpoints."""
    assert artefact.progress is not None
    checkpoints = Checkpoints(artefact.progress, context.placement, context.checkpoint_minutes)
    trainer = Trainer(task, context.placement, lambda *_: (term,), teacher, checkpoints, context.metrics)
    params = trainer.whole(trainer.run(initial))
    checkpoints.close()
    return params
