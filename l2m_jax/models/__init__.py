"""GPT-2, OPT and Llama as one decoder, from and to Hugging Face folders."""

from l2m_jax.models.architecture import DecoderConfig, Rope
from l2m_jax.models.decoder import (
    Cache,
    apply_head,
    decode_step,
    empty_cache,
    head,
    hidden_states,
    init,
    logits,
    prefill,
    unstack_layers,
)

__all__ = [
    "Cache",
    "DecoderConfig",
    "Rope",
    "apply_head",
    "decode_step",
    "empty_cache",
    "head",
    "hidden_states",
    "init",
    "logits",
    "prefill",
    "unstack_layers",
]
