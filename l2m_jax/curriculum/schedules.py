"""Coefficients of the loss that change over the training, by stage or by step."""

import math
from dataclasses import dataclass

SCHEDULED_BY = ("stage", "linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """α, β or temperature over the training.

    Attributes:
        values: the first and the last value, or the only one; by stage also one for each stage.
        by: "stage": a constant in each stage, which is compiled into the step. "linear" or "cosine": a value for each
            step, an array that needs no recompilation.
    """

    values: tuple[float, ...]
    by: str = "stage"

    def __post_init__(self):
        if self.by not in SCHEDULED_BY:
            raise ValueError(f"a schedule is one of {', '.join(SCHEDULED_BY)}, not {self.by!r}")
        if not self.values or (self.by_step and len(self.values) > 2):
            raise ValueError(f"a schedule by {self.by} cannot have the values {self.values}")

    @property
    def by_step(self) -> bool:
        return self.by != "stage"

    def at_stage(self, i: int, n: int) -> float:
        """The value of stage i = 1 ... n; by step, the last value throughout."""
        if not 1 <= i <= n:
            raise ValueError(f"stage {i} of {n}: stages count from 1 to n")
        first, last = self.values[0], self.values[-1]
        if not self.by_step and len(self.values) > 2:
            if len(self.values) != n:
                raise ValueError(f"{len(self.values)} values for {n} stages")
            return self.values[i - 1]
        # The ends of a schedule, and a constant schedule, must be exact: these values decide what is compiled.
        return last if self.by_step or i == n else first + (last - first) * (i - 1) / (n - 1)

    def at_step(self, step: int, steps: int) -> float:
        """The value at update `step` = 0 ... steps - 1, from the first value to the last."""
        done = step / (steps - 1) if steps > 1 else 1.0
        if self.by == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.values[0] + (self.values[-1] - self.values[0]) * done
