"""The supported model families, by their Hugging Face `model_type`.

A family is a module with

- ARCHITECTURE: the class name in Hugging Face's config.json;
- PREFIX, IGNORED: how its files name tensors (see `SafetensorsFolder`);
- RANDOM: fields of `DecoderConfig` of a model with random weights, where they differ from the defaults there
  (`layer_types` is repeated over the layers);
- DROPOUT: the dropout rates that one `dropout` setting sets;
- read_config, write_config: from and to config.json;
- weights: the table of its tensors.
"""

from types import ModuleType

from l2m_jax.models.hf import gemma3, gpt2, llama, mistral, opt, qwen2, qwen3, smollm3

FAMILIES: dict[str, ModuleType] = {
    "gpt2": gpt2,
    "opt": opt,
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "mistral": mistral,
    "smollm3": smollm3,
    "gemma3_text": gemma3,
}
