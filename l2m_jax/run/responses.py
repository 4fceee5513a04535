"""The phase that generates a model's responses to the training prompts, for the ranking and for some methods."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from l2m_jax.generation import Answer, Generator, ResponseFile, SamplingRules, generate, kept_answers
from l2m_jax.models import DecoderConfig
from l2m_jax.models.settings import Compute
from l2m_jax.multihost import first
from l2m_jax.progress import console
from l2m_jax.run import data
from l2m_jax.run.artefacts import Artefact, Source
from l2m_jax.run.context import Context
from l2m_jax.run.models import load_frozen, read_config


@dataclass(frozen=True)
class ResponsesInputs:
    """
    Attributes:
        max_prompt_length: longer prompts get no response; 0: limited only by the model's positions.
        seed: for sampling; independent of the run's own seed, so that runs can share the responses.
    """

    model: Artefact | Source
    train: Artefact
    tokenizer: data.Tokenizer
    sampling: SamplingRules
    seed: int
    max_prompt_length: int


def longest_prompt(config: DecoderConfig, sampling: SamplingRules, max_prompt_length: int) -> int:
    """The maximum number of prompt tokens that leaves the model room for an answer."""
    room = config.max_positions - sampling.max_new_tokens
    return min(room, max_prompt_length or room)


def make_responses(
    artefact: Artefact[ResponsesInputs], compute: Compute, context: Context, title: str
) -> Mapping[int, Answer]:
    """The answers by training example, generated once. They are kept as they come, so that a second call resumes."""
    inputs = artefact.inputs
    train, tokenizer = data.open_corpus(inputs.train), data.load(inputs.tokenizer)
    config = read_config(inputs.model, compute, inputs.tokenizer)
    room = longest_prompt(config, inputs.sampling, inputs.max_prompt_length)
    kept = np.flatnonzero(train.prompt_lengths <= room).tolist()
    if left := len(train) - len(kept):
        console.print(f"  {left:,} prompts leave no room for an answer")
    prompts = [train.prompt_tokens(i).tolist() for i in kept]
    output = ResponseFile(artefact.path, artefact.key)
    generator = Generator(config, {}, context.placement, tokenizer, context.slots)
    known = kept_answers(generator, prompts, inputs.sampling, output)
    if len(known) < len(prompts):
        if not artefact.is_finished:
            artefact.begin()
        config, params = load_frozen(inputs.model, compute, inputs.tokenizer, context.placement)
        generator = dataclasses.replace(generator, config=config, params=params)
        answers = generate(generator, prompts, inputs.sampling, [inputs.seed], output=output, title=title)
        known = {(answer.prompt, answer.seed): answer for answer in answers}
    if not artefact.is_finished:
        first(artefact.finish)
    return {i: known[number, inputs.seed] for number, i in enumerate(kept)}
