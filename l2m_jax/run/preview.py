"""Rows as they will be trained on, without a run."""

import contextlib
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from l2m_jax.config import Config
from l2m_jax.data.corpus import Corpus
from l2m_jax.run import data, tokenizers
from l2m_jax.run.artefacts import Artefact
from l2m_jax.run.checks import check_files
from l2m_jax.run.resolve import tokenizer_of


class Segment(NamedTuple):
    """Consecutive tokens as text, all or none of which carry loss."""

    text: str
    loss: bool


class Example(NamedTuple):
    """
    Attributes:
        length, prompt_length, targets: numbers of tokens, of the whole, of the prompt, and of those that carry loss.
    """

    id: str
    length: int
    prompt_length: int
    targets: int
    segments: list[Segment]


class Preview(NamedTuple):
    """Attributes: end_of_response: the token that ends a response, as text."""

    corpora: dict[data.Part, Corpus]
    end_of_response: str
    tokenizer: tokenizers.Tokenizer

    def example(self, part: data.Part, i: int) -> Example:
        corpus, tokenizer = self.corpora[part], tokenizers.load(self.tokenizer)
        tokens, targets = corpus.example_tokens(i), corpus.target_positions(i)
        is_target = np.zeros(len(tokens), bool)
        is_target[targets] = True
        bounds = [0, *(np.flatnonzero(np.diff(is_target)) + 1).tolist(), len(tokens)]
        segments = [
            Segment(tokenizer.decode(tokens[start:end].tolist()), bool(is_target[start]))
            for start, end in itertools.pairwise(bounds)
        ]
        prompt_length = int(corpus.prompt_lengths[i])
        return Example(corpus.row(i).id, len(tokens), prompt_length, len(targets), segments)


@contextlib.contextmanager
def preview(config: Config) -> Iterator[Preview]:
    """The rows of all parts, tokenised in a temporary folder; prints how many were kept, and why others were dropped.

    Raises:
        InputError: as a run before its first training.
    """
    check_files(config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = tokenizer_of(config, folder)
        if isinstance(tokenizer, Artefact):
            tokenizers.make_tokenizer(tokenizer)
        parts = [
            Artefact(data.corpus_inputs(config.data, part, tokenizer, config.world), folder / part)
            for part in data.PARTS
        ]
        made = data.make_corpora(parts, config.data.processes)
        corpora: dict[data.Part, Corpus] = dict(zip(data.PARTS, made, strict=True))
        end = tokenizers.load(tokenizer).decode([tokenizers.end_of_response(tokenizer)])
        yield Preview(corpora, end, tokenizer)
