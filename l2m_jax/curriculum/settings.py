"""The settings of a curriculum."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from l2m_jax.curriculum.difficulty import RANKINGS
from l2m_jax.curriculum.schedules import SCHEDULED_BY
from l2m_jax.curriculum.strata import STRATA
from l2m_jax.errors import (
    InputError,
    require_at_least,
    require_choice,
    require_fraction,
    require_positive,
)

WEIGHTS = ("", "p(1-p)")


@dataclass(frozen=True)
class Curriculum:
    """How training examples are ranked, and the stages in which they are learnt. Defaults are the paper's.

    Raises:
        InputError: a value outside its range.
    """

    stages: int = 4
    # 8 on cumulative quarters are 20 epochs' worth, which single-stage methods also get. May be a fraction.
    epochs_per_stage: float = 8.0
    # A budget over all stages instead, which may be less than one pass: in examples, or in tokens of average examples.
    examples: int = field(default=0, metadata={"absent_at_default": True})
    tokens: int = field(default=0, metadata={"absent_at_default": True})
    ranking: str = "fusion"  # one of `difficulty.RANKINGS`
    ranking_model: str = ""  # folder of the student that ranks; empty: the student's initial weights
    ranking_temperature: float = (
        -1.0
    )  # of the ranking student's answers; 0: greedy (-1: as sampling.temperature)
    # Examples, drawn at random, whose prompts the ranking student answers; the Rouge-L of the others is fitted to their
    # cross-entropy (0: all are answered).
    ranking_rows: int = field(default=0, metadata={"absent_at_default": True})
    rerank: bool = False  # at each stage's start, what is not open yet, by the student's cross-entropy
    stratify: str = ""  # rank within strata: "category", or "length" (quarters of the references' lengths)
    subsets: tuple[int, ...] = ()  # the subsets to train on; 1 is the easiest (empty: all)
    mix: float = 0.0  # share of a stage's examples from the subsets that are not open yet
    open_by: float = 0.0  # share of the training after which all subsets are open (0: by equal epochs)
    alpha: float = 0.1  # α_n of Eq. 6
    beta_first: float = 0.7  # β_1 and β_n of Eq. 7
    beta_last: float = 1.0
    alphas: tuple[float, ...] = ()  # instead of 0 and `alpha`: first and last, the only one, or one a stage
    betas: tuple[float, ...] = ()  # instead of `beta_first` and `beta_last`
    temperatures: tuple[float, ...] = ()  # instead of the method's own
    alpha_by: str = "stage"  # one of `schedules.SCHEDULED_BY`: "stage", or by step "linear" or "cosine"
    beta_by: str = "stage"
    temperature_by: str = "stage"
    loss_by: str = "stage"  # "sample": α, β and T by an example's rank, in a single stage in random order
    weight: str = ""  # of an example: "p(1-p)", where p is the Rouge-L of the student's own answer
    restart_optimizer: bool = True  # a new schedule and optimiser state in each stage
    patience: int = 0  # end a stage after this many validations without a better Rouge-L (0: never)

    def __post_init__(self):
        require_positive(self, "stages", "epochs_per_stage")
        require_choice(self, "ranking", RANKINGS)
        require_choice(self, "stratify", STRATA)
        require_choice(self, "loss_by", ("stage", "sample"))
        require_choice(self, "weight", WEIGHTS)
        require_fraction(self, "alpha", "beta_first", "beta_last")
        require_fraction(self, "mix", "open_by", below_one=True)
        require_at_least(self, 0, "patience", "ranking_rows", "examples", "tokens")
        if self.examples and self.tokens:
            raise InputError(
                f"tokens: {self.tokens} and examples {self.examples} both set the budget; leave one at 0"
            )
        if self.ranking_temperature != -1:
            require_at_least(self, 0, "ranking_temperature")
        for name in ("alpha", "beta", "temperature"):
            self._check_schedule(name, getattr(self, f"{name}s"), getattr(self, f"{name}_by"))
        if outside := [i for i in self.subsets if not 1 <= i <= self.stages]:
            raise InputError(
                f"subsets: {outside[0]} is not one of the {self.stages} subsets, which are numbered from 1"
            )
        if len(set(self.subsets)) != len(self.subsets):
            raise InputError(f"subsets: {self.subsets} names a subset twice")
        if self.loss_by == "sample":
            for name in ("mix", "open_by", "rerank", "alpha_by", "beta_by", "temperature_by"):
                if getattr(self, name) != getattr(Curriculum, name):
                    raise InputError(
                        f"{name}: has no effect in the single stage of loss_by 'sample'; leave one of them out"
                    )

    def in_examples(self, lengths: np.ndarray) -> Self:
        """The same with a budget of tokens as one of examples.

        Args:
            lengths: tokens of each training example, [n].
        """
        if not self.tokens:
            return self
        return dataclasses.replace(
            self, tokens=0, examples=max(1, round(self.tokens / float(np.mean(lengths))))
        )

    def epochs_over(self, sizes: Sequence[int]) -> float:
        """Epochs of each stage, over subsets of these sizes."""
        return self.examples / float(np.cumsum(sizes).sum()) if self.examples else self.epochs_per_stage

    def _check_schedule(self, name: str, values: tuple[float, ...], by: str) -> None:
        require_choice(self, f"{name}_by", SCHEDULED_BY)
        one_a_stage = by == self.loss_by == "stage"
        lengths = (0, 1, 2, *([len(self.subsets) or self.stages] if one_a_stage else ()))
        if len(values) not in lengths:
            raise InputError(
                f"{name}s: {values} must be first and last, or a single value"
                + (
                    f", or one for each of {lengths[-1]} stages"
                    if by == "stage"
                    else f" with {name}_by {by!r}"
                )
            )
        for value in values:
            if not (0 < value < math.inf if name == "temperature" else 0 <= value <= 1):
                where = "above 0" if name == "temperature" else "between 0 and 1"
                raise InputError(f"{name}s: {value} must be {where}")
