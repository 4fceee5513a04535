"""From settings to data and models: what a run starts with."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from l2m_jax import config as settings
from l2m_jax import files, models
from l2m_jax.data.corpus import Corpus, build_corpus, filter_rows
from l2m_jax.data.encoding import TokenLimits
from l2m_jax.data.sources import Row, read_rows, split_rows
from l2m_jax.data.synthetic import synthetic_rows
from l2m_jax.data.tokenizer import load_tokenizer, tokenizer_fingerprint, train_tokenizer
from l2m_jax.errors import InputError
from l2m_jax.models import DecoderConfig
from l2m_jax.models.hf.gguf import GgufFile
from l2m_jax.multihost import first
from l2m_jax.progress import console
from l2m_jax.training.optimizer import OptimizerSettings
from l2m_jax.types import Params


class Splits(NamedTuple):
    train: Corpus
    validation: Corpus
    test: Corpus

    @property
    def fingerprint(self) -> str:
        return files.fingerprint(*(part.fingerprint for part in self))


def read_tokenizer(source: str) -> Any:
    """The tokenizer of a folder, a GGUF file or a hub name."""
    return GgufFile(Path(source)).tokenizer() if source.endswith(".gguf") else load_tokenizer(source)


def build_tokenizer(config: settings.Config, folder: Path) -> Any:
    """The tokenizer of the settings; one trained on synthetic tasks is kept in `folder`."""
    data = config.data
    source = data.tokenizer or config.teacher.model.path
    if source:
        setting = "data.tokenizer" if data.tokenizer else "teacher.model.path"
        try:
            return read_tokenizer(source)
        except InputError as error:
            raise InputError(f"config.{setting}: {error}") from error
    if data.source != "synthetic":
        raise InputError(
            "config.data.tokenizer: empty, and the teacher has no path to take it from; give a folder or a hub name"
        )
    made_from = files.fingerprint("tokenizer", data.synthetic)

    def build() -> None:
        if files.is_finished(folder, made_from):
            return
        rows = synthetic_rows(data.synthetic.seed, data.synthetic.train, 1, 1).train
        texts = [f"{row.instruction}\n{row.input}\n{row.references[0]}" for row in rows]
        with files.writing(folder, made_from) as unfinished:
            train_tokenizer(texts, data.synthetic.tokenizer_size).save_pretrained(unfinished)

    first(build)
    return load_tokenizer(folder)


def check_tokenizers(config: settings.Config, tokenizer: Any) -> None:
    """Refuses a pretrained teacher or student whose tokenizer gives other ids than the run's.

    Raises:
        InputError: naming the model.
    """
    for who, model in (("teacher", config.teacher.model), ("student", config.student.model)):
        if not model.path or model.init != "pretrained" or model.path.endswith(".gguf"):
            continue
        folder = Path(model.path)
        if folder.is_dir() and not any(
            (folder / name).is_file() for name in ("tokenizer.json", "vocab.json")
        ):
            continue  # a folder of weights alone says nothing about its tokenizer
        if tokenizer_fingerprint(load_tokenizer(model.path)) != tokenizer_fingerprint(tokenizer):
            raise InputError(
                f"config.{who}.model.path: the tokenizer of '{model.path}' gives other ids than the run's "
                f"('{config.data.tokenizer or config.teacher.model.path}'); teacher and student must share one"
            )


def limits(data: settings.Data, bos: bool) -> TokenLimits:
    long = "truncate" if data.truncate else "drop"
    return TokenLimits(
        max_length=data.max_length,
        max_prompt_length=data.max_prompt_length or None,
        long_prompt=long,
        long_response=long,
        bos=bos,
    )


def begins_with_bos(data: settings.Data, use: str) -> bool:
    """Whether rows begin with the beginning-of-sequence token in `use`, "training" or "evaluation"."""
    return data.bos in (use, "both")


def build_splits(data: settings.Data, tokenizer: Any, folder: Path) -> Splits:
    """Tokenised training, validation and test rows; prints how many were kept and why others were dropped."""
    sources = (data.train, data.validation, data.test)
    made_from = files.fingerprint(
        data, tokenizer_fingerprint(tokenizer), [_file_hash(source) for source in sources]
    )
    names = Splits._fields

    def build() -> None:
        if not all(files.is_finished(folder / name, made_from) for name in names):
            rows = _rows(data, tokenizer)
            for name, part in zip(names, rows, strict=True):
                # The validation and test rows are answered and never trained on.
                bos = begins_with_bos(data, "training" if name == "train" else "evaluation")
                build_corpus(part, tokenizer, folder / name, limits(data, bos), made_from=made_from)

    first(build)
    splits = Splits(*(Corpus.open(folder / name) for name in names))
    for name, part in zip(names, splits, strict=True):
        console.print(f"  {name}: {part.counts}, {len(part.tokens):,} tokens")
    return splits


def _rows(data: settings.Data, tokenizer: Any) -> tuple[Iterable[Row], Iterable[Row], Iterable[Row]]:
    if data.source == "synthetic":
        s = data.synthetic
        return synthetic_rows(s.seed, s.train, s.validation, s.test)
    parts: dict[str, Iterable[Row]] = {}
    for name, most in (("validation", data.validation_rows), ("test", data.test_rows)):
        if source := getattr(data, name):
            parts[name] = itertools.islice(read_rows(source, "evaluation"), most or None)
    if len(parts) == 2:
        train = itertools.islice(read_rows(data.train), data.train_rows or None)
        return train, parts["validation"], parts["test"]
    # The split comes after the filter, so that its parts have the sizes asked for, whichever of them gets the
    # beginning-of-sequence token.
    kept, counts = filter_rows(read_rows(data.train), tokenizer, limits(data, data.bos != "none"))
    console.print(f"  {data.train}: {counts}")
    sizes = [0 if n in parts else getattr(data, f"{n}_rows") for n in ("validation", "test")]
    train_rows = data.train_rows or max(len(kept) - sum(sizes), 1)
    train, validation, test = split_rows(kept, (train_rows, *sizes), data.split_seed)
    return train, parts.get("validation", validation), parts.get("test", test)


def _file_hash(source: str) -> str:
    path = Path(source)
    return hashlib.sha256(path.read_bytes()).hexdigest() if source and path.is_file() else source


def compute_dtype(model: settings.Model, platform: str | None = None) -> str:
    """The type that the settings ask for; by default what suits `platform`, or the devices at hand."""
    if model.dtype != "auto":
        return model.dtype
    return "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"


def build_model(
    model: settings.Model,
    tokenizer: Any,
    seed: int,
    teacher: tuple[DecoderConfig, Params] | None = None,
) -> tuple[DecoderConfig, Params]:
    """A model as its settings describe it, with float32 parameters.

    Args:
        teacher: whose layers a student takes with `init = "teacher_layers"`.
    """
    if model.init == "teacher_layers":
        assert teacher is not None
        config, params = models.student_from_teacher(*teacher, model.layers)
        config = computed_as(config, model)
    elif model.path and model.init == "pretrained":
        config, params = models.load(model.path)
        config = computed_as(config, model)
    else:
        config = models.read_config(model.path) if model.path else architecture(model.architecture, tokenizer)
        config = computed_as(config, model)
        params = models.init(config, jax.random.key(seed))
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens and the model '{model.path}' {config.vocab_size}: they do "
            "not belong together; set config.data.tokenizer to the model's own"
        )
    return dataclasses.replace(config, valid_vocab_size=min(config.valid_vocab_size, len(tokenizer))), params


def optimizer(training: settings.Training) -> OptimizerSettings:
    names = [field.name for field in dataclasses.fields(OptimizerSettings)]
    return OptimizerSettings(**{name: getattr(training, name) for name in names})


def computed_as(config: DecoderConfig, model: settings.Model, platform: str | None = None) -> DecoderConfig:
    """How the settings want a model to be computed: compute type, remat, dropout."""
    return dataclasses.replace(
        config,
        dtype=compute_dtype(model, platform),
        remat=model.remat,
        embedding_dropout=model.dropout,
        residual_dropout=model.dropout,
        # As in the published configurations: of the three families, GPT-2 alone drops attention weights.
        attention_dropout=model.dropout if config.family == "gpt2" else 0.0,
    )


def architecture(a: settings.Architecture, tokenizer: Any) -> DecoderConfig:
    if a.hidden_size % a.num_heads:
        raise InputError(
            f"config architecture: hidden_size {a.hidden_size} is not a multiple of num_heads {a.num_heads}"
        )
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    family: dict[str, dict[str, Any]] = {
        "gpt2": {"activation": "gelu_new", "scaled_residual_init": True},
        "opt": {"activation": "relu", "position_offset": 2},
        "llama": {
            "activation": "silu",
            "gated_mlp": True,
            "norm": "rms",
            "rope": models.Rope(),
            "attention_bias": False,
            "mlp_bias": False,
        },
    }
    return DecoderConfig(
        family=a.family,
        vocab_size=len(tokenizer),
        valid_vocab_size=len(tokenizer),
        hidden_size=a.hidden_size,
        embed_size=a.hidden_size,
        num_layers=a.num_layers,
        num_heads=a.num_heads,
        num_kv_heads=a.num_kv_heads or a.num_heads,
        head_dim=a.hidden_size // a.num_heads,
        intermediate_size=a.intermediate_size or 4 * a.hidden_size,
        max_positions=a.max_positions,
        **special,
        **family[a.family],
    )
