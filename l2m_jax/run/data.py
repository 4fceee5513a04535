"""The first phase: a tokenizer, and the tokenised training, validation and test rows."""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2m_jax import files
from l2m_jax.data.chat import ChatTemplate
from l2m_jax.data.corpus import Corpus, write_corpus
from l2m_jax.data.settings import Data, SyntheticData
from l2m_jax.data.splits import Part, part_rows, token_limits
from l2m_jax.data.synthetic import synthetic_rows
from l2m_jax.data.tokenizer import load_tokenizer, tokenizer_fingerprint, train_tokenizer
from l2m_jax.errors import InputError
from l2m_jax.models.hf.gguf import GgufFile
from l2m_jax.multihost import first
from l2m_jax.progress import console
from l2m_jax.run.artefacts import Artefact, Source

PARTS: tuple[Part, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class TokenizerInputs:
    """A tokenizer trained on synthetic tasks."""

    synthetic: SyntheticData


@dataclass(frozen=True)
class CorpusInputs:
    """One part of the data.

    Attributes:
        data: the settings that matter to this part; the others, and all paths, are at their defaults.
        source: the file or hub name of its rows; None for synthetic tasks.
        split: whether the part is split off the training rows.
        world: of training rows; 0 for the other parts.
    """

    part: Part
    data: Data
    source: Source | None
    split: bool
    tokenizer: "Tokenizer"
    world: int = 0


@dataclass(frozen=True)
class ChatTokenizer(Source):
    """A given tokenizer whose chat template the run uses; the template counts as its content."""


Tokenizer = Source | Artefact[TokenizerInputs]


@functools.cache
def read_tokenizer(source: str) -> Any:
    """The tokenizer of a folder, a GGUF file or a hub name."""
    return GgufFile(Path(source)).tokenizer() if source.endswith(".gguf") else load_tokenizer(source)


@functools.cache
def _chat_template(source: str) -> ChatTemplate:
    return ChatTemplate(read_tokenizer(source))


def tokenizer_source(path: str, setting: str, prompt: str = "alpaca") -> Source:
    """A given tokenizer. Tokenizers that produce the same ids are equal, with prompt "chat" if their templates are, too.

    Raises:
        InputError: there is no tokenizer, or no chat template where one is needed; the message begins with `setting` (a
            setting or flag).
    """
    try:
        ids = tokenizer_fingerprint(read_tokenizer(path))
        if prompt == "chat":
            return ChatTokenizer(path, f"{ids}+{_chat_template(path).fingerprint}")
        return Source(path, ids)
    except InputError as error:
        raise InputError(f"{setting}: {error}") from error


def given_tokenizer(data: Data, teacher_path: str) -> Source | None:
    """The tokenizer of `data.tokenizer`, or else the teacher's; None if neither is given.

    Raises:
        InputError: as in `tokenizer_source`; or there is none, and the prompt needs a chat template.
    """
    if not (data.tokenizer or teacher_path):
        if data.prompt == "chat":
            raise InputError(
                "config.data.prompt: 'chat', but the tokenizer trained on synthetic tasks has no chat template; set "
                "config.data.tokenizer to a folder with one"
            )
        return None
    setting = "config.data.tokenizer" if data.tokenizer else "config.teacher.model.path"
    return tokenizer_source(data.tokenizer or teacher_path, setting, data.prompt)


def prompt_of(tokenizer: Tokenizer) -> str:
    """The setting `data.prompt` of the run that has this tokenizer."""
    return "chat" if isinstance(tokenizer, ChatTokenizer) else "alpaca"


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The token that ends the assistant's turn in a chat; None with another prompt."""
    return _chat_template(tokenizer.path).end_of_turn if isinstance(tokenizer, ChatTokenizer) else None


def end_of_response(tokenizer: Tokenizer) -> int:
    """The token that ends a response: the end of sequence, or of the assistant's turn in a chat."""
    end = end_of_turn(tokenizer)
    return load(tokenizer).eos_token_id if end is None else end


def load(tokenizer: Tokenizer) -> Any:
    return read_tokenizer(str(tokenizer.path))


def make_tokenizer(artefact: Artefact[TokenizerInputs]) -> None:
    synthetic = artefact.inputs.synthetic

    def make() -> None:
        rows = synthetic_rows(synthetic.seed, synthetic.train, 1, 1).train
        texts = [f"{row.instruction}\n{row.input}\n{row.references[0]}" for row in rows]
        with artefact.writing() as folder:
            train_tokenizer(texts, synthetic.tokenizer_size).save_pretrained(folder)

    if not artefact.is_finished:
        first(make)


def corpus_inputs(data: Data, part: Part, tokenizer: Tokenizer, world: int = 0) -> CorpusInputs:
    """The inputs of one part: only what matters to it."""
    world = world if part == "train" else 0
    separate = bool(getattr(data, part)) if part != "train" else bool(data.validation and data.test)
    kept: dict[str, Any] = {
        name: getattr(data, name)
        for name in ("source", "max_length", "max_prompt_length", "truncate", "prompt")
    }
    if data.source == "synthetic":
        sizes = {"train": part == "train", "validation": part != "test", "test": True}
        small = {name: getattr(SyntheticData(), name) for name, used in sizes.items() if not used}
        synthetic = dataclasses.replace(
            data.synthetic, tokenizer_size=SyntheticData().tokenizer_size, **small
        )
        kept |= {"synthetic": synthetic, "bos": _bos(data, part)}
        return CorpusInputs(part, Data(**kept), None, False, tokenizer, world)
    if separate:
        kept |= {"bos": _bos(data, part), "validation": "given", "test": "given"}
        rows = [part]
    else:
        # Test rows are drawn first, then validation rows; the rest is for training.
        drawn = [p for p in ("test", "validation") if not getattr(data, p)]
        rows = [*drawn, part] if part == "train" else drawn[: drawn.index(part) + 1]
        kept |= {"split_seed": data.split_seed, "bos": data.bos}
        before = {"train": ("test", "validation"), "validation": ("test",), "test": ()}[part]
        kept |= {p: "given" for p in before if getattr(data, p)}
    kept |= {f"{p}_rows": getattr(data, f"{p}_rows") for p in rows}
    path = getattr(data, part) if separate else data.train
    return CorpusInputs(part, Data(train="given", **kept), given(path), not separate, tokenizer, world)


def _bos(data: Data, part: Part) -> str:
    """The setting as it affects this part: "both" or "none"."""
    return "both" if data.bos in ("both", "training" if part == "train" else "evaluation") else "none"


def given(path: str, patterns: tuple[str, ...] | None = None) -> Source:
    """A file, a folder (of files that match `patterns`) or a hub name, by its content."""

    def content() -> str:
        there = Path(path)
        return files.content_hash(there, patterns=patterns) if there.exists() else f"hub:{path}"

    return Source(path, first(content))


def given_model(path: str) -> Source:
    """A model's folder, GGUF file or hub name, by its config and weights."""
    return given(path, ("config.json", "*.safetensors", "*.safetensors.index.json"))


def relevant_synthetic(data: Data) -> SyntheticData:
    """The synthetic tasks that the tokenizer is trained on.

    Raises:
        InputError: there is neither a tokenizer nor synthetic tasks to train one on.
    """
    if data.source != "synthetic":
        raise InputError(
            "config.data.tokenizer: empty, and there is no config.teacher.model.path to take one from; give a folder or a hub name"
        )
    s = data.synthetic
    return SyntheticData(train=s.train, seed=s.seed, tokenizer_size=s.tokenizer_size)


def make_corpus(artefact: Artefact[CorpusInputs]) -> Corpus:
    """The tokenised rows of a part. Prints how many were kept, and why others were dropped."""
    inputs = artefact.inputs

    def make() -> None:
        data, tokenizer = inputs.data, load(inputs.tokenizer)
        if inputs.source is not None:
            field = "train" if inputs.split else inputs.part
            data = dataclasses.replace(data, **{field: inputs.source.path})
        rows = part_rows(data, inputs.part, tokenizer, inputs.world)
        limits = token_limits(data, inputs.part)
        try:
            with artefact.writing() as folder:
                write_corpus(folder, rows, tokenizer, limits)
        except InputError as error:
            raise InputError(f"config.data, {inputs.part} rows: {error}") from error

    if not artefact.is_finished:
        first(make)
    corpus = Corpus.open(artefact.path)
    console.print(f"  {inputs.part}: {corpus.counts}, {len(corpus.tokens):,} tokens")
    return corpus


@functools.cache
def open_corpus(artefact: Artefact[CorpusInputs]) -> Corpus:
    return Corpus.open(artefact.path)
