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
        ({"remat": "full"}, "remat is 'full'; it must be one of none, block, dots"),
        ({"activation": "geglu"}, "activation is 'geglu'"),
        ({"attention": "flash"}, "attention is 'flash'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"num_kv_heads": 3}, "num_heads 2 is not a multiple of num_kv_heads 3"),
        ({"rope": Rope(), "head_dim": 5}, "head_dim 5 is odd"),
        ({"valid_vocab_size": 10}, "valid_vocab_size 10 must lie between 1 and vocab_size 9"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **change)
