import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from l2m_jax import models
from l2m_jax.errors import InputError


def test_shards_with_an_index(write_model, tmp_path):
    write_model(tmp_path / "given")
    config, params = models.load(tmp_path / "given")
    models.save(tmp_path, config, params, shard_bytes=4096)
    shards = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    jax.tree.map(np.testing.assert_array_equal, models.load(tmp_path)[1], params)

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


def test_dtypes_of_storage_parameters_and_computation(write_model, tmp_path):
    write_model(tmp_path)
    _, exact = models.load(tmp_path)
    config, params = models.load(tmp_path, dtype="bfloat16", param_dtype="bfloat16")
    assert (config.dtype, config.param_dtype) == ("bfloat16", "bfloat16")
    jax.tree.map(
        np.testing.assert_array_equal, params, jax.tree.map(lambda leaf: leaf.astype("bfloat16"), exact)
    )
    models.save(tmp_path / "half", config, params, dtype="bfloat16")
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    jax.tree.map(
        np.testing.assert_array_equal, models.load(tmp_path / "half", param_dtype="bfloat16")[1], params
    )


def test_names_that_older_files_use(write_model, tmp_path):
    tensors = write_model(tmp_path)
    _, expected = models.load(tmp_path)
    older = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    older |= {f"h.{i}.attn.bias": np.ones((1, 1, 24, 24), np.float32) for i in range(2)}
    older |= {"h.0.attn.masked_bias": np.float32([-1e4]), "lm_head.weight": tensors["transformer.wte.weight"]}
    save_file(older, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, models.load(tmp_path)[1], expected)


def test_a_file_that_is_cut_off(write_model, tmp_path):
    write_model(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors is cut off or not a safetensors file"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"')
    with pytest.raises(InputError, match=r"config\.json is not JSON"):
        models.load(tmp_path)


def test_an_interrupted_save_leaves_the_old_weights(write_model, tmp_path, monkeypatch):
    write_model(tmp_path / "given")
    config, params = models.load(tmp_path / "given")
    before = (tmp_path / "given" / "model.safetensors").read_bytes()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("l2m_jax.models.hf.safetensors_folder.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.save(tmp_path / "given", config, jax.tree.map(lambda leaf: leaf + 1, params))
    assert (tmp_path / "given" / "model.safetensors").read_bytes() == before
    jax.tree.map(np.testing.assert_array_equal, models.load(tmp_path / "given")[1], params)
