"""How a student compares with its teacher on the reference responses of a few rows, by groups of rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from l2m_jax import losses, models
from l2m_jax.data.batches import ListedExamples, forward_batches
from l2m_jax.losses import Agreement
from l2m_jax.models import DecoderConfig
from l2m_jax.parallel import Placement, over_devices
from l2m_jax.training.step import target_hidden
from l2m_jax.types import MicroBatch, Params, TeacherRows

MEASURES = Agreement._fields


@over_devices(static=("config", "valid_vocab_size", "chunk_size"), weights=("params", "teacher_head_UxF"))
def agreement_pass(
    config: DecoderConfig,
    valid_vocab_size: int,
    chunk_size: int,
    params: Params,
    teacher_head_UxF: jax.Array,
    batch: MicroBatch,
) -> Agreement:
    """The measures of each target of a micro-batch that has the teacher's hidden states, `[T]`; 0 for padding."""
    assert batch.teacher_hidden_TxE is not None
    return losses.fused_token_agreement(
        target_hidden(config, params, batch),
        models.head(config, params),
        batch.teacher_hidden_TxE,
        teacher_head_UxF,
        batch.labels_T,
        batch.weights_T,
        valid_vocab_size=valid_vocab_size,
        chunk_size=chunk_size,
    )


@dataclass(frozen=True, eq=False)
class TeacherSide:
    """What the comparison needs of the teacher.

    Attributes:
        rows: its final hidden states at the targets of an example, under "teacher_hidden_TxE".
        head_UxF: placed.
        valid_vocab_size: vocabulary entries that it shares with the student.
    """

    rows: Callable[[int], TeacherRows]
    head_UxF: jax.Array
    valid_vocab_size: int


def agreement_by_example(
    config: DecoderConfig,
    params: Params,
    examples: ListedExamples,
    teacher: TeacherSide,
    placement: Placement,
    *,
    chunk_size: int,
    slots: int,
) -> np.ndarray:
    """Sums over the targets of each example, float64 `[n, M]`, with a column for each of `MEASURES`.

    Args:
        params: placed; those of a training state will do.
        slots: tokens of a device's micro-batch.
    """
    function = placement.map(agreement_pass)
    sums_NxM = np.zeros((len(examples), len(MEASURES)))
    everything = np.arange(len(examples))
    batches = forward_batches(
        examples, everything, placement.num_devices, slots=slots, teacher_rows=teacher.rows
    )
    for batch in batches:
        fed = placement.feed(batch.micro_batch)
        found = placement.gather(
            function(config, teacher.valid_vocab_size, chunk_size, params, teacher.head_UxF, fed)
        )
        real = batch.example_AxT >= 0
        for column, values_AxT in enumerate(found):
            np.add.at(sums_NxM[:, column], batch.example_AxT[real], values_AxT[real].astype(np.float64))
    return sums_NxM


def means(sums_NxM: np.ndarray, targets_N: np.ndarray, rows: Sequence[int] | np.ndarray) -> dict[str, float]:
    """The mean over all targets of `rows`, by the names of `MEASURES`."""
    total = sums_NxM[rows].sum(axis=0) / targets_N[rows].sum()
    return dict(zip(MEASURES, total.tolist(), strict=True))


def by_group(
    sums_NxM: np.ndarray, targets_N: np.ndarray, groups: Mapping[str, Sequence[int] | np.ndarray]
) -> dict[str, dict[str, float]]:
    """`means` of each group of rows, with the number of its `rows`."""
    return {name: {"rows": len(rows), **means(sums_NxM, targets_N, rows)} for name, rows in groups.items()}
