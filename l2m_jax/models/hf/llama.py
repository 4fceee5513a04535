"""Llama in Hugging Face's names: Llama 1 to 3, OpenLLaMA, TinyLlama, SmolLM2; and what families after it share."""

from collections.abc import Mapping
from typing import Any

from l2m_jax.errors import InputError, require_type, shown
from l2m_jax.models.architecture import DecoderConfig, Rope
from l2m_jax.models.hf import config_json
from l2m_jax.models.hf.config_json import Json, Key
from l2m_jax.models.hf.weights import Weight, dense, norm

ARCHITECTURE = "LlamaForCausalLM"
PREFIX = "model."
# A buffer in old files, which follows from the config.
IGNORED = r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq"

# Llama has no dropout in Hugging Face. A `dropout` setting applies to the residual stream, as in the other families.
DROPOUT = ("residual_dropout",)
RANDOM = {
    "activation": "silu",
    "gated_mlp": True,
    "norm": "rms",
    "rope": Rope(),
    "attention_bias": False,
    "mlp_bias": False,
}

KEYS = {
    "vocab_size": Key("vocab_size", 32000),
    "hidden_size": Key("hidden_size", 4096),
    "num_hidden_layers": Key("num_layers", 32),
    "num_attention_heads": Key("num_heads", 32),
    "num_key_value_heads": Key("num_kv_heads", None),
    "head_dim": Key("head_dim", None),
    "intermediate_size": Key("intermediate_size", 11008),
    "max_position_embeddings": Key("max_positions", 2048),
    "hidden_act": Key("activation", "silu"),
    "rms_norm_eps": Key("norm_eps", 1e-6),
    "attention_bias": Key("attention_bias", False),
    "mlp_bias": Key("mlp_bias", False),
    "attention_dropout": Key("attention_dropout", 0.0),
    "initializer_range": Key("init_std", 0.02),
    "tie_word_embeddings": Key("tie_embeddings", False),
    "bos_token_id": Key("bos_token_id", 1),
    "eos_token_id": Key("eos_token_id", 2),
    "pad_token_id": Key("pad_token_id", None),
}
_ROPE_KEYS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_positions",
}


def keys_with(*without: str, **defaults: Any) -> dict[str, Key]:
    """Llama's keys `without` some, and with other defaults."""
    return {
        name: key._replace(default=defaults.get(name, key.default))
        for name, key in KEYS.items()
        if name not in without
    }


def read_config(hf: Json) -> DecoderConfig:
    return read(hf, KEYS, {}, family="llama", rope=read_rope(hf))


def read(hf: Json, keys: Mapping[str, Key], required: Mapping[str, Any], **fixed: Any) -> DecoderConfig:
    """The config of a family whose blocks are Llama's but for `fixed`, fields of `DecoderConfig`."""
    fields = config_json.read(hf, keys, required)
    width, heads = fields["hidden_size"], fields["num_heads"]
    fields["num_kv_heads"] = fields["num_kv_heads"] or heads
    fields["head_dim"] = fields.get("head_dim") or config_json.head_dim(width, heads)
    common = {"norm": "rms", "gated_mlp": True, "mlp_bias": False, "embed_size": width}
    return DecoderConfig(**common | {"valid_vocab_size": fields["vocab_size"]} | fixed | fields)


def read_rope(hf: Json, theta: float = 10_000.0) -> Rope:
    """Rotary positions; `theta` where the file names none."""
    # transformers 5 writes "rope_parameters"; before it, "rope_theta" and "rope_scaling".
    given: Json = {}
    for key in ("rope_scaling", "rope_parameters"):
        require_type(f"config.json: {key}", found := hf.get(key), dict | None)
        given |= found or {}
    theta = given.get("rope_theta", hf.get("rope_theta", theta))
    scaling = given.get("rope_type", given.get("type", "default"))
    if scaling not in ["default", "linear", "llama3"]:
        raise InputError(
            f"config.json: rope type {shown(scaling)} is not supported (default, linear, llama3); choose another checkpoint"
        )
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError("config.json: partial_rotary_factor is not supported; choose another checkpoint")
    numbers = {field: given[key] for key, field in _ROPE_KEYS.items() if given.get(key) is not None}
    try:
        return Rope(theta=theta, scaling=scaling, **numbers)
    except InputError as error:
        raise InputError(f"config.json: rope: {error}") from error


def write_config(config: DecoderConfig, keys: Mapping[str, Key] = KEYS) -> Json:
    rope = config.rope
    assert rope is not None
    scaling: Json | None = None
    if rope.scaling != "default":
        used = _ROPE_KEYS if rope.scaling == "llama3" else {"factor": "factor"}
        scaling = {"rope_type": rope.scaling} | {key: getattr(rope, field) for key, field in used.items()}
    # The older form, which every version of transformers and every inference server reads.
    return config_json.write(config, keys) | {"rope_theta": rope.theta, "rope_scaling": scaling}


def weights(config: DecoderConfig) -> list[Weight]:
    layer, attention = "model.layers.{}", "model.layers.{}.self_attn"
    out_bias = config.attention_bias if config.attention_out_bias is None else config.attention_out_bias
    head_norms, mlp_norms, after_attention = [], [], "mlp_norm"
    if config.qk_norm:
        head_norms += norm(config, f"{attention}.q_norm", "blocks/attention/query_norm")
        head_norms += norm(config, f"{attention}.k_norm", "blocks/attention/key_norm")
    if config.update_norm:
        after_attention = "attention_update_norm"
        mlp_norms += norm(config, f"{layer}.pre_feedforward_layernorm", "blocks/mlp_norm")
        mlp_norms += norm(config, f"{layer}.post_feedforward_layernorm", "blocks/mlp_update_norm")
    table = [
        Weight("model.embed_tokens.weight", "embeddings/tokens/embedding"),
        *norm(config, f"{layer}.input_layernorm", "blocks/attention_norm"),
        *dense(f"{attention}.q_proj", "blocks/attention/query", config.attention_bias),
        *dense(f"{attention}.k_proj", "blocks/attention/key", config.attention_bias),
        *dense(f"{attention}.v_proj", "blocks/attention/value", config.attention_bias),
        *dense(f"{attention}.o_proj", "blocks/attention/out", out_bias),
        *head_norms,
        *norm(config, f"{layer}.post_attention_layernorm", f"blocks/{after_attention}"),
        *mlp_norms,
        *dense(f"{layer}.mlp.gate_proj", "blocks/mlp/gate", config.mlp_bias),
        *dense(f"{layer}.mlp.up_proj", "blocks/mlp/up", config.mlp_bias),
        *dense(f"{layer}.mlp.down_proj", "blocks/mlp/down", config.mlp_bias),
        *norm(config, "model.norm", "output/norm"),
    ]
    return table if config.tie_embeddings else [*table, Weight("lm_head.weight", "head/embedding")]
