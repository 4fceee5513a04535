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
from l2m_jax.models.hf.folder import load, read_config, save
from l2m_jax.models.student import student_from_teacher
from l2m_jax.reporting.card import ModelCard

__all__ = [
    "Cache",
    "DecoderConfig",
    "ModelCard",
    "Rope",
    "apply_head",
    "decode_step",
    "empty_cache",
    "head",
    "hidden_states",
    "init",
    "load",
    "logits",
    "prefill",
    "read_config",
    "save",
    "student_from_teacher",
    "unstack_layers",
]
