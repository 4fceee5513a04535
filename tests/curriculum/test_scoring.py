import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from l2m_jax import models
from l2m_jax.curriculum import scoring
from l2m_jax.data.corpus import build_corpus
from l2m_jax.data.encoding import TokenLimits
from l2m_jax.data.sources import Row
from l2m_jax.data.tokenizer import train_tokenizer
from l2m_jax.evaluation import rouge_l
from l2m_jax.evaluation.sets import from_corpus
from l2m_jax.generation import Answer, SamplingRules, generate


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
    """By padded rows of plain logits, in float64."""
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


@pytest.mark.parametrize("placed", ["one device", "four devices", "mesh"])
def test_cross_entropy_of_the_response_alone(model, corpus, expected, placed):
    config, params = model
    placement: dict[str, Any] = {"devices": jax.local_devices()[: 1 if placed == "one device" else 4]}
    if placed == "mesh":
        placement = {"mesh": Mesh(np.array(jax.devices()[:2]), ("devices",), axis_types=(AxisType.Auto,))}
    found = scoring.cross_entropy_by_example(config, params, corpus, chunk_size=16, **placement)
    assert found.dtype == np.float64 and np.ptp(expected) > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_both_scores(model, corpus, expected, tokenizer, tmp_path, monkeypatch):
    config, params = model
    longest = int(np.sort(corpus.prompt_lengths)[-3])
    prompts = from_corpus("train", corpus, longest_prompt=longest)
    assert 0 < prompts.left_out < len(corpus)
    said = []

    def answer(config, params, prompts, rules, seeds, *, tokenizer, **options):
        real = generate(config, params, prompts, rules, seeds, tokenizer=tokenizer, **options)
        said[:] = [dataclasses.replace(a, text=f"{a.text} words {a.prompt % 3}") for a in real]
        return said

    monkeypatch.setattr(scoring, "generate", answer)
    rules = SamplingRules(max_new_tokens=64 - longest)
    output = tmp_path / "answers.jsonl"
    rouge, cross_entropy = scoring.score(
        config,
        params,
        corpus,
        prompts,
        tokenizer,
        rules,
        7,
        devices=jax.local_devices()[:1],
        output=output,
        made_from="model",
    )
    assert all(isinstance(a, Answer) and a.seed == 7 for a in said) and output.is_file()
    by_example = dict(zip(prompts.indices, said, strict=True))
    by_hand = [
        rouge_l(by_example[i].text, corpus.references(i)) if i in by_example else 0
        for i in range(len(corpus))
    ]
    assert rouge.tolist() == by_hand and len(set(by_hand)) > 2
    np.testing.assert_allclose(cross_entropy, expected, rtol=1e-5)
