"""Reads model.safetensors, or its shards with an index, piece by piece, and writes them shard by shard."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from l2m_jax import files
from l2m_jax.errors import InputError, reason, shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"[\w-][\w.-]{0,200}\.safetensors", re.ASCII)  # a file in the index's own folder
_DTYPES = ("F32", "F16", "BF16", "F64")


class SafetensorsFolder:
    """The tensors of a folder by their Hugging Face names.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json and the shards that it names.
        prefix: added to names that lack it, as some checkpoints contain only the bare transformer.
        ignored: a pattern of names (without the prefix) that are not parameters.

    Raises:
        InputError: no weights, a missing shard, or a file that is cut off.
    """

    def __init__(self, folder: Path, prefix: str, ignored: str | None):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._folder = folder
        self._stored: dict[str, tuple[Path, str]] = {}
        for file in _files(folder):
            with _opened(file) as opened:
                for stored in opened.keys():  # noqa: SIM118  (not iterable)
                    bare = stored.removeprefix(prefix)
                    if ignored and re.fullmatch(ignored, bare):
                        continue
                    name = stored if stored.startswith((prefix, "lm_head.")) else prefix + stored
                    if name in self._stored:
                        raise InputError(
                            f"{file} has tensor {shown(stored)}, which {self._stored[name][0].name} has too; "
                            "keep one of them"
                        )
                    tensor = opened.get_slice(stored)
                    if (dtype := tensor.get_dtype()) not in _DTYPES:
                        raise InputError(
                            f"{file}: tensor {shown(stored)} has dtype {dtype}, which is not supported "
                            f"({', '.join(_DTYPES)}); choose a checkpoint in full precision"
                        )
                    self._stored[name] = (file, stored)
                    self.shapes[name] = tuple(tensor.get_shape())

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        file, stored = self._stored[name]
        # Reopened for each piece, because the pages of an open file count as this process's memory.
        with _opened(file) as opened:
            return opened.get_slice(stored)[index]

    def place(self, name: str) -> str:
        """The file that contains tensor `name`; the folder if no file does."""
        return str(self._stored[name][0] if name in self._stored else self._folder)

    def drop(self, name: str) -> None:
        """Excludes a tensor from `shapes`."""
        self.shapes.pop(name, None)


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(files.read_json(index)["weight_map"].values()))
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{index} is not a safetensors index ({reason(error)}); fetch it again"
            ) from error
        if wrong := [name for name in names if not _SHARD.fullmatch(str(name))]:
            raise InputError(
                f"{index} names the shard {shown(wrong[0])}; shards are .safetensors files in the same folder; "
                "fetch it again"
            )
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise InputError(
                f"{folder} lacks {', '.join(absent)}, which {INDEX} names; fetch the missing shards"
            )
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    torch_files = sorted(folder.glob("*.bin"))
    if torch_files:
        raise InputError(
            f"{folder} has only PyTorch weights ({torch_files[0].name}); with PyTorch installed, convert them with: "
            f"python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{folder}')"
            ".save_pretrained('CONVERTED')\""
        )
    raise InputError(f"{folder} has no {SINGLE} (nor {INDEX}); pass a folder that contains the weights")


def _opened(file: Path):
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file} is cut off or not a safetensors file ({reason(error)}); fetch it again"
        ) from error


def write(folder: Path, tensors: Iterator[tuple[str, np.ndarray]], dtype: str, shard_bytes: int) -> None:
    """Writes the tensors as one file, or as shards of at most `shard_bytes` with their index.

    Each file is renamed to its final name once it is complete. Files of an earlier model in `folder` are removed last.
    """
    unnamed: list[Path] = []
    weight_map: list[list[str]] = []
    total = 0
    shard: dict[str, np.ndarray] = {}

    def finish_shard():
        file = folder / f".shard-{len(unnamed)}.unfinished"
        save_file(shard, file, metadata={"format": "pt"})
        file.chmod(0o644)  # the library makes it readable for its owner only
        unnamed.append(file)
        weight_map.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        stored = np.ascontiguousarray(tensor, dtype=np.dtype(getattr(ml_dtypes, dtype, dtype)))
        if shard and sum(t.nbytes for t in shard.values()) + stored.nbytes > shard_bytes:
            finish_shard()
        shard[name] = stored
        total += stored.nbytes
    finish_shard()

    names = [SINGLE] if len(unnamed) == 1 else [_shard_name(i, len(unnamed)) for i in range(len(unnamed))]
    for file, name in zip(unnamed, names, strict=True):
        os.replace(file, folder / name)
    if len(names) > 1:
        mapping = {
            tensor: name for name, tensors in zip(names, weight_map, strict=True) for tensor in tensors
        }
        files.write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": mapping})
    else:
        (folder / INDEX).unlink(missing_ok=True)
    for file in folder.glob("*.safetensors"):
        if file.name not in names:
            file.unlink()


def _shard_name(i: int, count: int) -> str:
    return f"model-{i + 1:05d}-of-{count:05d}.safetensors"
