"""Attention over packed rows and over a KV cache, and rotary positions."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import backend

from l2m_jax.models.architecture import DecoderConfig, Rope
from l2m_jax.parallel import split_rows
from l2m_jax.products import product

# Queries per block: small enough to skip most of the scores above the diagonal, with a limit on the number of blocks
# that keeps compile time short.
_QUERY_BLOCK = 256
_MAX_BLOCKS = 8

# Added to masked scores. Half of the lowest float32, so that the sum stays finite.
_MASKED = float(jnp.finfo(jnp.float32).min / 2)


class LayerCache(NamedTuple):
    """Keys and values of one layer. Heads come before slots, so that a step reads contiguous memory for each head."""

    key_BxKxSxD: jax.Array
    value_BxKxSxD: jax.Array


class RopeAngles(NamedTuple):
    """cos and sin of the angle by which each position rotates each pair of features, float32."""

    cos_BxLx1xD: jax.Array
    sin_BxLx1xD: jax.Array


def rope_angles(rope: Rope, head_dim: int, positions_BxL: jax.Array) -> RopeAngles:
    """Angles for `rotate`; the frequencies of the first half of D are repeated in the second, as in Hugging Face."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.scaling == "linear":
        frequencies = frequencies / rope.factor
    elif rope.scaling == "llama3":
        # Llama 3.1: 1 (unchanged) for short wavelengths, 0 (scaled) for long ones, linear in between.
        turns = rope.original_max_positions * frequencies / (2 * jnp.pi)
        unchanged = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        unchanged = jnp.clip(unchanged, 0.0, 1.0)
        frequencies = frequencies * (unchanged + (1 - unchanged) / rope.factor)
    angles = positions_BxL.astype(jnp.float32)[:, :, None] * frequencies[None, None, :]
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
    return RopeAngles(jnp.cos(angles), jnp.sin(angles))


def layer_angles(ropes: Sequence[Rope | None], head_dim: int, positions_BxL: jax.Array) -> RopeAngles:
    """Angles with a leading axis for `ropes`; layers without rotary positions turn by 0."""

    def angles(rope):
        if rope is not None:
            return rope_angles(rope, head_dim, positions_BxL)
        zeros = jnp.zeros((*positions_BxL.shape, 1, head_dim), jnp.float32)
        return RopeAngles(zeros + 1, zeros)

    return jax.tree.map(lambda *kinds: jnp.stack(kinds), *map(angles, ropes))


def rotate(x_BxLxHxD: jax.Array, angles: RopeAngles) -> jax.Array:
    """Rotates the pairs (d, d + D/2) of queries or keys, in float32."""
    x = x_BxLxHxD.astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)
    return (x * angles.cos_BxLx1xD + rotated * angles.sin_BxLx1xD).astype(x_BxLxHxD.dtype)


def _implementation(config: DecoderConfig, query: jax.Array) -> str:
    if config.attention != "auto":
        return config.attention
    client = backend.get_backend()
    if client.platform != "gpu" or "cuda" not in client.platform_version:
        return "xla"
    _, L, _, D = query.shape
    ampere = float(client.local_devices()[0].compute_capability) >= 8.0
    return "cudnn" if ampere and why_not_cudnn(query.dtype, L, D) is None else "xla"


def why_not_cudnn(dtype: jax.typing.DTypeLike, length: int, head_dim: int) -> str | None:
    """Why JAX's cuDNN attention does not support these, on GPUs since Ampere; None if it does."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16, not in {jnp.dtype(dtype)}"
    if head_dim > 128:
        return f"head_dim {head_dim} is larger than 128"
    # With a mask, odd lengths fail in the backward pass.
    return f"row length {length} is odd" if length % 2 else None


def _scale(config: DecoderConfig) -> float:
    return (config.query_scalar or config.head_dim) ** -0.5 if config.scale_attention else 1.0


def causal(config: DecoderConfig, segment_ids_BxL: jax.Array | None, keep_kv: bool = False) -> Callable:
    """Each token attends to itself and to earlier tokens of its own segment. The cache is (key, value), or None.

    With `window`, a token sees only so many tokens, itself included; an array where layers differ.

    Empty slots (segment 0) attend to each other, so that every softmax has something to sum over.
    """
    mask = None
    if segment_ids_BxL is not None:
        mask = split_rows((segment_ids_BxL[:, :, None] == segment_ids_BxL[:, None, :])[:, None])

    def attend(query, key, value, dropout, window=None):
        visible = mask if window is None else _within(window, mask, query.shape[:2])
        query, key, value = split_rows(query), split_rows(key), split_rows(value)
        # JAX's cuDNN attention has no dropout: training can use it only with an `attention_dropout` of 0.
        if dropout is None and _implementation(config, query) == "cudnn":
            attended = _fused(config, query, key, value, visible, "cudnn")
        else:
            attended = _in_blocks(config, query, key, value, visible, dropout)
        return attended, (key, value) if keep_kv else None

    return attend


def _fused(
    config: DecoderConfig,
    query_BxLxHxD: jax.Array,
    key_BxLxKxD: jax.Array,
    value_BxLxKxD: jax.Array,
    mask_Bx1xLxL: jax.Array | None,
    implementation: Literal["cudnn", "xla"],
) -> jax.Array:
    """JAX's attention. cuDNN's kernel takes head sizes that are multiples of 8: others are padded with zeros."""
    D = query_BxLxHxD.shape[-1]
    padding = [(0, 0)] * 3 + [(0, -D % 8)]
    query, key, value = (jnp.pad(x, padding) for x in (query_BxLxHxD, key_BxLxKxD, value_BxLxKxD))
    attended = jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask_Bx1xLxL,
        scale=_scale(config),
        is_causal=True,
        implementation=implementation,
    )
    return attended[..., :D]


def _within(window: int | jax.Array, mask_Bx1xLxL: jax.Array | None, rows: tuple[int, int]) -> jax.Array:
    """The mask, without what lies `window` tokens back or more. Slots of a row are as far apart as positions."""
    B, L = rows
    slots = jnp.arange(L)
    near = (slots[:, None] - slots[None, :] < window)[None, None]
    return split_rows(jnp.broadcast_to(near, (B, 1, L, L))) if mask_Bx1xLxL is None else mask_Bx1xLxL & near


def _in_blocks(
    config: DecoderConfig,
    query_BxLxHxD: jax.Array,
    key_BxLxKxD: jax.Array,
    value_BxLxKxD: jax.Array,
    mask_Bx1xLxL: jax.Array | None,
    dropout: Callable[[jax.Array], jax.Array] | None,
) -> jax.Array:
    """Attention in blocks of queries, each over the keys up to the end of the block.

    This skips up to half of the [L, L] scores. The softmax is normalised after the product with the values, where
    there are fewer numbers to divide. Dropout applies to the probabilities, as in the reference models.
    """
    B, L, H, D = query_BxLxHxD.shape
    K = key_BxLxKxD.shape[2]
    G = H // K
    query = query_BxLxHxD.reshape(B, L, K, G, D).transpose(0, 2, 3, 1, 4)
    key, value = key_BxLxKxD.swapaxes(1, 2), value_BxLxKxD.swapaxes(1, 2)
    size = -(-L // (_MAX_BLOCKS * _QUERY_BLOCK)) * _QUERY_BLOCK

    def block(start: int, end: int) -> jax.Array:
        # The queries of a group are one axis, Q: XLA's CPU backend multiplies more axes more slowly.
        Q = G * (end - start)
        allowed = (jnp.arange(start, end)[:, None] >= jnp.arange(end)[None])[None, None]
        if mask_Bx1xLxL is not None:
            allowed = allowed & mask_Bx1xLxL[:, :, start:end, :end]
        allowed = jnp.broadcast_to(allowed[:, :, None], (len(allowed), 1, G, end - start, end))
        allowed = allowed.reshape(-1, 1, Q, end)
        scores = product("BKQD,BKSD->BKQS", query[..., start:end, :].reshape(B, K, Q, D), key[:, :, :end])
        scores = _scale(config) * scores + jnp.where(allowed, 0.0, _MASKED)
        exp_scores = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, -1, keepdims=True)))
        normalizer = jnp.sum(exp_scores, -1, keepdims=True)
        if dropout is not None:
            exp_scores = dropout(exp_scores)
        attended = product("BKQS,BKSD->BKQD", exp_scores.astype(value.dtype), value[:, :, :end])
        return (attended / normalizer).astype(value.dtype).reshape(B, K, G, end - start, D)

    blocks = [block(start, min(start + size, L)) for start in range(0, L, size)]
    return jnp.concatenate(blocks, -2).transpose(0, 3, 1, 2, 4).reshape(B, L, H, D)


def _weighted(probabilities_BxKxGxS: jax.Array, values_BxKxSxD: jax.Array) -> jax.Array:
    """The float32 values [B, K, G, D], weighted and summed over slots."""

    def as_product(probabilities, values):
        return product("BKGS,BKSD->BKGD", probabilities, values)

    def as_sum(probabilities, values):
        weighted = probabilities[:, :, 0, :, None].astype(jnp.float32) * values.astype(jnp.float32)
        return jnp.sum(weighted, axis=2)[:, :, None]

    if probabilities_BxKxGxS.shape[2] > 1:
        return as_product(probabilities_BxKxGxS, values_BxKxSxD)
    # XLA's CPU backend multiplies single rows at half the speed of memory.
    return jax.lax.platform_dependent(probabilities_BxKxGxS, values_BxKxSxD, cpu=as_sum, default=as_product)


def cached(
    config: DecoderConfig, cache: LayerCache, positions_B: jax.Array, window: int | None = None
) -> Callable:
    """One new token per row: writes its key and value to slot `positions_B`; its query sees the slots up to there.

    Computes in the cache's dtype.

    With `window`, it sees only the last so many of them.
    """

    def attend(query_Bx1xHxD, key_Bx1xKxD, value_Bx1xKxD, dropout):
        B, _, H, D = query_Bx1xHxD.shape
        K, S = cache.key_BxKxSxD.shape[1:3]
        rows_B = jnp.arange(B)

        def put(cached_BxKxSxD, new_Bx1xKxD):
            # Each row has one place, so a GPU needs no atomic writes.
            places = cached_BxKxSxD.at[rows_B, :, positions_B]
            return places.set(new_Bx1xKxD[:, 0], indices_are_sorted=True, unique_indices=True)

        keys, values = put(cache.key_BxKxSxD, key_Bx1xKxD), put(cache.value_BxKxSxD, value_Bx1xKxD)
        query = query_Bx1xHxD.reshape(B, K, H // K, D).astype(keys.dtype)
        scores = product("BKGD,BKSD->BKGS", query, keys)
        visible = jnp.arange(S)[None] <= positions_B[:, None]
        if window is not None:
            visible &= positions_B[:, None] - jnp.arange(S)[None] < window
        scores = jnp.where(visible[:, None, None], scores * _scale(config), jnp.finfo(jnp.float32).min)
        probabilities = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
        attended = _weighted(probabilities, values).astype(query_Bx1xHxD.dtype)
        return attended.reshape(B, 1, H, D), LayerCache(keys, values)

    return attend
