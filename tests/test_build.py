"""From settings to models."""

import jax
import pytest

from l2m_jax import build, config


@pytest.mark.parametrize(
    ("backend", "asked", "computes_in"),
    [
        ("cpu", "auto", "float32"),
        ("gpu", "auto", "bfloat16"),
        ("tpu", "auto", "bfloat16"),
        ("gpu", "float32", "float32"),
        ("cpu", "bfloat16", "bfloat16"),
    ],
)
def test_mixed_precision_is_the_default_on_accelerators(monkeypatch, backend, asked, computes_in):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    architecture = config.Architecture(hidden_size=16, num_heads=2, max_positions=8)
    settings = config.Model(architecture=architecture, dtype=asked, remat="block")

    class Tokenizer:
        bos_token_id = eos_token_id = pad_token_id = 0

        def __len__(self) -> int:
            return 20

    found, params = build.build_model(settings, Tokenizer(), seed=0)
    assert (found.dtype, found.param_dtype, found.remat) == (computes_in, "float32", "block")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
