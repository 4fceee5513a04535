"""What a teacher store keeps of each target."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from l2m_jax.training.shards import Tensors
from l2m_jax.types import TeacherRows


class StoreFormat(Protocol):
    """How the teacher's signal is stored, and read again."""

    @property
    def dtype(self) -> str:
        """The name of the setting."""
        ...

    @property
    def tensors(self) -> Tensors:
        """Dtype and shape of what is stored of a target, by name."""
        ...

    def encode(self, found: Any) -> dict[str, np.ndarray]:
        """What is stored of n targets, by name, given what the forward pass returned of them, `[n, ...]` each."""
        ...

    def decode(self, stored: TeacherRows) -> TeacherRows:
        """What a micro-batch has of n targets, by its fields, given what is stored of them."""
        ...


@dataclass(frozen=True)
class HiddenStates:
    """The teacher's final hidden states: E numbers a target. With the teacher's head, they give its distribution.

    Attributes:
        width: E.
        dtype: "float32", "bfloat16" or "float16".
    """

    width: int
    dtype: str

    @property
    def tensors(self) -> Tensors:
        return {"hidden_states": (self.dtype, (self.width,))}

    def encode(self, found: np.ndarray) -> dict[str, np.ndarray]:
        return {"hidden_states": found}

    def decode(self, stored: TeacherRows) -> TeacherRows:
        return {"teacher_hidden_TxE": stored["hidden_states"]}
