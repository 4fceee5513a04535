"""The phase that ranks the training examples by difficulty, from a student's own answers and cross-entropy."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from l2m_jax.curriculum import Difficulty
from l2m_jax.evaluation.cross_entropy import cross_entropy_by_example
from l2m_jax.evaluation.rouge import rouge_l_many
from l2m_jax.generation import Answer
from l2m_jax.multihost import first
from l2m_jax.progress import console
from l2m_jax.run import data, responses
from l2m_jax.run.artefacts import Artefact, Source
from l2m_jax.run.context import Context
from l2m_jax.run.models import load_frozen


@dataclass(frozen=True)
class RankingInputs:
    """
    Attributes:
        model: the student whose answers and cross-entropy measure difficulty.
        answers: its answers to the training prompts.
        ranking: one of `curriculum.RANKINGS`.
        stages: the number of subsets.
        seed: for a random ranking; None for the others.
    """

    model: Artefact | Source
    answers: Artefact[responses.ResponsesInputs]
    train: Artefact
    tokenizer: data.Tokenizer
    ranking: str
    stages: int
    seed: int | None


def make_ranking(artefact: Artefact[RankingInputs], context: Context) -> Difficulty:
    """Scores and ranks the training examples, and prints a line for each subset."""
    inputs = artefact.inputs
    if not artefact.is_finished:
        artefact.begin()
        train = data.open_corpus(inputs.train)
        rouge_l, cross_entropy = _scores(artefact, context)
        difficulty = Difficulty.of(
            train.ids,
            rouge_l,
            cross_entropy,
            subsets=inputs.stages,
            method=inputs.ranking,
            seed=inputs.seed or 0,
        )

        def write() -> None:
            difficulty.write(artefact.path)
            artefact.finish()

        first(write)
    elif not inputs.answers.is_finished:
        _answers(inputs, context)  # lost since: they are kept for their readers, as is all that a run makes
    difficulty = Difficulty.read(artefact.path)
    for number, indices in enumerate(difficulty.subsets, start=1):
        console.print(
            f"  subset {number}: {len(indices):,} examples, Rouge-L {100 * difficulty.rouge_l[indices].mean():.1f}, "
            f"cross-entropy {difficulty.cross_entropy[indices].mean():.2f}"
        )
    return difficulty


def _answers(inputs: RankingInputs, context: Context) -> Mapping[int, Answer]:
    return responses.make_responses(inputs.answers, context.student, context, "the student's own answers")


def _scores(artefact: Artefact[RankingInputs], context: Context) -> tuple[np.ndarray, np.ndarray]:
    """Rouge-L in [0, 1] and cross-entropy in nats per token, [n] each. Prompts without room for an answer score 0."""
    inputs = artefact.inputs
    train = data.open_corpus(inputs.train)
    answers = _answers(inputs, context)
    answered = list(answers)
    rouge_l = np.zeros(len(train))
    rouge_l[answered] = rouge_l_many(
        [answers[i].text for i in answered], [train.references(i) for i in answered]
    )
    config, params = load_frozen(inputs.model, context.student, inputs.tokenizer, context.placement)
    cross_entropy = cross_entropy_by_example(
        config, params, train, context.placement, chunk_size=context.chunk_size
    )
    return rouge_l, cross_entropy
