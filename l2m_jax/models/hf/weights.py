"""Tables of names: which tensor of a Hugging Face file is which parameter, applied in both directions."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from l2m_jax.errors import InputError
from l2m_jax.models.architecture import DecoderConfig
from l2m_jax.models.decoder import init
from l2m_jax.types import Params

ShardingOf = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
_SHOWN = 8
_CHUNK_NUMBERS = 1 << 22


class Weight(NamedTuple):
    """A row of a family's table.

    Attributes:
        name: of the tensor in Hugging Face files, "{}" standing for the layer.
        path: of the parameter, "blocks/attention/query/kernel".
        transpose: PyTorch's Linear holds [out, in], a Linen kernel [in, out].
        part, parts: the parameter is this one of `parts` equal pieces of the tensor's last axis (GPT-2 holds
            query, key and value in one).
    """

    name: str
    path: str
    transpose: bool = False
    part: int = 0
    parts: int = 1


class Source(Protocol):
    """Tensors by their Hugging Face names, read piece by piece."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray: ...

    def place(self, name: str) -> str:
        """The file that holds a tensor, for messages."""
        ...


def dense(name: str, path: str, bias: bool) -> list[Weight]:
    """The rows for one PyTorch Linear."""
    kernel = Weight(f"{name}.weight", f"{path}/kernel", transpose=True)
    return [kernel, Weight(f"{name}.bias", f"{path}/bias")] if bias else [kernel]


def norm(config: DecoderConfig, name: str, path: str) -> list[Weight]:
    """The rows for one norm."""
    if not config.norm_affine:
        return []
    scale = Weight(f"{name}.weight", f"{path}/scale")
    return [scale, Weight(f"{name}.bias", f"{path}/bias")] if config.norm == "layer" else [scale]


@functools.lru_cache
def parameter_shapes(config: DecoderConfig) -> Mapping[str, tuple[int, ...]]:
    """The shape of every parameter by its path."""
    tree = jax.eval_shape(lambda key: init(config, key), jax.random.key(0))
    return {path: leaf.shape for path, leaf in _flat(tree).items()}


def _flat(tree: Params) -> dict[str, Any]:
    return flatten_dict(tree, sep="/")


def _is_stacked(path: str) -> bool:
    return path.startswith("blocks/")


def _layers(weight: Weight, shape: tuple[int, ...]) -> range:
    return range(shape[0]) if _is_stacked(weight.path) else range(1)


def tensor_shape(weight: Weight, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the Hugging Face tensor, given the parameter's shape."""
    one_layer = shape[1:] if _is_stacked(weight.path) else shape
    tensor = one_layer[::-1] if weight.transpose else one_layer
    return (*tensor[:-1], tensor[-1] * weight.parts)


def fill(
    config: DecoderConfig,
    table: list[Weight],
    source: Source,
    *,
    sharding: ShardingOf | None = None,
) -> Params:
    """Parameters of `config` from `source`, in `config.param_dtype`, one parameter at a time.

    Only the piece that a device needs is read. The largest parameters come first: while they are being placed,
    host and device copy exist side by side, and early on there is little else in memory.

    Raises:
        InputError: tensors missing, left over, or of another shape.
    """
    shapes = parameter_shapes(config)
    _check(table, shapes, source)
    by_path = {weight.path: weight for weight in table}
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    leaves = {}
    for path in sorted(shapes, key=lambda path: -np.prod(shapes[path])):
        weight, shape = by_path[path], shapes[path]
        placement = sharding(path, shape) if sharding else default
        read = _reader(weight, shape, source, np.dtype(config.param_dtype))
        leaves[path] = jax.block_until_ready(jax.make_array_from_callback(shape, placement, read))
    # A model without final norm and projection has an "output" group all the same, an empty one.
    return {"output": {}} | unflatten_dict(leaves, sep="/")


def _reader(weight: Weight, shape: tuple[int, ...], source: Source, dtype: np.dtype) -> Callable:
    def read(index: tuple[slice, ...]) -> np.ndarray:
        ranges = [range(*s.indices(n)) for s, n in zip(index, shape, strict=True)]
        layers, piece = (ranges[0], ranges[1:]) if _is_stacked(weight.path) else (range(1), ranges)
        host = np.empty((len(layers), *map(len, piece)), dtype)
        slices = [slice(r.start, r.stop) for r in (piece[::-1] if weight.transpose else piece)]
        if weight.parts > 1:
            offset = weight.part * shape[-1]
            slices[-1] = slice(slices[-1].start + offset, slices[-1].stop + offset)
        for row, layer in enumerate(layers):
            target = host[row].T if weight.transpose else host[row]
            for chunk in _row_chunks(slices):
                start = chunk[0].start - slices[0].start
                target[start : start + _length(chunk[0])] = source.read(weight.name.format(layer), chunk)
        return host if _is_stacked(weight.path) else host[0]

    return read


def _length(s: slice) -> int:
    return s.stop - s.start


def _row_chunks(slices: list[slice]) -> Iterator[tuple[slice, ...]]:
    """The same piece a few rows at a time: an embedding in the file's dtype would be much beside the rest."""
    first, *others = slices
    rows = max(1, _CHUNK_NUMBERS // max(1, math.prod(map(_length, others))))
    for start in range(first.start, first.stop, rows):
        yield (slice(start, min(start + rows, first.stop)), *others)


def _check(table: list[Weight], shapes: Mapping[str, tuple[int, ...]], source: Source) -> None:
    expected = {
        weight.name.format(layer): tensor_shape(weight, shapes[weight.path])
        for weight in table
        for layer in _layers(weight, shapes[weight.path])
    }
    missing = sorted(expected.keys() - source.shapes.keys())
    if missing:
        raise InputError(
            f"{source.place(missing[0])} lacks {_listed(missing)}, which its config asks for; "
            "the file is incomplete or belongs to another model"
        )
    left_over = sorted(source.shapes.keys() - expected.keys())
    if left_over:
        raise InputError(
            f"{source.place(left_over[0])} holds {_listed(left_over)}, for which its config has no place; "
            "the file and config.json belong to different models"
        )
    for name, shape in expected.items():
        if source.shapes[name] != shape:
            raise InputError(
                f"{source.place(name)}: tensor {name} has shape {list(source.shapes[name])}, but its config "
                f"makes it {list(shape)}; the file and config.json belong to different models"
            )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({', '.join(names[:_SHOWN])}{more})"


def tensors(config: DecoderConfig, table: list[Weight], params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """The Hugging Face tensors of `params` one after another: what `fill` reads.

    Raises:
        InputError: `params` do not belong to `config`.
    """
    leaves = _flat(params)
    shapes, found = parameter_shapes(config), {path: np.shape(leaf) for path, leaf in leaves.items()}
    for path in sorted(shapes.keys() | found.keys()):
        if shapes.get(path) != found.get(path):
            raise InputError(
                f"parameter {path}: the config makes its shape {shapes.get(path)}, not {found.get(path)}; "
                "save parameters with the config they were made for"
            )
    names: dict[str, list[Weight]] = {}
    for weight in table:
        names.setdefault(weight.name, []).append(weight)
    for name, pieces in names.items():
        pieces.sort(key=lambda weight: weight.part)
        for layer in _layers(pieces[0], shapes[pieces[0].path]):
            arrays = [_one_layer(leaves[weight.path], weight, layer) for weight in pieces]
            yield name.format(layer), np.concatenate(arrays, axis=-1) if len(arrays) > 1 else arrays[0]


def _one_layer(leaf: jax.Array, weight: Weight, layer: int) -> np.ndarray:
    array = np.asarray(leaf[layer] if _is_stacked(weight.path) else leaf)
    return array.T if weight.transpose else array
