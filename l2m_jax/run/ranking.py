"""The phase that ranks the training examples by difficulty, from a student's own answers and cross-entropy."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import jax
import numpy as np

from l2m_jax.curriculum import Difficulty
from l2m_jax.curriculum.difficulty import matched_rouge_l
from l2m_jax.data.corpus import Corpus
from l2m_jax.evaluation import rouge
from l2m_jax.evaluation.cross_entropy import cross_entropy_by_example
from l2m_jax.generation import Answer
from l2m_jax.multihost import every_process, first, share, total
from l2m_jax.progress import console
from l2m_jax.run import data, responses, tokenizers
from l2m_jax.run.artefacts import Artefact, Source
from l2m_jax.run.context import Context
from l2m_jax.run.models import load_frozen

_SCORED_TOGETHER = 1 << 13  # answers


@dataclass(frozen=True)
class RankingInputs:
    """
    Attributes:
        model: the student whose answers and cross-entropy measure difficulty.
        answers: its answers to the training prompts, or to a random sample of them.
        ranking: one of `curriculum.RANKINGS`.
        stages: the number of subsets.
        seed: for a random ranking; None for the others.
    """

    model: Artefact | Source
    answers: Artefact[responses.ResponsesInputs]
    train: Artefact
    tokenizer: tokenizers.Tokenizer
    ranking: str
    stages: int
    seed: int | None


def make_ranking(artefact: Artefact[RankingInputs], context: Context) -> Difficulty:
    """Scores and ranks the training examples, and prints a line for each subset."""
    inputs = artefact.inputs
    if not artefact.is_finished:
        artefact.begin()
        train = data.open_corpus(inputs.train)
        answers = _answers(inputs, context)
        config, params = load_frozen(inputs.model, context.student, inputs.tokenizer, context.placement)
        cross_entropy_N = cross_entropy_by_example(
            config, params, train, context.placement, chunk_size=context.chunk_size
        )
        rouge_l_N = _rouge_l(answers, train)
        if inputs.answers.inputs.rows:
            rouge_l_N = _matched(rouge_l_N, cross_entropy_N, answers.examples_P)

        def write() -> None:
            difficulty = Difficulty.of(
                train.rows.data["id"],
                rouge_l_N,
                cross_entropy_N,
                subsets=inputs.stages,
                method=inputs.ranking,
                seed=inputs.seed or 0,
            )
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


def _answers(inputs: RankingInputs, context: Context) -> responses.Responses:
    return responses.make_responses(inputs.answers, context.student, context, "the student's own answers")


def _rouge_l(answers: responses.Responses, train: Corpus) -> np.ndarray:
    """Of each answered training example, float64 in [0, 1]; 0 for the others. The processes share the answers."""
    rouge_l_N = np.zeros(len(train))

    def score() -> None:
        with rouge.Pool(rouge.worthwhile_processes(answers.size // jax.process_count())) as pool:
            for batch in share(_batches(answers)):
                examples = [i for i, _ in batch]
                texts = [answer.text for _, answer in batch]
                rouge_l_N[examples] = pool.rouge_l(texts, train.references_of(examples))

    every_process(score)
    return total(rouge_l_N)


def _batches(answers: responses.Responses) -> Iterator[list[tuple[int, Answer]]]:
    remaining = iter(answers)
    while batch := list(islice(remaining, _SCORED_TOGETHER)):
        yield batch


def _matched(rouge_l_N: np.ndarray, cross_entropy_N: np.ndarray, examples: np.ndarray) -> np.ndarray:
    """Rouge-L of all examples, from that of the sample `examples`."""
    is_measured_N = np.isin(np.arange(len(rouge_l_N)), examples)
    console.print(
        f"  Rouge-L is that of {len(examples):,} random examples; the others' is matched to their cross-entropy"
    )
    return matched_rouge_l(rouge_l_N, cross_entropy_N, is_measured_N)
