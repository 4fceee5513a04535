import dataclasses
import json
import math

import jax
import pytest

from l2m_jax import models
from l2m_jax.errors import InputError
from l2m_jax.evaluation import protocol, rouge_l
from l2m_jax.evaluation.protocol import Results, Score, evaluate, summarise, table
from l2m_jax.evaluation.sets import PromptSet
from l2m_jax.generation import Answer, SamplingRules

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
    eos_token_id = 0

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
    )
    return config, models.init(config, jax.random.key(0))


def run(model, sets=(SET, OTHER), seeds=(10, 20), **options):
    config, params = model
    return evaluate(
        config, params, Tokenizer(), sets, RULES, seeds, devices=jax.local_devices()[:1], **options
    )


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
    results = run(model, folder=tmp_path, made_from="model")
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
    results = run(model, folder=tmp_path, made_from="model")
    assert [dataclasses.asdict(found) for found in run(model).sets] == [
        dataclasses.asdict(s) for s in results.sets
    ]
    with pytest.raises(ValueError, match="made_from"):
        run(model, folder=tmp_path)


def test_an_interrupted_evaluation_continues_and_a_finished_one_is_read(model, tmp_path, monkeypatch):
    made = []
    generate = protocol.generate

    def counted(config, params, prompts, rules, seeds, *, output, **options):
        before = len(output.read_text(encoding="utf-8").splitlines()) - 1 if output.exists() else 0
        answers = generate(config, params, prompts, rules, seeds, output=output, **options)
        made.append(len(answers) - before)
        return answers

    monkeypatch.setattr(protocol, "generate", counted)
    monkeypatch.setattr(protocol.files, "write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(model, folder=tmp_path, made_from="model")
    assert made == [6, 6]
    monkeypatch.undo()
    monkeypatch.setattr(protocol, "generate", counted)
    results = run(model, folder=tmp_path, made_from="model")
    assert made == [6, 6, 0, 0]
    assert run(model, folder=tmp_path, made_from="model") == results
    assert len(made) == 4
    run(model, folder=tmp_path, made_from="another model")
    assert made[4:] == [6, 6]


def test_two_sets_of_one_name(model):
    with pytest.raises(InputError, match="two evaluation sets are called 'self_inst'"):
        run(model, sets=(SET, SET))


def test_the_table_compares_models(model):
    results = run(model)
    better = dataclasses.replace(
        results,
        sets=tuple(dataclasses.replace(found, rouge_l=Score.of([90.0, 92.0])) for found in results.sets),
    )
    text = table({"teacher": results, "student": better}, teacher="teacher").markdown()
    assert text.splitlines()[0] == "|  | SelfInst | Short† |"
    assert r"| student | 91.0 ± 1.4\* | 91.0 ± 1.4\* |" in text
    assert "never to report" in text
