"""Tables that map the tensors of Hugging Face files to parameters, applied in both directions."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from l2m_jax.errors import InputError
from l2m_jax.models.architecture import DecoderConfig
from l2m_jax.models.decoder import inference_dtype, init
from l2m_jax.models.quantised import is_quantised
from l2m_jax.types import Params

_MAX_NAMES_LISTED = 8
_CHUNK_NUMBERS = 1 << 22


class Put(Protocol):
    """Places one parameter: `Placement.put`. `read(index)` returns a piece of it as a host array."""

    def __call__(
        self, shape: tuple[int, ...], read: Callable[[tuple[slice, ...]], np.ndarray], *, stacked: bool
    ) -> jax.Array: ...


class Weight(NamedTuple):
    """A row of a family's table.

    Attributes:
        name: of the tensor in Hugging Face files, with "{}" for the layer.
        path: of the parameter, such as "blocks/attention/query/kernel".
        transpose: a PyTorch Linear stores [out, in], a Linen kernel [in, out].
        part, parts: the parameter is piece number `part` of `parts` equal pieces of the tensor's last axis (GPT-2
            stores query, key and value in one tensor).
    """

    name: str
    path: str
    transpose: bool = False
    part: int = 0
    parts: int = 1


class Source(Protocol):
    """Tensors by their Hugging Face names, read in pieces."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray: ...

    def place(self, name: str) -> str:
        """The file that contains a tensor, for error messages."""
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
    """The shape of the Hugging Face tensor, given that of the parameter."""
    one_layer = shape[1:] if _is_stacked(weight.path) else shape
    tensor = one_layer[::-1] if weight.transpose else one_layer
    return (*tensor[:-1], tensor[-1] * weight.parts)


def fill(
    config: DecoderConfig,
    table: list[Weight],
    source: Source,
    *,
    put: Put | None = None,
    layers: Sequence[int] = (),
    frozen: bool = False,
    quantise: Callable[[Params], Params] | None = None,
) -> Params:
    """The parameters of `config` from `source`, placed one at a time.

    The largest parameters come first: while one is being placed, its host and device copies both exist, and early on
    little else is in memory.

    Args:
        config: of the whole model in `source`.
        put: places a parameter, reading only the pieces that it needs. None: on the first local device.
        layers: those to keep, in this order; the others are not read. Empty: all.
        frozen: parameters in `inference_dtype` instead of `config.param_dtype`.
        quantise: `quantised.quantise`, mapped: applied to each kernel as soon as it is placed.

    Raises:
        InputError: tensors are missing, left over, or of another shape.
    """
    shapes = parameter_shapes(config)
    check(table, shapes, source)
    by_path = {weight.path: weight for weight in table}
    leaves = {}
    for path in sorted(shapes, key=lambda path: -math.prod(shapes[path])):
        dtype = inference_dtype(config, path) if frozen else config.param_dtype
        leaf = load_parameter(by_path[path], shapes[path], source, dtype, put=put, layers=layers)
        if quantise is None or not is_quantised(path):
            leaves[path] = leaf
        else:
            leaves |= _flat(jax.block_until_ready(quantise(unflatten_dict({path: leaf}, sep="/"))))
    # A model without final norm and projection still has an "output" group, which is empty.
    return {"output": {}} | unflatten_dict(leaves, sep="/")


def load_parameter(
    weight: Weight,
    shape: tuple[int, ...],
    source: Source,
    dtype: str,
    *,
    put: Put | None = None,
    layers: Sequence[int] = (),
) -> jax.Array:
    """One parameter, read from `source` and placed. `shape` is that in the whole model; arguments as in `fill`."""
    stacked = _is_stacked(weight.path)
    if stacked:
        layers = layers or range(shape[0])
        shape = (len(layers), *shape[1:])
    read = _reader(weight, shape, source, np.dtype(dtype), layers)
    return jax.block_until_ready((put or _put_on_first_device)(shape, read, stacked=stacked))


def _put_on_first_device(shape: tuple[int, ...], read: Callable, *, stacked: bool) -> jax.Array:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.make_array_from_callback(shape, device, read)


def _reader(
    weight: Weight, shape: tuple[int, ...], source: Source, dtype: np.dtype, layers: Sequence[int]
) -> Callable:
    stacked = _is_stacked(weight.path)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        ranges = [range(*s.indices(n)) for s, n in zip(index, shape, strict=True)]
        rows, piece = (ranges[0], ranges[1:]) if stacked else (range(1), ranges)
        host = np.empty((*([len(rows)] if stacked else []), *map(len, piece)), dtype)
        slices = [slice(r.start, r.stop) for r in (piece[::-1] if weight.transpose else piece)]
        if weight.parts > 1:
            offset = weight.part * shape[-1]
            slices[-1] = slice(slices[-1].start + offset, slices[-1].stop + offset)
        for i, row in enumerate(rows):
            one_layer = host[i] if stacked else host
            target = one_layer.T if weight.transpose else one_layer
            name = weight.name.format(layers[row]) if stacked else weight.name
            for chunk in _row_chunks(slices):
                start = chunk[0].start - slices[0].start
                piece = target[start : start + _length(chunk[0])]
                with np.errstate(over="ignore"):
                    piece[...] = source.read(name, chunk)
                if not np.isfinite(piece).all():
                    raise InputError(
                        f"{source.place(name)}: tensor {name} has values that are not finite in {dtype}; "
                        "the model is damaged, or its training diverged"
                    )
        return host

    return read


def _length(s: slice) -> int:
    return s.stop - s.start


def _row_chunks(slices: list[slice]) -> Iterator[tuple[slice, ...]]:
    """The same piece, a few rows at a time, as a whole embedding in the file's dtype would need much memory."""
    first, *others = slices
    rows = max(1, _CHUNK_NUMBERS // max(1, math.prod(map(_length, others))))
    for start in range(first.start, first.stop, rows):
        yield (slice(start, min(start + rows, first.stop)), *others)


def check(table: list[Weight], shapes: Mapping[str, tuple[int, ...]], source: Source) -> None:
    """Raises InputError unless `source` has exactly the tensors of `table`, in the right shapes."""
    layers = max(_layers(weight, shapes[weight.path]).stop for weight in table)
    if layers > len(source.shapes):  # a wrong config.json must not take minutes to be refused
        raise InputError(
            f"{source.place('')} has {len(source.shapes)} tensors, too few for the {layers} layers of its config; "
            "the file is incomplete or belongs to another model"
        )
    expected = {
        weight.name.format(layer): tensor_shape(weight, shapes[weight.path])
        for weight in table
        for layer in _layers(weight, shapes[weight.path])
    }
    missing = sorted(expected.keys() - source.shapes.keys())
    if missing:
        raise InputError(
            f"{source.place(missing[0])} lacks {_listed(missing)}, which its config requires; "
            "the file is incomplete or belongs to another model"
        )
    left_over = sorted(source.shapes.keys() - expected.keys())
    if left_over:
        raise InputError(
            f"{source.place(left_over[0])} has {_listed(left_over)} that its config does not describe; "
            "the file and config.json belong to different models"
        )
    for name, shape in expected.items():
        if source.shapes[name] != shape:
            raise InputError(
                f"{source.place(name)}: tensor {name} has shape {list(source.shapes[name])}, but its config "
                f"requires {list(shape)}; the file and config.json belong to different models"
            )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES_LISTED} more" if len(names) > _MAX_NAMES_LISTED else ""
    return (
        f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({', '.join(names[:_MAX_NAMES_LISTED])}{more})"
    )


def tensors(config: DecoderConfig, table: list[Weight], params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """The Hugging Face tensors of `params` one by one, as host arrays; the inverse of `fill`.

    Args:
        params: host or device arrays.

    Raises:
        InputError: `params` do not match `config`.
    """
    leaves = _flat(params)
    shapes, found = parameter_shapes(config), {path: np.shape(leaf) for path, leaf in leaves.items()}
    for path in sorted(shapes.keys() | found.keys()):
        if shapes.get(path) != found.get(path):
            raise InputError(
                f"parameter {path}: its shape is {found.get(path)}, but the config requires {shapes.get(path)}; "
                "save parameters with their own config"
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
