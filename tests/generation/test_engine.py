"""Answers of small models: what they must equal, and what they must not depend on."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file
from scipy import stats

from l2m_jax import models
from l2m_jax.errors import InputError
from l2m_jax.generation import Engine, SamplingRules, default_slots, generate, programs
from l2m_jax.generation.programs import prepare

EOS = 2
GOLDEN = json.loads((Path(__file__).parent / "golden" / "greedy.json").read_text())
MODELS = Path(__file__).parents[1] / "models" / "golden"

SMALL = models.DecoderConfig(
    family="gpt2",
    vocab_size=48,
    valid_vocab_size=45,
    hidden_size=16,
    embed_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    intermediate_size=24,
    max_positions=64,
)
FAMILIES = {
    "gpt2": {},
    "opt": {"position_offset": 2, "activation": "relu"},
    "opt_350m": {"position_offset": 2, "pre_norm": False, "final_norm": False, "embed_size": 8},
    "llama": {
        "rope": models.Rope(),
        "norm": "rms",
        "num_kv_heads": 2,
        "gated_mlp": True,
        "activation": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_embeddings": False,
    },
}


def small(family="gpt2", **changes):
    """A config, and parameters that differ enough for it to say different things."""
    changes = FAMILIES[family] | {"family": family.removesuffix("_350m")} | changes
    config = dataclasses.replace(SMALL, **changes)
    shapes = jax.eval_shape(lambda: models.init(config, jax.random.key(0)))
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        noise = rng.normal(scale=0.4, size=leaf.shape).astype(np.float32)
        return jnp.asarray(1 + noise if "scale" in str(path[-1]) else noise)

    return config, jax.tree_util.tree_map_with_path(fill, shapes)


def some_prompts(count, longest=30, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 45, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


full_logits = jax.jit(models.logits, static_argnums=0)


def one_device():
    return jax.devices()[:1]


def greedy_without_cache(config, params, prompt, new_tokens, eos):
    """A full forward pass over everything so far for each token; padding behind changes nothing."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + new_tokens:
        padded = np.zeros((1, config.max_positions), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(np.argmax(full_logits(config, params, padded)[0, len(tokens) - 1])))
        if tokens[-1] == eos:
            return tuple(tokens[len(prompt) : -1])
    return tuple(tokens[len(prompt) :])


@pytest.mark.parametrize(("scan_layers", "remat"), [(True, "none"), (False, "block")])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_full_forward_passes(family, scan_layers, remat):
    config, params = small(family, scan_layers=scan_layers, remat=remat)
    prompts = some_prompts(8)
    # 3 slots for 8 prompts: most begin in a slot where another answer, often a longer one, has left its cache.
    rules = SamplingRules(temperature=0, max_new_tokens=16)
    answers = generate(config, params, prompts, rules, [0], eos_token_id=EOS, slots=3, devices=one_device())
    expected = [greedy_without_cache(config, params, prompt, 16, EOS) for prompt in prompts]
    assert [answer.tokens for answer in answers] == expected
    assert len(set(expected)) > 4  # else the model says the same to everything


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_greedy_equals_transformers(name, tmp_path):
    tensors, prefix = load_file(MODELS / f"{name}.safetensors"), "weight/"
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(json.loads((MODELS / "cases.json").read_text())[name]))
    config, params = models.load(tmp_path)
    case = GOLDEN["cases"][name]
    for title, given in GOLDEN["rules"].items():
        rules = SamplingRules(
            temperature=0,
            max_new_tokens=given["max_new_tokens"],
            min_new_tokens=given.get("min_new_tokens", 0),
            no_repeat_ngram=given.get("no_repeat_ngram_size", 0),
        )
        answers = generate(
            config, params, case["prompts"], rules, [0], eos_token_id=case["eos"], devices=one_device()
        )
        expected = [tuple(a[:-1] if a[-1] == case["eos"] else a) for a in case["answers"][title]]
        assert [answer.tokens for answer in answers] == expected, title


SAMPLED = SamplingRules(top_k=20, top_p=0.95, no_repeat_ngram=3, min_new_tokens=2, max_new_tokens=24)


@pytest.fixture(scope="module")
def sampled():
    """(config, params, prompts, answers of one device)."""
    config, params = small()
    prompts = some_prompts(12)
    answers = generate(
        config, params, prompts, SAMPLED, [7, 8], eos_token_id=EOS, slots=12, devices=one_device()
    )
    return config, params, prompts, answers


def test_order_slots_and_devices_change_nothing(sampled):
    config, params, prompts, answers = sampled
    order = np.random.default_rng(1).permutation(len(prompts)).tolist()
    shuffled = generate(
        config,
        params,
        [prompts[p] for p in order],
        SAMPLED,
        [8, 7],
        eos_token_id=EOS,
        slots=5,
        devices=jax.devices()[1:2],
    )
    by_work = {(order[a.prompt], a.seed): a.tokens for a in shuffled}
    assert by_work == {(a.prompt, a.seed): a.tokens for a in answers}
    everywhere = generate(config, params, prompts, SAMPLED, [7, 8], eos_token_id=EOS, slots=3)
    assert everywhere == answers


def test_sharded_parameters_give_the_same(sampled):
    config, params, prompts, answers = sampled
    mesh = Mesh(np.array(jax.devices()[:4]), ("devices",), axis_types=(AxisType.Auto,))

    def shard(x):
        spec = ["devices" if i == x.ndim - 1 and x.shape[i] % 4 == 0 else None for i in range(x.ndim)]
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    sharded = jax.tree.map(shard, params)
    got = generate(config, sharded, prompts, SAMPLED, [7, 8], eos_token_id=EOS, slots=4, mesh=mesh)
    assert got == answers


class ExactModel:
    """A "model" of whole numbers, which no shape or order of summation can round differently.

    Its cache holds the tokens themselves, and its logits depend on all of them and on their places: a token
    that got lost, or came from another answer, would show.
    """

    unstack_layers = staticmethod(lambda params: params)

    @staticmethod
    def empty_cache(config, batch, length):
        return jnp.zeros((batch, 1, length, 1))

    @staticmethod
    def prefill(config, params, tokens_BxL, lengths_B, cache_length):
        return None, tokens_BxL[:, None, :, None].astype(jnp.float32)

    @staticmethod
    def decode_step(config, params, tokens_B, positions_B, cache):
        cache = cache.at[jnp.arange(len(tokens_B)), 0, positions_B, 0].set(tokens_B.astype(jnp.float32))
        places_S = jnp.arange(cache.shape[2])
        seen = places_S[None] <= positions_B[:, None]
        return jnp.sum(jnp.where(seen, (cache[:, 0, :, 0] + 1) * (places_S + 3)[None], 0), axis=1), cache

    @staticmethod
    def apply_head(config, params, hidden_B):
        return -((hidden_B[:, None] * 7 + jnp.arange(config.vocab_size)[None] * 13) % 48) / 16


def test_nothing_but_rounding_can_differ(monkeypatch):
    """With exact arithmetic: any order, slots, prefill batches, devices and mapping give the same tokens."""
    monkeypatch.setattr(programs, "models", ExactModel)
    config = dataclasses.replace(SMALL, family="exact")
    prompts, seeds = some_prompts(20), (7, 8, 9)
    rules = SamplingRules(top_k=40, no_repeat_ngram=4, max_new_tokens=30)
    wanted = [(p, seed) for p in range(20) for seed in seeds]

    def run(order, **settings):
        engine = Engine(config, {}, rules, eos_token_id=EOS, **settings)
        return {(p, seed): tokens for ended in engine.run(prompts, order) for p, seed, tokens in ended}

    first = run(wanted, slots=9, devices=one_device())
    assert len(first) == 60 and len(set(first.values())) > 50
    assert len({len(tokens) for tokens in first.values()}) > 10
    shuffled = np.random.default_rng(0).permutation(len(wanted))
    mesh = Mesh(np.array(jax.devices()[:4]), ("devices",), axis_types=(AxisType.Auto,))
    assert run([wanted[i] for i in shuffled], slots=4, prefill_tokens=64, devices=jax.devices()[2:3]) == first
    assert run(wanted[::-1], slots=3) == first
    assert run(wanted, slots=2, mesh=mesh, prefill_tokens=100) == first


def test_answers_keep_the_rules(sampled):
    _, _, prompts, answers = sampled
    assert [(a.prompt, a.seed) for a in answers] == [(p, s) for p in range(12) for s in (7, 8)]
    lengths = [len(a.tokens) for a in answers]
    assert min(lengths) >= 2 and max(lengths) == 24
    assert any(2 <= n < 24 for n in lengths)  # some meet the end of sequence
    for answer in answers:
        assert EOS not in answer.tokens
        assert max(answer.tokens) < 45  # the rest of the vocabulary is padding
        text = [*prompts[answer.prompt], *answer.tokens]
        ngrams = [tuple(text[i : i + 3]) for i in range(len(text) - 2)]
        first_new = len(prompts[answer.prompt])
        assert all(ngrams.index(ngram) == i for i, ngram in enumerate(ngrams) if i + 3 > first_new)
    assert len({a.tokens for a in answers}) == len(answers)


def test_first_tokens_follow_the_models_distribution():
    config, params = small()
    prompt, draws = some_prompts(1)[0], 4096
    rules = SamplingRules(temperature=1.5, max_new_tokens=1)
    answers = generate(config, params, [prompt], rules, range(draws), eos_token_id=EOS, devices=one_device())
    counts = np.bincount([a.tokens[0] if a.tokens else EOS for a in answers], minlength=48)
    logits = full_logits(config, params, jnp.asarray([prompt]))[0, -1]
    expected = np.asarray(jax.nn.softmax(logits / 1.5), np.float64) * draws
    possible = expected > 0
    assert counts[~possible].sum() == 0
    wanted = expected[possible] * draws / expected.sum()
    assert stats.chisquare(counts[possible], wanted).pvalue > 1e-3


class Interrupted(Exception):
    pass


class Words:
    """Stands in for a tokenizer, and interrupts the run after some answers."""

    def __init__(self, answers=10**9):
        self.left = answers

    def decode(self, tokens, skip_special_tokens):
        if not self.left:
            raise Interrupted
        self.left -= 1
        return " ".join(map(str, tokens))


def test_an_interrupted_run_continues(sampled, tmp_path):
    config, params, prompts, answers = sampled
    output = tmp_path / "responses.jsonl"

    def run(tokenizer, seeds=(7, 8), **changes):
        given = {"made_from": "model", "slots": 4, **changes}
        return generate(
            config,
            params,
            prompts,
            SAMPLED,
            seeds,
            eos_token_id=EOS,
            tokenizer=tokenizer,
            devices=one_device(),
            output=output,
            **given,
        )

    with pytest.raises(Interrupted):
        run(Words(9))
    kept = output.read_bytes()
    written = kept.count(b"\n") - 1
    assert 0 < written <= 9
    output.write_bytes(kept[:-5])  # the last line was not written to its end
    words = Words()
    resumed = run(words)
    assert 10**9 - words.left == len(answers) - (written - 1)
    assert [(a.prompt, a.seed, a.tokens) for a in resumed] == [(a.prompt, a.seed, a.tokens) for a in answers]
    assert all(a.text == " ".join(map(str, a.tokens)) for a in resumed)
    assert output.read_bytes().startswith(kept[: kept[:-5].rfind(b"\n") + 1])
    # Finished: nothing is decoded again; another seed is added; another model's answers are made anew.
    assert run(Words(0)) == resumed
    words = Words()
    run(words, seeds=(7, 9))
    assert 10**9 - words.left == len(prompts)
    words = Words()
    assert run(words, made_from="another model") == resumed
    assert 10**9 - words.left == len(answers)


def test_output_needs_to_know_the_model(sampled, tmp_path):
    config, params, prompts, _ = sampled
    with pytest.raises(ValueError, match="made_from"):
        generate(config, params, prompts, SAMPLED, [7], eos_token_id=EOS, output=tmp_path / "x")


def test_progress_tells_rate_and_time_left(sampled, capsys):
    config, params, prompts, _ = sampled
    generate(
        config,
        params,
        prompts,
        SAMPLED,
        [7, 8],
        eos_token_id=EOS,
        devices=one_device(),
        title="dolly, student",
    )
    printed = capsys.readouterr().out
    assert "dolly, student  24/24  tokens/s" in printed and "0 s left" in printed


@pytest.mark.parametrize(
    ("prompts", "seeds", "message"),
    [
        ([[5], []], [1], "prompt 1 has no tokens"),
        ([[5] * 41], [1], "prompt 0 has 41 tokens and 24 new ones .* cut prompts to 40 tokens"),
        ([[5, 48]], [1], "prompt 0 has token 48"),
        ([[5, -1]], [1], "prompt 0 has token -1"),
        ([[5]], [1, 1], "seeds"),
        ([[5]], [-1], "seeds"),
    ],
)
def test_inputs_that_cannot_be_answered(sampled, prompts, seeds, message):
    config, params, _, _ = sampled
    with pytest.raises(InputError, match=message):
        generate(config, params, prompts, SAMPLED, seeds, eos_token_id=EOS)


def test_room_for_tokens_grows_to_the_last_position():
    config, params = small(max_positions=72)
    rules = SamplingRules(temperature=0, min_new_tokens=20, max_new_tokens=20)
    prompts = [some_prompts(1, seed=3)[0] * 52, some_prompts(1, seed=4)[0]]
    prompts[0] = prompts[0][:52]
    answers = generate(config, params, prompts, rules, [1], eos_token_id=EOS, slots=1, devices=one_device())
    assert [a.tokens for a in answers] == [greedy_without_cache(config, params, p, 20, None) for p in prompts]


def test_no_room_for_prompts(sampled):
    config, params, _, _ = sampled
    rules = SamplingRules(max_new_tokens=64)
    with pytest.raises(InputError, match="max_new_tokens 64 leaves no room"):
        generate(config, params, [[5]], rules, [1], eos_token_id=EOS)


def test_no_prompts_give_no_answers(sampled):
    config, params, _, _ = sampled
    assert generate(config, params, [], SAMPLED, [1], eos_token_id=EOS) == []


def test_utilisation_of_the_engine():
    config, params = small(num_layers=1)
    prompts = some_prompts(60, longest=20)
    rules = SamplingRules(temperature=1.4, max_new_tokens=44)
    engine = Engine(config, params, rules, eos_token_id=EOS, slots=16, devices=one_device())
    ended = [a for some in engine.run(prompts, [(p, s) for p in range(60) for s in range(5)]) for a in some]
    assert len(ended) == 300
    lengths = [len(tokens) for _, _, tokens in ended]
    assert np.std(lengths) > 5  # long and short answers side by side
    assert engine.utilisation >= 0.85


def test_parameters_are_prepared_in_the_dtype_that_they_are_used_in():
    config, params = small("llama", dtype="bfloat16")
    stacked, by_layer = jax.jit(prepare, static_argnums=0)(config, params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(stacked):
        is_norm = any("norm" in str(key) for key in path)
        assert leaf.dtype == (jnp.float32 if is_norm else jnp.bfloat16)
    assert len(by_layer["blocks"]) == config.num_layers
    tokens = jnp.asarray([some_prompts(1)[0]])
    np.testing.assert_array_equal(full_logits(config, stacked, tokens), full_logits(config, params, tokens))


def test_default_slots_follow_the_size_of_the_cache():
    config, _ = small()
    assert default_slots(config, 1000) == 64
    large = dataclasses.replace(SMALL, num_layers=48, num_heads=25, num_kv_heads=25, head_dim=64)
    assert 8 < default_slots(large, 1024) < 64
