"""The configuration of a decoder: sizes, norms, positions, and how it is computed."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp

from l2m_jax.errors import (
    InputError,
    require_at_least,
    require_choice,
    require_fraction,
    require_positive,
    require_types,
    shown,
)
from l2m_jax.models.activations import ACTIVATIONS

_CHOICES = {
    "norm": ("layer", "rms"),
    "remat": ("none", "block", "dots"),
    "attention": ("auto", "xla", "cudnn"),
    "dtype": ("float32", "bfloat16", "float16"),
    "param_dtype": ("float32", "bfloat16", "float16"),
    "activation": tuple(ACTIVATIONS),
}
# Indices on the devices are int32.
_INT32 = (
    "vocab_size",
    "hidden_size",
    "embed_size",
    "head_dim",
    "intermediate_size",
    "max_positions",
    "sliding_window",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_MOST_LAYERS = 1 << 14
_LAYER_TYPES = ("full", "sliding", "no_rope")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embeddings (Su et al., 2021), and how their frequencies are scaled for longer sequences.

    Attributes:
        theta: base of the geometric series of wavelengths.
        scaling: "default" changes nothing; "linear" divides every frequency by `factor`; "llama3" divides only the
            low ones (wavelengths over `original_max_positions / low_freq_factor`), with a smooth transition.
        factor, low_freq_factor, high_freq_factor, original_max_positions: see `scaling`.
    """

    theta: float = 10_000.0
    scaling: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self):
        require_types(self)
        require_positive(
            self, "theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_positions"
        )


class LayerKind(NamedTuple):
    """What may differ from layer to layer.

    Attributes:
        window: how many tokens a token sees, itself included; None: all before it.
        rope: its rotary positions; None: none.
    """

    window: int | None
    rope: Rope | None


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer. Hashable, so that it can be a static argument of `jax.jit`.

    Attributes:
        family: a key of `hf.families.FAMILIES`, which converts it from and to Hugging Face.
        vocab_size: rows of the token embedding.
        valid_vocab_size: how many of them are real tokens; logits of the others are -inf.
        hidden_size: width E of the residual stream.
        embed_size: width of the token embedding and of the head; smaller than `hidden_size` only in OPT-350M.
        num_layers, num_heads, num_kv_heads, head_dim, intermediate_size: the blocks.
        max_positions: the longest sequence. A learned table has `max_positions + position_offset` rows.
        position_offset: row of the table that position 0 reads (2 in OPT).
        rope: rotary positions instead of a learned table.
        layer_types: of each layer "full", "sliding" (`sliding_window`, `sliding_rope`) or "no_rope" (no positions at
            all, SmolLM3). Empty: all sliding if there is a `sliding_window`, all full otherwise.
        sliding_window: in sliding layers a token sees so many tokens, itself included.
        sliding_rope: rotary positions of sliding layers where they differ from `rope` (Gemma 3).
        norm, norm_eps, norm_affine: "layer" or "rms"; whether norms have parameters.
        norm_zero_centered: norms multiply by 1 + scale (Gemma).
        pre_norm: norms before attention and MLP; otherwise after each residual sum (OPT-350M).
        update_norm: another norm after attention and MLP, before each residual sum (Gemma).
        qk_norm: norms over each head of queries and keys, before they are rotated (Qwen3, Gemma 3).
        final_norm: a norm after the last block.
        activation: a key of `activations.ACTIVATIONS`.
        gated_mlp: down(act(gate(x)) * up(x)) instead of down(act(up(x))).
        attention_bias, mlp_bias: whether those projections have biases.
        attention_out_bias: whether the projection from the heads has one. None: as `attention_bias`.
        scale_attention: divide attention scores by sqrt(head_dim), or by sqrt(query_scalar) if it is given (Gemma).
        scale_embeddings: multiply token embeddings by sqrt(hidden_size), rounded to `dtype` first (Gemma).
        tie_embeddings: the head is the token embedding.
        embedding_dropout, attention_dropout, residual_dropout: rates, applied where Hugging Face applies them.
        init_std: standard deviation of random weights; `scaled_residual_init` divides it by sqrt(2 num_layers)
            in projections that write to the residual stream (GPT-2).
        bos_token_id, eos_token_id, pad_token_id: as in the Hugging Face config; the model does not use them.
        dtype: of matrix products and the residual stream. Norms, softmax and logits are always float32.
        param_dtype: of the parameters.
        remat: what the backward pass recomputes: "none", the whole block ("block"), or everything in a block except
            matrix products with parameters ("dots").
        scan_layers: trace one block for all layers (compile time independent of depth), or unroll them (faster, as
            stacked parameters need no slicing). None: unroll up to 4 layers.
        attention: "cudnn" (NVIDIA's fused kernel), "xla", or "auto": cuDNN if it supports device, dtype and shapes.
    """

    family: str
    vocab_size: int
    valid_vocab_size: int
    hidden_size: int
    embed_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    position_offset: int = 0
    rope: Rope | None = None
    norm: str = "layer"
    norm_eps: float = 1e-5
    norm_affine: bool = True
    pre_norm: bool = True
    final_norm: bool = True
    activation: str = "gelu_new"
    gated_mlp: bool = False
    attention_bias: bool = True
    mlp_bias: bool = True
    scale_attention: bool = True
    tie_embeddings: bool = True
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    init_std: float = 0.02
    scaled_residual_init: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    scan_layers: bool | None = None
    attention: str = "auto"
    layer_types: tuple[str, ...] = ()
    sliding_window: int | None = None
    sliding_rope: Rope | None = None
    norm_zero_centered: bool = False
    update_norm: bool = False
    qk_norm: bool = False
    attention_out_bias: bool | None = None
    query_scalar: float | None = None
    scale_embeddings: bool = False

    def __post_init__(self):
        # Accepts jnp.bfloat16 and the like, but stores the name, which JSON and command lines can hold.
        for field in ("dtype", "param_dtype"):
            object.__setattr__(self, field, jnp.dtype(getattr(self, field)).name)
        require_types(self)
        for field, choices in _CHOICES.items():
            require_choice(self, field, choices)
        require_positive(self, "vocab_size", "hidden_size", "embed_size", "num_layers", "num_heads")
        require_positive(self, "num_kv_heads", "head_dim", "intermediate_size", "max_positions")
        require_at_least(self, 0, "norm_eps", "init_std", "position_offset")
        for field in _INT32:
            numbers = getattr(self, field)
            for number in numbers if isinstance(numbers, tuple) else (numbers,):
                if number is not None and not -(2**31) <= number < 2**31:
                    raise InputError(f"{field}: {shown(number)} must fit into 32 bits")
        if self.num_layers > _MOST_LAYERS:
            raise InputError(f"num_layers: {self.num_layers} must be at most {_MOST_LAYERS}")
        require_fraction(self, "embedding_dropout", "attention_dropout", "residual_dropout", below_one=True)
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_kv_heads: {self.num_kv_heads} must divide num_heads {self.num_heads}, so that the query heads "
                "share the key/value heads evenly"
            )
        if self.rope is not None and self.head_dim % 2:
            raise InputError(f"head_dim: {self.head_dim} must be even, as rotary positions rotate pairs")
        self._check_layer_types()
        if not 0 < self.valid_vocab_size <= self.vocab_size:
            raise InputError(
                f"valid_vocab_size: {self.valid_vocab_size} must be between 1 and vocab_size {self.vocab_size}; "
                "a tokenizer with more tokens than the embedding has rows belongs to another model"
            )

    def _check_layer_types(self) -> None:
        for name in ("sliding_window", "query_scalar"):
            if getattr(self, name) is not None:
                require_positive(self, name)
        if self.layer_types and len(self.layer_types) != self.num_layers:
            raise InputError(
                f"layer_types: {len(self.layer_types)} entries, but num_layers is {self.num_layers}; give one for "
                "each layer"
            )
        if unknown := [kind for kind in self.layer_types if kind not in _LAYER_TYPES]:
            raise InputError(f"layer_types: {shown(unknown[0])} is not one of {', '.join(_LAYER_TYPES)}")
        if "sliding" in self.layer_types and self.sliding_window is None:
            raise InputError("layer_types: 'sliding' needs a sliding_window, which is not given")

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """What differs between layers, one entry for each of them."""
        kinds = {
            "full": LayerKind(None, self.rope),
            "sliding": LayerKind(self.sliding_window, self.sliding_rope or self.rope),
            "no_rope": LayerKind(None, None),
        }
        types = self.layer_types or ("sliding",) * self.num_layers
        return tuple(kinds[kind] for kind in types)

    def keep_layers(self, layers: Sequence[int]) -> "DecoderConfig":
        """The config of a model of these layers alone, in this order."""
        types = tuple(self.layer_types[layer] for layer in layers) if self.layer_types else ()
        return dataclasses.replace(self, num_layers=len(layers), layer_types=types)

    @property
    def has_dropout(self) -> bool:
        return max(self.embedding_dropout, self.attention_dropout, self.residual_dropout) > 0

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All tokens that end a sequence; empty if the config names none."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)
