"""Adapters in the format of PEFT, which loads them onto the base model (https://github.com/huggingface/peft)."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from l2m_jax import files
from l2m_jax.models.architecture import DecoderConfig
from l2m_jax.models.hf.families import FAMILIES
from l2m_jax.models.hf.weights import Weight
from l2m_jax.models.lora import Lora
from l2m_jax.types import Params


def save(folder: Path, config: DecoderConfig, lora: Lora, adapters: Params, base: str) -> None:
    """Writes adapter_config.json and adapter_model.safetensors.

    Args:
        adapters: host arrays as from `Lora.init`.
        base: where PEFT finds the model without adapters: a folder or a hub name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    leaves: dict[str, Any] = flatten_dict(adapters, sep="/")
    modules: dict[str, list[Weight]] = {}
    for weight in FAMILIES[config.family].weights(config):
        if weight.path.endswith("/kernel") and _adapter(weight, "a") in leaves:
            modules.setdefault(weight.name.removesuffix(".weight"), []).append(weight)
    tensors, ranks, alphas = {}, {}, {}
    for name, pieces in modules.items():
        short = re.escape(name.partition("{}.")[2])
        if len(pieces) > 1:
            ranks[short], alphas[short] = len(pieces) * lora.rank, len(pieces) * lora.alpha
        for layer in range(config.num_layers):
            a, b = _tensors(pieces, [[leaves[_adapter(w, m)][layer] for w in pieces] for m in "ab"])
            of_layer = f"base_model.model.{name.format(layer)}"
            tensors[f"{of_layer}.lora_A.weight"], tensors[f"{of_layer}.lora_B.weight"] = a, b
    with files.replacing(folder / "adapter_model.safetensors") as unfinished:
        save_file(tensors, unfinished, metadata={"format": "pt"})
        unfinished.chmod(0o644)  # the library makes it readable for its owner only
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": [name.partition("{}.")[2] for name in modules],
        "fan_in_fan_out": not all(w.transpose for pieces in modules.values() for w in pieces),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    files.write_json(folder / "adapter_config.json", described)


def _adapter(weight: Weight, matrix: str) -> str:
    return f"{weight.path.removesuffix('kernel')}lora_{matrix}"


def _tensors(
    pieces: Sequence[Weight], layers: Sequence[Sequence[np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """A [rank, inputs] and B [outputs, rank] of one module, of PyTorch's shapes.

    Where a module holds several of our layers (GPT-2's query, key and value), its rank is the sum of theirs: A has theirs
    below each other, and B one block for each, zero elsewhere.
    """
    of_a, of_b = layers
    rank, outputs = of_b[0].shape
    b = np.zeros((pieces[0].parts * outputs, len(pieces) * rank), np.float32)
    for n, (weight, own) in enumerate(zip(pieces, of_b, strict=True)):
        b[weight.part * outputs : (weight.part + 1) * outputs, n * rank : (n + 1) * rank] = own.T
    return np.ascontiguousarray(np.concatenate([a.T for a in of_a])), b
