"""The stages of a student's training: their plan, re-ranking as the student learns, and what they show how often."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from l2m_jax import files, methods
from l2m_jax.curriculum import (
    Curriculum,
    Difficulty,
    Exposure,
    Stage,
    exposure,
    length_strata,
    stratified,
)
from l2m_jax.data.corpus import Corpus
from l2m_jax.errors import InputError
from l2m_jax.methods import Method
from l2m_jax.multihost import first
from l2m_jax.progress import console
from l2m_jax.types import Params

_MOST_CATEGORIES = 16


@dataclass(frozen=True, eq=False)
class Plan:
    """What decides the stages of a student's training.

    Attributes:
        subsets: in the order in which they open, by number (1 is the easiest).
        strata_N: None unless examples are ranked within strata.
        rouge_l_N: of the student's own answers; None without a ranking.
        ended: the stages that had ended when the subsets were last divided again.
    """

    method: Method
    curriculum: Curriculum
    seed: int
    subsets: dict[int, np.ndarray]
    strata_N: np.ndarray | None
    rouge_l_N: np.ndarray | None
    ended: tuple[Stage, ...] = ()

    @classmethod
    def of(
        cls, method: Method, curriculum: Curriculum, seed: int, train: Corpus, ranking: Difficulty | None
    ) -> "Plan":
        """
        Args:
            ranking: that of the training examples; None for a method that ignores difficulty.
        """
        curriculum = curriculum.in_examples(train.lengths)
        order = np.arange(len(train)) if ranking is None else ranking.order
        strata_N = strata_of(train, curriculum.stratify)
        opening = methods.subsets(method, curriculum, order, seed, strata_N)
        return cls(method, curriculum, seed, opening, strata_N, None if ranking is None else ranking.rouge_l)

    @functools.cached_property
    def stages(self) -> tuple[Stage, ...]:
        opening = list(self.subsets.values())
        found = methods.stages_over(opening, self.method, self.curriculum, self.seed, self.rouge_l_N)
        return self.ended + found[len(self.ended) :]

    def unopened(self, opened: int) -> np.ndarray:
        """The examples of the subsets after the first `opened` ones."""
        return np.concatenate(list(self.subsets.values())[opened:])

    def reranked(self, opened: int, order: np.ndarray) -> "Plan":
        """The plan with the subsets after the first `opened` ones divided again. `order`: their examples, easiest first."""
        numbers = list(self.subsets)
        if self.method.ranking == "reversed":
            order = order[::-1]
        if self.strata_N is not None:
            order = stratified(order, self.strata_N, len(numbers) - opened)
        # As large as they were, because schedules and validations count the planned steps.
        ends = np.cumsum([len(self.subsets[number]) for number in numbers[opened:]])
        anew = zip(numbers[opened:], np.split(order, ends[:-1]), strict=True)
        return dataclasses.replace(self, subsets=self.subsets | dict(anew), ended=self.stages[:opened])


def strata_of(train: Corpus, stratify: str) -> np.ndarray | None:
    """The stratum of each example by the setting `curriculum.stratify`; None if that is empty.

    Raises:
        InputError: the rows have no categories.
    """
    if stratify == "length":
        return length_strata(train.response_lengths)
    if stratify == "category":
        names, category_N = train.categories
        if names == [""]:
            raise InputError(
                "config.curriculum.stratify: the training rows have no field 'category' (or 'topic'); set 'length', "
                "or leave it empty"
            )
        return category_N
    return None


class Reranking:
    """At the start of each stage, ranks what is not open yet again, by the current student's cross-entropy.

    Orders are kept in one file for each stage. A run that resumes within a stage reads them there, because the parameters
    that they came from are gone.

    Args:
        folder: the folder of the files, which belong to one training phase.
        cross_entropy: measures examples with placed parameters; [n], in the order of the given indices.
        changed: called with each new plan.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        cross_entropy: Callable[[Params, np.ndarray], np.ndarray],
        changed: Callable[[Plan], object],
    ):
        self._plan, self._folder, self._cross_entropy, self._changed = plan, folder, cross_entropy, changed

    def begin(self, number: int, params: Params) -> Stage:
        """The stage that begins, the `number`-th from 0, with placed parameters at its start (or later ones if the
        order of this stage is there already).

        Raises:
            InputError: the order of an earlier stage is missing.
        """
        plan = self.known(number)
        opened = len(plan.ended) + 1
        if opened <= min(number, self._last):
            file = self._file(opened)
            if opened < number:
                raise InputError(
                    f"{file}: missing; remove the student's checkpoints to train it from the start"
                )
            indices = np.sort(plan.unopened(opened))
            scores = self._cross_entropy(params, indices)
            first(functools.partial(_write, file, indices, scores))
            plan = self.known(number)
        self._changed(plan)
        return plan.stages[number]

    def known(self, number: int | None = None) -> Plan:
        """The plan with the orders that are there, or with those until the start of stage `number`."""
        plan = self._plan
        for opened in range(1, (self._last if number is None else min(number, self._last)) + 1):
            file = self._file(opened)
            if not first(file.is_file):
                break
            plan = plan.reranked(opened, pq.read_table(file)["example"].to_numpy())
        return plan

    @property
    def _last(self) -> int:
        """The last subset has nothing left to choose from."""
        return len(self._plan.subsets) - 2

    def _file(self, opened: int) -> Path:
        return self._folder / f"stage{opened + 1:02}.parquet"


def _write(file: Path, indices: np.ndarray, cross_entropy: np.ndarray) -> None:
    order = np.argsort(cross_entropy, kind="stable")
    file.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(file) as temporary:
        pq.write_table(
            pa.table({"example": indices[order], "cross_entropy": cross_entropy[order]}), temporary
        )


def exposures(plan: Plan, train: Corpus, batch_size: int) -> dict[str, Exposure]:
    """How often the student sees each "subset" and each "category", where there are several.

    A method without stages has no subsets. If there are many categories, the smaller ones count together.
    """
    found = {}
    count = functools.partial(exposure, plan.stages, plan.seed, batch_size)
    if len(plan.subsets) > 1 and (plan.method.staged or plan.curriculum.subsets):
        numbers = sorted(plan.subsets)
        subset_N = np.full(len(train), -1)
        for place, number in enumerate(numbers):
            subset_N[plan.subsets[number]] = place
        found["subset"] = count([str(number) for number in numbers], subset_N)
    names, category_N = train.categories
    if len(names) > 1:
        sizes = np.bincount(category_N, minlength=len(names))
        largest = np.argsort(-sizes, kind="stable")[:_MOST_CATEGORIES]
        place = np.full(len(names), len(largest))
        place[largest] = np.arange(len(largest))
        named = [names[i] or "none" for i in largest] + ["others"] * (len(names) > len(largest))
        category_N = place[category_N]
        category_N[np.setdiff1d(np.arange(len(train)), plan.unopened(0))] = -1
        found["category"] = count(named, category_N)
    return found


def show(found: dict[str, Exposure]) -> None:
    """Prints the average number of times that an example of each group is seen, by stage and in total."""
    for kind, seen in found.items():
        stages = [f"stage {stage}" for stage in seen.stages] if len(seen.stages) > 1 else []
        table = Table(kind, "examples", *stages, "passes", title=f"passes over each {kind}")
        columns = [seen.passes(stage) for stage in seen.stages] if stages else []
        for i, (name, size) in enumerate(zip(seen.names, seen.sizes, strict=True)):
            table.add_row(name, f"{size:,}", *(f"{passes[i]:.2f}" for passes in [*columns, seen.passes()]))
        console.print(table)


def write_exposures(file: Path, found: dict[str, Exposure]) -> None:
    first(lambda: files.write_json(file, {kind: seen.to_json() for kind, seen in found.items()}))


def read_exposures(file: Path) -> dict[str, Exposure]:
    """What `write_exposures` wrote; empty if there is no such file.

    Raises:
        InputError: the file is damaged.
    """
    if not file.is_file():
        return {}
    way_out = f"delete {file} to make the report without it"
    found = files.read_json(file, way_out)
    try:
        return {kind: Exposure.from_json(seen) for kind, seen in found.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file} is not what was written; {way_out}") from error
