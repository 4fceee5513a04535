import dataclasses
import json
import math

import jax
import pytest

from l2m_jax import models
from l2m_jax.errors import InputError
from l2m_jax.evaluation import protocol, rouge_l
from l2m_jax.evaluation.protocol import Results, Score, evaluate, summarise
from l2m_jax.evaluation.sets import PromptSet
from l2m_jax.generation import Answer, Generator, SamplingRules
from l2m_jax.parallel import Placement

SET = PromptSet(
    name="self_inst",
    title="SelfInst",
    indices=(0, 1, 2),
    ids=("a", "b", "c"),
    prompts=((5, 6), (7,), (8, 9, 10)),
    texts=("five six", "seven", "eight nine ten"),
    references=(("w5 w6",), ("w7", "w1 w2 w3"), ("w8",)),
    categories=("x", "y", "x"),
    left_out=2,
)
OTHER = dataclasses.replace(SET, name="short", title="Short", unreportable=True)
RULES = SamplingRules(temperature=1.0, max_new_tokens=4)


class Tokenizer:
    def decode(self, tokens, skip_special_tokens):
        assert skip_special_tokens
        return " ".join(f"w{token}" for token in tokens)


@pytest.fixture(scope="module")
def model():
    config = models.DecoderConfig(
        family="gpt2",
        vocab_size=16,
        valid_vocab_size=16,
        hidden_size=8,
        embed_size=8,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=4,
        intermediate_size=16,
        max_positions=16,
        eos_token_id=0,
    )
    placement = Placement("pmap", tuple(jax.devices()[:1]))
    params = placement.place(models.init(config, jax.random.key(0)))
    return Generator(config, params, placement, Tokenizer())


def run(model, sets=(SET, OTHER), seeds=(10, 20), rules=RULES, **options):
    return evaluate(model, sets, rules, seeds, **options)


def test_mean_and_deviation_over_seeds_by_hand():
    # Seed 10: 0.5, 1.0, 0.0; seed 20: 0.0, 0.5, 0.0. Per seed: 50 and 16.67; mean 33.33, deviation 33.33/sqrt(2).
    values = {(0, 10): 0.5, (1, 10): 1.0, (2, 10): 0.0, (0, 20): 0.0, (1, 20): 0.5, (2, 20): 0.0}
    answers = [Answer(p, seed, (1,) * (p + 1), "W7." if p == 1 else "no") for p, seed in values]
    result = summarise(SET, answers, list(values.values()), (10, 20))
    assert result.rouge_l.per_seed == pytest.approx((50.0, 50 / 3))
    assert result.rouge_l.mean == pytest.approx(100 / 3)
    assert result.rouge_l.std == pytest.approx(100 / 3 / math.sqrt(2))
    assert result.exact_match.per_seed == pytest.approx((100 / 3, 100 / 3)) and result.exact_match.std == 0.0
    assert (result.rows, result.left_out, result.response_tokens) == (3, 2, 2.0)
    assert list(result.categories) == ["x", "y"]
    x, y = result.categories["x"], result.categories["y"]
    assert (x.rows, x.rouge_l.per_seed, x.exact_match.mean) == (2, (25.0, 0.0), 0.0)
    assert (y.rows, y.rouge_l.per_seed, y.exact_match.mean) == (1, (100.0, 50.0), 100.0)


def test_one_seed_has_no_deviation():
    assert Score.of([12.5]) == Score(12.5, 0.0, (12.5,))


def test_results_and_responses(model, tmp_path):
    results = run(model, folder=tmp_path, key="model")
    lines = [
        json.loads(line) for line in (tmp_path / "responses.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [(line["set"], line["id"], line["seed"]) for line in lines] == [
        (name, id, seed) for name in ("self_inst", "short") for id in "abc" for seed in (10, 20)
    ]
    for line in lines:
        i = "abc".index(line["id"])
        assert (line["prompt"], line["references"]) == (SET.texts[i], list(SET.references[i]))
        assert line["rouge_l"] == rouge_l(line["response"], line["references"])
        assert line["category"] == SET.categories[i]
    by_seed = [
        [x["rouge_l"] for x in lines if x["set"] == "self_inst" and x["seed"] == seed] for seed in (10, 20)
    ]
    assert results.sets[0].rouge_l.per_seed == pytest.approx([100 * sum(values) / 3 for values in by_seed])
    assert results.rouge_l == results.sets[0].rouge_l.mean  # the other set may not be reported

    written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert Results.from_json(written) == results
    assert written["sets"][0]["rouge_l"]["mean"] == results.sets[0].rouge_l.mean
    assert written["rules"]["max_new_tokens"] == 4 and written["seeds"] == [10, 20]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["responses.jsonl", "results.json"]


def test_validation_needs_no_folder(model, tmp_path):
    results = run(model, folder=tmp_path, key="model")
    assert [dataclasses.asdict(found) for found in run(model).sets] == [
        dataclasses.asdict(s) for s in results.sets
    ]
    with pytest.raises(ValueError, match="key"):
        run(model, folder=tmp_path)
    with pytest.raises(ValueError, match="tokenizer"):
        run(dataclasses.replace(model, tokenizer=None))


def test_an_interrupted_evaluation_continues_and_a_finished_one_is_read(model, tmp_path, monkeypatch):
    made = []
    generate = protocol.generate

    def counted(generator, prompts, rules, seeds, *, output, **options):
        path = output.path
        before = len(path.read_text(encoding="utf-8").splitlines()) - 1 if path.exists() else 0
        answers = generate(generator, prompts, rules, seeds, output=output, **options)
        made.append(len(answers) - before)
        return answers

    monkeypatch.setattr(protocol, "generate", counted)
    monkeypatch.setattr(protocol.files, "write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(model, folder=tmp_path, key="model")
    assert made == [6, 6]
    monkeypatch.undo()
    monkeypatch.setattr(protocol, "generate", counted)
    results = run(model, folder=tmp_path, key="model")
    assert made == [6, 6, 0, 0]
    assert run(model, folder=tmp_path, key="model") == results
    cheaper = dataclasses.replace(model.config, dtype="bfloat16", remat="block")
    assert run(dataclasses.replace(model, config=cheaper), folder=tmp_path, key="model") == results
    assert len(made) == 4


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "changes",
    [{"key": "another model"}, {"rules": dataclasses.replace(RULES, max_new_tokens=3)}],
    ids=["key", "rules"],
)
def test_another_evaluation_is_not_overwritten(model, tmp_path, monkeypatch, finished, changes):
    if finished:
        run(model, folder=tmp_path, key="model")
    else:
        monkeypatch.setattr(protocol, "rouge_l_many", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(model, folder=tmp_path, key="model")
        monkeypatch.undo()
    there = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    name = r"results\.json" if finished else r"self_inst\.jsonl"
    with pytest.raises(InputError, match=rf"{name}: holds .* of another model.*choose another folder"):
        run(model, folder=tmp_path, **{"key": "model"} | changes)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == there


def test_two_sets_of_one_name(model):
    with pytest.raises(InputError, match="two evaluation sets are called 'self_inst'"):
        run(model, sets=(SET, SET))
