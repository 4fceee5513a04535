"""The phase that generates a model's responses to the training prompts, for the ranking and for some methods."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np

from l2m_jax.data.corpus import Corpus
from l2m_jax.data.order import shuffled
from l2m_jax.generation import Answer, Generator, ResponseFile, SamplingRules, generate_file
from l2m_jax.models import DecoderConfig
from l2m_jax.models.settings import Compute
from l2m_jax.multihost import first
from l2m_jax.progress import console
from l2m_jax.run import data, tokenizers
from l2m_jax.run.artefacts import Artefact, Source
from l2m_jax.run.context import Context
from l2m_jax.run.models import load_frozen, read_config


@dataclass(frozen=True)
class ResponsesInputs:
    """
    Attributes:
        max_prompt_length: longer prompts get no response; 0: limited only by the model's positions.
        seed: for sampling; independent of the run's own seed, so that runs can share the responses.
        rows: the maximum number of prompts to answer, drawn at random; 0: all.
    """

    model: Artefact | Source
    train: Artefact
    tokenizer: tokenizers.Tokenizer
    sampling: SamplingRules
    seed: int
    max_prompt_length: int
    rows: int = field(default=0, metadata={"absent_at_default": True})


def longest_prompt(config: DecoderConfig, sampling: SamplingRules, max_prompt_length: int) -> int:
    """The maximum number of prompt tokens that leaves the model room for an answer."""
    room = config.max_positions - sampling.max_new_tokens
    return min(room, max_prompt_length or room)


@dataclass(frozen=True, eq=False)
class Responses:
    """Answers to training prompts, in a file. None is held in memory.

    Attributes:
        file: the answers; those of the n-th prompt belong to example `examples_P[n]`.
        examples_P: int64, ascending.
    """

    file: ResponseFile
    examples_P: np.ndarray

    def __len__(self) -> int:
        return len(self.examples_P)

    def __iter__(self) -> Iterator[tuple[int, Answer]]:
        """Examples with their answers, in the order of the file, read one after another."""
        for _, answer in self.file.lines():
            yield int(self.examples_P[answer.prompt]), answer

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.file.path.stat().st_size if len(self) else 0

    def tokens(self, rules: SamplingRules, end: int) -> "ResponseTokens":
        """The tokens by example; `end` ends an answer that was not cut off."""
        places_P, lengths_P = np.zeros((2, len(self)), np.int64)
        for place, answer in self.file.lines():
            places_P[answer.prompt] = place
            lengths_P[answer.prompt] = len(with_end(answer, rules, end))
        return ResponseTokens(self.file, self.examples_P, places_P, lengths_P, rules, end)


@dataclass(frozen=True, eq=False)
class ResponseTokens(Mapping[int, tuple[int, ...]]):
    """The tokens of responses by training example, read from their file when they are asked for.

    Attributes:
        places_P: where each response is in the file.
        lengths_P: the number of its tokens.
    """

    file: ResponseFile
    examples_P: np.ndarray
    places_P: np.ndarray
    lengths_P: np.ndarray
    rules: SamplingRules
    end: int

    def __getitem__(self, example: int) -> tuple[int, ...]:
        if example not in self:
            raise KeyError(example)
        place = self.places_P[np.searchsorted(self.examples_P, example)]
        return with_end(self.file.answer_at(int(place)), self.rules, self.end)

    def __contains__(self, example: object) -> bool:
        at = np.searchsorted(self.examples_P, example)  # pyright: ignore[reportArgumentType, reportCallIssue]
        return bool(at < len(self) and self.examples_P[at] == example)

    def __iter__(self) -> Iterator[int]:
        return map(int, self.examples_P)

    def __len__(self) -> int:
        return len(self.examples_P)


def with_end(answer: Answer, rules: SamplingRules, end: int) -> tuple[int, ...]:
    """An answer's tokens, and `end` unless the answer was cut off."""
    ended = len(answer.tokens) < rules.max_new_tokens
    return (*answer.tokens, end) if ended else answer.tokens


class _Prompts(Sequence[np.ndarray]):
    """The prompts of some examples, read from their corpus when they are asked for."""

    def __init__(self, corpus: Corpus, examples_P: np.ndarray):
        self._corpus, self._examples_P = corpus, examples_P

    def __len__(self) -> int:
        return len(self._examples_P)

    @overload
    def __getitem__(self, number: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, number: slice) -> list[np.ndarray]: ...
    def __getitem__(self, number: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(number, slice):
            return [self._corpus.prompt_tokens(i) for i in self._examples_P[number]]
        return self._corpus.prompt_tokens(self._examples_P[number])


def make_responses(
    artefact: Artefact[ResponsesInputs], compute: Compute, context: Context, title: str
) -> Responses:
    """The answers to training prompts, generated once. They are kept as they come, so that a second call resumes."""
    inputs = artefact.inputs
    train = data.open_corpus(inputs.train)
    config = read_config(inputs.model, compute, inputs.tokenizer)
    room = longest_prompt(config, inputs.sampling, inputs.max_prompt_length)
    examples_P = np.flatnonzero(train.prompt_lengths <= room)
    if left := len(train) - len(examples_P):
        console.print(f"  {left:,} prompts leave no room for an answer")
    if inputs.rows:
        examples_P = np.sort(shuffled(examples_P, inputs.seed)[: inputs.rows])
    if not artefact.is_finished:
        artefact.begin()
        config, params = load_frozen(inputs.model, compute, inputs.tokenizer, context.placement)
        generator = Generator(
            config, params, context.placement, tokenizers.load(inputs.tokenizer), context.slots
        )
        prompts, output = _Prompts(train, examples_P), ResponseFile(artefact.path, artefact.key)
        generate_file(generator, prompts, inputs.sampling, [inputs.seed], output, title=title)
        first(artefact.finish)
    # The record of the artefact has vouched for the file.
    return Responses(ResponseFile(artefact.path, None), examples_P)
