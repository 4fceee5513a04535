"""Qwen2 and Qwen2.5 in Hugging Face's names: Llama with biases on queries, keys and values."""

from l2m_jax.models.architecture import DecoderConfig, Rope
from l2m_jax.models.hf import llama
from l2m_jax.models.hf.config_json import Json

ARCHITECTURE = "Qwen2ForCausalLM"
PREFIX, IGNORED, DROPOUT = llama.PREFIX, None, llama.DROPOUT
_BIASES = {"attention_bias": True, "attention_out_bias": False}
RANDOM = llama.RANDOM | _BIASES | {"rope": Rope(theta=1e6), "norm_eps": 1e-6}

_KEYS = llama.keys_with(
    "attention_bias",
    "mlp_bias",
    vocab_size=151936,
    intermediate_size=22016,
    max_position_embeddings=32768,
    bos_token_id=None,
    eos_token_id=None,
)
# No published model uses it.
_REQUIRED = {"use_sliding_window": False}


def read_config(hf: Json) -> DecoderConfig:
    return llama.read(hf, _KEYS, _REQUIRED, family="qwen2", rope=llama.read_rope(hf), **_BIASES)


def write_config(config: DecoderConfig) -> Json:
    return llama.write_config(config, _KEYS) | _REQUIRED


weights = llama.weights
