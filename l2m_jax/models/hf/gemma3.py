"""Gemma 3 (text) in Hugging Face's names.

Five of six layers see a window and have rotary positions of their own. Norms come before and after attention and MLP,
and over queries and keys; they multiply by 1 + scale. Embeddings are multiplied by the root of the width.
"""

import dataclasses

from l2m_jax.errors import InputError, require_type
from l2m_jax.models.architecture import DecoderConfig, Rope
from l2m_jax.models.hf import llama
from l2m_jax.models.hf.config_json import Json, Key

ARCHITECTURE = "Gemma3ForCausalLM"
PREFIX, IGNORED, DROPOUT = llama.PREFIX, None, llama.DROPOUT
_BLOCKS = {
    "norm_zero_centered": True,
    "update_norm": True,
    "qk_norm": True,
    "scale_embeddings": True,
}
RANDOM = (
    llama.RANDOM
    | _BLOCKS
    | {
        "activation": "gelu_pytorch_tanh",
        "rope": Rope(theta=1e6),
        "sliding_rope": Rope(),
        "sliding_window": 512,
        "layer_types": ("sliding",) * 5 + ("full",),
        "norm_eps": 1e-6,
    }
)

_KEYS = llama.keys_with(
    "hidden_act",
    "mlp_bias",
    vocab_size=262208,
    hidden_size=2304,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    intermediate_size=9216,
    max_position_embeddings=131072,
    tie_word_embeddings=True,
    bos_token_id=2,
    eos_token_id=1,
    pad_token_id=0,
) | {
    "hidden_activation": Key("activation", "gelu_pytorch_tanh"),
    "sliding_window": Key("sliding_window", 4096),
    "query_pre_attn_scalar": Key("query_scalar", 256),
}
_REQUIRED = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
}
_TYPES = {"sliding_attention": "sliding", "full_attention": "full"}


def read_config(hf: Json) -> DecoderConfig:
    # transformers 5 writes one entry of "rope_parameters" for each kind of layer.
    require_type("config.json: rope_parameters", nested := hf.get("rope_parameters"), dict | None)
    ropes = nested or {}
    full = {"rope_scaling": hf.get("rope_scaling"), "rope_parameters": ropes.get("full_attention")}
    sliding = {"rope_parameters": ropes.get("sliding_attention")}
    sliding_rope = llama.read_rope(sliding, hf.get("rope_local_base_freq", 10_000.0))
    if sliding_rope.scaling != "default":
        raise InputError(
            "config.json: scaled rotary positions in sliding layers are not supported; choose another checkpoint"
        )
    config = llama.read(
        hf,
        _KEYS,
        _REQUIRED,
        family="gemma3_text",
        rope=llama.read_rope(full, hf.get("rope_theta", 1_000_000.0)),
        sliding_rope=sliding_rope,
        **_BLOCKS,
    )
    scalar = None if config.query_scalar == config.head_dim else config.query_scalar
    return dataclasses.replace(config, query_scalar=scalar, layer_types=_layer_types(hf, config.num_layers))


def _layer_types(hf: Json, num_layers: int) -> tuple[str, ...]:
    require_type("config.json: layer_types", given := hf.get("layer_types"), list | None)
    if given is not None:
        return tuple(_TYPES.get(str(kind), str(kind)) for kind in given)
    require_type("config.json: sliding_window_pattern", every := hf.get("sliding_window_pattern", 6), int)
    return tuple("sliding" if (n + 1) % max(every, 1) else "full" for n in range(num_layers))


def write_config(config: DecoderConfig) -> Json:
    assert config.sliding_rope is not None
    types = config.layer_types or ("sliding",) * config.num_layers
    written = {hf: ours for ours, hf in _TYPES.items()}
    return (
        llama.write_config(config, _KEYS)
        | {
            "rope_local_base_freq": config.sliding_rope.theta,
            "query_pre_attn_scalar": config.query_scalar or config.head_dim,
            "layer_types": [written[kind] for kind in types],
        }
        | _REQUIRED
    )


weights = llama.weights
