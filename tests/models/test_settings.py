import dataclasses

import jax
import pytest

from l2m_jax import models
from l2m_jax.errors import InputError
from l2m_jax.models import Architecture, Compute, Model
from l2m_jax.models.hf.families import FAMILIES
from l2m_jax.models.hf.published import PUBLISHED

NAN = float("nan")
RATES = ("embedding_dropout", "attention_dropout", "residual_dropout")
SMALL = Architecture(hidden_size=16, num_heads=2, max_positions=8)


class Tokenizer:
    bos_token_id, eos_token_id, pad_token_id = 3, 4, None

    def __init__(self, size=20):
        self.size = size

    def __len__(self):
        return self.size


def rates(config):
    return tuple(getattr(config, rate) for rate in RATES)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (Architecture, {"family": "mamba"}, "family: 'mamba' is not one of gpt2, opt, llama"),
        (Architecture, {"num_layers": 0}, "num_layers: 0 must be greater than 0"),
        (Architecture, {"num_heads": 0}, "num_heads: 0 must be greater than 0"),
        (Architecture, {"hidden_size": -8}, "hidden_size: -8 must be greater than 0"),
        (Architecture, {"hidden_size": NAN}, "hidden_size: nan must be greater than 0"),
        (Architecture, {"max_positions": 0}, "max_positions: 0 must be greater than 0"),
        (Architecture, {"num_kv_heads": -1}, "num_kv_heads: -1 must be 0 or more"),
        (Architecture, {"intermediate_size": -1}, "intermediate_size: -1 must be 0 or more"),
        (Architecture, {"hidden_size": 128, "num_heads": 5}, "hidden_size: 128 must be a multiple of num_heads 5"),
        (Architecture, {"family": "llama", "num_kv_heads": 3}, "num_kv_heads: 3 must divide num_heads 4"),
        (Architecture, {"num_kv_heads": 2}, "num_kv_heads: 2 must be 0 or num_heads 4, as gpt2 models share no"),
        (
            Architecture,
            {"family": "llama", "hidden_size": 12, "num_heads": 4},
            "hidden_size: 12 with num_heads 4 must give an even head size",
        ),
        (Model, {"init": "scratch"}, "init: 'scratch' is not one of pretrained, random, teacher_layers"),
        (Model, {"init": "teacher_layers"}, "layers: empty; with init 'teacher_layers', name the layers to keep"),
        (Model, {"init": "teacher_layers", "layers": (0, -1)}, "layers: -1 must be 0 or more"),
        (Compute, {"dtype": "float16"}, "dtype: 'float16' is not one of auto, float32, bfloat16"),
        (Compute, {"remat": "full"}, "remat: 'full' is not one of none, block, dots"),
    ],
)  # fmt: skip
def test_settings_out_of_range(kind, settings, message):
    with pytest.raises(InputError, match=f"^{message}"):
        kind(**settings)


@pytest.mark.parametrize(("family", "published"), [("gpt2", "gpt2"), ("opt", "facebook/opt-125m")])
def test_a_random_model_has_the_published_architecture(family, published):
    expected = PUBLISHED[published]
    sizes = Architecture(
        family=family, num_layers=12, num_heads=12, hidden_size=768, max_positions=expected.max_positions
    )
    config = models.random_config(sizes, Tokenizer(expected.vocab_size))
    special = {"bos_token_id": 3, "eos_token_id": 4, "pad_token_id": None}
    expected = dataclasses.replace(expected, intermediate_size=4 * 768, **special)
    assert config == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_survives_saving_and_loading(tmp_path, family):
    settings = dataclasses.replace(SMALL, family=family, num_kv_heads=0 if family in ("gpt2", "opt") else 1)
    published = models.random_config(settings, Tokenizer())
    config = models.with_dropout(published, 0.25)
    models.save(tmp_path, config, models.init(config, jax.random.key(0)))
    loaded, _ = models.load(tmp_path)
    assert models.with_dropout(loaded, 0.25) == config
    assert rates(config) == ((0.25,) * 3 if family == "gpt2" else (0, 0, 0.25))

    # Without dropout in the settings, everything else comes back as it was, and the published rates stay.
    models.save(tmp_path, published, models.init(published, jax.random.key(0)))
    loaded, _ = models.load(tmp_path)
    assert loaded == published == models.with_dropout(loaded, -1.0)
    assert rates(published) == {"gpt2": (0.1,) * 3, "opt": (0, 0, 0.1)}.get(family, (0, 0, 0))


def test_one_setting_decides_every_rate():
    config = dataclasses.replace(
        models.random_config(dataclasses.replace(SMALL, family="llama"), Tokenizer()), attention_dropout=0.5
    )
    assert rates(models.with_dropout(config, 0.0)) == (0, 0, 0)
    for wrong in (1.0, 1.5, NAN):
        with pytest.raises(InputError, match=r"^dropout: .* must be below 1"):
            models.with_dropout(config, wrong)


@pytest.mark.parametrize(
    ("platform", "dtype", "computes_in"),
    [
        ("cpu", "auto", "float32"),
        ("gpu", "auto", "bfloat16"),
        ("tpu", "auto", "bfloat16"),
        ("gpu", "float32", "float32"),
        ("cpu", "bfloat16", "bfloat16"),
    ],
)
def test_mixed_precision_is_the_default_on_accelerators(monkeypatch, platform, dtype, computes_in):
    config = models.random_config(SMALL, Tokenizer())
    compute = Compute(dtype, remat="block")
    found = models.with_compute(config, compute, platform)
    assert found == dataclasses.replace(config, dtype=computes_in, remat="block")
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert models.with_compute(config, compute) == found
