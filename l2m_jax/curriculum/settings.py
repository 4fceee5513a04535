"""The settings of a curriculum."""

import math
from dataclasses import dataclass

from l2m_jax.curriculum.difficulty import RANKINGS
from l2m_jax.curriculum.schedules import SCHEDULED_BY
from l2m_jax.errors import (
    InputError,
    require_at_least,
    require_choice,
    require_fraction,
    require_positive,
)


@dataclass(frozen=True)
class Curriculum:
    """How training examples are ranked, and the stages in which they are learnt. Defaults are the paper's.

    Raises:
        InputError: a value outside its range.
    """

    stages: int = 4
    epochs_per_stage: int = 8  # on cumulative quarters: 20 epochs' worth, which single-stage methods also get
    ranking: str = "fusion"  # one of `difficulty.RANKINGS`
    ranking_model: str = ""  # folder of the student that ranks; empty: the student's initial weights
    ranking_temperature: float = (
        -1.0
    )  # of the ranking student's answers, 0: greedy (-1: as sampling.temperature)
    subsets: tuple[int, ...] = ()  # the subsets to train on; 1 is the easiest (empty: all)
    alpha: float = 0.1  # α_n of Eq. 6
    beta_first: float = 0.7  # β_1 and β_n of Eq. 7
    beta_last: float = 1.0
    alphas: tuple[float, ...] = ()  # instead of 0 and `alpha`: first and last, the only one, or one a stage
    betas: tuple[float, ...] = ()  # instead of `beta_first` and `beta_last`
    temperatures: tuple[float, ...] = ()  # instead of the method's own
    alpha_by: str = "stage"  # one of `schedules.SCHEDULED_BY`: "stage", or by step "linear" or "cosine"
    beta_by: str = "stage"
    temperature_by: str = "stage"
    restart_optimizer: bool = True  # a new schedule and optimiser state in each stage
    patience: int = 0  # end a stage after this many validations without a better Rouge-L (0: never)

    def __post_init__(self):
        require_positive(self, "stages", "epochs_per_stage")
        require_choice(self, "ranking", RANKINGS)
        require_fraction(self, "alpha", "beta_first", "beta_last")
        require_at_least(self, 0, "patience")
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

    def _check_schedule(self, name: str, values: tuple[float, ...], by: str) -> None:
        require_choice(self, f"{name}_by", SCHEDULED_BY)
        lengths = (0, 1, 2) if by != "stage" else (0, 1, 2, len(self.subsets) or self.stages)
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
