"""Where a student's first weights come from, other than chance or a checkpoint."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from l2m_jax.errors import InputError
from l2m_jax.models.architecture import DecoderConfig
from l2m_jax.types import Params


def student_from_teacher(
    config: DecoderConfig, params: Params, layers: Sequence[int]
) -> tuple[DecoderConfig, Params]:
    """A shallower model of the teacher's own layers, as in DistilBERT (Sanh et al., 2019).

    Args:
        config, params: of the teacher, whose embeddings, final norm and head are copied.
        layers: which of its layers the student has, 0 being the lowest, in the student's order.

    Raises:
        InputError: no layers, or one that the teacher lacks.
    """
    absent = [layer for layer in layers if not 0 <= layer < config.num_layers]
    if absent or not layers:
        raise InputError(
            f"teacher layers {list(layers)}: name at least one layer, each between 0 and {config.num_layers - 1}"
        )
    index = np.asarray(layers)
    copied = jax.tree.map(lambda leaf: leaf.copy(), {k: v for k, v in params.items() if k != "blocks"})
    student = copied | {"blocks": jax.tree.map(lambda leaf: leaf[index], params["blocks"])}
    return dataclasses.replace(config, num_layers=len(layers)), student
