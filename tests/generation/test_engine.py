"""Answers of small models: what they must equal, and what they must not depend on."""

import collections
import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy import stats

from l2m_jax import models
from l2m_jax.errors import InputError
from l2m_jax.generation import (
    Engine,
    Generator,
    ResponseFile,
    SamplingRules,
    default_slots,
    engine,
    generate,
    generate_file,
    programs,
)
from l2m_jax.parallel import Placement

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
    eos_token_id=EOS,
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


def place(config, params, mapping="pmap", devices=slice(1), **options):
    """A generator on some of the fake devices, by default on the first one."""
    placement = Placement(mapping, tuple(jax.devices()[devices]))
    return Generator(config, placement.place(params), placement, **options)


FOUR, ALL = slice(4), slice(None)


class Watched(Engine):
    """Notes the shapes of the slots that each program is called with."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.calls = collections.defaultdict(list)

    def _map(self, function):
        mapped = super()._map(function)

        def call(*arguments):
            for slots in (a for a in arguments if isinstance(a, programs.Slots)):
                self.calls[function].append(jax.eval_shape(lambda x: x, slots))
            return mapped(*arguments)

        return call


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
    answers = generate(place(config, params, slots=3), prompts, rules, [0])
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
    generator = place(dataclasses.replace(config, eos_token_id=case["eos"]), params)
    for title, given in GOLDEN["rules"].items():
        rules = SamplingRules(
            temperature=0,
            max_new_tokens=given["max_new_tokens"],
            min_new_tokens=given.get("min_new_tokens", 0),
            no_repeat_ngram=given.get("no_repeat_ngram_size", 0),
        )
        answers = generate(generator, case["prompts"], rules, [0])
        expected = [tuple(a[:-1] if a[-1] == case["eos"] else a) for a in case["answers"][title]]
        assert [answer.tokens for answer in answers] == expected, title


SAMPLED = SamplingRules(top_k=20, top_p=0.95, no_repeat_ngram=3, min_new_tokens=2, max_new_tokens=24)


@pytest.fixture(scope="module")
def sampled():
    """(config, params, prompts, answers of one device)."""
    config, params = small()
    prompts = some_prompts(12)
    answers = generate(place(config, params, slots=12), prompts, SAMPLED, [7, 8])
    return config, params, prompts, answers


def test_order_slots_and_devices_change_nothing(sampled):
    config, params, prompts, answers = sampled
    order = np.random.default_rng(1).permutation(len(prompts)).tolist()
    elsewhere = place(config, params, devices=slice(1, 2), slots=5)
    shuffled = generate(elsewhere, [prompts[p] for p in order], SAMPLED, [8, 7])
    by_work = {(order[a.prompt], a.seed): a.tokens for a in shuffled}
    assert by_work == {(a.prompt, a.seed): a.tokens for a in answers}
    assert generate(place(config, params, devices=ALL, slots=3), prompts, SAMPLED, [7, 8]) == answers


def test_sharded_parameters_give_the_same(sampled):
    config, params, prompts, answers = sampled
    sharded = place(config, params, "fsdp", FOUR, slots=4)
    assert generate(sharded, prompts, SAMPLED, [7, 8]) == answers


@pytest.mark.parametrize("mapping", ["pmap", "fsdp"])
def test_parameters_are_read_in_place(sampled, mapping):
    """What generation adds to the parameters of a training state, on every device: one entry for each layer."""
    config, params, prompts, _ = sampled
    devices = jax.devices()[FOUR]

    def new_bytes(config):
        generator = place(config, params, mapping, FOUR)
        before = {id(x) for x in jax.live_arrays()}
        engine = Engine(generator, SAMPLED)
        new = [x for x in jax.live_arrays() if id(x) not in before]
        generate(generator, prompts[:1], SAMPLED, [7])
        assert not any(x.is_deleted() for x in jax.tree.leaves(generator.params))
        del engine
        shards = [shard for x in new for shard in x.addressable_shards]
        return [sum(s.data.nbytes for s in shards if s.device == device) for device in devices]

    def bytes_of(tree, itemsize):
        return sum(x.size for x in jax.tree.leaves(tree)) * itemsize

    blocks, embeddings = params["blocks"], params["embeddings"]
    norms = [x for path, x in jax.tree_util.tree_leaves_with_path(blocks) if "norm" in str(path)]
    parts = 1 if mapping == "pmap" else 4
    assert new_bytes(config) == [bytes_of(blocks, 4) / parts] * 4
    narrow = bytes_of([blocks, embeddings], 2) + bytes_of(norms, 2)  # norms stay in float32
    assert new_bytes(dataclasses.replace(config, dtype="bfloat16")) == [narrow / parts] * 4


def test_layers_keep_the_sharding_of_their_stack(monkeypatch):
    """Where kernels are not transposed: on GPUs, this preparation needs no exchange."""
    monkeypatch.setattr(programs, "is_transposed", lambda placement: False)
    config, params = small("llama")
    generator = place(config, params, "fsdp", FOUR)
    layers = programs.prepare_on_devices(config, generator.params, generator.placement)["blocks"]
    assert len(layers) == config.num_layers
    stack = jax.tree.leaves(generator.params["blocks"])
    for layer in layers:
        for of_layer, of_stack in zip(jax.tree.leaves(layer), stack, strict=True):
            share, stack_share = (x.sharding.shard_shape(x.shape) for x in (of_layer, of_stack))
            assert (config.num_layers, *share) == stack_share
            assert np.prod(share) == of_layer.size / 4


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

    params = {"blocks": {"unused": np.zeros((2, 4), np.float32)}}

    def run(order, devices=slice(1), mapping="pmap", slots=0, **settings):
        engine = Engine(place(config, params, mapping, devices, slots=slots), rules, **settings)
        return {(p, seed): tokens for ended in engine.run(prompts, order) for p, seed, tokens in ended}

    first = run(wanted, slots=9)
    assert len(first) == 60 and len(set(first.values())) > 50
    assert len({len(tokens) for tokens in first.values()}) > 10
    shuffled = np.random.default_rng(0).permutation(len(wanted))
    assert run([wanted[i] for i in shuffled], slice(2, 3), slots=4, prefill_tokens=64) == first
    assert run(wanted[::-1], ALL, slots=3) == first
    assert run(wanted, FOUR, "fsdp", slots=2, prefill_tokens=100) == first


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
    answers = generate(place(config, params), [prompt], rules, range(draws))
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
    output = ResponseFile(tmp_path / "responses.jsonl", "model")

    def run(tokenizer, seeds=(7, 8), output=output, rules=SAMPLED, **changes):
        changed = dataclasses.replace(config, **changes)
        generator = place(changed, params, tokenizer=tokenizer, slots=4)
        return generate(generator, prompts, rules, seeds, output=output)

    with pytest.raises(Interrupted):
        run(Words(9))
    kept = output.path.read_bytes()
    written = kept.count(b"\n") - 1
    assert 0 < written <= 9
    output.path.write_bytes(kept[:-5])  # the last line was not written to its end
    words = Words()
    resumed = run(words)
    assert 10**9 - words.left == len(answers) - (written - 1)
    assert [(a.prompt, a.seed, a.tokens) for a in resumed] == [(a.prompt, a.seed, a.tokens) for a in answers]
    assert all(a.text == " ".join(map(str, a.tokens)) for a in resumed)
    assert output.path.read_bytes().startswith(kept[: kept[:-5].rfind(b"\n") + 1])
    # Finished: nothing is decoded again, whatever the cost or rounding of a step, and another seed is added.
    assert run(Words(0)) == resumed
    narrow = {
        "dtype": "bfloat16",
        "param_dtype": "bfloat16",
        "remat": "block",
        "scan_layers": True,
        "attention": "xla",
    }
    dropout = {f"{name}_dropout": 0.5 for name in ("embedding", "attention", "residual")}
    assert run(Words(0), **narrow, **dropout) == resumed
    words = Words()
    run(words, seeds=(7, 9))
    assert 10**9 - words.left == len(prompts)
    # Answers of another model, or by other rules, are neither used nor overwritten.
    content = output.path.read_bytes()
    for changes in (
        {"output": dataclasses.replace(output, key="another model")},
        {"rules": dataclasses.replace(SAMPLED, top_k=21)},
        {"norm_eps": 1e-6},
    ):
        with pytest.raises(
            InputError, match=r"responses\.jsonl: holds answers of another model.*another folder"
        ):
            run(Words(), **changes)
        assert output.path.read_bytes() == content


def test_a_file_of_answers_needs_no_list_of_prompts(sampled, tmp_path, monkeypatch):
    """Prompts come from a view, a few at a time, and a run may end at any of them."""
    config, params, prompts, answers = sampled
    monkeypatch.setattr(engine, "_SCHEDULED_TOGETHER", 5)
    shares = []

    class View(Sequence):
        def __len__(self):
            return len(prompts)

        def __getitem__(self, chosen):
            if isinstance(chosen, slice):
                shares.append(len(prompts[chosen]))
                return [np.array(prompt, np.int32) for prompt in prompts[chosen]]
            return np.array(prompts[chosen], np.int32)

    def run(answered, seeds=(7, 8)):
        generator = place(config, params, tokenizer=Words(answered), slots=4)
        generate_file(generator, View(), SAMPLED, seeds, output)

    output = ResponseFile(tmp_path / "responses.jsonl", "model")
    for answered in (7, 9):  # the second run ends in a later share
        with pytest.raises(Interrupted):
            run(answered)
    run(10**9)
    run(0)  # nothing is left to do
    assert set(shares) == {5, len(prompts) % 5}
    found = {(a.prompt, a.seed): a.tokens for a in dataclasses.replace(output, key=None).read()}
    assert found == {(a.prompt, a.seed): a.tokens for a in answers}
    places = dict(dataclasses.replace(output, key=None).lines())
    assert all(output.answer_at(place) == answer for place, answer in places.items())
    # The file is the same as that of a list.
    assert generate(place(config, params, tokenizer=Words(0)), prompts, SAMPLED, (7, 8), output=output)


def test_progress_tells_rate_and_time_left(sampled, capsys):
    config, params, prompts, _ = sampled
    generate(place(config, params), prompts, SAMPLED, [7, 8], title="dolly, student")
    printed = capsys.readouterr().out
    assert "dolly, student  24/24  tokens/s" in printed and "0 s left" in printed


def test_any_end_of_sequence_ends_an_answer(sampled):
    config, params, prompts, _ = sampled
    ends = (EOS, 9)
    rules = dataclasses.replace(SAMPLED, min_new_tokens=0)
    one, several = (
        generate(place(dataclasses.replace(config, eos_token_id=ids), params), prompts, rules, [7, 8])
        for ids in (EOS, ends)
    )
    assert any(9 in answer.tokens for answer in one)
    for short, long in zip(several, one, strict=True):
        end = long.tokens.index(9) if 9 in long.tokens else len(long.tokens)
        assert short.tokens == long.tokens[:end]
    assert min(len(answer.tokens) for answer in several) < 2
    late = generate(place(dataclasses.replace(config, eos_token_id=ends), params), prompts, SAMPLED, [7, 8])
    assert min(len(answer.tokens) for answer in late) >= 2
    assert not any(set(ends) & set(answer.tokens) for answer in late)


@pytest.mark.parametrize("ids", [None, ()])
def test_a_model_that_cannot_end_an_answer(sampled, ids):
    config, params, _, _ = sampled
    with pytest.raises(InputError, match=r"^eos_token_id: .* ends no answer; set it"):
        place(dataclasses.replace(config, eos_token_id=ids), params)


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
        generate(place(config, params), prompts, SAMPLED, seeds)


def test_room_for_tokens_grows_to_the_last_position():
    config, params = small(max_positions=72)
    rules = SamplingRules(temperature=0, min_new_tokens=20, max_new_tokens=20)
    prompts = [some_prompts(1, seed=3)[0] * 52, some_prompts(1, seed=4)[0]]
    prompts[0] = prompts[0][:52]
    answers = generate(place(config, params, slots=1), prompts, rules, [1])
    assert [a.tokens for a in answers] == [greedy_without_cache(config, params, p, 20, None) for p in prompts]


def test_the_room_follows_what_is_decoded_not_the_padding_of_a_batch():
    config, params = small(max_positions=256)
    prompts = [*some_prompts(4, longest=9), some_prompts(1, seed=3)[0] * 200]
    prompts[-1] = prompts[-1][:200]
    rules = SamplingRules(temperature=0, max_new_tokens=8)
    watched = Watched(place(config, params, slots=1), rules)
    ended = watched.run(prompts, [(p, 1) for p in range(5)])
    answers = {p: tokens for some in ended for p, _, tokens in some}
    assert answers == {p: greedy_without_cache(config, params, prompts[p], 8, EOS) for p in range(5)}
    decoded = [slots.tokens_BxS.shape[-1] for slots in watched.calls[programs.decode]]
    assert decoded[0] == 64 and decoded[-1] == 256
    assert len(watched.calls[programs.resize]) == 1


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_cpu_decodes_bfloat16_from_float32_keys_and_values(family):
    config, params = small(family, dtype=jnp.bfloat16)
    watched = Watched(place(config, params), SamplingRules(temperature=0, max_new_tokens=12))
    prompts = some_prompts(8)
    ended = watched.run(prompts, [(p, 1) for p in range(8)])
    answers = {p: tokens for some in ended for p, _, tokens in some}
    assert answers == {p: greedy_without_cache(config, params, prompts[p], 12, EOS) for p in range(8)}
    for slots in watched.calls[programs.decode]:
        assert {leaf.dtype for leaf in jax.tree.leaves(slots.cache)} == {jnp.dtype(jnp.float32)}


def test_no_room_for_prompts(sampled):
    config, params, _, _ = sampled
    rules = SamplingRules(max_new_tokens=64)
    with pytest.raises(InputError, match="max_new_tokens: 64 leaves no room"):
        generate(place(config, params), [[5]], rules, [1])


def test_no_prompts_give_no_answers(sampled):
    config, params, _, _ = sampled
    assert generate(place(config, params), [], SAMPLED, [1]) == []


def test_utilisation_of_the_engine():
    config, params = small(num_layers=1)
    prompts = some_prompts(60, longest=20)
    rules = SamplingRules(temperature=1.4, max_new_tokens=44)
    used = Engine(place(config, params, slots=16), rules)
    ended = [a for some in used.run(prompts, [(p, s) for p in range(60) for s in range(5)]) for a in some]
    assert len(ended) == 300
    lengths = [len(tokens) for _, _, tokens in ended]
    assert np.std(lengths) > 5  # long and short answers side by side
    assert used.utilisation >= 0.85


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_parameters_are_prepared_in_the_dtype_and_form_that_they_are_used_in(dtype, transposed):
    config, params = small("llama", dtype=dtype)
    prepared = jax.jit(programs.prepare, static_argnums=(0, 1))(config, transposed, params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(prepared):
        is_norm = any("norm" in str(key) for key in path)
        assert leaf.dtype == (jnp.float32 if is_norm else jnp.dtype(dtype))
    assert len(prepared["blocks"]) == config.num_layers
    assert ("kernel_OxI" in prepared["blocks"][0]["mlp"]["up"]) == transposed
    step = jax.jit(models.decode_step, static_argnums=0)
    tokens, positions = jnp.asarray([5, 6]), jnp.asarray([0, 3])
    cache = models.empty_cache(config, 2, 8)
    of_prepared, of_params = (step(config, p, tokens, positions, cache) for p in (prepared, params))
    # The transposed product sums in another order.
    same = partial(
        np.testing.assert_allclose, rtol=0, atol={"float32": 1e-5, "bfloat16": 0.02}[dtype] * transposed
    )
    jax.tree.map(lambda a, b: same(np.float32(a), np.float32(b)), of_prepared, of_params)


def test_a_cache_has_room_in_one_of_few_sizes():
    config = dataclasses.replace(SMALL, max_positions=1000)
    sizes = [engine.cache_size(config, length) for length in range(1, 1001)]
    assert all(size >= length for length, size in enumerate(sizes, start=1)) and sizes == sorted(sizes)
    assert sorted(set(sizes)) == [64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1000]


def test_default_slots_follow_the_size_of_the_cache():
    config, _ = small()
    assert default_slots(config, 1000) == 64
    large = dataclasses.replace(SMALL, num_layers=48, num_heads=25, num_kv_heads=25, head_dim=64)
    assert 8 < default_slots(large, 1024) < 64
