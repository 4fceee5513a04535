import dataclasses

import jax.numpy as jnp
import pytest

from l2m_jax.errors import InputError
from l2m_jax.models import DecoderConfig, Rope

CONFIG = DecoderConfig(
    family="gpt2",
    vocab_size=9,
    valid_vocab_size=9,
    hidden_size=8,
    embed_size=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=8,
    max_positions=16,
)


def test_configs_are_values():
    assert dataclasses.replace(CONFIG) == CONFIG
    assert hash(dataclasses.replace(CONFIG)) == hash(CONFIG)
    assert dataclasses.replace(CONFIG, dtype=jnp.bfloat16).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"remat": "full"}, "remat: 'full' is not one of none, block, dots"),
        ({"activation": "geglu"}, "activation: 'geglu' is not one of"),
        ({"attention": "flash"}, "attention: 'flash' is not one of"),
        ({"dtype": "int8"}, "dtype: 'int8' is not one of"),
        ({"num_kv_heads": 3}, "num_kv_heads: 3 must divide num_heads 2"),
        ({"rope": Rope(), "head_dim": 5}, "head_dim: 5 must be even"),
        ({"num_kv_heads": 0}, "num_kv_heads: 0 must be greater than 0"),
        ({"residual_dropout": 1.0}, "residual_dropout: 1.0 must be at least 0 and below 1"),
        ({"attention_dropout": float("nan")}, "attention_dropout: expected a finite number, got nan"),
        ({"layer_types": ("sliding",)}, "layer_types: 'sliding' needs a sliding_window"),
        ({"layer_types": ("full", "full")}, "layer_types: 2 entries, but num_layers is 1"),
        ({"layer_types": ("local",)}, "layer_types: 'local' is not one of full, sliding, no_rope"),
        ({"sliding_window": 0}, "sliding_window: 0 must be greater than 0"),
        ({"valid_vocab_size": 10}, "valid_vocab_size: 10 must be between 1 and vocab_size 9"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize(("given", "all_ids"), [(None, ()), (0, (0,)), ((2, 7), (2, 7))])
def test_end_of_sequence_tokens(given, all_ids):
    assert dataclasses.replace(CONFIG, eos_token_id=given).eos_token_ids == all_ids
