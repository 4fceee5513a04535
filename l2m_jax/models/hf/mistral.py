"""Mistral in Hugging Face's names: Llama, in which a token may see only a window of those before it."""

from l2m_jax.models.architecture import DecoderConfig
from l2m_jax.models.hf import llama
from l2m_jax.models.hf.config_json import Json, Key

ARCHITECTURE = "MistralForCausalLM"
PREFIX, IGNORED, DROPOUT = llama.PREFIX, None, llama.DROPOUT
RANDOM = llama.RANDOM | {"sliding_window": 4096, "norm_eps": 1e-6}

_KEYS = llama.keys_with(
    "attention_bias",
    "mlp_bias",
    intermediate_size=14336,
    num_key_value_heads=8,
    max_position_embeddings=131072,
) | {"sliding_window": Key("sliding_window", 4096)}


def read_config(hf: Json) -> DecoderConfig:
    return llama.read(hf, _KEYS, {}, family="mistral", rope=llama.read_rope(hf), attention_bias=False)


def write_config(config: DecoderConfig) -> Json:
    return llama.write_config(config, _KEYS)


weights = llama.weights
