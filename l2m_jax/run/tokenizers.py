"""A run's tokenizer: given, trained on synthetic tasks, or trimmed to the tokens in use."""

import functools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from l2m_jax import files
from l2m_jax.data.chat import ChatTemplate
from l2m_jax.data.encoding import Counts, TokenLimits, encode_rows
from l2m_jax.data.settings import Data, SyntheticData
from l2m_jax.data.sources import read_rows
from l2m_jax.data.splits import token_limits
from l2m_jax.data.synthetic import synthetic_rows
from l2m_jax.data.text import encode_text, read_documents
from l2m_jax.data.tokenizer import load_tokenizer, tokenizer_fingerprint, train_tokenizer
from l2m_jax.data.vocabulary import kept_tokens, trim
from l2m_jax.errors import InputError
from l2m_jax.evaluation.sources import parse_set, read_evaluation_set
from l2m_jax.models.hf.gguf import GgufFile
from l2m_jax.multihost import first
from l2m_jax.progress import console
from l2m_jax.run import sources
from l2m_jax.run.artefacts import Artefact, Source

# Kept besides the tokens of the data: others with the lowest ids, the commonest where the tokenizer was trained.
EXTRA_TOKENS = 1000
_KEPT = "kept_tokens.json"


@dataclass(frozen=True)
class TokenizerInputs:
    """A tokenizer trained on synthetic tasks."""

    synthetic: SyntheticData


@dataclass(frozen=True)
class TrimmedInputs:
    """A tokenizer with the tokens that occur in what a run reads, and few others.

    Attributes:
        whole: the tokenizer with all tokens.
        least: how often a token must occur.
        train: the training rows, of all worlds.
        held_out: validation and test rows that have files of their own.
        data: the token limits of these rows; the other settings are at their defaults.
        sets: evaluation sets, by their names in `config.evaluation.sets`.
        texts: to pretrain on, each with its number of tokens.
    """

    whole: Source
    least: int
    train: Source
    held_out: tuple[Source, ...]
    data: Data
    sets: tuple[Source, ...]
    texts: tuple[tuple[Source, int], ...]


@dataclass(frozen=True)
class ChatTokenizer(Source):
    """A given tokenizer whose chat template the run uses; the template counts as its content."""


Tokenizer = Source | Artefact[TokenizerInputs] | Artefact[TrimmedInputs]


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


def untrimmed(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer that `tokenizer` was trimmed from, or itself."""
    if isinstance(tokenizer, Artefact) and isinstance(tokenizer.inputs, TrimmedInputs):
        return tokenizer.inputs.whole
    return tokenizer


def kept(model: Artefact | Source, tokenizer: Tokenizer) -> np.ndarray | None:
    """The entries of a model's vocabulary that a trimmed tokenizer keeps; None for all.

    A model that the run has made has no others.
    """
    if isinstance(model, Artefact) or untrimmed(tokenizer) is tokenizer:
        return None
    return _kept(str(tokenizer.path))


@functools.cache
def _kept(folder: str) -> np.ndarray:
    return np.array(files.read_json(Path(folder) / _KEPT), np.int64)


def make_tokenizer(artefact: Artefact[TokenizerInputs] | Artefact[TrimmedInputs]) -> None:
    """Trains a tokenizer, or trims one."""
    inputs = artefact.inputs

    def make() -> None:
        with artefact.writing() as folder:
            if isinstance(inputs, TrimmedInputs):
                _trim(inputs, folder)
            else:
                _train(inputs.synthetic, folder)

    if not artefact.is_finished:
        first(make)


def _train(synthetic: SyntheticData, folder: Path) -> None:
    rows = synthetic_rows(synthetic.seed, synthetic.train, 1, 1).train
    texts = [f"{row.instruction}\n{row.input}\n{row.references[0]}" for row in rows]
    train_tokenizer(texts, synthetic.tokenizer_size).save_pretrained(folder)


def _trim(inputs: TrimmedInputs, folder: Path) -> None:
    whole = load(inputs.whole)
    counts = Counter(token for tokens in _tokens_read(inputs, whole) for token in tokens)
    used = [token for token, count in counts.items() if count >= inputs.least]
    try:
        tokens = kept_tokens(whole, used, EXTRA_TOKENS)
    except InputError as error:
        raise InputError(f"config.data.trim_vocabulary: {error}") from error
    trim(whole, tokens).save_pretrained(folder)
    files.write_json(folder / _KEPT, tokens.tolist())
    console.print(f"  {len(tokens):,} of {len(whole):,} tokens kept, {len(used):,} of them in the data")


def _tokens_read(inputs: TrimmedInputs, tokenizer: Any) -> Iterable[Iterable[int]]:
    """The tokens of all rows, sets and texts."""
    unlimited = TokenLimits(max_length=2**31)
    rows = [(read_rows(inputs.train.path), token_limits(inputs.data, "train"))]
    uses = ("validation", "test")[-len(inputs.held_out) :]
    for source, use in zip(inputs.held_out, uses, strict=False):
        rows.append((read_rows(source.path, use), token_limits(inputs.data, "test")))
    # References of sets are compared as text, but a student should be able to write them.
    rows += [(read_evaluation_set(s.path), unlimited) for s in inputs.sets]
    for chosen, limits in rows:
        yield from (row.tokens.tolist() for row in encode_rows(chosen, tokenizer, limits, Counts()))
    for text, limit in inputs.texts:
        yield encode_text(read_documents(text.path), tokenizer, limit).tolist()


def trimmed_inputs(
    data: Data, whole: Source, sets: Iterable[str], texts: Iterable[tuple[str, int]]
) -> TrimmedInputs:
    """The inputs of a trimmed tokenizer: all files, whatever rows of them a run uses, so that worlds share it.

    Args:
        sets: as in `config.evaluation.sets`.
        texts: files to pretrain on, each with its number of tokens.
    """
    limits = {name: getattr(data, name) for name in ("max_length", "max_prompt_length", "truncate", "bos")}
    return TrimmedInputs(
        whole=whole,
        least=data.trim_vocabulary,
        train=sources.given(data.train),
        held_out=tuple(sources.given(path) for path in (data.validation, data.test) if path),
        data=Data(**limits),
        sets=tuple(_given_set(name) for name in sets if name != "test"),
        texts=tuple((sources.given(path), limit) for path, limit in texts),
    )


def _given_set(name: str) -> Source:
    path = parse_set(name)[1]
    return Source(name, sources.given(path).content if path else f"hub:{name}")


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
