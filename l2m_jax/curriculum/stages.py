"""Subsets from easy to hard, the Baby-Step stages over them, and the schedules α_i and β_i (Algorithm 1)."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from l2m_jax.curriculum.schedules import Schedule
from l2m_jax.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class SampleCoefficients:
    """Coefficients of the loss that vary by sample: float32 arrays, one entry for each example of the corpus.

    Attributes:
        alpha_N, beta_N: in place of the stage's α_i and β_i.
        weight_N: factor of the weight of all targets of an example. The loss is a weighted mean, so that only ratios
            between the examples of a batch count.
    """

    alpha_N: np.ndarray | None = None
    beta_N: np.ndarray | None = None
    weight_N: np.ndarray | None = None

    @property
    def by_name(self) -> dict[str, np.ndarray]:
        found = {"alpha": self.alpha_N, "beta": self.beta_N, "weight": self.weight_N}
        return {name: values for name, values in found.items() if values is not None}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of training: its examples, its length and its objective.

    Attributes:
        index: i, starting at 1.
        alpha: α_i, the teacher's share in the skew mixture (Eq. 6).
        beta: β_i, the weight of the divergence against cross-entropy (Eq. 7).
        indices: int64, the examples of this stage, easiest subset first. Ignored by == and hash.
        epochs: passes over `indices`; the last one may be incomplete.
        examples: the total number of examples seen, at most epochs · len(indices).
        temperature: T_i of both models' logits in the divergence.
        samples: what varies by sample instead; None: nothing does. Ignored by == and hash.
    """

    index: int
    alpha: float
    beta: float
    indices: np.ndarray = dataclasses.field(compare=False, repr=False)
    epochs: int
    examples: int
    temperature: float = 1.0
    samples: SampleCoefficients | None = dataclasses.field(default=None, compare=False, repr=False)

    def examples_in_epoch(self, epoch: int) -> int:
        """The number of examples in an epoch (0, 1, ...): the first ones of that epoch's order."""
        return max(0, min(len(self.indices), self.examples - epoch * len(self.indices)))


def partition(order: Sequence[int] | np.ndarray, n: int) -> tuple[np.ndarray, ...]:
    """Divides `order` (easiest first) into n consecutive subsets d_1 ... d_n whose sizes differ by at most one.

    The easiest subsets get one more each if needed: 10 examples in 4 subsets are 3, 3, 2, 2.

    Raises:
        InputError: n is less than 1 or greater than the number of examples.
    """
    order = np.asarray(order, np.int64)
    if n < 1:
        raise InputError(f"{n} difficulty subsets: there must be at least 1")
    if n > len(order):
        raise InputError(
            f"{n} difficulty subsets of {len(order)} training examples: at most {len(order)} are possible; "
            "ask for fewer subsets or give more data"
        )
    return tuple(np.array_split(order, n))


def alpha_at(i: int, n: int, alpha_first: float = 0.0, alpha_last: float = 0.1) -> float:
    """α_i = α·(i−1)/(n−1) of Eq. 6, for i = 1 ... n, or any other straight line from `alpha_first`.

    With n = 1, the only stage gets `alpha_last`: like the last of several, it sees all data.
    """
    return Schedule((alpha_first, alpha_last)).at_stage(i, n)


def beta_at(i: int, n: int, beta_first: float = 0.7, beta_last: float = 1.0) -> float:
    """β_i = β_1 − (β_1 − β_n)·(i−1)/(n−1) of Eq. 7, for i = 1 ... n; with n = 1, `beta_last`."""
    return Schedule((beta_first, beta_last)).at_stage(i, n)


def baby_steps(
    subsets: Sequence[np.ndarray],
    *,
    epochs: int = 8,
    alpha: tuple[float, float] = (0.0, 0.1),
    beta: tuple[float, float] = (0.7, 1.0),
) -> tuple[Stage, ...]:
    """Algorithm 1: stage i trains on d_1 ∪ ... ∪ d_i for `epochs` epochs.

    Args:
        subsets: d_1 ... d_n, from `partition`.
        epochs: of each stage.
        alpha: α of the first and of the last stage.
        beta: β of the first and of the last stage.
    """
    if epochs < 1:
        raise InputError(f"{epochs} epochs a stage: there must be at least 1")
    n = len(subsets)
    stages = []
    for i in range(1, n + 1):
        indices = np.concatenate(subsets[:i])
        stages.append(
            Stage(
                index=i,
                alpha=alpha_at(i, n, *alpha),
                beta=beta_at(i, n, *beta),
                indices=indices,
                epochs=epochs,
                examples=epochs * len(indices),
            )
        )
    return tuple(stages)


def baby_step_examples(size: int, n: int, epochs: int) -> int:
    """The number of examples that `baby_steps` trains on: with n = 4, 8·(¼ + ½ + ¾ + 1) = 20 times the data."""
    subset_sizes = [len(subset) for subset in partition(np.arange(size), n)]
    return epochs * sum(np.cumsum(subset_sizes).tolist())


def single_stage(
    indices: Sequence[int] | np.ndarray, examples: int, *, alpha: float = 0.0, beta: float = 1.0
) -> tuple[Stage, ...]:
    """The only stage of a method without a curriculum: all data at once, `examples` examples in total.

    With `baby_step_examples(...)` or `examples_seen(stages)`, it sees exactly as many as the staged run.
    """
    indices = np.asarray(indices, np.int64)
    if len(indices) == 0 or examples < 1:
        raise InputError(f"{examples} examples to train on, out of {len(indices)}: both must be at least 1")
    return (Stage(1, alpha, beta, indices, math.ceil(examples / len(indices)), examples),)


def examples_seen(stages: Iterable[Stage]) -> int:
    """The number of examples seen over all stages, with repetitions."""
    return sum(stage.examples for stage in stages)


def steps(stages: Iterable[Stage], batch_size: int) -> int:
    """The number of updates over all stages. A batch never spans two epochs, so an epoch's last batch may be smaller."""
    return sum(
        math.ceil(stage.examples_in_epoch(epoch) / batch_size)
        for stage in stages
        for epoch in range(stage.epochs)
    )
