"""Top-k log-probabilities that DistillKit has captured: Parquet files of bytes, and the settings of their compression.

A position has k log-probabilities, in descending order. The first `exact_k` are floats. The others are a polynomial of
their number, 0, 1, ... (whose terms may also be its square root or exponential), plus residuals: bins of a float scale and
integers. They may all be differences from the one before. Integers and token ids are packed without gaps, the most
significant bit first, and each group of them ends with a whole byte.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from l2m_jax.errors import InputError, reason
from l2m_jax.training.outputs import Read, files_in

_SETTINGS = "compression_config.yaml"
_TOKENS, _LOG_PROBS, _IDS = "input_ids", "compressed_logprobs", "bytepacked_indices"
_FUNCTIONS = {"sqrt": np.sqrt, "exp": np.exp}


@dataclass(frozen=True)
class DistillKitFiles:
    """What DistillKit's `sample_logits_vllm` writes: Parquet files of rows, and compression_config.yaml.

    Rows have log-probabilities for all tokens but the last.
    """

    folder: Path
    before_norm = False
    may_end_with_padding = True

    @property
    def files(self) -> list[Path]:
        return files_in(self.folder, "*.parquet")

    def tokens(self, file: Path) -> tuple[np.ndarray, np.ndarray]:
        try:
            rows = pq.read_table(file, columns=[_TOKENS])[_TOKENS].combine_chunks()
            return rows.flatten().to_numpy().astype(np.int64), rows.value_lengths().to_numpy()
        except (pa.ArrowException, OSError, KeyError, AttributeError) as error:
            raise InputError(f"{file}: cannot be read ({reason(error)}); write or copy it again") from error

    def read(self, file: Path, row: int, part: slice) -> Read:
        place = self.folder / _SETTINGS
        try:
            settings = yaml.safe_load(place.read_text(encoding="utf-8"))
            packed, ids = (_column(file, name, row)[part] for name in (_LOG_PROBS, _IDS))
            bits = math.ceil(math.log2(settings["d"]))
            return {"top_ids": _integers(ids, bits, settings["k"]), "log_probs": _log_probs(packed, settings)}
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
            raise InputError(
                f"{file}: row {row} is not compressed by the settings in {place} ({reason(error)}); copy the file that was "
                "written beside it"
            ) from error


def _column(file: Path, name: str, row: int) -> np.ndarray:
    """The bytes of a row, [positions, bytes]."""
    starts = _group_starts(file)
    group = int(np.searchsorted(starts, row, side="right")) - 1
    positions = _group(file, group)[name][row - int(starts[group])].values
    return positions.flatten().to_numpy().astype(np.uint8).reshape(len(positions), -1)


@functools.lru_cache(16)
def _group_starts(file: Path) -> np.ndarray:
    metadata = pq.read_metadata(file)
    return np.cumsum([0, *(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))])


@functools.lru_cache(1)
def _group(file: Path, group: int) -> pa.Table:
    return pq.ParquetFile(file).read_row_group(group, columns=[_LOG_PROBS, _IDS])


def _log_probs(packed: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """[m, bytes] -> [m, k]."""
    end = 0

    def take(count: int, dtype: str) -> np.ndarray:
        nonlocal end
        kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
        start, end = end, end + count * kind.itemsize
        return np.ascontiguousarray(packed[:, start:end]).view(kind).astype(np.float64)

    exact = take(settings["exact_k"], settings["exact_dtype"])
    approximate = np.zeros((len(packed), settings["k"] - settings["exact_k"]))
    number = np.arange(approximate.shape[1], dtype=np.float64)
    if settings.get("normalize_t"):
        number /= max(len(number) - 1, 1)
    terms = settings["polynomial_terms"] or []
    for term, coefficient in zip(terms, take(len(terms), settings["term_dtype"]).T, strict=True):
        approximate += coefficient[:, None] * (
            _FUNCTIONS[term](number) if term in _FUNCTIONS else number**term
        )
    start = 0
    for group in settings["residual_bins"]:
        bits, count = group["element_bits"], group["num_elements"]
        scale = take(1, group["scale_dtype"])
        integers = _integers(take(-(-bits * count // 8), "uint8").astype(np.uint8), bits, count)
        integers = 2 * integers - 1 if bits == 1 else integers - 2 ** (bits - 1)
        approximate[:, start : start + count] += integers * scale
        start += count
    if end != packed.shape[1]:
        raise ValueError(f"{packed.shape[1]} bytes a position, and not {end}")
    values = np.concatenate([exact, approximate], axis=1)
    return np.cumsum(values, axis=1) if settings["delta_encoding"] else values


def _integers(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """[m, bytes] -> int64 [m, count], of so many bits each."""
    digits = np.unpackbits(packed, axis=1)[:, : bits * count].reshape(len(packed), count, bits)
    return digits @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))
