"""Adapters on disk and their settings."""

import importlib.util
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from l2m_jax import models
from l2m_jax.errors import InputError
from l2m_jax.models import DecoderConfig, Lora, Rope
from l2m_jax.models.hf import peft

QWEN = DecoderConfig(
    family="qwen2", vocab_size=60, valid_vocab_size=60, hidden_size=16, embed_size=16, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=8, intermediate_size=24, max_positions=32, init_std=0.3, norm="rms", rope=Rope(),
    activation="silu", gated_mlp=True, mlp_bias=False, attention_out_bias=False,
)  # fmt: skip
GPT2 = DecoderConfig(
    family="gpt2", vocab_size=60, valid_vocab_size=60, hidden_size=16, embed_size=16, num_layers=2, num_heads=2,
    num_kv_heads=2, head_dim=8, intermediate_size=32, max_positions=32, init_std=0.3,
)  # fmt: skip


def _saved(folder, config, lora):
    """Saves a base, its merge and its adapter; returns the tensors of each, and the description of the adapter."""
    key, rng = jax.random.key(0), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: (models.init(config, key), lora.init(config, key)))
    base, adapters = jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), shapes)
    models.save(folder / "base", config, base)
    models.save(folder / "merged", config, lora.merged(adapters, jax.tree.map(np.copy, base)))
    peft.save(folder / "merged" / "adapter", config, lora, adapters, str(folder / "base"))
    tensors = [load_file(folder / name / "model.safetensors") for name in ("base", "merged")]
    adapter = load_file(folder / "merged" / "adapter" / "adapter_model.safetensors")
    described = json.loads((folder / "merged" / "adapter" / "adapter_config.json").read_text())
    return *tensors, adapter, described


def test_the_merged_model_is_the_base_and_the_scaled_product_of_the_adapter(tmp_path):
    lora = Lora(rank=3, alpha=12.0, targets=("query", "gate"))
    base, merged, adapter, described = _saved(tmp_path, QWEN, lora)
    shapes = {}
    for layer in range(2):
        for module, out in (("self_attn.q_proj", 16), ("mlp.gate_proj", 24)):
            name = f"base_model.model.model.layers.{layer}.{module}"
            shapes |= {f"{name}.lora_A.weight": (3, 16), f"{name}.lora_B.weight": (out, 3)}
    assert {name: tensor.shape for name, tensor in adapter.items()} == shapes
    for name, tensor in merged.items():
        of_module = f"base_model.model.{name.removesuffix('.weight')}"
        expected = base[name]
        if f"{of_module}.lora_A.weight" in adapter:
            a, b = adapter[f"{of_module}.lora_A.weight"], adapter[f"{of_module}.lora_B.weight"]
            expected = expected + 12.0 / 3 * b @ a
        np.testing.assert_allclose(tensor, expected, rtol=1e-5, atol=1e-6)
    assert described["peft_type"] == "LORA" and described["task_type"] == "CAUSAL_LM"
    assert (described["r"], described["lora_alpha"], described["fan_in_fan_out"]) == (3, 12.0, False)
    assert described["target_modules"] == ["self_attn.q_proj", "mlp.gate_proj"]
    assert described["base_model_name_or_path"] == str(tmp_path / "base")


def test_a_module_that_holds_several_layers_has_the_sum_of_their_ranks(tmp_path):
    base, merged, adapter, described = _saved(tmp_path, GPT2, Lora(2, 8.0, ("query", "value", "down")))
    assert described["rank_pattern"] == {r"attn\.c_attn": 4} and described["alpha_pattern"] == {
        r"attn\.c_attn": 16.0
    }
    assert described["target_modules"] == ["attn.c_attn", "mlp.c_proj"] and described["fan_in_fan_out"]
    for module in ("attn.c_attn", "mlp.c_proj"):
        name = f"transformer.h.1.{module}"
        a, b = (adapter[f"base_model.model.{name}.lora_{matrix}.weight"] for matrix in "AB")
        difference = (
            merged[f"{name}.weight"] - base[f"{name}.weight"]
        )  # [inputs, outputs], as GPT-2 stores it
        np.testing.assert_allclose(difference, 8.0 / 2 * (b @ a).T, rtol=1e-4, atol=1e-5)
    keys = merged["transformer.h.0.attn.c_attn.weight"][:, 16:32]
    np.testing.assert_array_equal(keys, base["transformer.h.0.attn.c_attn.weight"][:, 16:32])


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft and PyTorch are not installed")
@pytest.mark.parametrize("config", [QWEN, GPT2], ids=lambda config: config.family)
def test_peft_computes_the_logits_of_the_merged_model(tmp_path, config):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    _saved(tmp_path, config, Lora(rank=3, alpha=12.0))
    tokens = torch.arange(20)[None]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = PeftModel.from_pretrained(base, tmp_path / "merged" / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(tokens).logits, merged(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_target_that_the_model_lacks_lists_those_that_it_has():
    lora = Lora(rank=2, targets=("query", "gate"))
    with pytest.raises(
        InputError, match="no dense layer 'gate'; choose from query, key, value, out, up, down"
    ):
        lora.init(GPT2, jax.random.key(0))
    assert len(Lora(rank=2).scales(GPT2)["blocks"]["attention"]) == 4  # all that there are


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rank": -1}, "rank: -1 must be 0 or more"),
        ({"alpha": 0.0}, "alpha: 0.0 must be greater than 0"),
        ({"targets": ("q_proj",)}, "targets: 'q_proj' is not one of query, key, value, out, gate, up, down"),
        ({"targets": ("up", "up")}, "names a layer twice"),
    ],
)
def test_settings_that_are_refused(settings, says):
    with pytest.raises(InputError, match=says):
        Lora(**settings)
