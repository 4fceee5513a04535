"""Subsets from easy to hard, the Baby-Step stages over them, and the schedules α_i and β_i (Algorithm 1)."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from l2m_jax.curriculum.schedules import Schedule
from l2m_jax.data.order import order_of_examples, shuffled
from l2m_jax.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class SampleCoefficients:
    """Coefficients of the loss that vary by sample: float32 arrays, one entry for each example of the corpus.

    Attributes:
        alpha_N, beta_N, temperature_N: in place of the stage's α_i, β_i and T_i.
        weight_N: factor of the weight of all targets of an example. The loss is a weighted mean, so that only ratios
            between the examples of a batch count.
    """

    alpha_N: np.ndarray | None = None
    beta_N: np.ndarray | None = None
    weight_N: np.ndarray | None = None
    temperature_N: np.ndarray | None = None

    @property
    def by_name(self) -> dict[str, np.ndarray]:
        return {name.removesuffix("_N"): values for name, values in vars(self).items() if values is not None}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of training: its examples, its length and its objective.

    Attributes:
        index: i, starting at 1.
        alpha: α_i, the teacher's share in the skew mixture (Eq. 6).
        beta: β_i, the weight of the divergence against cross-entropy (Eq. 7).
        passes: int64, the examples of each epoch: a multiset, whose order is drawn when it is trained on. Ignored by
            == and hash.
        examples: the total number of examples seen; fewer than in `passes` cut the last epoch's order short.
        temperature: T_i of both models' logits in the divergence.
        samples: what varies by sample instead; None: nothing does. Ignored by == and hash.
    """

    index: int
    alpha: float
    beta: float
    passes: tuple[np.ndarray, ...] = dataclasses.field(compare=False, repr=False)
    examples: int
    temperature: float = 1.0
    samples: SampleCoefficients | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def epochs(self) -> int:
        return len(self.passes)

    @functools.cached_property
    def indices(self) -> np.ndarray:
        """int64, the examples of this stage, each once; in the order of its first epoch if that has them all."""
        first = self.passes[0]
        different = np.unique(np.concatenate(list({id(p): p for p in self.passes}.values())))
        return first if len(first) == len(different) else different

    def examples_in_epoch(self, epoch: int) -> int:
        """The number of examples in an epoch (0, 1, ...): the first ones of that epoch's order."""
        if epoch >= self.epochs:
            return 0
        before = sum(map(len, self.passes[:epoch]))
        return max(0, min(len(self.passes[epoch]), self.examples - before))

    def order(self, epoch: int, seed: int) -> np.ndarray:
        """The examples of an epoch in the order in which they are trained on."""
        order = order_of_examples(seed, self.index, epoch, self.passes[epoch])
        return order[: self.examples_in_epoch(epoch)]


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


def baby_steps(
    subsets: Sequence[np.ndarray],
    *,
    epochs: float = 8,
    alpha: tuple[float, float] = (0.0, 0.1),
    beta: tuple[float, float] = (0.7, 1.0),
    mix: float = 0.0,
    open_by: float = 0.0,
    seed: int = 0,
) -> tuple[Stage, ...]:
    """Algorithm 1: stage i trains on d_1 ∪ ... ∪ d_i for `epochs` epochs.

    Args:
        subsets: d_1 ... d_n, from `partition`.
        epochs: of each stage. Of a fraction of an epoch, the examples are drawn at random.
        alpha: α of the first and of the last stage (Eq. 6). A single stage has the last one: it sees all data.
        beta: β of the first and of the last stage (Eq. 7).
        mix: the share of a stage's examples that comes from the subsets that are not open yet.
        open_by: the share of all examples after which the last subset opens; the stages before share it in
            proportion to their data. 0: as it follows from equal epochs.
        seed: for the examples that `mix` and fractions of epochs draw.
    """
    n = len(subsets)
    sizes = [len(subset) for subset in subsets]
    everything = np.concatenate(subsets)
    stages = []
    for i, examples in enumerate(stage_examples(sizes, epochs, open_by), start=1):
        opened = sum(sizes[:i])
        passes = _passes(everything[:opened], everything[opened:], examples, mix, (seed, i))
        alpha_i, beta_i = (Schedule(ends).at_stage(i, n) for ends in (alpha, beta))
        stages.append(Stage(i, alpha_i, beta_i, passes, examples))
    return tuple(stages)


def stage_examples(sizes: Sequence[int], epochs: float, open_by: float = 0.0) -> list[int]:
    """The number of examples that each of the `baby_steps` trains on, over subsets of these sizes.

    Their sum does not depend on `open_by`.

    Raises:
        InputError: a stage would have none.
    """
    ends = np.cumsum(np.cumsum(sizes)).astype(float)
    if open_by and len(sizes) > 1:
        ends[:-1] *= open_by * ends[-1] / ends[-2]
    examples = np.diff(np.floor(epochs * ends + 0.5).astype(int), prepend=0).tolist()
    if min(examples) < 1:
        stage = examples.index(min(examples)) + 1
        early = f" with all data open by {open_by:g} of them" if open_by else ""
        raise InputError(
            f"{epochs:g} epochs a stage{early} leave stage {stage} without examples; raise curriculum.epochs_per_stage, "
            "or the budget of curriculum.examples or curriculum.tokens"
        )
    return examples


def _passes(
    opened: np.ndarray, others: np.ndarray, examples: int, mix: float, words: tuple[int, int]
) -> tuple[np.ndarray, ...]:
    """`examples` in epochs as long as `opened`, of which each has its share of `others`."""
    whole, rest = divmod(examples, len(opened))
    if not mix or not len(others):
        return (opened,) * whole + ((_drawn(opened, rest, *words, 1),) if rest else ())
    ends = np.append(np.arange(1, whole + 1) * len(opened), [examples] if rest else []).astype(int)
    mixed = np.floor(mix * ends + 0.5).astype(int)
    from_others = np.split(_drawn(others, mixed[-1], *words, 2), mixed[:-1])
    from_opened = np.split(_drawn(opened, examples - mixed[-1], *words, 1), (ends - mixed)[:-1])
    return tuple(np.concatenate(pair) for pair in zip(from_opened, from_others, strict=True))


def _drawn(pool: np.ndarray, count: int, seed: int, stage: int, use: int) -> np.ndarray:
    """`count` examples at random, none of them for the k-th time before every one was there k - 1 times."""
    rounds = [shuffled(pool, seed, stage, k, use) for k in range(-(-count // len(pool)))]
    return np.concatenate([*rounds, pool[:0]])[:count]


def shuffled_over_time(stages: Sequence[Stage], seed: int) -> tuple[Stage, ...]:
    """`stages` with the same examples, each as often over the whole training, in a random order over all stages."""
    passes = [stage.passes for stage in stages]
    lengths = [len(examples) for of_stage in passes for examples in of_stage]
    everything = shuffled(np.concatenate([p for of_stage in passes for p in of_stage]), seed)
    anew = iter(np.split(everything, np.cumsum(lengths)[:-1]))
    return tuple(
        dataclasses.replace(stage, passes=tuple(next(anew) for _ in stage.passes)) for stage in stages
    )


def single_stage(
    indices: Sequence[int] | np.ndarray, examples: int, *, alpha: float = 0.0, beta: float = 1.0
) -> tuple[Stage, ...]:
    """The only stage of a method without a curriculum: all data at once, `examples` examples in total.

    With `examples_seen(stages)`, it sees exactly as many as the staged run.
    """
    indices = np.asarray(indices, np.int64)
    if len(indices) == 0 or examples < 1:
        raise InputError(f"{examples} examples to train on, out of {len(indices)}: both must be at least 1")
    return (Stage(1, alpha, beta, (indices,) * math.ceil(examples / len(indices)), examples),)


def by_rank(order: np.ndarray, first: float, last: float) -> np.ndarray:
    """float32 by example: a straight line from `first` to `last` over the ranks of `order`; `last` for others."""
    values_N = np.full(int(order.max()) + 1, last, np.float32)
    values_N[order] = np.linspace(first, last, len(order)) if len(order) > 1 else last
    return values_N


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
