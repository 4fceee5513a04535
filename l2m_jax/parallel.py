"""How the step is mapped over devices: `pmap` with everything replicated, or `jit` over a mesh, sharded.

The same functions of `step.py` run under both. Under "pmap" parameters and optimiser state carry a leading
device axis, and each device sees its own share of a micro-batch. Under "fsdp" they are global arrays, each
sharded along its largest divisible axis, and the micro-batch keeps its device axis, sharded.

With several processes, a device axis under "pmap" is that of this process's devices alone.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from l2m_jax.models.sharding import rows_split_as

AXIS = "devices"


@dataclass(frozen=True)
class Parallel:
    """A mapping ("pmap" or "fsdp") over `devices`: those of all processes, one process after another."""

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
        """Which of `devices` are this process's."""
        own = [i for i, device in enumerate(self.devices) if device.process_index == jax.process_index()]
        return range(own[0], own[-1] + 1)

    @property
    def _by_device(self) -> NamedSharding:
        """One entry of the first axis on each device: on each of this process's under "pmap"."""
        mesh = self.mesh.local_mesh if self.mapping == "pmap" else self.mesh
        return NamedSharding(mesh, PartitionSpec(AXIS))

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

    def parameter_sharding(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        """The same for a parameter by its path, such as "blocks/mlp/up/kernel"."""
        return self.sharding(shape, stacked=path.startswith("blocks/"))

    def _constrain(self, tree: Any) -> Any:
        def constrain(path, x):
            return jax.lax.with_sharding_constraint(x, self.sharding(x.shape, stacked=_is_stacked(path)))

        return jax.tree_util.tree_map_with_path(constrain, tree)

    def place(self, tree: Any, *, may_alias: bool = False) -> Any:
        """Parameters or state onto all devices, into buffers of their own, which a step may take over.

        `may_alias` spares the copy where they lie there already (under "fsdp", loaded by `Run.load`).
        """
        if self.mapping == "fsdp":

            def shard(path, x):
                sharding = self.sharding(np.shape(x), stacked=_is_stacked(path))
                if isinstance(x, jax.Array) and x.sharding.device_set == sharding.device_set:
                    placed = jax.device_put(x, sharding)
                    return placed if may_alias else jnp.copy(placed)
                host = np.asarray(x)
                return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

            return jax.tree_util.tree_map_with_path(shard, tree)

        def replicate(x):
            shards = [jax.device_put(x, self.devices[i])[None] for i in self.local]
            return jax.make_array_from_single_device_arrays(
                (len(shards), *np.shape(x)), self._by_device, shards
            )

        return jax.tree.map(replicate, tree)

    def feed(self, tree: Any) -> Any:
        """Host arrays with a leading axis of all devices: each share onto its device, if that is this process's."""

        def put(x):
            if self.mapping == "pmap":
                x = x[self.local.start : self.local.stop]
            return jax.make_array_from_callback(x.shape, self._by_device, lambda index: x[index])

        return jax.tree.map(put, tree)

    def unplace(self, tree: Any) -> Any:
        """The value behind placed arrays: under "pmap" one device's copy, under "fsdp" the global array."""
        if self.mapping == "fsdp":
            return tree
        return jax.tree.map(lambda x: x.addressable_shards[0].data[0], tree)

    def snapshot(self, tree: Any) -> Any:
        """A copy of the value behind placed arrays, which stays as it is when a step reuses their buffers.

        Under "pmap" on the host: every process has the same, and Orbax has the first one write it.
        """
        if self.mapping == "fsdp":
            return jax.tree.map(jnp.copy, tree)
        return jax.tree.map(np.asarray, self.unplace(tree))  # taking one device off the device axis copies

    def collect(self, tree: Any) -> Any:
        """What `unplace` gives, whole in every process, for the first one to write."""
        return jax.tree.map(
            lambda x: x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True),
            self.unplace(tree),
        )

    def gather(self, x: Any) -> np.ndarray:
        """The result of a mapped function with its leading axis of all devices, in every process."""
        return multihost_utils.process_allgather(x, tiled=True)

    def read(self, tree: Any) -> Any:
        """Small replicated results as NumPy values."""
        return jax.tree.map(np.asarray, self.unplace(tree))


def _is_stacked(path: Sequence[Any]) -> bool:
    """Whether a leaf lies under the blocks, whose parameters have a leading layer axis."""
    return any(str(getattr(key, "key", getattr(key, "name", ""))) == "blocks" for key in path)
