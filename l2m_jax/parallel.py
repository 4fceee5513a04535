"""Placement: which devices a run uses, and how functions and arrays are laid out over them.

No other module maps functions over devices, places arrays or gathers them. The same functions have two mappings:

- "pmap": `jax.pmap`. Parameters and state are replicated. Placed arrays have a leading device axis, and a function sees
  one device's copy.
- "fsdp": `jax.jit` over a mesh. Parameters and state are global arrays, each sharded along its largest axis that the
  devices divide. Batches keep their leading device axis, which is sharded.

A function declares the kinds of its arguments once, where it is defined (`over_devices`):

- static: hashable values that the program is compiled for;
- weights: placed parameters or state;
- replicated: plain values, equal on all devices, such as a learning rate;
- all others are batches: one share per device.

With several processes, the device axis under "pmap" covers only the devices of this process.
"""

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "devices"

F = TypeVar("F", bound=Callable)
Index = tuple[slice, ...]


@dataclass(frozen=True)
class Layout:
    """How a function's arguments and results are laid out over devices; see `over_devices`."""

    static: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    replicated: tuple[str, ...] = ()
    donate: tuple[str, ...] = ()
    returns: Literal["batch", "weights"] = "batch"
    one_device: bool = False
    split_rows: bool = True


def over_devices(
    *,
    static: Sequence[str] = (),
    weights: Sequence[str] = (),
    replicated: Sequence[str] = (),
    donate: Sequence[str] = (),
    returns: Literal["batch", "weights"] = "batch",
    one_device: bool = False,
    split_rows: bool = True,
) -> Callable[[F], F]:
    """Declares how `Placement.map` lays out a function's arguments, by name.

    Args:
        static, weights, replicated: kinds of arguments (see the module docstring); all others are batches.
        donate: arguments whose buffers the results may reuse.
        returns: "weights" for parameters or state, "batch" for one share per device.
        one_device: under "fsdp" the function sees one device's share at a time, without the device axis.
            Otherwise it must accept the leading device axis of its batches, and sum over it.
        split_rows: under "fsdp", shard activations by rows. Not worth it for one token per row.

    A function with a keyword argument `axis_name` gets the name of the device axis under "pmap", otherwise None.
    """
    layout = Layout(
        tuple(static), tuple(weights), tuple(replicated), tuple(donate), returns, one_device, split_rows
    )

    def mark(function: F) -> F:
        function.layout = layout  # pyright: ignore[reportFunctionMemberAccess]
        return function

    return mark


@dataclass(frozen=True)
class Placement:
    """A mapping ("pmap" or "fsdp") over `devices`, those of all processes, grouped by process."""

    mapping: str
    devices: tuple[jax.Device, ...]  # pyright: ignore[reportInvalidTypeForm]

    @functools.cached_property
    def mesh(self) -> Mesh:
        return Mesh(np.array(self.devices), (AXIS,), axis_types=(AxisType.Auto,))

    @property
    def num_devices(self) -> int:
        return len(self.devices)

    @functools.cached_property
    def local(self) -> range:
        """The indices of this process's devices in `devices`."""
        own = [i for i, device in enumerate(self.devices) if device.process_index == jax.process_index()]
        return range(own[0], own[-1] + 1)

    @property
    def own(self) -> "Placement":
        """The same mapping over this process's devices alone, for work that processes share out."""
        return Placement(self.mapping, tuple(self.devices[i] for i in self.local))

    @property
    def _by_device(self) -> NamedSharding:
        """One entry of the first axis on each device (under "pmap": of this process)."""
        mesh = self.mesh.local_mesh if self.mapping == "pmap" else self.mesh
        return NamedSharding(mesh, PartitionSpec(AXIS))

    # Functions

    def map(self, function: Callable) -> Callable:
        """`function`, declared with `over_devices`, mapped over all devices. Arguments are positional."""
        return _mapped(self, function)

    def create(self, function: Callable, *arguments: Hashable) -> Any:
        """One share of `function(*arguments)` per device, computed on that device."""
        return _creator(self, function, arguments)()

    def initialise(self, function: Callable[[], Any]) -> Any:
        """Computes and places the weights that `function()` returns. Under "fsdp" no device ever holds all of them."""
        if self.mapping == "pmap":
            return self.place(jax.jit(function)())
        return jax.jit(lambda: self._constrain(function()))()

    @property
    def _axis_size(self) -> int:
        return len(self.local) if self.mapping == "pmap" else self.num_devices

    # Weights

    def sharding(self, shape: tuple[int, ...], *, stacked: bool = False) -> NamedSharding:
        """Sharding along the largest axis that the devices divide; replicated if there is none.

        `stacked` excludes the leading layer axis: a scan over a sharded axis would fetch every layer from one device.
        """
        first = 1 if stacked else 0
        axes = [i for i in range(first, len(shape)) if shape[i] and shape[i] % self.num_devices == 0]
        spec: list[str | None] = [None] * len(shape)
        if axes:
            spec[max(axes, key=lambda i: shape[i])] = AXIS
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def put(
        self, shape: tuple[int, ...], read: Callable[[Index], np.ndarray], *, stacked: bool = False
    ) -> jax.Array:
        """Places one leaf of the weights; `read` returns a piece of it on the host.

        Under "fsdp" only the pieces of this process's devices are read. The placed leaf has its own buffers: views of
        other arrays are copied, and an array that owns its memory is taken over.
        """

        def read_own(index: Any) -> np.ndarray:
            return np.require(read(index), requirements=["OWNDATA"])

        if self.mapping == "fsdp":
            return jax.make_array_from_callback(shape, self.sharding(shape, stacked=stacked), read_own)
        host = read_own(tuple(slice(None) for _ in shape))[None]
        shards = [jax.device_put(host, self.devices[i], may_alias=False) for i in self.local]
        return jax.make_array_from_single_device_arrays((len(shards), *shape), self._by_device, shards)

    def place(self, tree: Any) -> Any:
        """Places parameters or state on all devices, leaf by leaf, in their own buffers, which a step may donate."""

        def place(path, x):
            host = np.asarray(x)
            return self.put(host.shape, host.__getitem__, stacked=is_stacked(path))

        return jax.tree_util.tree_map_with_path(place, tree)

    def abstract(self, tree: Any) -> Any:
        """Shapes, such as from `jax.eval_shape`, with the layout that `place` gives such arrays."""

        def abstract(path, x):
            if self.mapping == "fsdp":
                sharding = self.sharding(x.shape, stacked=is_stacked(path))
                return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
            return self.abstract_batch(x)

        return jax.tree_util.tree_map_with_path(abstract, tree)

    def to_host(self, tree: Any) -> Any:
        """Copies weights, or what is equal on all devices, to NumPy arrays leaf by leaf, complete in every process."""

        def fetch(x):
            if self.mapping == "pmap":
                return np.asarray(np.array(x.addressable_shards[0].data)[0])
            return np.array(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)

        return jax.tree.map(fetch, tree)

    def _constrain(self, tree: Any) -> Any:
        def constrain(path, x):
            return jax.lax.with_sharding_constraint(x, self.sharding(x.shape, stacked=is_stacked(path)))

        return jax.tree_util.tree_map_with_path(constrain, tree)

    # Batches and results

    def feed(self, tree: Any) -> Any:
        """Puts the shares of host arrays, along a leading axis of all devices, on this process's devices."""

        def put(x):
            if self.mapping == "pmap":
                x = x[self.local.start : self.local.stop]
            return jax.make_array_from_callback(x.shape, self._by_device, lambda index: x[index])

        return jax.tree.map(put, tree)

    def abstract_batch(self, tree: Any) -> Any:
        """Shapes of one device's share, with the layout that `feed` gives such arrays."""
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((self.num_devices, *x.shape), x.dtype, sharding=sharding), tree
        )

    def gather(self, tree: Any) -> Any:
        """Results as NumPy arrays with a leading axis of all devices, in every process that has some. Waits for them."""
        if len(self.local) == self.num_devices:
            return jax.device_get(tree)
        return multihost_utils.process_allgather(tree, tiled=True)


def is_stacked(path: Sequence[Any]) -> bool:
    """Whether a leaf under "blocks" has a leading layer axis (`unstack_layers` removes it)."""
    names = [getattr(key, "key", getattr(key, "name", None)) for key in path]
    return any(
        name == "blocks" and not isinstance(after, jax.tree_util.SequenceKey)
        for name, after in zip(names, [*path, None][1:], strict=True)
    )


# Cached, so that a second call finds its programs compiled.
@functools.cache
def _mapped(placement: Placement, function: Callable) -> Callable:
    layout: Layout = function.layout  # pyright: ignore[reportFunctionMemberAccess]
    parameters = inspect.signature(function).parameters
    names = [n for n, p in parameters.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    if unknown := {*layout.static, *layout.weights, *layout.replicated, *layout.donate} - set(names):
        raise ValueError(f"{function.__name__} has no argument {', '.join(sorted(unknown))}")
    static, donate = (
        tuple(names.index(name) for name in chosen) for chosen in (layout.static, layout.donate)
    )
    takes_axis_name = "axis_name" in parameters
    if placement.mapping == "pmap":
        plain = {*layout.static, *layout.replicated}
        return jax.pmap(
            functools.partial(function, axis_name=AXIS) if takes_axis_name else function,
            axis_name=AXIS,
            in_axes=tuple(None if name in plain else 0 for name in names),
            static_broadcasted_argnums=static,
            donate_argnums=donate,
            devices=placement.devices,
        )
    batched = [name not in (*layout.static, *layout.weights, *layout.replicated) for name in names]

    def sharded(*arguments):
        # If the device axis is mapped, rows are not split further.
        rows = NamedSharding(placement.mesh, PartitionSpec() if layout.one_device else PartitionSpec(AXIS))
        with rows_split_as(rows) if layout.split_rows else contextlib.nullcontext():
            called = functools.partial(function, axis_name=None) if takes_axis_name else function
            if layout.one_device and any(batched):
                result = _over_device_axis(called, arguments, static, batched)
            else:
                result = called(*arguments)
        if layout.returns == "weights":
            return placement._constrain(result)
        return jax.lax.with_sharding_constraint(result, placement._by_device)

    return jax.jit(sharded, static_argnums=static, donate_argnums=donate)


@functools.cache
def _creator(placement: Placement, function: Callable, arguments: tuple[Hashable, ...]) -> Callable[[], Any]:
    def stacked():
        size = placement._axis_size
        return jax.tree.map(lambda x: jnp.broadcast_to(x[None], (size, *x.shape)), function(*arguments))

    return jax.jit(stacked, out_shardings=placement._by_device)


def _over_device_axis(
    function: Callable, arguments: Sequence[Any], static: Sequence[int], batched: Sequence[bool]
) -> Any:
    """`jax.vmap` over the device axis of the batches."""
    dynamic = [i for i in range(len(arguments)) if i not in static]

    def call(*given):
        whole = list(arguments)
        for i, value in zip(dynamic, given, strict=True):
            whole[i] = value
        return function(*whole)

    in_axes = tuple(0 if batched[i] else None for i in dynamic)
    return jax.vmap(call, in_axes=in_axes, spmd_axis_name=AXIS)(*(arguments[i] for i in dynamic))


_ROWS: contextvars.ContextVar[NamedSharding | None] = contextvars.ContextVar("rows", default=None)


@contextlib.contextmanager
def rows_split_as(sharding: NamedSharding) -> Iterator[None]:
    """While a function is traced in this context, `split_rows` gives arrays `sharding`, which names their first axis.

    Left to itself, the compiler splits some activations like the parameters, for instance over heads, which the cuDNN
    kernel refuses together with a mask that is split over rows.
    """
    token = _ROWS.set(sharding)
    try:
        yield
    finally:
        _ROWS.reset(token)


def split_rows(x: jax.Array) -> jax.Array:
    """`x`, whose first axis is the batch, with the sharding of `rows_split_as`; unchanged outside that context."""
    sharding = _ROWS.get()
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)
