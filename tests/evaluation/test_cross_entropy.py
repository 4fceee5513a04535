"""Cross-entropy against plain logits of padded rows, in float64."""

import jax
import numpy as np
import pytest

from l2m_jax import models
from l2m_jax.data.corpus import build_corpus
from l2m_jax.data.encoding import TokenLimits
from l2m_jax.data.sources import Row
from l2m_jax.data.tokenizer import train_tokenizer
from l2m_jax.evaluation.cross_entropy import cross_entropy_by_example
from l2m_jax.parallel import Placement


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["copy these words"], 300)


@pytest.fixture(scope="module")
def corpus(tokenizer, tmp_path_factory):
    rows = [
        Row(str(i), "copy", "words " * (1 + i % 5), ("words " * (1 + i % 3) + str(i),)) for i in range(11)
    ]
    return build_corpus(rows, tokenizer, tmp_path_factory.mktemp("data") / "train", TokenLimits(64)).corpus


@pytest.fixture(scope="module")
def model(tokenizer):
    config = models.DecoderConfig(
        family="gpt2",
        vocab_size=320,
        valid_vocab_size=310,
        hidden_size=16,
        embed_size=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=32,
        max_positions=64,
        residual_dropout=0.5,
        init_std=0.5,
    )
    return config, models.init(config, jax.random.key(1))


@pytest.fixture(scope="module")
def expected(model, corpus):
    config, params = model
    tokens_BxL = np.zeros((len(corpus), 64), np.int32)
    for i in range(len(corpus)):
        tokens_BxL[i, : corpus.lengths[i]] = corpus.example_tokens(i)
    logits_BxLxV = np.asarray(
        jax.jit(models.logits, static_argnums=0)(config, params, tokens_BxL), np.float64
    )
    means = []
    for logits, tokens, prompt, end in zip(
        logits_BxLxV, tokens_BxL, corpus.prompt_lengths, corpus.lengths, strict=True
    ):
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        means.append(-log_probabilities[np.arange(prompt - 1, end - 1), tokens[prompt:end]].mean())
    return np.array(means)


@pytest.mark.parametrize("mapping", ["pmap", "fsdp"])
@pytest.mark.parametrize("devices", [1, 4])
def test_cross_entropy_of_the_response_alone(model, corpus, expected, mapping, devices):
    config, params = model
    placement = Placement(mapping, tuple(jax.devices()[:devices]))
    found = cross_entropy_by_example(config, placement.place(params), corpus, placement, chunk_size=16)
    assert found.dtype == np.float64 and np.ptp(expected) > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-5)
