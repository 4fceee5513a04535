"""The sampling rules against an independent NumPy version, and sampled frequencies against the distribution."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from l2m_jax.errors import InputError
from l2m_jax.generation.sampling import (
    SamplingRules,
    answer_keys,
    ban_early_end,
    ban_repeated_ngrams,
    candidates,
    draw,
    sample,
)

EOS = 3
EVERY_TOKEN = SamplingRules(top_k=0)
sample_jit = jax.jit(sample, static_argnums=(5, 6))


def changed(**changes):
    """Rules without top-k, unless it is given."""
    return dataclasses.replace(EVERY_TOKEN, **changes)


def repr_of_changes(rules):
    differing = {f: v for f, v in dataclasses.asdict(rules).items() if v != getattr(EVERY_TOKEN, f)}
    return ",".join(f"{f}={v}" for f, v in differing.items()) or "none"


def numpy_probabilities(logits, tokens, length, new_tokens, rules):
    """One row, float64, written after Hugging Face's definitions: sorts, loops over n-grams."""
    logits = logits.astype(np.float64)
    known = [int(t) for t in tokens[:length]]
    n = rules.no_repeat_ngram
    if n:
        prefix = known[len(known) - (n - 1) :] if n > 1 else []
        for start in range(len(known) - n + 1):
            if known[start : start + n - 1] == prefix:
                logits[known[start + n - 1]] = -np.inf
    if new_tokens < rules.min_new_tokens:
        logits[EOS] = -np.inf
    if rules.temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)]
    logits = logits / rules.temperature
    if 0 < rules.top_k < len(logits):
        logits[logits < np.sort(logits)[-rules.top_k]] = -np.inf
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    if rules.top_p < 1:
        order = np.argsort(probabilities)
        removed = order[np.cumsum(probabilities[order]) <= 1 - rules.top_p]
        probabilities[removed[removed != order[-1]]] = 0
        probabilities /= probabilities.sum()
    return probabilities


@functools.partial(jax.jit, static_argnums=4)
def our_probabilities(logits_BxV, tokens_BxS, lengths_B, new_B, rules):
    """The distribution that `sample` draws from, by the same steps."""
    if rules.no_repeat_ngram:
        logits_BxV = ban_repeated_ngrams(logits_BxV, tokens_BxS, lengths_B, rules.no_repeat_ngram)
    if rules.min_new_tokens:
        logits_BxV = ban_early_end(logits_BxV, new_B, rules.min_new_tokens, (EOS,))
    kept, ids = candidates(logits_BxV, rules)
    probabilities = jax.nn.softmax(kept, axis=-1)
    if ids is None:
        return probabilities
    return jnp.zeros(logits_BxV.shape).at[jnp.arange(len(ids))[:, None], ids].set(probabilities)


def random_rows(seed, B=16, V=37, S=24):
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=3, size=(B, V)).astype(np.float32)
    lengths = rng.integers(1, S + 1, size=B).astype(np.int32)
    tokens = rng.integers(0, 5, size=(B, S)).astype(np.int32)  # few distinct tokens, so that n-grams repeat
    new = np.minimum(rng.integers(0, 6, size=B), lengths - 1).astype(np.int32)
    return logits, tokens, lengths, new


@pytest.mark.parametrize(
    "rules",
    [
        changed(),
        changed(temperature=0.6),
        changed(top_k=5),
        changed(top_k=500),
        changed(top_k=1, temperature=2.0),
        changed(top_p=0.8),
        changed(top_p=1e-6),
        changed(top_p=0.99, temperature=1.7),
        changed(top_k=8, top_p=0.7, temperature=1.3),
        changed(no_repeat_ngram=1),
        changed(no_repeat_ngram=2, top_k=6),
        changed(no_repeat_ngram=3, top_p=0.9),
        changed(no_repeat_ngram=30),
        changed(min_new_tokens=3, top_k=4, temperature=3.0),
        changed(no_repeat_ngram=2, min_new_tokens=4, top_k=7, top_p=0.6, temperature=0.9),
    ],
    ids=repr_of_changes,
)
def test_rules_equal_numpy(rules):
    for seed in range(3):
        rows = random_rows(seed)
        ours = np.asarray(our_probabilities(*rows, rules))
        expected = np.stack([numpy_probabilities(*row, rules) for row in zip(*rows, strict=True)])
        np.testing.assert_array_equal(ours > 0, expected > 0)
        np.testing.assert_allclose(ours, expected, atol=2e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_greedy_takes_the_largest_that_is_not_banned(n):
    rules = changed(temperature=0, no_repeat_ngram=n, min_new_tokens=2)
    banned = 0
    for seed in range(10):
        logits, tokens, lengths, new = random_rows(seed)
        logits[:, :5] += 10  # the tokens that the rows hold
        keys = np.zeros((len(logits), 2), np.uint32)
        ours = sample_jit(logits, tokens, lengths, new, keys, rules, (EOS,))
        expected = [
            numpy_probabilities(*row, rules).argmax()
            for row in zip(logits, tokens, lengths, new, strict=True)
        ]
        np.testing.assert_array_equal(ours, expected)
        banned += np.sum(np.asarray(ours) != logits.argmax(-1))
    assert banned > 0  # else the rules had nothing to do


def _frequencies(logits_V, rules, draws):
    """How often each token comes in answers to different prompts, and at different positions."""
    prompts, positions = draws // 50, 50
    keys = np.repeat(answer_keys([[i] for i in range(prompts)], [10])[:, 0], positions, axis=0)
    position = np.tile(np.arange(positions, dtype=np.int32), prompts)
    logits = np.broadcast_to(logits_V[None], (draws, len(logits_V)))
    tokens = np.zeros((draws, 1), np.int32)
    chosen = sample_jit(logits, tokens, position, position, keys, rules, (EOS,))
    return np.bincount(np.asarray(chosen), minlength=len(logits_V))


@pytest.mark.parametrize(
    "rules",
    [
        changed(),
        SamplingRules(),
        changed(temperature=1.5, top_k=20),
        changed(top_p=0.7),
        changed(top_k=30, top_p=0.9),
    ],
    ids=repr_of_changes,
)
def test_sampled_frequencies_follow_the_distribution(rules):
    V, draws = 700, 20_000  # three chunks of the search, the last one partly filled
    logits = np.random.default_rng(0).normal(scale=2, size=V).astype(np.float32)
    counts = _frequencies(logits, rules, draws)
    expected = numpy_probabilities(logits, np.zeros(1, np.int32), 0, 0, rules) * draws
    assert counts[expected == 0].sum() == 0
    rare = expected < 8
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    present = wanted > 0
    assert stats.chisquare(observed[present], wanted[present]).pvalue > 1e-3
    # The same test notices a distribution that is off by a temperature of 1.1.
    off = numpy_probabilities(logits / 1.1, np.zeros(1, np.int32), 0, 0, rules) * draws
    wanted = np.append(off[~rare], off[rare].sum())[present]
    assert stats.chisquare(observed[present], wanted * draws / wanted.sum()).pvalue < 1e-6


def test_draw_never_takes_what_has_no_probability():
    # One entry alone is possible, in any place of any chunk; others underflow or are -inf.
    C = 600
    for place in (0, 255, 256, 511, 512, 599):
        logits = np.full((64, C), -np.inf, np.float32)
        logits[:, place] = -50.0
        logits[:, (place + 1) % C] = -500.0
        keys = answer_keys([[i] for i in range(64)], [0])[:, 0]
        chosen = jax.jit(draw)(logits, keys, np.zeros(64, np.int32))
        assert np.all(np.asarray(chosen) == place)


def test_keys_depend_on_seed_and_tokens_alone():
    prompts = [[5, 6, 7], [5, 6], [7, 6, 5], [5, 6, 7]]
    keys = answer_keys(prompts, [10, 20])
    np.testing.assert_array_equal(keys[0], keys[3])
    assert len({tuple(key) for key in keys.reshape(-1, 2).tolist()}) == 6
    np.testing.assert_array_equal(answer_keys(prompts[::-1], [20, 10]), keys[::-1, ::-1])
    with jax.default_prng_impl("rbg"):  # a configured generator must not change answers
        np.testing.assert_array_equal(answer_keys(prompts, [10, 20]), keys)


def test_random_numbers_differ_between_positions():
    logits = np.zeros(1000, np.float32)
    counts = _frequencies(logits, changed(), 5000)
    assert (counts > 0).sum() > 950  # 5,000 draws from 1,000: about 993 come up when they are independent


@pytest.mark.parametrize("greedy", [True, False])
def test_an_early_end_is_banned_whichever_token_it_is(greedy):
    logits, tokens, lengths, _ = random_rows(0)
    logits[:, [EOS, 11]] += 50
    rules = changed(temperature=0.0 if greedy else 1.0, min_new_tokens=2)
    new = np.arange(len(logits), dtype=np.int32) % 4
    keys = answer_keys([[i] for i in range(len(logits))], [0])[:, 0]
    chosen = np.asarray(sample_jit(logits, tokens, lengths, new, keys, rules, (EOS, 11)))
    np.testing.assert_array_equal(np.isin(chosen, (EOS, 11)), new >= 2)


def test_the_defaults_are_the_papers():
    assert dataclasses.asdict(SamplingRules()) == {
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
        "no_repeat_ngram": 0,
        "min_new_tokens": 0,
        "max_new_tokens": 512,
    }


NAN = float("nan")


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(SamplingRules)])
@pytest.mark.parametrize("value", [NAN, -1, float("inf")])
def test_no_rule_is_negative_or_not_a_number(field, value):
    with pytest.raises(InputError, match=rf"^{field}: {value} must be"):
        SamplingRules(**{field: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_p": 0.0}, "top_p: 0.0 must be greater than 0 and at most 1"),
        ({"top_p": 1.1}, "top_p: 1.1 must be"),
        ({"temperature": -0.1}, "temperature: -0.1 must be 0 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0 must be 1 or more"),
        ({"min_new_tokens": 513}, r"max_new_tokens: 512 must be at least min_new_tokens \(513\)"),
    ],
)
def test_rules_outside_their_range(changes, message):
    with pytest.raises(InputError, match=f"^{message}"):
        SamplingRules(**changes)
