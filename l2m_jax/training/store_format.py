"""What a teacher store keeps of each target: final hidden states, or top-k log-probabilities."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from l2m_jax.losses import TopK
from l2m_jax.training.shards import Tensors
from l2m_jax.types import TeacherRows

# Hidden states in int8 have one scale for so many entries: a few entries of a trained model are many times the others.
INT8_BLOCK = 64


class StoreFormat(Protocol):
    """How the teacher's signal is stored, and read again."""

    @property
    def dtype(self) -> str:
        """That of the setting `store_dtype`."""
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
        dtype: "float32", "bfloat16", "float16", or "int8" with a float32 scale for each block of 64 entries.
    """

    width: int
    dtype: str

    @property
    def tensors(self) -> Tensors:
        states = {"hidden_states": (self.dtype, (self.width,))}
        if self.dtype != "int8":
            return states
        return states | {"scales": ("float32", (-(-self.width // INT8_BLOCK),))}

    def encode(self, found: np.ndarray) -> dict[str, np.ndarray]:
        if self.dtype != "int8":
            return {"hidden_states": found}
        whole = np.pad(found.astype(np.float32), ((0, 0), (0, -self.width % INT8_BLOCK)))
        blocks = whole.reshape(len(found), -1, INT8_BLOCK)
        scales = np.abs(blocks).max(axis=-1) / 127
        with np.errstate(invalid="ignore"):  # the store refuses scales that are not finite
            rounded = np.rint(blocks / np.where(scales == 0, 1, scales)[..., None]).astype(np.int8)
        return {"hidden_states": rounded.reshape(whole.shape)[:, : self.width], "scales": scales}

    def decode(self, stored: TeacherRows) -> TeacherRows:
        states = stored["hidden_states"]
        if self.dtype == "int8":
            states = states * np.repeat(stored["scales"], INT8_BLOCK, axis=1)[:, : self.width]
        return {"teacher_hidden_TxE": states}


@dataclass(frozen=True)
class TopKLogProbs:
    """The teacher's k most probable tokens, their log-probabilities, and the logarithm of the mass of all others.

    Attributes:
        dtype: "float32", "bfloat16" or "float16", of the log-probabilities.
        tail: whether the loss has the other tokens as one further class. Changes nothing that is stored.
    """

    k: int
    dtype: str
    tail: bool = True

    @property
    def tensors(self) -> Tensors:
        ids, log_probs = ("int32", (self.k,)), (self.dtype, (self.k,))
        return {"token_ids": ids, "log_probs": log_probs, "log_tail": ("float32", ())}

    def encode(self, found: TopK) -> dict[str, np.ndarray]:
        return {name: np.asarray(values) for name, values in found._asdict().items()}

    def decode(self, stored: TeacherRows) -> TeacherRows:
        found = {
            "teacher_ids_TxK": stored["token_ids"],
            "teacher_log_probs_TxK": stored["log_probs"],
        }
        return found | {"teacher_log_tail_T": stored["log_tail"]} if self.tail else found


def store_format(width: int, dtype: str, top_k: int = 0, tail: bool = True) -> StoreFormat:
    """The format of the settings: `width` is that of the hidden states, and `top_k` = 0 stores these."""
    return TopKLogProbs(top_k, dtype, tail) if top_k else HiddenStates(width, dtype)
