"""int8 kernels of a frozen model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2m_jax import models
from l2m_jax.models import DecoderConfig
from l2m_jax.models.quantised import quantise
from l2m_jax.parallel import Placement

CONFIG = DecoderConfig(
    family="gpt2", vocab_size=60, valid_vocab_size=60, hidden_size=16, embed_size=16, num_layers=2, num_heads=2,
    num_kv_heads=2, head_dim=8, intermediate_size=32, max_positions=32, scan_layers=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    """With biases that are not 0, which come after the scales, and a kernel whose last output is 0."""
    shapes = jax.eval_shape(lambda: models.init(CONFIG, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes)
    params["blocks"]["mlp"]["up"]["kernel"][..., -1] = 0
    return params


@pytest.fixture(scope="module")
def small(params):
    return jax.jit(quantise)(params)


def _dequantised(params):
    """The float model that the int8 one computes."""

    def layer(group):
        if not isinstance(group, dict):
            return group
        if "kernel_scale" not in group:
            return {name: layer(inner) for name, inner in group.items()}
        kernel = np.asarray(group["kernel"], np.float32) * np.asarray(group["kernel_scale"])[:, None]
        return {name: leaf for name, leaf in group.items() if name != "kernel_scale"} | {"kernel": kernel}

    return layer(params)


def test_a_weight_is_off_by_half_a_step_at_most_and_other_leaves_by_nothing(params, small):
    up, scale = (small["blocks"]["mlp"]["up"][name] for name in ("kernel", "kernel_scale"))
    kernel = np.asarray(params["blocks"]["mlp"]["up"]["kernel"])
    assert up.dtype == jnp.int8 and scale.shape == (2, 32)
    np.testing.assert_allclose(scale[:, :-1], np.abs(kernel).max(axis=1)[:, :-1] / 127, rtol=1e-6)
    error = np.abs(_dequantised(small)["blocks"]["mlp"]["up"]["kernel"] - kernel)
    assert (error <= 0.5001 * np.asarray(scale)[:, None]).all() and not error[..., -1].any()
    jax.tree.map(np.testing.assert_array_equal, small["embeddings"], params["embeddings"])


def test_the_model_computes_with_the_scaled_weights(params, small):
    tokens = np.arange(12)[None]
    logits = jax.jit(lambda params: jax.nn.log_softmax(models.logits(CONFIG, params, tokens)))
    p, q = np.asarray(logits(params)), np.asarray(logits(small))
    np.testing.assert_allclose(q, logits(_dequantised(small)), rtol=1e-4, atol=1e-4)
    assert 0 < (np.exp(p) * (p - q)).sum(-1).mean() < 0.01


@pytest.mark.parametrize("mapping", ["pmap", "fsdp"])
def test_loading_quantises_kernel_by_kernel(params, small, mapping, tmp_path):
    models.save(tmp_path, CONFIG, params)
    placement = Placement(mapping, tuple(jax.devices()[:4]))
    _, loaded = models.load(tmp_path, frozen=True, put=placement.put, quantise=placement.map(quantise))
    jax.tree.map(np.testing.assert_array_equal, placement.to_host(loaded), small)
