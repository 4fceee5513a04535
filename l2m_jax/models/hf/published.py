"""Published architectures of the paper's models, for planning without their files.

Each is given as the differences of its config.json on the hub from the family's defaults, and read by the same table
as the file itself.
"""

from typing import Any

from l2m_jax.models.architecture import DecoderConfig
from l2m_jax.models.hf import gpt2, llama, opt


def _gpt2(layers: int, heads: int, width: int) -> DecoderConfig:
    return gpt2.read_config({"n_layer": layers, "n_head": heads, "n_embd": width})


def _opt(layers: int, heads: int, width: int, **other: Any) -> DecoderConfig:
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": width}
    return opt.read_config({**sizes, "ffn_dim": 4 * width, **other})


def _open_llama(layers: int, width: int, intermediate: int) -> DecoderConfig:
    sizes = {"num_hidden_layers": layers, "num_attention_heads": 32, "hidden_size": width}
    return llama.read_config({**sizes, "intermediate_size": intermediate})


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
}
