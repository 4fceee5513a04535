import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from l2m_jax import models
from l2m_jax.errors import InputError
from l2m_jax.models.hf import weights
from l2m_jax.models.hf.families import FAMILIES

CASES = json.loads((Path(__file__).parent / "golden" / "cases.json").read_text())
# Hugging Face configs of what the paper and its neighbours use: the fields that differ from the defaults.
_LLAMA_3B = {
    "hidden_size": 3200,
    "intermediate_size": 8640,
    "num_hidden_layers": 26,
    "num_attention_heads": 32,
}
SIZES = {
    "gpt2": ({"model_type": "gpt2"}, 124_439_808),
    "gpt2-medium": ({"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16}, 354_823_168),
    "gpt2-large": ({"model_type": "gpt2", "n_embd": 1280, "n_layer": 36, "n_head": 20}, 774_030_080),
    "gpt2-xl": ({"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25}, 1_557_611_200),
    "opt-125m": ({"model_type": "opt"}, 125_239_296),
    "opt-350m": (
        {
            "model_type": "opt",
            "hidden_size": 1024,
            "word_embed_proj_dim": 512,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "ffn_dim": 4096,
            "do_layer_norm_before": False,
        },
        331_196_416,
    ),
    "opt-1.3b": (
        {
            "model_type": "opt",
            "hidden_size": 2048,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "ffn_dim": 8192,
        },
        1_315_758_080,
    ),
    "opt-2.7b": (
        {
            "model_type": "opt",
            "hidden_size": 2560,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "ffn_dim": 10240,
        },
        2_651_596_800,
    ),
    "open_llama_3b": ({"model_type": "llama", **_LLAMA_3B}, 3_426_473_600),
    "open_llama_7b": ({"model_type": "llama"}, 6_738_415_616),
    "TinyLlama-1.1B": (
        {
            "model_type": "llama",
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_key_value_heads": 4,
        },
        1_100_048_384,
    ),
    "SmolLM2-135M": (
        {
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
        134_515_008,
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_published_sizes(tmp_path, name):
    hf, count = SIZES[name]
    (tmp_path / "config.json").write_text(json.dumps(hf))
    shapes = weights.parameter_shapes(models.read_config(tmp_path))
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == count


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_loads_again(write_model, tmp_path, name):
    tensors = write_model(tmp_path / "given", name)
    config, params = models.load(tmp_path / "given")
    models.save(tmp_path / "saved", config, params)
    again_config, again = models.load(tmp_path / "saved")
    assert again_config == config
    jax.tree.map(np.testing.assert_array_equal, again, params)
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert stored.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(stored[key], tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "transformer.h.1.ln_1.bias"}, r"lacks 1 tensor \(transformer\.h\.1\.ln_1\.bias\)"),
        ({"add": "transformer.h.2.ln_1.bias"}, r"has 1 tensor \(transformer\.h\.2\.ln_1\.bias\) that its config does not describe"),
        ({"add": "lora.weight"}, r"has 1 tensor \(transformer\.lora\.weight\)"),
        (
            {"reshape": "transformer.wpe.weight"},
            r"model\.safetensors: tensor transformer\.wpe\.weight has shape \[24, 6\], but its config requires \[24, 12\]",
        ),
        ({"config": {"n_layer": 3}}, r"lacks 12 tensors .* and 4 more"),
        ({"config": {"model_type": "mamba"}}, "model_type 'mamba' is not supported; choose one of gpt2, opt, llama"),
        ({"config": {"add_cross_attention": True}}, "add_cross_attention = True is not supported for gpt2"),
        ({"config": {"n_head": 5}}, "width 12 is not a multiple of the 5 attention heads"),
        ({"config": {"activation_function": "laplace"}}, "activation: 'laplace' is not one of"),
        ({"config": {"quantization_config": {"bits": 4}}}, "quantised weights are not supported"),
    ],
)  # fmt: skip
def test_weights_and_config_that_do_not_fit(write_model, tmp_path, change, message):
    tensors = write_model(tmp_path, **change.get("config", {}))
    if "drop" in change:
        del tensors[change["drop"]]
    if "add" in change:
        tensors[change["add"]] = np.zeros(12, np.float32)
    if "reshape" in change:
        tensors[change["reshape"]] = tensors[change["reshape"]][:, :6].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message) as raised:
        models.load(tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


_PEAK = """
import pathlib, re, sys, jax
from l2m_jax import models
from l2m_jax.parallel import Placement
small, large, param_dtype, mapping = sys.argv[1:]
put = Placement(mapping, tuple(jax.devices())).put if mapping else None
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
models.load(small, param_dtype=param_dtype, put=put)
before = peak()
params = models.load(large, param_dtype=param_dtype, put=put)[1]
print((peak() - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize(("param_dtype", "mapping"), [("float32", ""), ("bfloat16", ""), ("float32", "fsdp")])
def test_loading_needs_little_more_memory_than_the_parameters(write_model, tmp_path, param_dtype, mapping):
    write_model(tmp_path / "small")
    hf = {"model_type": "gpt2", "vocab_size": 20_000, "n_embd": 768, "n_layer": 8, "n_positions": 64}
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "config.json").write_text(json.dumps(hf))
    config = models.read_config(tmp_path / "large")
    shapes = weights.parameter_shapes(config)
    tensors = {
        weight.name.format(layer): np.ones(weights.tensor_shape(weight, shapes[weight.path]), np.float32)
        for weight in FAMILIES["gpt2"].weights(config)
        for layer in weights._layers(weight, shapes[weight.path])
    }
    save_file(tensors, tmp_path / "large" / "model.safetensors")
    del tensors
    command = [
        sys.executable,
        "-c",
        _PEAK,
        str(tmp_path / "small"),
        str(tmp_path / "large"),
        param_dtype,
        mapping,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 1.0 < float(done.stdout) < 1.3
