"""The difficulty of training examples: from two scores each to their ranks, and the file of both."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from l2m_jax import files
from l2m_jax.curriculum.stages import partition
from l2m_jax.errors import InputError

RANKINGS = ("fusion", "rouge", "rouge_then_cross_entropy", "random")

_FUSION_CONSTANT = 60
_LEAST_WEIGHT = 0.01 * 0.25


def _standing(difficulty_N: np.ndarray) -> np.ndarray:
    """1 + the number of strictly easier examples. Equal scores give equal standings."""
    return 1 + np.searchsorted(np.sort(difficulty_N), difficulty_N)


def rank(
    rouge_l_N: np.ndarray | Sequence[float],
    cross_entropy_N: np.ndarray | Sequence[float],
    method: str = "fusion",
    *,
    seed: int = 0,
) -> np.ndarray:
    """Orders the examples from the easiest to the hardest. Equal examples keep the order of their index.

    Methods:
        fusion: reciprocal rank fusion. An example scores 1/(60 + r_rouge) + 1/(60 + r_ce), where r is 1 + the
            number of examples that are strictly easier by that measure; the highest score is the easiest.
        rouge: descending Rouge-L.
        rouge_then_cross_entropy: descending Rouge-L, with ties in ascending cross-entropy.
        random: a permutation from `seed`, independent of the scores.

    Args:
        rouge_l_N: Rouge-L of the student's own output against the reference; high is easy.
        cross_entropy_N: mean cross-entropy of the reference response; low is easy.

    Returns:
        order_N: int64, indices of the examples, easiest first.

    Raises:
        InputError: an unknown method, or a score that is not finite.
    """
    rouge_l_N, cross_entropy_N = np.asarray(rouge_l_N, np.float64), np.asarray(cross_entropy_N, np.float64)
    if rouge_l_N.shape != cross_entropy_N.shape or rouge_l_N.ndim != 1:
        raise ValueError(
            f"expected one score of each kind per example, got {rouge_l_N.shape} and {cross_entropy_N.shape}"
        )
    if method not in RANKINGS:
        raise InputError(f"unknown ranking method '{method}': choose one of {', '.join(RANKINGS)}")
    if method == "random":
        return np.random.default_rng(seed).permutation(len(rouge_l_N)).astype(np.int64)
    for name, scores in (("Rouge-L", rouge_l_N), ("cross-entropy", cross_entropy_N)):
        if not np.isfinite(scores).all():
            example = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise InputError(
                f"the {name} of training example {example} is {scores[example]}: "
                "check the weights of the model that ranks the examples"
            )
    if method == "fusion":
        by_rouge, by_cross_entropy = _standing(-rouge_l_N), _standing(cross_entropy_N)
        fused = 1 / (_FUSION_CONSTANT + by_rouge) + 1 / (_FUSION_CONSTANT + by_cross_entropy)
        return np.argsort(-fused, kind="stable").astype(np.int64)
    if method == "rouge":
        return np.argsort(-rouge_l_N, kind="stable").astype(np.int64)
    return np.lexsort((cross_entropy_N, -rouge_l_N)).astype(np.int64)


def matched_rouge_l(
    rouge_l_N: np.ndarray, cross_entropy_N: np.ndarray, is_measured_N: np.ndarray
) -> np.ndarray:
    """Rouge-L of all examples, where it was measured on a random sample: the others are matched to it by rank.

    The lower an example's cross-entropy, the higher its Rouge-L, such that the examples that were not measured have the
    sample's distribution (quantile matching). A regression would give them less extreme values, and the sample would
    fill the easiest and the hardest subset.

    Args:
        rouge_l_N: counts where `is_measured_N`. Unchanged if that is nowhere.
        cross_entropy_N: of all examples.
    """
    found_N, others = np.array(rouge_l_N, np.float64), ~is_measured_N
    if others.any() and is_measured_N.any():
        hardness = (_standing(cross_entropy_N[others]) - 0.5) / others.sum()
        found_N[others] = np.quantile(found_N[is_measured_N], 1 - hardness, method="inverted_cdf")
    return found_N


def sample_weights(rouge_l_N: np.ndarray) -> np.ndarray:
    """float32 [N], p(1−p) as in PACED, where p is the Rouge-L of the student's own answer: smallest for what
    the student can do already, and for what it cannot do at all.

    At least 1% of the largest possible weight, so that a batch of such examples alone has a loss.
    """
    weight_N = rouge_l_N * (1 - rouge_l_N)
    return np.maximum(weight_N, _LEAST_WEIGHT).astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Difficulty:
    """The difficulty of each training example. Arrays have one entry per example, in the order of the corpus.

    Attributes:
        ids: the examples' ids, Arrow strings.
        rouge_l: float64 in [0, 1], of the student's own output against the reference.
        cross_entropy: float64, mean over the response's tokens, in nats.
        rank: int64, 0 for the easiest example.
        subset: int64, 1 for the easiest subset (that of stage 1).
    """

    ids: pa.ChunkedArray
    rouge_l: np.ndarray
    cross_entropy: np.ndarray
    rank: np.ndarray
    subset: np.ndarray

    @classmethod
    def of(
        cls,
        ids: Sequence[str] | pa.ChunkedArray,
        rouge_l_N: np.ndarray,
        cross_entropy_N: np.ndarray,
        *,
        subsets: int = 4,
        method: str = "fusion",
        seed: int = 0,
    ) -> "Difficulty":
        """Ranks the examples by `method` and divides them into `subsets` (see `rank` and `partition`)."""
        order = rank(rouge_l_N, cross_entropy_N, method, seed=seed)
        rank_N, subset_N = np.empty_like(order), np.empty_like(order)
        rank_N[order] = np.arange(len(order))
        for number, indices in enumerate(partition(order, subsets), start=1):
            subset_N[indices] = number
        if not isinstance(ids, pa.ChunkedArray):
            ids = pa.chunked_array([pa.array(ids, pa.string())])
        return cls(ids, np.asarray(rouge_l_N, float), np.asarray(cross_entropy_N, float), rank_N, subset_N)

    @property
    def order(self) -> np.ndarray:
        """Indices of the examples, easiest first."""
        return np.argsort(self.rank)

    @property
    def subsets(self) -> tuple[np.ndarray, ...]:
        """The indices of d_1 ... d_n, each easiest first."""
        order = self.order
        return tuple(order[self.subset[order] == number] for number in np.unique(self.subset))

    def write(self, path: Path) -> None:
        """Writes one row per example, in the order of the corpus. A reader never sees an incomplete file."""
        table = pa.table(
            {
                "id": self.ids.combine_chunks(),  # one chunk, because their number changes the bytes of the file
                "rouge_l": self.rouge_l,
                "cross_entropy": self.cross_entropy,
                "rank": self.rank,
                "subset": self.subset,
            }
        )
        with files.replacing(path) as temporary:
            pq.write_table(table, temporary)

    @classmethod
    def read(cls, path: Path) -> "Difficulty":
        """Reads what `write` wrote.

        Raises:
            InputError: the file is missing, cannot be read, or lacks one of the five columns.
        """
        names = ("rouge_l", "cross_entropy", "rank", "subset")
        try:
            table = pq.read_table(path, columns=["id", *names])
            return cls(table["id"], *(table[name].to_numpy() for name in names))
        except (OSError, pa.ArrowException, KeyError) as error:
            raise InputError(
                f"{path}: cannot be read as a difficulty file ({error}); delete it and rank the examples again"
            ) from error
