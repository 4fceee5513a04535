"""The transformer. Every family is a configuration of it.

Pure functions of (config, params, ...), to be traced under the caller's `jax.jit` with `config` static. Parameters
are nested dicts of arrays; those under "blocks" have a leading layer axis N.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from l2m_jax.errors import InputError
from l2m_jax.models.architecture import DecoderConfig, LayerKind
from l2m_jax.models.attention import LayerCache, cached, causal, layer_angles, rope_angles
from l2m_jax.models.layers import Block, Embeddings, Output
from l2m_jax.products import project
from l2m_jax.types import Params

# Up to this many layers are unrolled: the program is still small, and stacked parameters need no slicing.
_MAX_UNROLLED = 4

Cache = tuple[LayerCache, ...]
"""One pair of arrays per layer, each with the batch axis first, so that rows can be gathered, scattered and sharded."""


@functools.partial(jax.jit, static_argnums=0)
def init(config: DecoderConfig, key: jax.Array) -> Params:
    """Random parameters in `config.param_dtype`: normal weights with `init_std`, biases of 0, norm scales of 1."""
    embeddings_key, blocks_key, output_key, head_key = jax.random.split(key, 4)
    tokens = jnp.zeros((1, 1), jnp.int32)
    x = jnp.zeros((1, 1, config.hidden_size), config.dtype)

    def init_block(key):
        rope = config.rope and rope_angles(config.rope, config.head_dim, tokens)
        return Block(config).init(key, x, rope, causal(config, None)).get("params", {})

    params = {
        "embeddings": Embeddings(config).init(embeddings_key, tokens, tokens)["params"],
        "blocks": jax.vmap(init_block)(jax.random.split(blocks_key, config.num_layers)),
        "output": Output(config).init(output_key, x).get("params", {}),
    }
    if not config.tie_embeddings:
        shape = (config.vocab_size, config.embed_size)
        weights = jax.random.normal(head_key, shape, jnp.float32) * config.init_std
        params["head"] = {"embedding": weights.astype(config.param_dtype)}
    return params


def head(config: DecoderConfig, params: Params) -> jax.Array:
    """head_VxE, in `param_dtype`: logits are hidden_BxLxE @ head_VxE.T."""
    return (
        params["embeddings"]["tokens"]["embedding"] if config.tie_embeddings else params["head"]["embedding"]
    )


def inference_dtype(config: DecoderConfig, path: str) -> str:
    """The dtype of a parameter of a model that is not trained: the compute dtype, but float32 for norms and scales.

    These are read in float32. Every other parameter is cast to the compute dtype before use, so that casting it
    once beforehand changes no result.

    Args:
        path: of the parameter, such as "blocks/mlp_norm/scale", or `jax.tree_util.keystr` of its key path.
    """
    return "float32" if "norm" in path or "scale" in path else config.dtype


def hidden_states(
    config: DecoderConfig,
    params: Params,
    tokens_BxL: jax.Array,
    *,
    segment_ids_BxL: jax.Array | None = None,
    positions_BxL: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """hidden_BxLxE after the final norm and projection, in `config.dtype`: the input of the head.

    Args:
        tokens_BxL: int32.
        segment_ids_BxL: 1, 2, ... for the sequences packed into a row, 0 for empty slots; a token sees only its
            own segment. None: each row is one sequence.
        positions_BxL: None: counted from 0 in each segment.
        dropout_key: None: no dropout.

    Raises:
        InputError: an unpacked row is longer than the table of learned positions.
    """
    attend = causal(config, segment_ids_BxL)
    positions_BxL = _positions(config, tokens_BxL, segment_ids_BxL, positions_BxL)
    hidden, _ = _forward(config, params, tokens_BxL, positions_BxL, attend, dropout_key)
    return hidden


def logits(
    config: DecoderConfig,
    params: Params,
    tokens_BxL: jax.Array,
    *,
    segment_ids_BxL: jax.Array | None = None,
    positions_BxL: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """logits_BxLxV in float32, -inf for padding of the vocabulary. Arguments as in `hidden_states`."""
    hidden = hidden_states(
        config,
        params,
        tokens_BxL,
        segment_ids_BxL=segment_ids_BxL,
        positions_BxL=positions_BxL,
        dropout_key=dropout_key,
    )
    return apply_head(config, params, hidden)


def apply_head(config: DecoderConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """[..., E] -> logits [..., V] in float32, -inf for padding of the vocabulary."""
    head_VxE = head(config, params).astype(config.dtype)
    result = project(hidden, head_VxE)
    if config.valid_vocab_size == config.vocab_size:
        return result
    is_token = (jnp.arange(config.vocab_size) < config.valid_vocab_size).reshape(
        (1,) * (result.ndim - 1) + (-1,)
    )
    return jnp.where(is_token, result, -jnp.inf)


def apply_output(config: DecoderConfig, output: Params, hidden: jax.Array) -> jax.Array:
    """[..., hidden_size] after the last block -> [..., E]: the final norm and projection, with `params["output"]`."""
    return _apply(Output(config), output, hidden)


def empty_cache(config: DecoderConfig, batch: int, length: int) -> Cache:
    """A cache for `batch` rows of up to `length` tokens, in `config.dtype`."""
    shape = (batch, config.num_kv_heads, length, config.head_dim)
    return tuple(
        LayerCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
        for _ in range(config.num_layers)
    )


def prefill(
    config: DecoderConfig, params: Params, tokens_BxL: jax.Array, lengths_B: jax.Array, cache_length: int
) -> tuple[jax.Array, Cache]:
    """Runs right-padded prompts and stores their keys and values.

    Slots past the end of a prompt hold keys and values of padding; `decode_step` overwrites each slot before it
    reads it.

    Returns:
        (hidden_BxE of each prompt's last token, cache with `cache_length` slots).

    Raises:
        InputError: the prompts are longer than the cache, or than the table of learned positions.
    """
    L = tokens_BxL.shape[1]
    if cache_length < L:
        raise InputError(f"a cache of {cache_length} slots cannot hold prompts padded to {L} tokens")
    positions_BxL = _positions(config, tokens_BxL, None, None)
    attend = causal(config, None, keep_kv=True)
    hidden, (keys_NxBxLxKxD, values_NxBxLxKxD) = _forward(
        config, params, tokens_BxL, positions_BxL, attend, None
    )

    def slots(kv_BxLxKxD):
        return jnp.pad(kv_BxLxKxD.swapaxes(1, 2), ((0, 0), (0, 0), (0, cache_length - L), (0, 0)))

    cache = tuple(
        LayerCache(slots(keys_NxBxLxKxD[n]), slots(values_NxBxLxKxD[n])) for n in range(config.num_layers)
    )
    last_Bx1x1 = (lengths_B - 1)[:, None, None]
    return jnp.take_along_axis(hidden, last_Bx1x1, axis=1)[:, 0], cache


def unstack_layers(params: Params) -> Params:
    """Parameters for a loop around `decode_step`: "blocks" becomes a tuple with one entry per layer.

    `decode_step` slices stacked parameters on every call. Unstacking them once before the loop, under the same jit,
    avoids a copy of the model for each token.
    """
    N = jax.tree.leaves(params["blocks"])[0].shape[0]
    layers = (jax.tree.map(operator.itemgetter(n), params["blocks"]) for n in range(N))
    return params | {"blocks": tuple(layers)}


def decode_step(
    config: DecoderConfig, params: Params, tokens_B: jax.Array, positions_B: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Reads one more token in every row.

    The new key and value of row b are written to slot `positions_B[b]`, and its query sees the slots up to there. As
    the carry of a loop, the cache is updated in place.

    Args:
        params: stacked, or from `unstack_layers`.
        tokens_B, positions_B: int32, the token to read and its position in the sequence.

    Returns:
        (hidden_BxE that predicts the next token, cache).
    """
    if not isinstance(params["blocks"], tuple):
        params = unstack_layers(params)
    positions_Bx1 = positions_B[:, None]
    x = _apply(Embeddings(config), params["embeddings"], tokens_B[:, None], positions_Bx1)
    kinds = config.layer_kinds
    angles = {
        rope: rope and rope_angles(rope, config.head_dim, positions_Bx1) for _, rope in dict.fromkeys(kinds)
    }
    updated = []
    for layer, layer_cache, (window, rope) in zip(params["blocks"], cache, kinds, strict=True):
        attend = cached(config, layer_cache, positions_B, window)
        x, layer_cache = _apply(Block(config), layer, x, angles[rope], attend)
        updated.append(layer_cache)
    hidden = _apply(Output(config), params["output"], x)
    return hidden[:, 0], tuple(updated)


def _layer_kinds(config, positions_BxL) -> tuple[Callable, jax.Array | None]:
    """(kind -> its rope angles and window, the kind of each layer). Kinds are None where all layers are alike."""
    L = positions_BxL.shape[1]
    # A window as long as the row hides nothing.
    kinds = [LayerKind(w if w is not None and w < L else None, rope) for w, rope in config.layer_kinds]
    distinct = list(dict.fromkeys(kinds))
    windows, ropes = zip(*distinct, strict=True)
    if len(distinct) == 1:
        angles = ropes[0] and rope_angles(ropes[0], config.head_dim, positions_BxL)
        return lambda kind: (angles, windows[0]), None
    angles = layer_angles(ropes, config.head_dim, positions_BxL)
    sees = jnp.array([window or L for window in windows]) if any(windows) else None
    kind_N = jnp.array([distinct.index(kind) for kind in kinds])
    return lambda kind: jax.tree.map(lambda x: x[kind], (angles, sees)), kind_N


def _positions(config, tokens_BxL, segment_ids_BxL, positions_BxL):
    if positions_BxL is not None:
        return positions_BxL
    L = tokens_BxL.shape[1]
    index_BxL = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32)[None], tokens_BxL.shape)
    if segment_ids_BxL is None:
        if config.rope is None and config.max_positions < L:
            raise InputError(
                f"a sequence of {L} tokens is longer than this model's {config.max_positions} positions; "
                "shorten it, or choose a model with rotary positions"
            )
        return index_BxL
    starts = jnp.diff(segment_ids_BxL, axis=1, prepend=-1) != 0
    return index_BxL - jax.lax.cummax(jnp.where(starts, index_BxL, 0), axis=1)


def _apply(module: nn.Module, params: Params, *inputs, dropout_key=None) -> Any:
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    return module.apply({"params": params}, *inputs, rngs=rngs)


def _forward(config, params, tokens_BxL, positions_BxL, attend: Callable, dropout_key):
    """(hidden_BxLxE, the caches that `attend` returned, stacked over layers)."""
    embeddings_key, layer_keys = None, None
    if dropout_key is not None:
        embeddings_key, blocks_key = jax.random.split(dropout_key)
        layer_keys = jax.random.split(blocks_key, config.num_layers)
    deterministic = dropout_key is None
    scan_layers = config.num_layers > _MAX_UNROLLED if config.scan_layers is None else config.scan_layers
    of_kind, kinds = _layer_kinds(config, positions_BxL)

    def block(x, inputs):
        layer, key, kind = inputs
        rope, window = of_kind(kind)
        near = functools.partial(attend, window=window)
        return _apply(Block(config), layer, x, rope, near, deterministic, dropout_key=key)

    if config.remat != "none":
        # A scan already prevents common subexpression elimination between forward and backward pass.
        keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if config.remat == "dots" else None
        block = jax.checkpoint(block, prevent_cse=not scan_layers, policy=keep)

    inputs = (tokens_BxL, positions_BxL, deterministic)
    x = _apply(Embeddings(config), params["embeddings"], *inputs, dropout_key=embeddings_key)
    start, found = 0, []
    for name in ("lower_blocks", "blocks"):  # the lower ones are frozen, see `freezing.py`
        if name not in params:
            continue
        layers = jax.tree.leaves(params[name])[0].shape[0]
        own = slice(start, start + layers)
        keys, kind = (None if each is None else each[own] for each in (layer_keys, kinds))
        unroll = 1 if scan_layers else max(1, layers)
        x, caches = jax.lax.scan(block, x, (params[name], keys, kind), unroll=unroll)
        start, found = own.stop, [*found, caches]
    caches = found[0] if len(found) == 1 else jax.tree.map(lambda *c: jnp.concatenate(c), *found)
    return _apply(Output(config), params["output"], x), caches
