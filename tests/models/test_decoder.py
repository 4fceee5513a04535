import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2m_jax import models
from l2m_jax.errors import InputError
from l2m_jax.models.layers import Embeddings

_GPT2 = models.DecoderConfig(
    family="gpt2",
    vocab_size=40,
    valid_vocab_size=40,
    hidden_size=16,
    embed_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    intermediate_size=24,
    max_positions=32,
    init_std=0.3,
)
FAMILIES = {
    "gpt2": _GPT2,
    "opt_350m": dataclasses.replace(
        _GPT2,
        family="opt",
        embed_size=8,
        pre_norm=False,
        final_norm=False,
        position_offset=2,
        activation="relu",
    ),
    "llama": dataclasses.replace(
        _GPT2,
        family="llama",
        norm="rms",
        num_kv_heads=2,
        rope=models.Rope(),
        gated_mlp=True,
        activation="silu",
        attention_bias=False,
        mlp_bias=False,
        tie_embeddings=False,
    ),
}
# The layers differ in window and rotary positions.
FAMILIES["gemma3"] = dataclasses.replace(
    FAMILIES["llama"],
    family="gemma3_text",
    layer_types=("sliding", "no_rope"),
    sliding_window=3,
    sliding_rope=models.Rope(theta=100.0),
    norm_zero_centered=True,
    update_norm=True,
    qk_norm=True,
    scale_embeddings=True,
    query_scalar=7.0,
)
B, L = 2, 10

logits = jax.jit(models.logits, static_argnums=0)
prefill = jax.jit(models.prefill, static_argnums=(0, 4))
decode_step = jax.jit(models.decode_step, static_argnums=0)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    config = FAMILIES[request.param]
    return config, models.init(config, jax.random.key(0))


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (B, L), 0, 40)


def _influence(config, params, tokens, segment_ids=None):
    """[L, L]: by how much the hidden state of each position (row) moves with the embedding of each (column)."""

    def hidden(noise_LxE):
        # Tokens are numbered so that each position has an embedding of its own to add the noise to.
        table = params["embeddings"]["tokens"]["embedding"].at[tokens[0]].add(noise_LxE)
        embeddings = params["embeddings"] | {"tokens": {"embedding": table}}
        moved = params | {"embeddings": embeddings}
        return models.hidden_states(config, moved, tokens, segment_ids_BxL=segment_ids)[0]

    noise = jnp.zeros((tokens.shape[1], config.embed_size))
    return np.asarray(jnp.abs(jax.jit(jax.jacrev(hidden))(noise)).sum(axis=(1, 3)))


def test_no_token_sees_a_later_one(model):
    influence = _influence(*model, jnp.arange(L)[None])
    assert (np.triu(influence, 1) == 0).all()
    assert (influence[np.tril_indices(L)] > 0).all()


def test_no_token_sees_another_segment(model):
    segment_ids = np.array([1, 1, 1, 2, 2, 2, 2, 3, 0, 0])
    influence = _influence(*model, jnp.arange(L)[None], jnp.asarray(segment_ids)[None])
    same = segment_ids[:, None] == segment_ids[None, :]
    assert (influence[~same] == 0).all()
    assert (influence[same & np.tri(L, dtype=bool)] > 0).all()


def test_no_token_sees_beyond_the_window():
    config = dataclasses.replace(FAMILIES["llama"], num_layers=1, sliding_window=3)
    segment_ids = np.array([1, 1, 2, 2, 2, 2, 2, 2, 0, 0])
    params = models.init(config, jax.random.key(0))
    influence = _influence(config, params, jnp.arange(L)[None], jnp.asarray(segment_ids)[None])
    visible = (
        (segment_ids[:, None] == segment_ids[None, :]) & np.tri(L, dtype=bool) & ~np.tri(L, k=-3, dtype=bool)
    )
    np.testing.assert_array_equal(influence > 0, visible)


def test_packed_rows_equal_separate_ones(model, tokens):
    config, params = model
    a, b = tokens[:1, :6], tokens[1:, :3]
    packed = jnp.concatenate([a, b, jnp.zeros((1, 1), jnp.int32)], axis=1)
    segment_ids = jnp.array([[1] * 6 + [2] * 3 + [0]])
    together = logits(config, params, packed, segment_ids_BxL=segment_ids)
    np.testing.assert_allclose(together[:, :6], logits(config, params, a), atol=1e-4)
    np.testing.assert_allclose(together[:, 6:9], logits(config, params, b), atol=1e-4)
    assert np.isfinite(together).all()

    positions = jnp.array([[*range(6), *range(3), 0]])
    given = logits(config, params, packed, segment_ids_BxL=segment_ids, positions_BxL=positions)
    np.testing.assert_array_equal(given, together)


@pytest.mark.parametrize("variant", [{"scan_layers": True}, {"remat": "block", "scan_layers": False}])
def test_decoding_with_a_cache_equals_full_forward_passes(model, tokens, variant):
    config = dataclasses.replace(model[0], **variant)
    params = model[1]
    full = logits(config, params, tokens)
    lengths = jnp.array([4, 6])
    hidden, cache = prefill(config, params, tokens[:, :6], lengths, L)
    rows = jnp.arange(B)
    unstacked = models.unstack_layers(params)
    for step in range(4):
        expected = full[rows, lengths - 1 + step]
        np.testing.assert_allclose(models.apply_head(config, params, hidden), expected, atol=1e-4)
        positions = lengths + step
        layers = params if step % 2 else unstacked
        hidden, cache = decode_step(config, layers, tokens[rows, positions], positions, cache)


def test_what_an_earlier_sequence_left_in_the_cache_is_not_seen(model, tokens):
    config, params = model
    clean = models.empty_cache(config, B, L)
    dirty = jax.tree.map(lambda x: jnp.full_like(x, 100.0), clean)
    for position in range(4):
        at = jnp.full(B, position)
        clean_hidden, clean = decode_step(config, params, tokens[:, position], at, clean)
        dirty_hidden, dirty = decode_step(config, params, tokens[:, position], at, dirty)
        np.testing.assert_array_equal(clean_hidden, dirty_hidden)


def test_a_loop_updates_the_cache_in_place():
    config = FAMILIES["llama"]
    params = models.init(config, jax.random.key(0))

    def generate(params, cache, tokens_B, start_B):
        params = models.unstack_layers(params)

        def step(state):
            i, tokens_B, cache = state
            hidden, cache = models.decode_step(config, params, tokens_B, start_B + i, cache)
            return i + 1, models.apply_head(config, params, hidden).argmax(-1).astype(jnp.int32), cache

        return jax.lax.while_loop(lambda state: state[0] < 5, step, (0, tokens_B, cache))

    cache = models.empty_cache(config, B, L)
    zeros = jnp.zeros(B, jnp.int32)
    compiled = jax.jit(generate, donate_argnums=1).lower(params, cache, zeros, zeros).compile()
    shape = re.escape(f"f32[{','.join(map(str, cache[0].key_BxKxSxD.shape))}]")
    results = re.findall(rf"= {shape}\S* (\S+)\(", compiled.as_text())
    assert results, "the program holds caches of the shape looked for"
    assert "copy" not in results


@pytest.mark.parametrize("variant", [{"scan_layers": True}, {"remat": "block"}, {"remat": "dots"}])
def test_scan_and_remat_change_nothing_but_the_cost(variant, tokens):
    config = FAMILIES["opt_350m"]
    params = models.init(config, jax.random.key(0))

    def loss(config, params):
        return jnp.square(models.hidden_states(config, params, tokens, dropout_key=jax.random.key(2))).mean()

    gradient = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)
    config = dataclasses.replace(config, residual_dropout=0.2, attention_dropout=0.2)
    expected = gradient(config, params)
    ours = gradient(dataclasses.replace(config, **variant), params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), ours, expected)


def test_remat_holds_less_for_the_backward_pass():
    def temporaries(remat):
        config = dataclasses.replace(_GPT2, num_layers=8, remat=remat)
        params = models.init(config, jax.random.key(0))
        tokens = jnp.zeros((8, 32), jnp.int32)
        gradient = jax.jit(jax.grad(lambda params: models.hidden_states(config, params, tokens).mean()))
        return gradient.lower(params).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("block") < temporaries("dots") < temporaries("none")


def test_the_program_does_not_grow_with_depth():
    def lines(num_layers):
        config = dataclasses.replace(FAMILIES["llama"], num_layers=num_layers, remat="dots")
        params = jax.eval_shape(functools.partial(models.init, config), jax.random.key(0))
        tokens = jax.ShapeDtypeStruct((B, L), jnp.int32)
        gradient = jax.grad(lambda params, tokens: models.hidden_states(config, params, tokens).mean())
        return len(jax.jit(gradient).lower(params, tokens).as_text().splitlines())

    assert lines(6) == lines(12)


def test_equal_configs_share_one_compilation(tokens):
    config = FAMILIES["gpt2"]
    params = models.init(config, jax.random.key(0))
    counted = jax.jit(
        lambda config, params, tokens: models.hidden_states(config, params, tokens), static_argnums=0
    )
    counted(config, params, tokens)
    counted(dataclasses.replace(config), params, tokens + 0)
    assert counted._cache_size() == 1


def test_padding_of_the_vocabulary_never_gets_probability(model, tokens):
    config, params = model
    wide = logits(config, params, tokens)
    narrow = logits(dataclasses.replace(config, valid_vocab_size=33), params, tokens)
    assert narrow.shape == wide.shape
    np.testing.assert_array_equal(narrow[..., :33], wide[..., :33])
    assert (np.asarray(narrow[..., 33:]) == -np.inf).all()


def test_fresh_weights_have_the_spread_of_hugging_face():
    config = dataclasses.replace(
        _GPT2,
        hidden_size=64,
        embed_size=64,
        head_dim=16,
        init_std=0.02,
        scaled_residual_init=True,
        num_layers=8,
    )
    params = models.init(config, jax.random.key(0))
    blocks = params["blocks"]
    for weights in (
        params["embeddings"]["tokens"]["embedding"],
        params["embeddings"]["positions"]["embedding"],
        blocks["attention"]["query"]["kernel"],
        blocks["mlp"]["up"]["kernel"],
    ):
        assert weights.std() == pytest.approx(0.02, rel=0.05)
        assert abs(weights.mean()) < 0.002
    for weights in (blocks["attention"]["out"]["kernel"], blocks["mlp"]["down"]["kernel"]):
        assert weights.std() == pytest.approx(0.02 / 16**0.5, rel=0.05)
    assert (blocks["attention_norm"]["scale"] == 1).all() and (blocks["attention_norm"]["bias"] == 0).all()
    assert (blocks["mlp"]["up"]["bias"] == 0).all()
    # Layers differ from one another, and another key gives other weights.
    query = blocks["attention"]["query"]["kernel"]
    assert not jnp.array_equal(query[0], query[1])
    assert not jnp.array_equal(
        query, models.init(config, jax.random.key(1))["blocks"]["attention"]["query"]["kernel"]
    )


def test_bfloat16_compute_with_float32_parameters(tokens):
    config = FAMILIES["llama"]
    params = models.init(config, jax.random.key(0))
    low = dataclasses.replace(config, dtype="bfloat16")
    assert jax.tree.all(
        jax.tree.map(lambda leaf: leaf.dtype == jnp.float32, models.init(low, jax.random.key(0)))
    )
    assert models.hidden_states(low, params, tokens).dtype == jnp.bfloat16
    ours, exact = logits(low, params, tokens), logits(config, params, tokens)
    assert ours.dtype == jnp.float32
    assert 0 < jnp.abs(ours - exact).max() < 0.1 * jnp.abs(exact).max()

    halved = dataclasses.replace(config, param_dtype=jnp.bfloat16)
    assert jax.tree.all(
        jax.tree.map(lambda x: x.dtype == jnp.bfloat16, models.init(halved, jax.random.key(0)))
    )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gradients_of_a_frequent_token_are_summed_in_float32(family):
    """A sum in bfloat16 would stop at 256: adding 1 to it changes nothing any more."""
    config = dataclasses.replace(FAMILIES[family], dtype="bfloat16")
    params = models.init(config, jax.random.key(0))["embeddings"]
    tokens = jnp.full((64, 8), 3)
    positions = jnp.broadcast_to(jnp.arange(8), tokens.shape)

    def total(params):
        embedded = Embeddings(config).apply({"params": params}, tokens, positions)
        assert embedded.dtype == jnp.bfloat16
        return embedded.astype(jnp.float32).sum()

    gradients = jax.grad(total)(params)
    assert (gradients["tokens"]["embedding"][3] == 512).all()
    if family == "gpt2":
        assert (gradients["positions"]["embedding"][:8] == 64).all()


def test_dropout(tokens):
    config = FAMILIES["gpt2"]
    params = models.init(config, jax.random.key(0))
    rates = {"embedding_dropout": 0.3, "attention_dropout": 0.3, "residual_dropout": 0.3}
    hidden_states = jax.jit(models.hidden_states, static_argnums=0)
    clean = hidden_states(config, params, tokens)
    for name, rate in rates.items():
        dropping = dataclasses.replace(config, **{name: rate})
        np.testing.assert_array_equal(hidden_states(dropping, params, tokens), clean)
        one, same, other = (
            hidden_states(dropping, params, tokens, dropout_key=jax.random.key(i)) for i in (1, 1, 2)
        )
        np.testing.assert_array_equal(one, same)
        assert not jnp.array_equal(one, clean) and not jnp.array_equal(one, other)


def test_dropout_masks_differ_from_layer_to_layer():
    # Blocks that add nothing but their output bias, one: what is dropped shows in the residual stream itself.
    config = dataclasses.replace(FAMILIES["gpt2"], residual_dropout=0.5, final_norm=False, num_layers=2)
    params = jax.tree.map(jnp.zeros_like, models.init(config, jax.random.key(0)))
    params["blocks"]["attention"]["out"]["bias"] += 1.0
    hidden = models.hidden_states(
        config, params, jnp.zeros((1, 32), jnp.int32), dropout_key=jax.random.key(1)
    )
    # Each layer adds 0 or 2. With one mask for both, no sum would be 2.
    assert set(np.unique(hidden)) == {0.0, 2.0, 4.0}


def test_a_sequence_beyond_the_learned_positions_is_refused(model):
    config, params = model
    long = jnp.zeros((1, 33), jnp.int32)
    if config.rope is None:
        with pytest.raises(InputError, match="33 tokens is longer than this model's 32 positions"):
            models.hidden_states(config, params, long)
    else:
        assert models.hidden_states(config, params, long).shape == (1, 33, 16)


def test_prompts_longer_than_the_cache_are_refused(tokens):
    config = FAMILIES["gpt2"]
    params = models.init(config, jax.random.key(0))
    with pytest.raises(InputError, match="cache of 5 slots cannot hold prompts padded to 10"):
        models.prefill(config, params, tokens, jnp.array([3, 4]), 5)
