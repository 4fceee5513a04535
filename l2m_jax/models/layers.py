"""The Linen modules of a decoder. Parameters are in `param_dtype`, products in `dtype`, norms in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from l2m_jax.models.activations import ACTIVATIONS
from l2m_jax.models.architecture import DecoderConfig
from l2m_jax.models.attention import rotate
from l2m_jax.parallel import split_rows
from l2m_jax.products import dense, dense_by_features


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, computed in float32."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        width = (x.shape[-1],)
        x = x.astype(jnp.float32)
        if c.norm == "layer":
            x = x - x.mean(axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + c.norm_eps)
        if c.norm_affine:
            fresh = nn.initializers.zeros if c.norm_zero_centered else nn.initializers.ones
            scale = self.param("scale", fresh, width, c.param_dtype).astype(jnp.float32)
            x = x * jnp.broadcast_to(1 + scale if c.norm_zero_centered else scale, x.shape)
        if c.norm_affine and c.norm == "layer":
            bias = self.param("bias", nn.initializers.zeros, width, c.param_dtype)
            x = x + jnp.broadcast_to(bias.astype(jnp.float32), x.shape)
        return x.astype(c.dtype)


class Dense(nn.Module):
    """x·W + b. Beside the kernel W there may be more, which no initialisation makes.

    "kernel_scale": W is int8, and its outputs are multiplied by these. "lora_a", "lora_b" and "lora_scale": an adapter, see
    `lora.py`. With "kernel_OxI" there is no W: this is its transpose, for products of few rows.
    """

    config: DecoderConfig
    features: int
    use_bias: bool
    init_std: float

    @nn.compact
    def __call__(self, x):
        c = self.config
        param_dtype, width = jnp.dtype(c.param_dtype), x.shape[-1]
        x = x.astype(c.dtype)
        if self.has_variable("params", "kernel_OxI"):
            y = dense_by_features(x, self._beside("kernel_OxI").astype(c.dtype))
        else:
            normal = nn.initializers.normal(self.init_std)
            y = dense(x, self.param("kernel", normal, (width, self.features), param_dtype).astype(c.dtype))
        if self.has_variable("params", "kernel_scale"):
            y = y * jnp.broadcast_to(self._beside("kernel_scale").astype(c.dtype), y.shape)
        if self.has_variable("params", "lora_a"):
            b = self._beside("lora_scale") * self._beside("lora_b").astype(jnp.float32)
            y = y + dense(dense(x, self._beside("lora_a").astype(c.dtype)), b.astype(c.dtype))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), param_dtype)
            y = y + jnp.broadcast_to(bias.astype(c.dtype), y.shape)
        return y

    def _beside(self, name: str) -> jax.Array:
        return self.get_variable("params", name)


def _dense(config: DecoderConfig, features: int, use_bias: bool, name: str, writes_residual: bool = False):
    scaled = writes_residual and config.scaled_residual_init
    std = config.init_std / (2 * config.num_layers) ** 0.5 if scaled else config.init_std
    return Dense(config, features, use_bias, std, name=name)


class Attention(nn.Module):
    """Projections to and from the heads, around `attend`.

    `attend(query_BxLxHxD, key_BxLxKxD, value_BxLxKxD, dropout) -> (attended_BxLxHxD, cache)` is what differs between
    training, prefill and decoding.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BxLxE, rope, attend, deterministic=True):
        c = self.config
        B, L, E = x_BxLxE.shape

        def heads(name, count):
            return _dense(c, count * c.head_dim, c.attention_bias, name)(x_BxLxE).reshape(
                B, L, count, c.head_dim
            )

        query = heads("query", c.num_heads)
        key = heads("key", c.num_kv_heads)
        value = heads("value", c.num_kv_heads)
        if c.qk_norm:
            query, key = Norm(c, name="query_norm")(query), Norm(c, name="key_norm")(key)
        if rope is not None:
            query, key = rotate(query, rope), rotate(key, rope)
        drops = c.attention_dropout > 0 and not deterministic
        dropout = nn.Dropout(c.attention_dropout, deterministic=False) if drops else None
        attended, cache = attend(query, key, value, dropout)
        attended = attended.reshape(B, L, c.num_heads * c.head_dim)
        out_bias = c.attention_bias if c.attention_out_bias is None else c.attention_out_bias
        return _dense(c, E, out_bias, "out", writes_residual=True)(attended), cache


class MLP(nn.Module):
    """Two matrix products around an activation; three if gated."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BxLxE):
        c = self.config
        activation = ACTIVATIONS[c.activation]
        hidden = _dense(c, c.intermediate_size, c.mlp_bias, "up")(x_BxLxE)
        if c.gated_mlp:
            hidden = hidden * activation(_dense(c, c.intermediate_size, c.mlp_bias, "gate")(x_BxLxE))
        else:
            hidden = activation(hidden)
        return _dense(c, x_BxLxE.shape[-1], c.mlp_bias, "down", writes_residual=True)(hidden)


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream, with norms before them or after the sums."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BxLxE, rope, attend, deterministic=True):
        c = self.config
        attention_norm, mlp_norm = Norm(c, name="attention_norm"), Norm(c, name="mlp_norm")
        dropout = nn.Dropout(c.residual_dropout, deterministic=deterministic)

        x_BxLxE = split_rows(x_BxLxE)
        update = attention_norm(x_BxLxE) if c.pre_norm else x_BxLxE
        update, cache = Attention(c, name="attention")(update, rope, attend, deterministic)
        if c.update_norm:
            update = Norm(c, name="attention_update_norm")(update)
        x_BxLxE = x_BxLxE + dropout(update)
        if not c.pre_norm:
            x_BxLxE = attention_norm(x_BxLxE)

        update = mlp_norm(x_BxLxE) if c.pre_norm else x_BxLxE
        update = MLP(c, name="mlp")(update)
        if c.update_norm:
            update = Norm(c, name="mlp_update_norm")(update)
        x_BxLxE = x_BxLxE + dropout(update)
        if not c.pre_norm:
            x_BxLxE = mlp_norm(x_BxLxE)
        return x_BxLxE, cache


class Embeddings(nn.Module):
    """Token embeddings, projected to the hidden width if they are narrower, plus learned positions unless rotary."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, tokens_BxL, positions_BxL, deterministic=True):
        c = self.config

        def embed(rows, width, name, indices):
            """Cast after the lookup, so that the gradients of a row that occurs often are summed in its own dtype."""
            table = nn.Embed(
                rows,
                width,
                param_dtype=jnp.dtype(c.param_dtype),
                embedding_init=nn.initializers.normal(c.init_std),
                name=name,
            )
            return table(indices).astype(c.dtype)

        x = embed(c.vocab_size, c.embed_size, "tokens", tokens_BxL)
        if c.scale_embeddings:
            x = x * jnp.asarray(c.hidden_size**0.5, c.dtype)
        if c.embed_size != c.hidden_size:
            x = _dense(c, c.hidden_size, False, "project_in")(x)
        if c.rope is None:
            rows = c.max_positions + c.position_offset
            x = x + embed(rows, c.hidden_size, "positions", positions_BxL + c.position_offset)
        return nn.Dropout(c.embedding_dropout, deterministic=deterministic)(x)


class Output(nn.Module):
    """The final norm and projection, between the last block and the head."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BxLxE):
        c = self.config
        if c.final_norm:
            x_BxLxE = Norm(c, name="norm")(x_BxLxE)
        if c.embed_size != c.hidden_size:
            x_BxLxE = _dense(c, c.embed_size, False, "project_out")(x_BxLxE)
        return x_BxLxE
