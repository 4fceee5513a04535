"""What distinguishes one decoder from another: sizes, norms, positions, and how it is to be computed."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from l2m_jax.errors import InputError
from l2m_jax.models.layers import ACTIVATIONS

_CHOICES = {
    "norm": ("layer", "rms"),
    "remat": ("none", "block", "dots"),
    "attention": ("auto", "xla", "cudnn"),
    "dtype": ("float32", "bfloat16", "float16"),
    "param_dtype": ("float32", "bfloat16", "float16"),
}


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embeddings (Su et al., 2021), and how their frequencies are stretched beyond the trained length.

    Attributes:
        theta: base of the geometric series of wavelengths.
        scaling: "default" leaves them alone, "linear" divides every frequency by `factor`, "llama3" only the low
            ones (wavelengths over `original_max_positions / low_freq_factor`), with a smooth passage.
        factor, low_freq_factor, high_freq_factor, original_max_positions: see `scaling`.
    """

    theta: float = 10_000.0
    scaling: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """One decoder-only transformer. Hashable, so that it can be a static argument of `jax.jit`.

    Attributes:
        family: "gpt2", "opt" or "llama": which table converts it from and to Hugging Face.
        vocab_size: rows of the token embedding.
        valid_vocab_size: how many of them are real tokens; logits of the rest are -inf.
        hidden_size: width E between the blocks.
        embed_size: width of the token embedding and of the head; below `hidden_size` in OPT-350M alone.
        num_layers, num_heads, num_kv_heads, head_dim, intermediate_size: the blocks.
        max_positions: longest sequence. A learned table has `max_positions + position_offset` rows.
        position_offset: row of the table that position 0 reads (2 in OPT).
        rope: rotary positions in place of a learned table.
        norm, norm_eps, norm_affine: "layer" or "rms"; whether norms have parameters.
        pre_norm: norms before attention and MLP; after each residual sum otherwise (OPT-350M).
        final_norm: a norm after the last block.
        activation: a key of `layers.ACTIVATIONS`, by its Hugging Face name.
        gated_mlp: down(act(gate(x)) * up(x)) in place of down(act(up(x))).
        attention_bias, mlp_bias: whether those projections have biases.
        scale_attention: divide attention scores by sqrt(head_dim).
        tie_embeddings: the head is the token embedding.
        embedding_dropout, attention_dropout, residual_dropout: rates, applied where Hugging Face applies them.
        init_std: standard deviation of fresh weights; `scaled_residual_init` divides it by sqrt(2 num_layers)
            in the projections that write to the residual stream (GPT-2).
        bos_token_id, eos_token_id, pad_token_id: as in the Hugging Face config; nothing here computes with them.
        dtype: of matrix products and of the residual stream. Norms, softmax and logits stay in float32.
        param_dtype: of the parameters.
        remat: what the backward pass computes again: nothing, the whole block ("block"), or everything in a block
            but its matrix products with parameters ("dots").
        scan_layers: one traced block for all layers (compile time independent of depth), or all of them unrolled
            (faster by what slicing stacked parameters costs). None: unrolled where there are at most 4.
        attention: "cudnn" (NVIDIA's fused kernel), "xla", or "auto": cuDNN where device, dtype and shapes allow.
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

    def __post_init__(self):
        # Accepts jnp.bfloat16 and the like, and keeps the name: it is what JSON and command lines can hold.
        for field in ("dtype", "param_dtype"):
            object.__setattr__(self, field, jnp.dtype(getattr(self, field)).name)
        for field, choices in (*_CHOICES.items(), ("activation", tuple(ACTIVATIONS))):
            if getattr(self, field) not in choices:
                raise InputError(
                    f"{field} is {getattr(self, field)!r}; it must be one of {', '.join(choices)}"
                )
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}, "
                "so the query heads cannot share the key/value heads evenly"
            )
        if self.rope is not None and self.head_dim % 2:
            raise InputError(f"head_dim {self.head_dim} is odd, but rotary positions turn pairs of numbers")
        if not 0 < self.valid_vocab_size <= self.vocab_size:
            raise InputError(
                f"valid_vocab_size {self.valid_vocab_size} must lie between 1 and vocab_size {self.vocab_size}; "
                "a tokenizer with more tokens than the embedding has rows belongs to another model"
            )
