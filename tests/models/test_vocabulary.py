"""Models with a part of their vocabulary."""

import dataclasses

import jax
import numpy as np
import pytest

from l2m_jax import models
from l2m_jax.errors import InputError

KEPT = np.array([0, 3, 4, 7, 8, 9, 20, 30, 39])


def _model(folder):
    config = models.DecoderConfig(
        family="llama",
        vocab_size=44,
        valid_vocab_size=44,
        hidden_size=16,
        embed_size=16,
        num_layers=3,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=32,
        max_positions=32,
        rope=models.Rope(),
        norm="rms",
        gated_mlp=True,
        activation="silu",
        attention_bias=False,
        mlp_bias=False,
        tie_embeddings=False,
        init_std=0.3,
        bos_token_id=1,
        eos_token_id=(2, 39, 3),
    )
    params = models.init(config, jax.random.key(0))
    models.save(folder, config, params)
    return config, params


def test_only_the_embeddings_of_kept_tokens_are_read(tmp_path):
    _, params = _model(tmp_path)
    small, kept = models.load(tmp_path, tokens=KEPT, layers=(0, 2))
    assert small == dataclasses.replace(models.read_config(tmp_path, tokens=KEPT), num_layers=2)
    expected = params | {
        "embeddings": {"tokens": {"embedding": params["embeddings"]["tokens"]["embedding"][KEPT]}},
        "head": {"embedding": params["head"]["embedding"][KEPT]},
        "blocks": jax.tree.map(lambda leaf: leaf[np.array([0, 2])], params["blocks"]),
    }
    jax.tree.map(np.testing.assert_array_equal, kept, expected)


def test_special_tokens_are_renumbered(tmp_path):
    _model(tmp_path)
    config = models.read_config(tmp_path, tokens=KEPT)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, (8, 1), None)
    assert config.vocab_size == config.valid_vocab_size == len(KEPT)


def test_a_token_that_the_model_does_not_have_is_refused(tmp_path):
    _model(tmp_path)
    with pytest.raises(InputError, match="token 44 is to be kept, but the model has 44 tokens"):
        models.load(tmp_path, tokens=np.array([1, 44]))
