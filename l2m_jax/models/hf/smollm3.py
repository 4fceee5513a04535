"""SmolLM3 in Hugging Face's names: Llama, in which some layers have no positions at all (every fourth)."""

import dataclasses

from l2m_jax.errors import require_type
from l2m_jax.models.architecture import DecoderConfig, Rope
from l2m_jax.models.hf import llama
from l2m_jax.models.hf.config_json import Json

ARCHITECTURE = "SmolLM3ForCausalLM"
PREFIX, IGNORED, DROPOUT = llama.PREFIX, None, llama.DROPOUT
RANDOM = llama.RANDOM | {
    "rope": Rope(theta=5e6),
    "norm_eps": 1e-6,
    "layer_types": ("full", "full", "full", "no_rope"),
}

_KEYS = llama.keys_with(
    vocab_size=128256,
    hidden_size=2048,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=4,
    max_position_embeddings=32768,
    tie_word_embeddings=True,
    bos_token_id=128000,
    eos_token_id=128001,
    pad_token_id=128004,
)
# No published model uses it.
_REQUIRED = {"use_sliding_window": False}


def read_config(hf: Json) -> DecoderConfig:
    rope = llama.read_rope(hf, 2_000_000.0)
    config = llama.read(hf, _KEYS, _REQUIRED, family="smollm3", rope=rope)
    require_type("config.json: no_rope_layers", has_rope := hf.get("no_rope_layers"), list | None)
    if has_rope is None:
        require_type("config.json: no_rope_layer_interval", every := hf.get("no_rope_layer_interval", 4), int)
        has_rope = [(n + 1) % max(every, 1) for n in range(config.num_layers)]
    types = tuple("full" if rope else "no_rope" for rope in has_rope[: config.num_layers])
    return dataclasses.replace(config, layer_types=types)


def write_config(config: DecoderConfig) -> Json:
    types = config.layer_types or ("full",) * config.num_layers
    has_rope = [int(kind == "full") for kind in types]
    return llama.write_config(config, _KEYS) | {"no_rope_layers": has_rope} | _REQUIRED


weights = llama.weights
