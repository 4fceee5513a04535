"""What `load` reads, in which dtype, and where it puts it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from l2m_jax import models
from l2m_jax.errors import InputError
from l2m_jax.models.hf.safetensors_folder import SafetensorsFolder
from l2m_jax.parallel import Placement

NAMES = ["gpt2", "opt_350m", "llama_gqa_tied", "llama"]
DEVICES = tuple(jax.devices()[:4])


def assert_equal(ours, expected):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


@pytest.fixture
def tensors_read(monkeypatch):
    """The names of the tensors read so far."""
    names = set()
    read = SafetensorsFolder.read

    def record(self, name, index):
        names.add(name)
        return read(self, name, index)

    monkeypatch.setattr(SafetensorsFolder, "read", record)
    return names


def bytes_on_first_device(arrays):
    shards = (shard.data for x in arrays for shard in x.addressable_shards if shard.device == DEVICES[0])
    # Shards are arrays of their own that share a buffer.
    return sum({shard.unsafe_buffer_pointer(): shard.nbytes for shard in shards}.values())


class RecordingPut:
    """`placement.put`, and a record of the calls."""

    def __init__(self, placement):
        self.placement = placement
        self.largest_piece = {}  # by shape, as a fraction of the parameter
        self.placed = []
        self.other_bytes = bytes_on_first_device(jax.live_arrays())

    def __call__(self, shape, read, *, stacked):
        def recording_read(index):
            piece = read(index)
            self.largest_piece[shape] = max(self.largest_piece.get(shape, 0), piece.size / math.prod(shape))
            return piece

        leaf = self.placement.put(shape, recording_read, stacked=stacked)
        self.placed.append(leaf)
        allowed = self.other_bytes + bytes_on_first_device(self.placed)
        assert bytes_on_first_device(jax.live_arrays()) <= allowed, (
            "a device holds more than its placed parameters"
        )
        return leaf


@pytest.mark.parametrize("mapping", ["pmap", "fsdp"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layers", [(), (1,)])
def test_placed_parameters_have_the_values_and_layout_of_the_placement(
    write_model, tmp_path, name, mapping, layers
):
    write_model(tmp_path, name)
    config, expected = models.load(tmp_path, layers=layers)
    put = RecordingPut(Placement(mapping, DEVICES))
    placed_config, params = models.load(tmp_path, layers=layers, put=put)
    assert placed_config == config
    assert_equal(put.placement.to_host(params), jax.tree.map(np.asarray, expected))
    layout = put.placement.abstract(jax.eval_shape(lambda: models.init(config, jax.random.key(0))))
    jax.tree.map(
        lambda leaf, wanted: leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim), params, layout
    )
    for leaf, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(layout), strict=True):
        assert leaf.shape == wanted.shape and leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    divided = [shape for shape in put.largest_piece if any(n % 4 == 0 for n in shape[1:] or shape)]
    assert divided
    for shape in divided:
        assert put.largest_piece[shape] == (1 if mapping == "pmap" else 1 / 4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layers", [(1,), (1, 0), (0, 0, 1)])
def test_a_subset_of_layers_equals_slicing(write_model, tmp_path, tensors_read, name, layers):
    tensors = write_model(tmp_path, name)
    config, whole = models.load(tmp_path)
    tensors_read.clear()
    student_config, student = models.load(tmp_path, layers=layers)
    assert student_config == dataclasses.replace(config, num_layers=len(layers))
    index = np.array(layers)
    assert_equal(student, whole | {"blocks": jax.tree.map(lambda leaf: leaf[index], whole["blocks"])})
    other_layers = [f".{layer}." for layer in {0, 1} - set(layers)]
    assert tensors_read == {name for name in tensors if not any(other in name for other in other_layers)}


@pytest.mark.parametrize("layers", [(0, 2), (-1,)])
def test_layers_that_the_model_does_not_have(write_model, tmp_path, layers):
    write_model(tmp_path)
    message = rf"layers: {layers[-1]} must be between 0 and 1, the layers of '{tmp_path}'"
    with pytest.raises(InputError, match=message):
        models.load(tmp_path, layers=layers)


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_model_is_in_the_compute_dtype_but_for_its_norms(write_model, tmp_path, name):
    write_model(tmp_path, name)
    config, params = models.load(tmp_path, dtype="bfloat16")
    frozen_config, frozen = models.load(tmp_path, dtype="bfloat16", frozen=True)
    assert frozen_config == dataclasses.replace(config, param_dtype="bfloat16")
    dtypes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(frozen):
        dtypes.setdefault("norm" in jax.tree_util.keystr(path), set()).add(leaf.dtype.name)
        assert leaf.dtype == models.inference_dtype(config, jax.tree_util.keystr(path))
    assert dtypes == {True: {"float32"}, False: {"bfloat16"}}
    logits = jax.jit(models.logits, static_argnums=0)
    tokens = jnp.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(logits(frozen_config, frozen, tokens), logits(config, params, tokens))


@pytest.mark.parametrize("name", [*NAMES, "gpt2_untied_relu_inner"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_head_alone(write_model, tmp_path, tensors_read, name, dtype):
    write_model(tmp_path, name)
    expected = models.head(*models.load(tmp_path)).astype(dtype)
    tensors_read.clear()
    head = models.load_head(tmp_path, dtype=dtype)
    assert len(tensors_read) == 1
    assert head.dtype == dtype
    np.testing.assert_array_equal(head, expected)
    for mapping in ("pmap", "fsdp"):
        placement = Placement(mapping, DEVICES)
        placed = models.load_head(tmp_path, dtype=dtype, put=placement.put)
        np.testing.assert_array_equal(placement.to_host(placed), expected)


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (-np.inf, "bfloat16"), (1e5, "float16")])
def test_a_weight_that_is_not_finite_is_refused_by_its_name(write_model, tmp_path, value, dtype):
    write_model(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = value
    save_file(tensors, tmp_path / "model.safetensors")
    said = rf"model\.safetensors: tensor model\.layers\.1\.mlp\.up_proj\.weight has values .* not finite in {dtype}"
    with pytest.raises(InputError, match=said):
        models.load(tmp_path, dtype=dtype, frozen=True)
