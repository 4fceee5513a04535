"""How the step is mapped over devices: `pmap` with everything replicated, or `jit` over a mesh, sharded.

The same functions of `step.py` run under both. Under "pmap" parameters and optimiser state carry a leading
device axis, and each device sees its own share of a micro-batch. Under "fsdp" they are global arrays, each
sharded along its largest divisible axis, and the micro-batch keeps its device axis, sharded.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from l2m_jax.models.sharding import rows_split_as

AXIS = "devices"


@dataclass(frozen=True)
class Parallel:
    """A mapping ("pmap" or "fsdp") over `devices` (those of all processes, in order)."""

    mapping: str
    devices: tuple[jax.Device, ...]  # pyright: ignore[reportInvalidTypeForm]

    @functools.cached_property
    def mesh(self) -> Mesh:
        return Mesh(np.array(self.devices), (AXIS,), axis_types=(AxisType.Auto,))

    @property
    def num_devices(self) -> int:
        return len(self.devices)

    def map(
        self,
        function: Callable,
        *,
        static: Sequence[int] = (),
        donate: Sequence[int] = (),
        broadcast: Sequence[int] = (),
    ) -> Callable:
        """`function(..., axis_name=...)` compiled for all devices.

        Args:
            static: positions of hashable arguments that the program is compiled for.
            donate: positions of arguments whose buffers the results may take over.
            broadcast: positions of plain arguments, without device axis or sharding, such as a learning rate.
        """
        if self.mapping == "pmap":
            kinds = [p.kind for p in inspect.signature(function).parameters.values()]
            count = sum(kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for kind in kinds)
            in_axes = tuple(None if i in (*static, *broadcast) else 0 for i in range(count))
            return jax.pmap(
                functools.partial(function, axis_name=AXIS),
                axis_name=AXIS,
                in_axes=in_axes,
                static_broadcasted_argnums=tuple(static),
                donate_argnums=tuple(donate),
                devices=self.devices,
            )

        def sharded(*arguments):
            with rows_split_as(NamedSharding(self.mesh, PartitionSpec(AXIS))):
                return self._constrain(function(*arguments, axis_name=None))

        return jax.jit(sharded, static_argnums=tuple(static), donate_argnums=tuple(donate))

    def sharding(self, shape: tuple[int, ...], *, stacked: bool = False) -> NamedSharding:
        """Along the largest axis that the devices divide; replicated where none does.

        `stacked` spares the leading layer axis: a scan over a sharded axis would fetch every layer from
        one device.
        """
        first = 1 if stacked else 0
        axes = [i for i in range(first, len(shape)) if shape[i] and shape[i] % self.num_devices == 0]
        spec: list[str | None] = [None] * len(shape)
        if axes:
            spec[max(axes, key=lambda i: shape[i])] = AXIS
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def _constrain(self, tree: Any) -> Any:
        def constrain(path, x):
            return jax.lax.with_sharding_constraint(x, self.sharding(x.shape, stacked=_is_stacked(path)))

        return jax.tree_util.tree_map_with_path(constrain, tree)

    def place(self, tree: Any) -> Any:
        """Parameters or state, given as host or single-device arrays, onto all devices."""
        if self.mapping == "fsdp":

            def shard(path, x):
                sharding = self.sharding(np.shape(x), stacked=_is_stacked(path))
                host = np.asarray(x)
                return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

            return jax.tree_util.tree_map_with_path(shard, tree)

        def replicate(x):
            sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
            local = [d for d in self.devices if d.process_index == jax.process_index()]
            shards = [jax.device_put(x, d)[None] for d in local]
            return jax.make_array_from_single_device_arrays(
                (self.num_devices, *np.shape(x)), sharding, shards
            )

        return jax.tree.map(replicate, tree)

    def feed(self, tree: Any) -> Any:
        """Host arrays with a leading device axis, each share onto its device."""
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))

        def put(x):
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

        return jax.tree.map(put, tree)

    def unplace(self, tree: Any) -> Any:
        """The value behind placed arrays: under "pmap" one device's copy, under "fsdp" the global array."""
        if self.mapping == "fsdp":
            return tree
        return jax.tree.map(lambda x: x.addressable_shards[0].data[0], tree)

    def snapshot(self, tree: Any) -> Any:
        """A copy of the value behind placed arrays, which stays as it is when a step reuses their buffers."""
        if self.mapping == "fsdp":
            return jax.tree.map(jnp.copy, tree)
        return self.unplace(tree)  # taking one device's copy off the device axis copies

    def read(self, tree: Any) -> Any:
        """Small replicated results as NumPy values."""
        return jax.tree.map(np.asarray, self.unplace(tree))


def _is_stacked(path: Sequence[Any]) -> bool:
    """Whether a leaf lies under the blocks, whose parameters have a leading layer axis."""
    return any(str(getattr(key, "key", getattr(key, "name", ""))) == "blocks" for key in path)
