import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from l2m_jax import models
from l2m_jax.errors import InputError
from l2m_jax.models import hub, weights

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())
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


def write_model(folder: Path, name: str = "gpt2", **changes) -> dict[str, np.ndarray]:
    """A golden case as a Hugging Face folder; returns its tensors."""
    prefix = "weight/"
    golden = load_file(GOLDEN / f"{name}.safetensors")
    tensors = {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CASES[name] | changes))
    return tensors


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", SIZES)
def test_the_published_sizes(tmp_path, name):
    hf, count = SIZES[name]
    (tmp_path / "config.json").write_text(json.dumps(hf))
    shapes = weights.parameter_shapes(models.read_config(tmp_path))
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == count


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_loads_again(tmp_path, name):
    tensors = write_model(tmp_path / "given", name)
    config, params = models.load(tmp_path / "given")
    models.save(tmp_path / "saved", config, params)
    again_config, again = models.load(tmp_path / "saved")
    assert again_config == config
    assert_trees_equal(again, params)
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert stored.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(stored[key], tensor)


def test_shards_with_an_index(tmp_path):
    write_model(tmp_path / "given")
    config, params = models.load(tmp_path / "given")
    models.save(tmp_path, config, params, shard_bytes=4096)
    shards = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert_trees_equal(models.load(tmp_path)[1], params)

    models.save(tmp_path, config, params)
    assert sorted(file.name for file in tmp_path.iterdir() if file.is_file()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]

    models.save(tmp_path, config, params, shard_bytes=4096)
    (tmp_path / shards[1]).unlink()
    with pytest.raises(InputError, match=f"lacks {shards[1]}.*fetch the missing shards"):
        models.load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match=r"index\.json is not a safetensors index"):
        models.load(tmp_path)


def test_dtypes_of_storage_parameters_and_computation(tmp_path):
    write_model(tmp_path)
    _, exact = models.load(tmp_path)
    config, params = models.load(tmp_path, dtype="bfloat16", param_dtype="bfloat16")
    assert (config.dtype, config.param_dtype) == ("bfloat16", "bfloat16")
    assert_trees_equal(params, jax.tree.map(lambda leaf: leaf.astype("bfloat16"), exact))
    models.save(tmp_path / "half", config, params, dtype="bfloat16")
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert_trees_equal(models.load(tmp_path / "half", param_dtype="bfloat16")[1], params)


@pytest.mark.parametrize("name", ["gpt2", "opt_350m", "llama_gqa_tied"])
def test_loading_onto_several_devices(tmp_path, name):
    write_model(tmp_path, name)
    _, expected = models.load(tmp_path)
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(AxisType.Auto,))
    seen = {}

    def sharding(path, shape):
        axes = [i for i, n in enumerate(shape) if n % 4 == 0 and not (i == 0 and path.startswith("blocks/"))]
        seen[path] = NamedSharding(
            mesh, PartitionSpec(*([None] * axes[-1]), "devices") if axes else PartitionSpec()
        )
        return seen[path]

    _, params = models.load(tmp_path, sharding=sharding)
    assert_trees_equal(jax.tree.map(np.asarray, params), expected)
    for path, leaf in weights._flat(params).items():
        assert leaf.sharding == seen[path]
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))


def test_names_that_older_files_use(tmp_path):
    tensors = write_model(tmp_path)
    _, expected = models.load(tmp_path)
    older = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    older |= {f"h.{i}.attn.bias": np.ones((1, 1, 24, 24), np.float32) for i in range(2)}
    older |= {"h.0.attn.masked_bias": np.float32([-1e4]), "lm_head.weight": tensors["transformer.wte.weight"]}
    save_file(older, tmp_path / "model.safetensors")
    assert_trees_equal(models.load(tmp_path)[1], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "transformer.h.1.ln_1.bias"}, r"lacks 1 tensor \(transformer\.h\.1\.ln_1\.bias\)"),
        ({"add": "transformer.h.2.ln_1.bias"}, r"holds 1 tensor \(transformer\.h\.2\.ln_1\.bias\), for which .* no place"),
        ({"add": "lora.weight"}, r"holds 1 tensor \(transformer\.lora\.weight\)"),
        (
            {"reshape": "transformer.wpe.weight"},
            r"model\.safetensors: tensor transformer\.wpe\.weight has shape \[24, 6\], but its config makes it \[24, 12\]",
        ),
        ({"config": {"n_layer": 3}}, r"lacks 12 tensors .* and 4 more"),
        ({"config": {"model_type": "mamba"}}, "model_type 'mamba' is not supported; choose one of gpt2, opt, llama"),
        ({"config": {"add_cross_attention": True}}, "add_cross_attention = True is not supported for gpt2"),
        ({"config": {"n_head": 5}}, "width 12 is not a multiple of the 5 attention heads"),
        ({"config": {"activation_function": "laplace"}}, "activation is 'laplace'"),
        ({"config": {"quantization_config": {"bits": 4}}}, "quantised weights are not supported"),
    ],
)  # fmt: skip
def test_weights_and_config_that_do_not_fit(tmp_path, change, message):
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


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
    ],
)
def test_rotary_positions_of_other_kinds(tmp_path, rope, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | rope))
    with pytest.raises(InputError, match=message):
        models.read_config(tmp_path)


def test_a_file_that_is_cut_off(tmp_path):
    write_model(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors is cut off or no safetensors file"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"')
    with pytest.raises(InputError, match=r"config\.json is not JSON"):
        models.load(tmp_path)


def test_folders_without_a_model(tmp_path):
    with pytest.raises(InputError, match=r"no such model folder '\./nowhere'"):
        models.load("./nowhere")
    with pytest.raises(InputError, match=r"has no config\.json"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CASES["gpt2"]))
    with pytest.raises(InputError, match=r"has no model\.safetensors"):
        models.load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"only PyTorch weights \(pytorch_model\.bin\).*save_pretrained"):
        models.load(tmp_path)


def test_a_hub_name_without_a_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=r"'nobody/no-such-model' is no folder here.*pass the path of a folder"
    ) as raised:
        models.load("nobody/no-such-model")
    assert "\n" not in str(raised.value)


def test_a_hub_name_is_fetched_once_and_read_as_a_folder(tmp_path, monkeypatch):
    write_model(tmp_path)
    asked = {}

    def snapshot_download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    config, _ = models.load("someone/tiny-gpt2")
    assert config == models.read_config(tmp_path)
    assert "*.safetensors" in asked["someone/tiny-gpt2"]
    models.read_config("someone/tiny-gpt2")
    assert "*.safetensors" not in asked["someone/tiny-gpt2"]


@pytest.mark.parametrize(
    "files",
    [
        {"vocab.json": {"a": 0, "b": 36}, "added_tokens.json": {"<pad>": 37}},
        {"tokenizer.json": {"model": {"vocab": {"a": 0, "b": 36}}, "added_tokens": [{"id": 37}]}},
        {"tokenizer.json": {"model": {"vocab": [["a", 0.0]] * 38}}},
    ],
)
def test_rows_past_the_tokenizer_are_no_tokens(tmp_path, files):
    write_model(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert models.read_config(tmp_path).valid_vocab_size == 38


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    write_model(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 50256}))
    with pytest.raises(
        InputError, match=r"valid_vocab_size 50257 .* vocab_size 40; a tokenizer with more tokens"
    ):
        models.load(tmp_path)


def test_the_real_opt_vocabulary(tmp_path, shared):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    (tmp_path / "vocab.json").write_bytes((shared / "tokenizers" / "opt" / "vocab.json").read_bytes())
    config = models.read_config(tmp_path)
    assert (config.vocab_size, config.valid_vocab_size) == (50272, 50265)


class _Tokenizer:
    """As much of a `transformers` tokenizer as saving needs."""

    bos_token_id, eos_token_id, pad_token_id = 7, 8, None

    def __init__(self, size=40):
        self.size = size

    def __len__(self):
        return self.size

    def save_pretrained(self, folder):
        (Path(folder) / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": self.size - 1}}}))


def test_tokenizer_card_and_generation_config_are_saved(tmp_path):
    config, params = models.load(_given(tmp_path))
    card = models.ModelCard(name="tiny", student="gpt2", teacher="openai-community/gpt2-xl", method="l2m")
    models.save(tmp_path / "saved", config, params, tokenizer=_Tokenizer(39), card=card)
    files = {file.name for file in (tmp_path / "saved").iterdir()}
    assert files == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
    }
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text()) == {
        "bos_token_id": 7,
        "eos_token_id": 8,
    }
    again, _ = models.load(tmp_path / "saved")
    assert again == dataclasses.replace(config, valid_vocab_size=39, bos_token_id=7, eos_token_id=8)
    assert (tmp_path / "saved" / "README.md").read_text() == card.render()


def _given(tmp_path: Path) -> Path:
    write_model(tmp_path / "given")
    return tmp_path / "given"


def test_saving_what_does_not_belong_together_is_refused(tmp_path):
    config, params = models.load(_given(tmp_path))
    with pytest.raises(InputError, match="tokenizer has 41 tokens but the model only 40 rows"):
        models.save(tmp_path / "saved", config, params, tokenizer=_Tokenizer(41))
    with pytest.raises(
        InputError, match=r"parameter blocks/attention/key/bias: the config makes its shape \(3, 12\)"
    ):
        models.save(tmp_path / "saved", dataclasses.replace(config, num_layers=3), params)
    assert not list((tmp_path / "saved").iterdir())


def test_an_interrupted_save_leaves_the_old_weights(tmp_path, monkeypatch):
    config, params = models.load(_given(tmp_path))
    before = (tmp_path / "given" / "model.safetensors").read_bytes()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("l2m_jax.models.safetensors_folder.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.save(tmp_path / "given", config, jax.tree.map(lambda leaf: leaf + 1, params))
    assert (tmp_path / "given" / "model.safetensors").read_bytes() == before
    assert_trees_equal(models.load(tmp_path / "given")[1], params)


_PEAK = """
import pathlib, re, sys, jax
from l2m_jax import models
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
models.load(sys.argv[1], param_dtype=sys.argv[3])
before = peak()
params = models.load(sys.argv[2], param_dtype=sys.argv[3])[1]
print((peak() - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_loading_needs_little_more_memory_than_the_parameters(tmp_path, param_dtype):
    write_model(tmp_path / "small")
    hf = {"model_type": "gpt2", "vocab_size": 20_000, "n_embd": 768, "n_layer": 8, "n_positions": 64}
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "config.json").write_text(json.dumps(hf))
    config = models.read_config(tmp_path / "large")
    shapes = weights.parameter_shapes(config)
    tensors = {
        weight.name.format(layer): np.ones(weights.tensor_shape(weight, shapes[weight.path]), np.float32)
        for weight in hub._FAMILIES["gpt2"].weights(config)
        for layer in weights._layers(weight, shapes[weight.path])
    }
    save_file(tensors, tmp_path / "large" / "model.safetensors")
    del tensors
    command = [sys.executable, "-c", _PEAK, str(tmp_path / "small"), str(tmp_path / "large"), param_dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 1.0 < float(done.stdout) < 1.3
