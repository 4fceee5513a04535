"""Settings of a model, and the `DecoderConfig` that they describe."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax

from l2m_jax.errors import InputError, require_at_least, require_choice, require_positive
from l2m_jax.models.architecture import DecoderConfig
from l2m_jax.models.hf.families import FAMILIES

_RATES = ("embedding_dropout", "attention_dropout", "residual_dropout")


@dataclass(frozen=True)
class Architecture:
    """A model with random weights, used if `Model.path` is empty."""

    family: str = "gpt2"  # a key of `hf.families.FAMILIES`: "gpt2", "opt", "llama", "qwen3", ...
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 0  # 0: as many as num_heads
    hidden_size: int = 128
    intermediate_size: int = 0  # 0: four times hidden_size
    max_positions: int = 1024

    def __post_init__(self):
        require_choice(self, "family", FAMILIES)
        require_positive(self, "num_layers", "num_heads", "hidden_size", "max_positions")
        require_at_least(self, 0, "num_kv_heads", "intermediate_size")
        if self.hidden_size % self.num_heads:
            raise InputError(
                f"hidden_size: {self.hidden_size} must be a multiple of num_heads {self.num_heads}"
            )
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise InputError(f"num_kv_heads: {self.num_kv_heads} must divide num_heads {self.num_heads}")
        rotates = "rope" in FAMILIES[self.family].RANDOM
        if not rotates and self.num_kv_heads not in (0, self.num_heads):
            raise InputError(
                f"num_kv_heads: {self.num_kv_heads} must be 0 or num_heads {self.num_heads}, as {self.family} models "
                "share no key/value heads"
            )
        if rotates and self.hidden_size // self.num_heads % 2:
            raise InputError(
                f"hidden_size: {self.hidden_size} with num_heads {self.num_heads} must give an even head size, "
                f"as the rotary positions of {self.family} models rotate pairs"
            )


@dataclass(frozen=True)
class Model:
    """Where a model's weights come from."""

    path: str = ""  # Hugging Face folder, GGUF file or hub name; empty: random weights of `architecture`
    init: str = "pretrained"  # "pretrained", "random", or "teacher_layers" for a student
    layers: tuple[int, ...] = ()  # for "teacher_layers": the teacher's layers to keep, in order, from 0
    architecture: Architecture = field(default_factory=Architecture)

    def __post_init__(self):
        require_choice(self, "init", ("pretrained", "random", "teacher_layers"))
        if negative := [layer for layer in self.layers if layer < 0]:
            raise InputError(f"layers: {negative[0]} must be 0 or more, the lowest layer being 0")
        if self.init == "teacher_layers" and not self.layers:
            raise InputError(
                "layers: empty; with init 'teacher_layers', name the layers to keep, such as (0, 3, 6)"
            )
        if self.layers and self.init != "teacher_layers":
            raise InputError(f"layers: {self.layers} is for init 'teacher_layers', and init is {self.init!r}")


@dataclass(frozen=True)
class Compute:
    """How a model is computed: changes its cost and rounding only."""

    dtype: str = (
        "auto"  # of products: "float32", "bfloat16", or "auto": bfloat16 on GPU and TPU, float32 on CPU
    )
    remat: str = (
        "none"  # what the backward pass recomputes: "none", "block", or "dots" (all but matrix products)
    )

    def __post_init__(self):
        require_choice(self, "dtype", ("auto", "float32", "bfloat16"))
        require_choice(self, "remat", ("none", "block", "dots"))


def random_config(architecture: Architecture, tokenizer: Any) -> DecoderConfig:
    """The config of a model with random weights for a `transformers` tokenizer, with its family's dropout rates."""
    a = architecture
    fields = dict(FAMILIES[a.family].RANDOM)
    if types := fields.pop("layer_types", ()):
        fields["layer_types"] = tuple(types[n % len(types)] for n in range(a.num_layers))
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return DecoderConfig(
        family=a.family,
        vocab_size=len(tokenizer),
        valid_vocab_size=len(tokenizer),
        hidden_size=a.hidden_size,
        embed_size=a.hidden_size,
        num_layers=a.num_layers,
        num_heads=a.num_heads,
        num_kv_heads=a.num_kv_heads or a.num_heads,
        head_dim=a.hidden_size // a.num_heads,
        intermediate_size=a.intermediate_size or 4 * a.hidden_size,
        max_positions=a.max_positions,
        **special,
        **fields,
    )


def with_compute(config: DecoderConfig, compute: Compute, platform: str | None = None) -> DecoderConfig:
    """`config` computed as `compute` says on `platform` ("cpu", "gpu" or "tpu"; None: that of the devices at hand)."""
    dtype = compute.dtype
    if dtype == "auto":
        dtype = "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"
    return dataclasses.replace(config, dtype=dtype, remat=compute.remat)


def with_dropout(config: DecoderConfig, dropout: float) -> DecoderConfig:
    """`config` with dropout for training. Folders do not store every rate, so apply it after each load that trains.

    Args:
        dropout: the rate for all places where the family has dropout; the other rates become 0. Negative: the rates
            stay those of the model's own config.

    Raises:
        InputError: the rate is not below 1.
    """
    if dropout < 0:
        return config
    if not dropout < 1:
        raise InputError(f"dropout: {dropout!r} must be below 1 (negative: the model's own rates)")
    chosen = FAMILIES[config.family].DROPOUT
    return dataclasses.replace(config, **{rate: dropout if rate in chosen else 0.0 for rate in _RATES})
