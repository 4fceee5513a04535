"""What other tools have written of a teacher: hidden states or top-k log-probabilities of rows of tokens, in files.

Each format is a class that lists its files, gives their token ids, and reads a part of one row. Position t of a row says
what the teacher expects after token t.
"""

import functools
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from l2m_jax.errors import InputError, reason

Read = Mapping[str, np.ndarray]
"""`hidden_states` [m, E], or `top_ids` and `log_probs` [m, K] in any order, of m positions."""


class Outputs(Protocol):
    """A folder of files in one format.

    Attributes:
        folder: where they are.
        before_norm: whether hidden states are those before the teacher's final norm.
        may_end_with_padding: whether a row also counts as that without its last token.
    """

    @property
    def folder(self) -> Path: ...

    @property
    def before_norm(self) -> bool: ...

    @property
    def may_end_with_padding(self) -> bool: ...

    @property
    def files(self) -> list[Path]: ...

    def tokens(self, file: Path) -> tuple[np.ndarray, np.ndarray]:
        """The token ids of a file, [sum of lengths], and the lengths of its rows.

        Raises:
            InputError: the file is damaged, or not of this format.
        """
        ...

    def read(self, file: Path, row: int, part: slice) -> Read:
        """Positions `part` of a row of a file."""
        ...


@dataclass(frozen=True)
class RowFiles:
    """The project's own layout: safetensors files of many rows each, one after another.

    `token_ids` [n], `lengths` [rows], and `hidden_states` [n, E] after the final norm, or `top_ids` and `log_probs` [n, K].
    """

    folder: Path
    before_norm = False
    may_end_with_padding = False

    @property
    def files(self) -> list[Path]:
        return files_in(self.folder, "*.safetensors")

    def tokens(self, file: Path) -> tuple[np.ndarray, np.ndarray]:
        with _opened(file) as tensors:
            token_ids, lengths = tensors.get_tensor("token_ids"), tensors.get_tensor("lengths")
            names = set(tensors.keys())
            shapes = {
                name: tensors.get_slice(name).get_shape()
                for name in names & {"hidden_states", "top_ids", "log_probs"}
            }
        if set(shapes) not in ({"hidden_states"}, {"top_ids", "log_probs"}):
            raise InputError(
                f"{file}: has {', '.join(sorted(names))}; besides token_ids and lengths it must have either hidden_states, "
                "or top_ids and log_probs"
            )
        if lengths.min(initial=0) < 0 or lengths.sum() != len(token_ids):
            raise InputError(
                f"{file}: lengths add up to {lengths.sum():,}, and there are {len(token_ids):,} token_ids; give each row's "
                "number of tokens"
            )
        for name, shape in shapes.items():
            if len(shape) != 2 or shape[0] != len(token_ids):
                raise InputError(
                    f"{file}: {name} has shape {shape}; it must have one row for each of the {len(token_ids):,} token_ids"
                )
        return token_ids, lengths

    def read(self, file: Path, row: int, part: slice) -> Read:
        start = int(_starts(file)[row])
        part = slice(start + part.start, start + part.stop)
        with _opened(file) as tensors:
            return {
                name: tensors.get_slice(name)[part] for name in set(tensors.keys()) - {"token_ids", "lengths"}
            }


@dataclass(frozen=True)
class VllmFiles:
    """What vLLM's `extract_hidden_states` writes: a safetensors file for each request.

    `token_ids` [n] and `hidden_states` [n, layers, E]. The last of the layers is read. It must be the model's last, whose
    output vLLM does not normalise.
    """

    folder: Path
    before_norm = True
    may_end_with_padding = False

    @property
    def files(self) -> list[Path]:
        return files_in(self.folder, "*.safetensors")

    def tokens(self, file: Path) -> tuple[np.ndarray, np.ndarray]:
        with _opened(file) as tensors:
            token_ids, shape = tensors.get_tensor("token_ids"), tensors.get_slice("hidden_states").get_shape()
        if len(shape) != 3 or shape[0] != len(token_ids) or not shape[1]:
            raise InputError(
                f"{file}: hidden_states has shape {shape}; vLLM writes [{len(token_ids)} tokens, layers, width]"
            )
        return token_ids, np.array([len(token_ids)])

    def read(self, file: Path, row: int, part: slice) -> Read:
        with _opened(file) as tensors:
            states = tensors.get_slice("hidden_states")
            return {"hidden_states": states[part, states.get_shape()[1] - 1]}


def files_in(folder: Path, pattern: str) -> list[Path]:
    """Files in a folder, or in folders within it. Raises InputError if there are none."""
    found = sorted(folder.rglob(pattern))
    if not found:
        raise InputError(
            f"{folder}: there is no {pattern} in this folder; name the one that has the teacher's outputs"
        )
    return found


@contextmanager
def _opened(file: Path) -> Any:
    try:
        with safe_open(file, framework="numpy") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: cannot be read ({reason(error)}); write or copy it again") from error


@functools.lru_cache(16)
def _starts(file: Path) -> np.ndarray:
    with _opened(file) as tensors:
        return np.concatenate([[0], np.cumsum(tensors.get_tensor("lengths"), dtype=np.int64)])
