"""Claims: statements about arms of a sweep, each a contrast that is named before the runs."""

import ast
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from l2m_jax.errors import InputError, require_choice
from l2m_jax.evaluation.protocol import Score, SetResult
from l2m_jax.sweep.presets import Row

SIGNS = {"positive": 1, "negative": -1}
# Measures of the kept student at its validation, by their names in metrics.jsonl.
_OF_VALIDATION = tuple(
    f"validation_{name}" for name in ("rouge_l", "rouge_l_greedy", "cross_entropy", "kl", "entropy")
)
# What a set is scored by: each measure that is a number, or has a mean over the sampling seeds.
METRICS = (
    *(field.name for field in dataclasses.fields(SetResult) if field.type in (Score, float)),
    *_OF_VALIDATION,
)
PER_PROMPT = "rouge_l"  # the metric whose value for each prompt is kept


@dataclass(frozen=True)
class Contrast:
    """A statement about the difference of two expressions of arms.

    Attributes:
        id: its name in tables and figures.
        left, right: arms, or sums of them, as in "kld_easy - skl_easy"; the difference is left - right.
        metric: one of `METRICS`.
        sets: names of the evaluation sets to average; empty: all that may be reported.
        sign: of the difference according to the statement, "positive" or "negative".
        role: "primary" (its p-value is adjusted for all primary contrasts) or "secondary" (it is not).
        paper: the paper's difference, in the metric's units.
        predicted: the sign that we expect, "positive", "negative" or "none".
        prediction: what we expect, and why.

    Raises:
        InputError: a value outside its range, or an expression that is not a difference of arms.
    """

    id: str
    statement: str
    left: str
    right: str
    metric: str = "rouge_l"
    sets: tuple[str, ...] = ()
    sign: str = "positive"
    role: str = "primary"
    paper: float = math.nan
    predicted: str = ""
    prediction: str = ""

    def __post_init__(self):
        require_choice(self, "metric", METRICS)
        require_choice(self, "sign", SIGNS)
        require_choice(self, "role", ("primary", "secondary"))
        require_choice(self, "predicted", ("", "none", *SIGNS))
        if self.sets and is_of_validation(self.metric):
            raise InputError(f"sets: {self.metric} is of the validation rows; leave sets out")
        if self.paper * SIGNS[self.sign] < 0:
            raise InputError(f"paper: {self.paper} does not have the sign of the statement, {self.sign}")
        if abs(sum(self.weights.values())) > 1e-9:
            raise InputError(
                f"left: {self.left!r} less right {self.right!r} is not a difference: the weights of the arms must add "
                "up to 0"
            )

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each arm in left - right, without those of weight 0."""
        weights = _weights(self.left, "left")
        for arm, weight in _weights(self.right, "right").items():
            weights[arm] = weights.get(arm, 0.0) - weight
        return {arm: weight for arm, weight in weights.items() if weight}

    @property
    def effect(self) -> float | None:
        """The paper's difference, if it gives one."""
        return None if math.isnan(self.paper) else self.paper


@dataclass(frozen=True)
class Claims:
    """
    Attributes:
        title: of the report.
        arms: the sweep's rows, by name.

    Raises:
        InputError: a contrast of unknown arms, or two of the same id.
    """

    title: str
    arms: Mapping[str, Row]
    contrasts: tuple[Contrast, ...]

    def __post_init__(self):
        seen = set()
        for contrast in self.contrasts:
            if contrast.id in seen:
                raise InputError(f"contrasts: two are called {contrast.id!r}; give each an id of its own")
            seen.add(contrast.id)
            if unknown := [arm for arm in contrast.weights if arm not in self.arms]:
                raise InputError(
                    f"contrasts.{contrast.id}: no arm {unknown[0]!r} (known: {', '.join(self.arms)})"
                )


def is_of_validation(metric: str) -> bool:
    return metric in _OF_VALIDATION


def is_of_diagnostics(metric: str) -> bool:
    """Whether it is measured beside the validations, on the rows of `evaluation.diagnostic_rows`."""
    return is_of_validation(metric) and metric != "validation_rouge_l"


def _weights(expression: str, place: str) -> dict[str, float]:
    """The weights of the arms in a sum such as "(a + b) / 2 - c"."""
    try:
        found = _linear(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        found = 0.0
    if isinstance(found, dict):
        return found
    raise InputError(f"{place}: {expression!r} is not a sum of arms, such as 'l2m' or '(a + b) / 2 - c'")


def _linear(node: ast.expr) -> dict[str, float] | float:
    """Raises ValueError for what is neither a number nor linear in the arms."""
    match node:
        case ast.Name(name):
            return {name: 1.0}
        case ast.Constant(int() | float() as number):
            return float(number)
        case ast.UnaryOp(ast.USub(), operand):
            return _scaled(_linear(operand), -1.0)
        case ast.BinOp(left, ast.Add() | ast.Sub() as operator, right):
            first = _linear(left)
            second = _scaled(_linear(right), 1.0 if isinstance(operator, ast.Add) else -1.0)
            if isinstance(first, dict) and isinstance(second, dict):
                return {arm: first.get(arm, 0.0) + second.get(arm, 0.0) for arm in {**first, **second}}
        case ast.BinOp(left, ast.Mult(), right):
            first, second = _linear(left), _linear(right)
            if isinstance(first, float):
                return _scaled(second, first)
            if isinstance(second, float):
                return _scaled(first, second)
        case ast.BinOp(left, ast.Div(), right):
            divisor = _linear(right)
            if isinstance(divisor, float):
                return _scaled(_linear(left), 1 / divisor)
    raise ValueError


def _scaled(value: dict[str, float] | float, factor: float) -> dict[str, float] | float:
    if isinstance(value, dict):
        return {arm: weight * factor for arm, weight in value.items()}
    return value * factor
