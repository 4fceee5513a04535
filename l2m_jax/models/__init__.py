"""GPT-2, OPT, Llama and its successors as one decoder, loaded from and saved to Hugging Face folders."""

from l2m_jax.models.architecture import DecoderConfig, Rope
from l2m_jax.models.decoder import (
    Cache,
    apply_head,
    apply_output,
    decode_step,
    empty_cache,
    head,
    hidden_states,
    inference_dtype,
    init,
    logits,
    prefill,
    unstack_layers,
)
from l2m_jax.models.hf.folder import check, load, load_head, load_output, read_config, save
from l2m_jax.models.lora import Lora
from l2m_jax.models.settings import (
    Architecture,
    Compute,
    Model,
    random_config,
    with_compute,
    with_dropout,
)

__all__ = [
    "Architecture",
    "Cache",
    "Compute",
    "DecoderConfig",
    "Lora",
    "Model",
    "Rope",
    "apply_head",
    "apply_output",
    "check",
    "decode_step",
    "empty_cache",
    "head",
    "hidden_states",
    "inference_dtype",
    "init",
    "load",
    "load_head",
    "load_output",
    "logits",
    "prefill",
    "random_config",
    "read_config",
    "save",
    "unstack_layers",
    "with_compute",
    "with_dropout",
]
