"""Published architectures of the paper's models and some newer ones, for planning without their files.

Each is given as the differences of its config.json on the hub from the family's defaults, and read by the same table
as the file itself.
"""

from typing import Any

from l2m_jax.models.architecture import DecoderConfig
from l2m_jax.models.hf import gemma3, gpt2, llama, mistral, opt, qwen2, qwen3, smollm3


def _gpt2(layers: int, heads: int, width: int) -> DecoderConfig:
    return gpt2.read_config({"n_layer": layers, "n_head": heads, "n_embd": width})


def _opt(layers: int, heads: int, width: int, **other: Any) -> DecoderConfig:
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": width}
    return opt.read_config({**sizes, "ffn_dim": 4 * width, **other})


def _open_llama(layers: int, width: int, intermediate: int) -> DecoderConfig:
    sizes = {"num_hidden_layers": layers, "num_attention_heads": 32, "hidden_size": width}
    return llama.read_config({**sizes, "intermediate_size": intermediate})


def _sizes(layers: int, heads: int, kv_heads: int, width: int, intermediate: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": width,
        "intermediate_size": intermediate,
    }


_QWEN: dict[str, Any] = {"rope_theta": 1e6, "tie_word_embeddings": True, "eos_token_id": 151645}


def _qwen25(*sizes: int, **other: Any) -> DecoderConfig:
    return qwen2.read_config(_QWEN | _sizes(*sizes) | other)


def _qwen3(*sizes: int) -> DecoderConfig:
    return qwen3.read_config(_QWEN | {"max_position_embeddings": 40960} | _sizes(*sizes))


def _gemma3(*sizes: int) -> DecoderConfig:
    other = {"vocab_size": 262144, "sliding_window": 512, "max_position_embeddings": 32768}
    return gemma3.read_config(other | _sizes(*sizes))


PUBLISHED: dict[str, DecoderConfig] = {
    "gpt2": _gpt2(12, 12, 768),
    "gpt2-medium": _gpt2(24, 16, 1024),
    "gpt2-large": _gpt2(36, 20, 1280),
    "gpt2-xl": _gpt2(48, 25, 1600),
    "facebook/opt-125m": _opt(12, 12, 768),
    "facebook/opt-350m": _opt(24, 16, 1024, word_embed_proj_dim=512, do_layer_norm_before=False),
    "facebook/opt-1.3b": _opt(24, 32, 2048),
    "facebook/opt-2.7b": _opt(32, 32, 2560),
    "openlm-research/open_llama_3b_v2": _open_llama(26, 3200, 8640),
    "openlm-research/open_llama_7b_v2": _open_llama(32, 4096, 11008),
    "Qwen/Qwen2.5-0.5B": _qwen25(24, 14, 2, 896, 4864),
    "Qwen/Qwen2.5-1.5B": _qwen25(28, 12, 2, 1536, 8960),
    "Qwen/Qwen2.5-3B-Instruct": _qwen25(36, 16, 2, 2048, 11008),
    "Qwen/Qwen2.5-7B-Instruct": _qwen25(28, 28, 4, 3584, 18944, vocab_size=152064, tie_word_embeddings=False),
    "Qwen/Qwen3-0.6B": _qwen3(28, 16, 8, 1024, 3072),
    "Qwen/Qwen3-1.7B": _qwen3(28, 16, 8, 2048, 6144),
    "Qwen/Qwen3-4B": _qwen3(36, 32, 8, 2560, 9728),
    "mistralai/Mistral-7B-v0.1": mistral.read_config({"max_position_embeddings": 32768}),
    "HuggingFaceTB/SmolLM3-3B": smollm3.read_config({"max_position_embeddings": 65536, "rope_theta": 5e6}),
    "google/gemma-3-270m": _gemma3(18, 4, 1, 640, 2048),
    "google/gemma-3-1b-pt": _gemma3(26, 4, 1, 1152, 6912),
}
