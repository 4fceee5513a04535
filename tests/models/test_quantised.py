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
    num_kv_heads=2, head_dim=8, intermediate_size=32, max_positions=32, init_std=0.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    """With biases that are not 0, which come after the scales, and a kernel whose last output is 0."""
    params = models.init(CONFIG, jax.random.key(0))
    params["blocks"]["mlp"]["up"]["bias"] += 0.5
    up = params["blocks"]["mlp"]["up"]["kernel"]
    params["blocks"]["mlp"]["up"]["kernel"] = up.at[..., -1].set(0.0)
    return params


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


def test_a_weight_is_off_by_half_a_step_at_most_and_other_leaves_by_nothing(params):
    small = jax.jit(quantise)(params)
    up, scale = (small["blocks"]["mlp"]["up"][name] for name in ("kernel", "kernel_scale"))
    kernel = np.asarray(params["blocks"]["mlp"]["up"]["kernel"])
    assert up.dtype == jnp.int8 and scale.shape == (2, 32)
    np.testing.assert_allclose(scale[:, :-1], np.abs(kernel).max(axis=1)[:, :-1] / 127, rtol=1e-6)
    error = np.abs(_dequantised(small)["blocks"]["mlp"]["up"]["kernel"] - kernel)
    assert (error <= 0.5001 * np.asarray(scale)[:, None]).all() and not error[..., -1].any()
    jax.tree.map(np.testing.assert_array_equal, small["embeddings"], params["embeddings"])


def test_the_model_computes_with_the_scaled_weights(params):
    tokens = jnp.arange(12)[None]
    logits = jax.jit(lambda params: models.logits(CONFIG, params, tokens))
    small = quantise(params)
    np.testing.assert_allclose(logits(small), logits(_dequantised(small)), rtol=1e-4, atol=1e-4)
    p, q = (jax.nn.log_softmax(logits(of)) for of in (params, small))
    divergence = jnp.sum(jnp.exp(p) * (p - q), -1)
    assert 0 < divergence.mean() < 0.01


@pytest.mark.parametrize("mapping", ["pmap", "fsdp"])
def test_loading_quantises_kernel_by_kernel(params, mapping, tmp_path):
    models.save(tmp_path, CONFIG, params)
    placement = Placement(mapping, tuple(jax.devices()[:4]))
    _, loaded = models.load(tmp_path, frozen=True, put=placement.put, quantise=placement.map(quantise))
    jax.tree.map(np.testing.assert_array_equal, placement.to_host(loaded), jax.jit(quantise)(params))
