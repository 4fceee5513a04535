import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2m_jax.models import DecoderConfig, Rope
from l2m_jax.models import attention as module

B, L, H, K, D = 2, 6, 4, 2, 8
CONFIG = DecoderConfig(
    family="llama",
    vocab_size=9,
    valid_vocab_size=9,
    hidden_size=32,
    embed_size=32,
    num_layers=1,
    num_heads=H,
    num_kv_heads=K,
    head_dim=D,
    intermediate_size=8,
    max_positions=16,
)


@pytest.fixture
def qkv():
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(k, (B, L, n, D)) for k, n in zip(keys, (H, K, K), strict=True))


def reference(qkv, segment_ids, scale):
    mask = None if segment_ids is None else (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    return jax.nn.dot_product_attention(*qkv, mask=mask, scale=scale, is_causal=True, implementation="xla")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_causal_attention_within_segments(qkv, packed, scaled):
    segment_ids = jnp.array([[1, 1, 2, 2, 2, 0]] * B) if packed else None
    attend = module.causal(dataclasses.replace(CONFIG, scale_attention=scaled), segment_ids)
    attended, kept = attend(*qkv, None)
    np.testing.assert_allclose(attended, reference(qkv, segment_ids, D**-0.5 if scaled else 1.0), atol=1e-5)
    assert kept is None


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [1, 3, jnp.array(3), L + 1])
def test_a_window_of_earlier_tokens(qkv, packed, window):
    segment_ids = jnp.array([[1, 1, 2, 2, 2, 2]] * B) if packed else None
    mask = None if segment_ids is None else (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    attended, _ = module.causal(CONFIG, segment_ids)(*qkv, None, window)
    before = (int(window) - 1, 0)
    expected = jax.nn.dot_product_attention(
        *qkv, mask=mask, is_causal=True, local_window_size=before, implementation="xla"
    )
    np.testing.assert_allclose(attended, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("block", "max_blocks"), [(64, 8), (64, 2), (256, 8)])
def test_blocks_of_queries_are_one_attention(monkeypatch, dtype, block, max_blocks):
    """Value and gradients, for row lengths that are no multiple of a block."""
    length = 150
    keys = jax.random.split(jax.random.key(1), 4)
    qkv = [jax.random.normal(k, (B, length, n, D), dtype) for k, n in zip(keys, (H, K, K), strict=False)]
    towards = jax.random.normal(keys[3], (B, length, H, D))
    segment_ids = jnp.asarray(np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], [30, 61, 50, 9], axis=1))
    monkeypatch.setattr(module, "_QUERY_BLOCK", block)
    monkeypatch.setattr(module, "_MAX_BLOCKS", max_blocks)

    def total(attention):
        return lambda qkv: jnp.sum(towards * attention(qkv).astype(jnp.float32))

    ours = jax.jit(jax.value_and_grad(total(lambda qkv: module.causal(CONFIG, segment_ids)(*qkv, None)[0])))
    expected = jax.jit(jax.value_and_grad(total(lambda qkv: reference(qkv, segment_ids, D**-0.5))))
    exact = [x.astype(jnp.float32) for x in qkv]
    tolerance = 1e-5 if dtype == "float32" else 3e-2
    for actual, wanted in zip(jax.tree.leaves(ours(qkv)), jax.tree.leaves(expected(exact)), strict=True):
        error = np.abs(np.asarray(actual, np.float32) - wanted).max()
        assert error <= tolerance * np.abs(wanted).max()


def test_the_backward_pass_multiplies_in_the_compute_dtype(qkv):
    """All products, forward and backward, take bfloat16 operands: float32 ones would miss a GPU's fast units."""
    low = [x.astype(jnp.bfloat16) for x in qkv]
    gradient = jax.grad(
        lambda *qkv: module.causal(CONFIG, None)(*qkv, None)[0].astype(jnp.float32).sum(), (0, 1, 2)
    )
    text = jax.jit(gradient).lower(*low).as_text()
    products = re.findall(r"stablehlo.dot_general .* : \(tensor<[\dx]*(\w+)>, tensor<[\dx]*(\w+)>\)", text)
    assert len(products) == 6 and {name for pair in products for name in pair} == {"bf16"}


def test_dropout_falls_on_the_probabilities(qkv):
    query, key, value = qkv
    kept = np.random.default_rng(0).random((B, K, H // K, L, L)) < 0.7
    scores = np.einsum("BLKGD,BSKD->BKGLS", np.reshape(query, (B, L, K, H // K, D)), key) * D**-0.5
    exp_scores = np.exp(scores) * np.tri(L)
    probabilities = exp_scores / exp_scores.sum(-1, keepdims=True)
    expected = np.einsum("BKGLS,BSKD->BLKGD", kept * probabilities, value).reshape(B, L, H, D)
    attended, _ = module.causal(CONFIG, None)(*qkv, lambda x: x * kept.reshape(x.shape))
    np.testing.assert_allclose(attended, expected, atol=1e-5)


def test_each_row_writes_its_own_slot(qkv):
    query, key, value = (x[:, :1] for x in qkv)
    cache = module.LayerCache(jnp.zeros((B, K, L, D)), jnp.zeros((B, K, L, D)))
    _, updated = module.cached(CONFIG, cache, jnp.array([1, 4]))(query, key, value, None)
    expected = np.zeros((B, K, L, D), np.float32)
    expected[0, :, 1], expected[1, :, 4] = key[0, 0], key[1, 0]
    np.testing.assert_array_equal(updated.key_BxKxSxD, expected)
    assert (np.asarray(updated.value_BxKxSxD)[1, :, 4] == value[1, 0]).all()


def test_rotation_turns_pairs_as_complex_numbers(qkv):
    query = qkv[0]
    positions = jnp.array([[0, 1, 2, 3, 4, 5], [7, 7, 0, 2, 1, 9]])
    ours = module.rotate(query, module.rope_angles(Rope(theta=50.0), D, positions))
    x = np.asarray(query)
    pairs = x[..., : D // 2] + 1j * x[..., D // 2 :]
    frequencies = 50.0 ** (-np.arange(D // 2) / (D // 2))
    turned = pairs * np.exp(1j * np.asarray(positions)[:, :, None, None] * frequencies)
    np.testing.assert_allclose(ours, np.concatenate([turned.real, turned.imag], -1), atol=1e-5)


def test_scores_depend_on_relative_positions_alone(qkv):
    query, key, _ = qkv
    positions = jnp.array([[0, 1, 2, 3, 4, 5]] * B)

    def scores(shift):
        angles = module.rope_angles(Rope(), D, positions + shift)
        q, k = module.rotate(query[:, :, :K], angles), module.rotate(key, angles)
        return jnp.einsum("BLKD,BSKD->BKLS", q, k)

    np.testing.assert_allclose(scores(0), scores(11), atol=1e-4)


def test_rotation_keeps_the_dtype(qkv):
    angles = module.rope_angles(Rope(), D, jnp.zeros((B, L), jnp.int32))
    assert module.rotate(qkv[0].astype(jnp.bfloat16), angles).dtype == jnp.bfloat16


def test_the_implementation_is_a_setting(qkv):
    assert module._implementation(CONFIG, qkv[0]) == "xla"
    assert module._implementation(dataclasses.replace(CONFIG, attention="cudnn"), qkv[0]) == "cudnn"


def test_heads_are_padded_for_the_fused_kernel(qkv, monkeypatch):
    config, qkv = dataclasses.replace(CONFIG, head_dim=D - 2), [x[..., :-2] for x in qkv]
    sizes, attention = [], jax.nn.dot_product_attention

    def noted(query, key, value, **settings):
        sizes.extend(x.shape[-1] for x in (query, key, value))
        return attention(query, key, value, **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", noted)
    segments = jnp.array([[1, 1, 1, 2, 2, 2]] * B)
    mask = (segments[:, :, None] == segments[:, None, :])[:, None]
    weights = np.random.default_rng(1).normal(size=qkv[0].shape).astype(np.float32)

    def loss(attend):
        return lambda *qkv: (attend(*qkv) * weights).sum()

    fused = loss(lambda *qkv: module._fused(config, *qkv, mask, "xla"))
    plain = loss(lambda *qkv: module.causal(config, segments)(*qkv, None)[0])
    for ours, expected in zip(
        jax.tree.leaves(jax.value_and_grad(fused, (0, 1, 2))(*qkv)),
        jax.tree.leaves(jax.value_and_grad(plain, (0, 1, 2))(*qkv)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    assert set(sizes) == {D} and D == 8


@pytest.mark.parametrize(
    ("dtype", "head_dim", "length", "capability", "expected"),
    [
        ("bfloat16", 64, 128, "8.0", "cudnn"),
        ("float16", 128, 2, "9.0", "cudnn"),
        ("float32", 64, 128, "9.0", "xla"),
        ("bfloat16", 100, 128, "9.0", "cudnn"),
        ("bfloat16", 256, 128, "9.0", "xla"),
        ("bfloat16", 64, 127, "9.0", "xla"),
        ("bfloat16", 64, 128, "7.5", "xla"),
    ],
)
def test_auto_takes_cudnn_where_it_runs(monkeypatch, dtype, head_dim, length, capability, expected):
    class Card:
        compute_capability = capability

    class Client:
        platform, platform_version = "gpu", "PJRT C API\ncuda 12090"

        def local_devices(self):
            return [Card()]

    monkeypatch.setattr(module.backend, "get_backend", Client)
    query = jax.ShapeDtypeStruct((1, length, 2, head_dim), dtype)
    assert module._implementation(CONFIG, query) == expected
    monkeypatch.setattr(Client, "platform_version", "rocm 6")
    assert module._implementation(CONFIG, query) == "xla"
