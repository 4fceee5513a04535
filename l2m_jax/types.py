"""Values that pass between the parts.

Arrays carry their shape in their name. The letters, everywhere in this package:

    A  devices (the leading axis of what is fed to all of them at once)
    B  sequences        R  packed rows        L  tokens in a sequence or row
    T  target tokens (positions that carry loss)
    V  vocabulary       E  width of the hidden states
    N  layers           H  heads              D  width of a head
    K  key/value heads; of the teacher's signal, its most probable tokens
    S  length of a KV cache
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

Params = dict[str, Any]

# What is stored of the teacher at the targets of an example, `[r_i, ...]`, by the fields of MicroBatch.
TeacherRows = Mapping[str, np.ndarray]


class MicroBatch(NamedTuple):
    """Packed rows and the positions in them that carry loss.

    A batch of examples is one or more micro-batches; their gradients are summed before the one division
    and the one update. Fed to several devices, every array has a leading axis A.

    Attributes:
        tokens_RxL: int32, the packed examples; 0 where a slot is empty.
        segment_ids_RxL: int32, 1, 2, ... for the examples of a row; 0 where a slot is empty.
        positions_RxL: int32, restarts at 0 with each example.
        target_index_T: int32, where in the flattened R·L slots each target is predicted *from* (the slot
            before the target token), ascending. The real targets come first; T = R·L. Those beyond them point past
            the slots, each somewhere else.
        labels_T: int32, the token to predict.
        weights_T: float32, 0 beyond the real targets; for these 1, or one over the targets of their example, times its
            weight in the curriculum.
        teacher_hidden_TxE: the teacher's final hidden state at each target, read from the teacher store;
            None with a live teacher, or without one.
        teacher_ids_TxK, teacher_log_probs_TxK: int32 and float, the teacher's k most probable tokens at each target,
            with their log-probabilities, from a store of these.
        teacher_log_tail_T: float32, the logarithm of the mass of all other tokens; None if the loss leaves them out.
        alpha_T, beta_T, temperature_T: float32, of the loss of each target, in place of the objective's; None where
            the objective's holds for all.
    """

    tokens_RxL: jax.Array
    segment_ids_RxL: jax.Array
    positions_RxL: jax.Array
    target_index_T: jax.Array
    labels_T: jax.Array
    weights_T: jax.Array
    teacher_hidden_TxE: jax.Array | None = None
    teacher_ids_TxK: jax.Array | None = None
    teacher_log_probs_TxK: jax.Array | None = None
    teacher_log_tail_T: jax.Array | None = None
    alpha_T: jax.Array | None = None
    beta_T: jax.Array | None = None
    temperature_T: jax.Array | None = None
