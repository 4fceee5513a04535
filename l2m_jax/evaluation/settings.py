"""Settings of evaluation and validation."""

import math
from dataclasses import dataclass

from l2m_jax.errors import InputError, require_at_least, require_choice
from l2m_jax.evaluation.sources import parse_set


@dataclass(frozen=True)
class Evaluation:
    sets: tuple[str, ...] = (
        "test",
    )  # "test" (of the data), known names (self_inst, vicuna, ...) or name=file
    seeds: tuple[int, ...] = (10, 20, 30, 40, 50)  # each prompt is answered once per seed
    rows: int = 0  # the maximum number of rows of each set (0: all)
    validations: int = 20  # over the whole of a student's training, evenly spaced
    validation_steps: int = (
        0  # updates from one validation to the next, instead of `validations` (0: by their number)
    )
    validation_rows: int = 0  # the maximum number of rows for validation Rouge-L (0: all)
    diagnostic_rows: int = 32  # rows of validation and of training to compare with the teacher on (0: none)
    select: str = "best"  # which student is kept: "best" by validation Rouge-L, or "last"

    def validations_in(self, updates: int) -> int:
        """The number of validations in a training of `updates` updates."""
        return math.ceil(updates / self.validation_steps) if self.validation_steps else self.validations

    def __post_init__(self):
        require_choice(self, "select", ("best", "last"))
        require_at_least(self, 0, "rows", "validation_steps", "validation_rows", "diagnostic_rows")
        require_at_least(self, 1, "validations")
        if not self.sets:
            raise InputError("sets: empty; give at least one set, as in ('test',)")
        try:
            names = [parse_set(source)[0] for source in self.sets]
        except InputError as error:
            raise InputError(f"sets: {error}") from error
        if twice := _repeated(names):
            raise InputError(
                f"sets: two of them are called '{twice[0]}'; name one differently, as in name=file"
            )
        if not self.seeds:
            raise InputError("seeds: empty; give at least one seed, as in (10,)")
        if outside := [seed for seed in self.seeds if not 0 <= seed < 2**32]:
            raise InputError(f"seeds: {outside[0]!r} must be at least 0 and below 2**32")
        if twice := _repeated(self.seeds):
            raise InputError(f"seeds: {twice[0]} is given twice; each seed must be different")


def _repeated(values: list[str] | tuple[int, ...]) -> list:
    return [value for i, value in enumerate(values) if value in values[:i]]
