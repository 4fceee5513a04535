"""How often a curriculum shows each group of examples, counted over the examples that training draws."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from l2m_jax.curriculum.stages import Stage

_SPANS = 120


@dataclasses.dataclass(frozen=True, eq=False)
class Exposure:
    """How often each of G groups of examples is seen, in K spans of training that lie within stages.

    Attributes:
        names: of the groups.
        sizes: the number of examples in each group.
        stage_K: the stage of each span.
        end_K: the number of updates at the end of each span.
        seen_KxG: the number of examples seen in each span.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    stage_K: np.ndarray
    end_K: np.ndarray
    seen_KxG: np.ndarray

    @property
    def stages(self) -> list[int]:
        return np.unique(self.stage_K).tolist()

    def passes(self, stage: int | None = None) -> np.ndarray:
        """[G], how often each example of a group is seen on average, in a stage or in all of them."""
        spans = np.ones(len(self.stage_K), bool) if stage is None else self.stage_K == stage
        return self.seen_KxG[spans].sum(axis=0) / np.maximum(self.sizes, 1)

    def to_json(self) -> dict[str, Any]:
        arrays = {name: getattr(self, name).tolist() for name in ("stage_K", "end_K", "seen_KxG")}
        return {"names": list(self.names), "sizes": list(self.sizes), **arrays}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Exposure":
        arrays = {name: np.array(value[name]) for name in ("stage_K", "end_K", "seen_KxG")}
        return cls(tuple(value["names"]), tuple(value["sizes"]), **arrays)


def exposure(
    stages: Sequence[Stage], seed: int, batch_size: int, names: Sequence[str], group_N: np.ndarray
) -> Exposure:
    """What training on `stages` with this seed and batch size shows, unless a stage ends early.

    Args:
        names: of the groups.
        group_N: the group of each example, by its number; -1 for examples in none.
    """
    counts, stage_of = [], []
    for stage in stages:
        for epoch in range(stage.epochs):
            groups = group_N[stage.order(epoch, seed)]
            batches = np.arange(len(groups)) // batch_size
            counted = np.zeros((batches[-1] + 1 if len(groups) else 0, len(names)), np.int64)
            np.add.at(counted, (batches[groups >= 0], groups[groups >= 0]), 1)
            counts.append(counted)
            stage_of.append(np.full(len(counted), stage.index))
    counts, stage_of = np.concatenate(counts), np.concatenate(stage_of)
    even = np.linspace(0, len(counts), _SPANS, endpoint=False).astype(int)
    starts = np.unique([*even, *np.flatnonzero(np.diff(stage_of, prepend=0))])
    sizes = np.bincount(group_N[group_N >= 0], minlength=len(names))
    return Exposure(
        names=tuple(names),
        sizes=tuple(sizes.tolist()),
        stage_K=stage_of[starts],
        end_K=np.append(starts[1:], len(counts)),
        seen_KxG=np.add.reduceat(counts, starts, axis=0),
    )
