"""What runs on the devices: prefill, moves into slots, and the loop of decoding steps.

Each function is written for one device. `Programs` maps them over all: with `jax.pmap` where parameters are
replicated, with `jax.jit` over a mesh where they are sharded. Everything but the parameters has a leading
device axis A.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from l2m_jax import models
from l2m_jax.generation.sampling import SamplingRules, sample
from l2m_jax.models import Cache, DecoderConfig
from l2m_jax.models.sharding import rows_split_as
from l2m_jax.types import Params


class Slots(NamedTuple):
    """B sequences that are decoded side by side, each with room for S tokens.

    Attributes:
        cache: keys and values of the tokens before the last one.
        tokens_BxS: int32, prompt and answer so far; `lengths_B` of them, `prompt_lengths_B` from the prompt.
        keys_Bx2: uint32, where the answer's random numbers come from.
        active_B: whether the answer is unfinished; the others stand still.
    """

    cache: Cache
    tokens_BxS: jax.Array
    lengths_B: jax.Array
    prompt_lengths_B: jax.Array
    keys_Bx2: jax.Array
    active_B: jax.Array


class Prefilled(NamedTuple):
    """Prompts whose keys and values are known, to be copied to the slots of their answers."""

    cache: Cache
    tokens_PxL: jax.Array
    lengths_P: jax.Array


class Moves(NamedTuple):
    """Row of `Prefilled`, slot and key of each answer that begins. A slot B (there is none) drops the move."""

    rows_M: np.ndarray
    slots_M: np.ndarray
    keys_Mx2: np.ndarray


def prepare(config: DecoderConfig, params: Params) -> tuple[Params, Params]:
    """Parameters for prefill, stacked, and for decoding, one entry a layer.

    Both in the dtype that they are used in, so that a step does not read float32 weights to compute in bfloat16.
    Norms keep theirs: they compute in float32.
    """

    def cast(path, leaf):
        return leaf if any("norm" in str(key) for key in path) else leaf.astype(config.dtype)

    params = jax.tree_util.tree_map_with_path(cast, params)
    return params, models.unstack_layers(params)


def empty_slots(config: DecoderConfig, B: int, S: int) -> Slots:
    ones = jnp.ones((B,), jnp.int32)
    return Slots(
        cache=models.empty_cache(config, B, S),
        tokens_BxS=jnp.zeros((B, S), jnp.int32),
        lengths_B=ones,
        prompt_lengths_B=ones,
        keys_Bx2=jnp.zeros((B, 2), jnp.uint32),
        active_B=jnp.zeros((B,), bool),
    )


def prefill(config: DecoderConfig, params: Params, tokens_PxL: jax.Array, lengths_P: jax.Array) -> Prefilled:
    """Keys and values of right-padded prompts. Decoding reads a prompt's last token once more, to get its logits."""
    _, cache = models.prefill(config, params, tokens_PxL, lengths_P, tokens_PxL.shape[1])
    return Prefilled(cache, tokens_PxL, lengths_P)


def begin(slots: Slots, prefilled: Prefilled, moves: Moves, count: jax.Array) -> Slots:
    """Carries out the first `count` moves. One at a time: a copy is as long as its prompt, not as the batch of moves."""

    def move(i, slots: Slots) -> Slots:
        row, slot = moves.rows_M[i], moves.slots_M[i]

        def copy(target, source):
            start = jax.lax.dynamic_index_in_dim(source, row, keepdims=False)
            window = (slot, *(slice(0, size) for size in start.shape))
            return target.at[window].set(start, mode="drop")

        length = prefilled.lengths_P[row]
        return Slots(
            cache=jax.tree.map(copy, slots.cache, prefilled.cache),
            tokens_BxS=copy(slots.tokens_BxS, prefilled.tokens_PxL),
            lengths_B=slots.lengths_B.at[slot].set(length, mode="drop"),
            prompt_lengths_B=slots.prompt_lengths_B.at[slot].set(length, mode="drop"),
            keys_Bx2=slots.keys_Bx2.at[slot].set(moves.keys_Mx2[i], mode="drop"),
            active_B=slots.active_B.at[slot].set(True, mode="drop"),
        )

    return jax.lax.fori_loop(0, count, move, slots)


def decode(
    config: DecoderConfig,
    rules: SamplingRules,
    eos_token_id: int,
    params: Params,
    slots: Slots,
    steps: jax.Array,
) -> Slots:
    """`steps` tokens further in every active slot that does not end before. Needs room for them in S."""

    def step(_, slots: Slots) -> Slots:
        last_B = slots.lengths_B - 1
        tokens_B = jnp.take_along_axis(slots.tokens_BxS, last_B[:, None], axis=1)[:, 0]
        hidden, cache = models.decode_step(config, params, tokens_B, last_B, slots.cache)
        logits = models.apply_head(config, params, hidden)
        new_B = slots.lengths_B - slots.prompt_lengths_B
        next_B = sample(logits, slots.tokens_BxS, slots.lengths_B, new_B, slots.keys_Bx2, rules, eos_token_id)
        # Past the end of a slot that stands still there may be no room; nothing is read there either.
        rows_B = jnp.arange(next_B.shape[0])
        return slots._replace(
            cache=cache,
            tokens_BxS=slots.tokens_BxS.at[rows_B, slots.lengths_B].set(next_B, mode="drop"),
            lengths_B=slots.lengths_B + slots.active_B,
            active_B=slots.active_B & (next_B != eos_token_id) & (new_B + 1 < rules.max_new_tokens),
        )

    return jax.lax.fori_loop(0, steps, step, slots)


def resize(S: int, slots: Slots) -> Slots:
    """Room for S tokens in each slot; the first tokens stay."""

    def fit(x, axis):
        have = x.shape[axis]
        if have >= S:
            return jax.lax.slice_in_dim(x, 0, S, axis=axis)
        return jnp.pad(x, [(0, S - have if i == axis else 0) for i in range(x.ndim)])

    cache = jax.tree.map(lambda kv_BxKxSxD: fit(kv_BxKxSxD, 2), slots.cache)
    return slots._replace(cache=cache, tokens_BxS=fit(slots.tokens_BxS, 1))


def keep(slots: Slots, rows_B: jax.Array) -> Slots:
    """Fewer slots: those of `rows_B`."""
    return jax.tree.map(lambda x: x[rows_B], slots)


@dataclass(frozen=True)
class Programs:
    """The functions above, mapped over devices.

    Attributes:
        mesh: slots are split over all of its axes.
        sharded: parameters are global arrays over `mesh` (`jax.jit`), not copies on every device (`jax.pmap`).
            Copies need no other process's devices, so `mesh` then has those of this one alone.
        num_devices: of all processes.
        first_device: where those of `mesh` begin among them.
    """

    mesh: Mesh
    sharded: bool
    num_devices: int
    first_device: int = 0

    # Cached, so that a second call finds its programs compiled.
    @staticmethod
    @functools.cache
    def replicated(devices: tuple[jax.Device, ...]) -> "Programs":  # pyright: ignore[reportInvalidTypeForm]
        own = [i for i, device in enumerate(devices) if device.process_index == jax.process_index()]
        mesh = Mesh(np.array(devices)[own], ("slots",), axis_types=(AxisType.Auto,))
        return Programs(mesh, False, len(devices), own[0])

    @staticmethod
    @functools.cache
    def sharded_over(mesh: Mesh) -> "Programs":
        return Programs(mesh, True, mesh.size)

    @functools.cached_property
    def split(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))

    def _map(
        self,
        function: Callable,
        in_axes: tuple[int | None, ...],
        *,
        static: int = 0,
        donate: Sequence[int] = (),
        split_rows: bool = False,
    ) -> Callable:
        """`function` over the device axis.

        Args:
            in_axes: of the arguments behind the `static` first ones.
            donate: positions among all of them.
            split_rows: keep activations of sharded parameters with their rows. One token a row is so little that
                the compiler does better to move activations than parameters.
        """
        statics = tuple(range(static))
        if not self.sharded:
            return jax.pmap(
                function,
                in_axes=(None,) * static + in_axes,
                static_broadcasted_argnums=statics,
                donate_argnums=tuple(donate),
                devices=list(self.mesh.devices.flat),
            )

        def mapped(*arguments):
            fixed = functools.partial(function, *arguments[:static])
            # The mapped axis is the mesh's; on their own axes, a device's rows are not split further.
            rows = rows_split_as(NamedSharding(self.mesh, PartitionSpec()))
            with rows if split_rows else contextlib.nullcontext():
                over_devices = jax.vmap(fixed, in_axes=in_axes, spmd_axis_name=self.mesh.axis_names)
                return jax.lax.with_sharding_constraint(over_devices(*arguments[static:]), self.split)

        return jax.jit(mapped, static_argnums=statics, donate_argnums=tuple(donate))

    @functools.cached_property
    def prefill(self) -> Callable:
        return self._map(prefill, (None, 0, 0), static=1, split_rows=True)

    @functools.cached_property
    def begin(self) -> Callable:
        return self._map(begin, (0, 0, 0, None), donate=(0,))

    @functools.cached_property
    def decode(self) -> Callable:
        return self._map(decode, (None, 0, None), static=3, donate=(4,))

    @functools.cached_property
    def resize(self) -> Callable:
        return self._map(resize, (0,), static=1)

    @functools.cached_property
    def keep(self) -> Callable:
        return self._map(keep, (0, 0))

    def prepare(self, config: DecoderConfig, params: Params) -> tuple[Params, Params]:
        if self.sharded:
            return jax.jit(prepare, static_argnums=0)(config, params)
        replicated = NamedSharding(self.mesh, PartitionSpec())
        params = jax.device_put(params, replicated)
        return jax.jit(prepare, static_argnums=0, out_shardings=replicated)(config, params)

    def empty_slots(self, config: DecoderConfig, B: int, S: int) -> Slots:
        def stacked():
            slots = empty_slots(config, B, S)
            return jax.tree.map(lambda x: jnp.broadcast_to(x[None], (self.mesh.size, *x.shape)), slots)

        return jax.jit(stacked, out_shardings=self.split)()

    def feed(self, tree: Any) -> Any:
        """Host arrays with a leading axis of all devices: each share onto its device, if that is this process's."""

        def put(x):
            x = x[self.first_device : self.first_device + self.mesh.size]
            return jax.make_array_from_callback(x.shape, self.split, lambda index: x[index])

        return jax.tree.map(put, tree)

    def read(self, tree: Any) -> Any:
        """The same arrays on the host, in every process."""
        return multihost_utils.process_allgather(tree, tiled=True)
