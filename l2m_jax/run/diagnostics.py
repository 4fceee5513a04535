"""Diagnostics beside the validations: agreement with the teacher on a few rows, greedy answers, and samples of them.

They change nothing but what is reported: no random stream, no checkpoint, no selection. The teacher's hidden states on
these rows are computed once, before the students, and kept beside the teacher store.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from l2m_jax import models
from l2m_jax.curriculum import Difficulty
from l2m_jax.data.batches import ListedExamples
from l2m_jax.evaluation import diagnostics as agreement
from l2m_jax.evaluation.protocol import summarise
from l2m_jax.evaluation.rouge import rouge_l_many
from l2m_jax.evaluation.sets import PromptSet, from_corpus
from l2m_jax.generation import Generator, SamplingRules, generate
from l2m_jax.models import DecoderConfig
from l2m_jax.multihost import first
from l2m_jax.run import data, tokenizers
from l2m_jax.run.artefacts import Artefact
from l2m_jax.run.context import Context
from l2m_jax.run.models import load_frozen, read_config
from l2m_jax.run.ranking import RankingInputs
from l2m_jax.training.step import Teacher, hidden_pass
from l2m_jax.training.store import TeacherStore
from l2m_jax.training.store_format import HiddenStates
from l2m_jax.types import Params

SAMPLES = 4  # validation prompts whose answers are kept at each validation
_DTYPE = "float32"  # few rows: what the teacher computes, not rounded further


@dataclass(frozen=True)
class DiagnosticsInputs:
    """
    Attributes:
        rows: at most so many of `validation`, the first ones, and of `train`, drawn at random but always the same.
    """

    teacher: Artefact
    validation: Artefact
    train: Artefact
    tokenizer: tokenizers.Tokenizer
    rows: int


def diagnostics_artefact(inputs: DiagnosticsInputs, shared: Path) -> Artefact[DiagnosticsInputs]:
    """The teacher's states in a folder of their own for each key, so that another number of rows stops no run."""
    key = Artefact(inputs, shared).key
    return Artefact(inputs, shared / "diagnostics" / key)


def make_states(artefact: Artefact[DiagnosticsInputs], context: Context) -> None:
    """The teacher's hidden states on the rows. What is missing or damaged is computed."""
    inputs, own = artefact.inputs, context.placement.own
    config = read_config(inputs.teacher, context.teacher, inputs.tokenizer)
    store = _store(artefact, _rows(inputs), config)
    if store.is_complete and artefact.is_finished:
        return
    artefact.begin()
    config, params = load_frozen(inputs.teacher, context.teacher, inputs.tokenizer, own)
    forward = own.map(hidden_pass)
    store.fill(context.placement, lambda batch: forward(config, params, batch))
    first(lambda: artefact.finish(without=store.files))


@dataclass(frozen=True)
class _Examples(ListedExamples):
    ids: Sequence[str] = ()


@dataclass(frozen=True)
class _Rows:
    """The rows to compare on: those of validation, then those of training, by their numbers in the corpora."""

    validation: np.ndarray
    train: np.ndarray
    examples: _Examples


def _rows(inputs: DiagnosticsInputs) -> _Rows:
    validation, train = data.open_corpus(inputs.validation), data.open_corpus(inputs.train)
    of_validation = np.arange(min(inputs.rows, len(validation)))
    keys = np.random.PCG64(np.random.SeedSequence(0)).random_raw(len(train))
    of_train = np.sort(np.argsort(keys, kind="stable")[: inputs.rows])
    parts = ((validation, of_validation), (train, of_train))
    tokens = [corpus.example_tokens(i) for corpus, chosen in parts for i in chosen.tolist()]
    prompts = np.concatenate([corpus.prompt_lengths[chosen] for corpus, chosen in parts])
    targets = [corpus.target_positions(i) for corpus, chosen in parts for i in chosen.tolist()]
    ids = [corpus.row(i).id for corpus, chosen in parts for i in chosen.tolist()]
    return _Rows(of_validation, of_train, _Examples(tokens, prompts, targets, ids))


def _store(artefact: Artefact[DiagnosticsInputs], rows: _Rows, teacher: DecoderConfig) -> TeacherStore:
    form = HiddenStates(teacher.embed_size, _DTYPE)
    return TeacherStore(artefact.path, rows.examples, key=artefact.key, form=form)


class Diagnostics:
    """What is measured of a student at its validations.

    Args:
        artefact: the teacher's states, finished.
        ranking: for the subsets of the training rows; finished. None without one.
    """

    def __init__(
        self,
        artefact: Artefact[DiagnosticsInputs],
        ranking: Artefact[RankingInputs] | None,
        context: Context,
    ):
        self._inputs, self._ranking, self._context = artefact.inputs, ranking, context
        self._teacher = read_config(artefact.inputs.teacher, context.teacher, artefact.inputs.tokenizer)
        self._rows = _rows(artefact.inputs)
        self._store = _store(artefact, self._rows, self._teacher)
        self._corpus = data.open_corpus(artefact.inputs.validation)
        self._prompts: PromptSet | None = None

    def measure(
        self, config: DecoderConfig, params: Params, teacher: Teacher | None, slots: int
    ) -> dict[str, Any]:
        """Agreement with the teacher, by the names of metrics.jsonl.

        Args:
            params: placed.
            teacher: the head that is on the devices already; None: it is placed for the time of the measurement.
            slots: tokens of a device's micro-batch.
        """
        rows, held_out = self._rows, len(self._rows.validation)
        side = agreement.TeacherSide(
            self._store.read,
            self._head() if teacher is None else teacher.head_VxE,
            min(config.valid_vocab_size, self._teacher.valid_vocab_size),
        )
        sums_NxM = agreement.agreement_by_example(
            config,
            params,
            rows.examples,
            side,
            self._context.placement,
            chunk_size=self._context.chunk_size,
            slots=slots,
        )
        targets_N = rows.examples.response_lengths
        found: dict[str, Any] = {}
        for part, chosen in (
            ("validation", np.arange(held_out)),
            ("train", np.arange(held_out, len(rows.examples))),
        ):
            of_part = agreement.means(sums_NxM, targets_N, chosen)
            found |= {f"{part}_{name}": value for name, value in of_part.items()}
        for name, groups in (
            ("validation_by_category", self._categories),
            ("train_by_subset", self._subsets),
        ):
            if groups:
                found[name] = agreement.by_group(sums_NxM, targets_N, groups)
        return found

    def answer(self, generator: Generator, rules: SamplingRules, longest_prompt: int) -> dict[str, Any]:
        """Greedy Rouge-L of the validation rows, whole and by category, and the answers to the first few."""
        chosen = self._rows.validation
        if (self._corpus.prompt_lengths[chosen] > longest_prompt).all():
            return {}
        if self._prompts is None:
            self._prompts = from_corpus(
                "validation", self._corpus, rows=len(chosen), longest_prompt=longest_prompt
            )
        prompts, greedy = self._prompts, dataclasses.replace(rules, temperature=0.0)
        # There are few answers: compiling programs for fewer slots takes longer than they save.
        generator = dataclasses.replace(generator, shrinks=False)
        answers = generate(generator, prompts.prompts, greedy, [0], title="validation, greedy")
        answers = sorted(answers, key=lambda answer: answer.prompt)
        rouge_l = rouge_l_many([a.text for a in answers], [prompts.references[a.prompt] for a in answers])
        result = summarise(prompts, answers, rouge_l, [0])
        found: dict[str, Any] = {"validation_rouge_l_greedy": result.rouge_l.mean}
        if len(result.categories) > 1:
            found["validation_rouge_l_greedy_by_category"] = {
                name: group.rouge_l.mean for name, group in result.categories.items()
            }
        found["samples"] = [
            {"id": prompts.ids[a.prompt], "answer": a.text, "rouge_l": 100 * score}
            for a, score in list(zip(answers, rouge_l, strict=True))[:SAMPLES]
        ]
        return found

    def _head(self) -> jax.Array:
        path, put = str(self._inputs.teacher.path), self._context.placement.put
        return models.load_head(path, dtype=self._teacher.dtype, put=put)

    @cached_property
    def _categories(self) -> dict[str, np.ndarray]:
        names = np.array([self._corpus.category(i) for i in self._rows.validation])
        found = {str(name): np.flatnonzero(names == name) for name in np.unique(names) if name}
        return found if len(found) > 1 else {}

    @cached_property
    def _subsets(self) -> dict[str, np.ndarray]:
        """By the subset's number, 1 for the easiest."""
        if self._ranking is None:
            return {}
        subset = Difficulty.read(self._ranking.path).subset[self._rows.train]
        place = len(self._rows.validation)
        return {str(number): place + np.flatnonzero(subset == number) for number in np.unique(subset)}
