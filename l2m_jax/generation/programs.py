"""What runs on the devices: prefill, moves into slots, and the loop of decoding steps.

Each function is written for one device. `Placement.map` maps it over all devices.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l2m_jax import models
from l2m_jax.generation.sampling import SamplingRules, is_any_of, sample
from l2m_jax.models import Cache, DecoderConfig
from l2m_jax.parallel import Placement, is_stacked, over_devices
from l2m_jax.types import Params


class Slots(NamedTuple):
    """B sequences that are decoded together, each with room for S tokens.

    Attributes:
        cache: keys and values of all tokens but the last.
        tokens_BxS: int32, the prompt followed by the answer so far: `lengths_B` tokens, of which the first
            `prompt_lengths_B` are the prompt.
        keys_Bx2: uint32, the key of the answer's random numbers.
        active_B: whether the answer is unfinished. Other slots do not change.
    """

    cache: Cache
    tokens_BxS: jax.Array
    lengths_B: jax.Array
    prompt_lengths_B: jax.Array
    keys_Bx2: jax.Array
    active_B: jax.Array


class Prefilled(NamedTuple):
    """Prompts with their keys and values, ready to be copied into slots."""

    cache: Cache
    tokens_PxL: jax.Array
    lengths_P: jax.Array


class Moves(NamedTuple):
    """For each answer that begins, its row of `Prefilled`, its slot and its key. A move to slot B is dropped."""

    rows_M: np.ndarray
    slots_M: np.ndarray
    keys_Mx2: np.ndarray


@over_devices(static=("config", "transposed"), weights=("params",), returns="weights", one_device=True)
def prepare(config: DecoderConfig, transposed: bool, params: Params) -> Params:
    """Parameters for `decode`: one entry for each layer, in the dtype that a step computes in.

    A decoding step reads every weight for a few tokens, so it should not read float32 weights to compute in
    bfloat16. Norms and scales stay as they are: they are read in float32. If `transposed`, the kernels of the layers
    become "kernel_OxI".
    """

    def cast(path, leaf):
        return leaf.astype(_dtype_in_use(config, path, leaf))

    prepared = jax.tree_util.tree_map_with_path(cast, params)
    if transposed:
        prepared = prepared | {"blocks": _with_transposed_kernels(prepared["blocks"])}
    return models.unstack_layers(prepared)


def _with_transposed_kernels(blocks: Params) -> Params:
    by_name = {}
    for name, value in blocks.items():
        if isinstance(value, dict):
            by_name[name] = _with_transposed_kernels(value)
        elif name == "kernel":
            by_name["kernel_OxI"] = value.swapaxes(-1, -2)
        else:
            by_name[name] = value
    return by_name


def is_transposed(placement: Placement) -> bool:
    """Whether layers are decoded with transposed kernels: where that is faster, on CPUs."""
    return _on_cpu(placement)


def prepare_on_devices(config: DecoderConfig, params: Params, placement: Placement) -> Params:
    """`prepare` of placed parameters. Leaves that it would not change are shared with `params`, not copied."""

    new = placement.map(prepare)(config, is_transposed(placement), changed_by_prepare(config, params))
    outside = {name: tree for name, tree in params.items() if name != "blocks"}
    return new | {
        name: jax.tree.map(lambda old, new: old if new is None else new, tree, new[name])
        for name, tree in outside.items()
    }


def changed_by_prepare(config: DecoderConfig, params: Params) -> Params:
    """The leaves (or their shapes) that `prepare` copies, and None in place of the others."""

    def changes(path, leaf):
        return is_stacked(path) or leaf.dtype != _dtype_in_use(config, path, leaf)

    # None is an empty subtree: a mapped function never sees the other leaves.
    return jax.tree_util.tree_map_with_path(lambda path, x: x if changes(path, x) else None, params)


def _dtype_in_use(config: DecoderConfig, path: tuple, leaf: jax.Array) -> np.dtype:
    kept = any(name in str(key) for key in path for name in ("norm", "scale"))
    return leaf.dtype if kept else jnp.dtype(config.dtype)


def cache_config(config: DecoderConfig, placement: Placement) -> DecoderConfig:
    """The config of the KV cache: float32 on CPUs, where XLA multiplies single rows of bfloat16 at half the speed."""
    return dataclasses.replace(config, dtype=jnp.float32) if _on_cpu(placement) else config


def _on_cpu(placement: Placement) -> bool:
    return placement.devices[0].platform == "cpu"


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


@over_devices(static=("config",), weights=("params",), one_device=True)
def prefill(config: DecoderConfig, params: Params, tokens_PxL: jax.Array, lengths_P: jax.Array) -> Prefilled:
    """Keys and values of right-padded prompts, with stacked parameters.

    Decoding reads the last token of a prompt again to get its logits.
    """
    _, cache = models.prefill(config, params, tokens_PxL, lengths_P, tokens_PxL.shape[1])
    return Prefilled(cache, tokens_PxL, lengths_P)


@over_devices(replicated=("count",), donate=("slots",), one_device=True, split_rows=False)
def begin(slots: Slots, prefilled: Prefilled, moves: Moves, count: jax.Array) -> Slots:
    """Carries out the first `count` moves, one at a time: few of the B possible moves are real.

    There must be room for the prompts that move, but not for the padding of their batch.
    """
    room = min(slots.tokens_BxS.shape[1], prefilled.tokens_PxL.shape[1])

    def move(i, slots: Slots) -> Slots:
        row, slot = moves.rows_M[i], moves.slots_M[i]

        def copy(target, source):
            start = jax.lax.dynamic_index_in_dim(source, row, keepdims=False)
            start = jax.lax.slice_in_dim(start, 0, room, axis=max(start.ndim - 2, 0))
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


@over_devices(
    static=("config", "rules", "eos_token_ids"),
    weights=("params",),
    replicated=("steps",),
    donate=("slots",),
    one_device=True,
    split_rows=False,
)
def decode(
    config: DecoderConfig,
    rules: SamplingRules,
    eos_token_ids: tuple[int, ...],
    params: Params,
    slots: Slots,
    steps: jax.Array,
) -> Slots:
    """Decodes `steps` tokens in every active slot, or fewer where its answer ends. S must have room for them.

    Args:
        params: from `prepare`.
    """

    def step(_, slots: Slots) -> Slots:
        last_B = slots.lengths_B - 1
        tokens_B = jnp.take_along_axis(slots.tokens_BxS, last_B[:, None], axis=1)[:, 0]
        hidden, cache = models.decode_step(config, params, tokens_B, last_B, slots.cache)
        logits = models.apply_head(config, params, hidden)
        new_B = slots.lengths_B - slots.prompt_lengths_B
        next_B = sample(
            logits, slots.tokens_BxS, slots.lengths_B, new_B, slots.keys_Bx2, rules, eos_token_ids
        )
        ended_B = is_any_of(next_B, eos_token_ids) | (new_B + 1 >= rules.max_new_tokens)
        # An inactive slot may have no room left for the token, which is never read.
        rows_B = jnp.arange(next_B.shape[0])
        return slots._replace(
            cache=cache,
            tokens_BxS=slots.tokens_BxS.at[rows_B, slots.lengths_B].set(
                next_B, mode="drop", indices_are_sorted=True, unique_indices=True
            ),
            lengths_B=slots.lengths_B + slots.active_B,
            active_B=slots.active_B & ~ended_B,
        )

    return jax.lax.fori_loop(0, steps, step, slots)


@over_devices(static=("S",), one_device=True, split_rows=False)
def resize(S: int, slots: Slots) -> Slots:
    """The same slots with room for S tokens each, cut or padded at the end."""

    def fit(x, axis):
        have = x.shape[axis]
        if have >= S:
            return jax.lax.slice_in_dim(x, 0, S, axis=axis)
        return jnp.pad(x, [(0, S - have if i == axis else 0) for i in range(x.ndim)])

    cache = jax.tree.map(lambda kv_BxKxSxD: fit(kv_BxKxSxD, 2), slots.cache)
    return slots._replace(cache=cache, tokens_BxS=fit(slots.tokens_BxS, 1))


@over_devices(one_device=True, split_rows=False)
def keep(slots: Slots, rows_B: jax.Array) -> Slots:
    """The slots of `rows_B` only."""
    return jax.tree.map(lambda x: x[rows_B], slots)
