"""What is trained on, with answers made up in place of generated ones: they say which parameters they came from."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from l2m_jax.curriculum import single_stage
from l2m_jax.data.batches import ListedExamples
from l2m_jax.errors import InputError
from l2m_jax.generation import Answer, SamplingRules
from l2m_jax.losses import SkewKL, SkewReverseKL
from l2m_jax.methods import METHODS, Rollouts
from l2m_jax.models import DecoderConfig
from l2m_jax.run import rollouts
from l2m_jax.run.responses import with_end
from l2m_jax.training.loop import Part

EOS, COUNT, BATCH = 2, 40, 8
LIMIT = 14  # tokens of an example
NEW_TOKENS = 6
RULES = SamplingRules(max_new_tokens=NEW_TOKENS)


class Corpus(ListedExamples):
    def __len__(self):
        return len(self.tokens)

    def prompt_tokens(self, i):
        return self.tokens[i][: self.prompt_lengths[i]]


def _corpus() -> Corpus:
    prompts = np.array([3 + i % 9 for i in range(COUNT)], np.int32)
    return Corpus([np.append(np.full(n, 100 + i), [7, EOS]) for i, n in enumerate(prompts)], prompts)


@pytest.fixture
def sampled(monkeypatch):
    """The prompts of each call of `generate`, whose made-up answers name the parameters that they came from."""
    calls = []

    def generate(generator, prompts, rules, seeds, **_):
        calls.append([prompt[0] - 100 for prompt in prompts])
        made = []
        for number, prompt in enumerate(prompts):
            assert len(prompt) <= 10
            # Of odd prompts the answer ends by itself.
            length = rules.max_new_tokens - prompt[0] % 2
            made.append(Answer(number, seeds[0], (generator.params,) * length, ""))
        return made

    monkeypatch.setattr(rollouts, "generate", generate)
    return calls


def _part(epoch: int, number: int, indices) -> Part:
    (stage,) = single_stage(np.arange(COUNT), 3 * COUNT)
    return Part(stage, epoch, number, np.asarray(indices), 0)


def _fixed(params: int) -> dict[int, tuple[int, ...]]:
    """What a model generated once: prompts of more than 10 tokens have no response."""
    lengths = _corpus().prompt_lengths
    answers = {i: (params,) * (NEW_TOKENS - i % 2) for i in range(COUNT) if lengths[i] <= 10}
    return {i: with_end(Answer(i, 0, tokens, ""), RULES, EOS) for i, tokens in answers.items()}


def _data(name: str, folder: Path, settings: Rollouts | None = None):
    method = METHODS[name]
    config = DecoderConfig("gpt2", 300, 300, 8, 8, 1, 1, 1, 8, 8, LIMIT, eos_token_id=EOS)
    decode = SimpleNamespace(eos_token_id=EOS)
    sampler = rollouts.Sampler(config, None, decode, EOS, 0, RULES, 10, seed=0)  # type: ignore[arg-type]
    current = (
        rollouts.Rollouts(settings or Rollouts(), _corpus(), sampler, str, folder)
        if method.on_policy
        else None
    )
    fixed = {"teacher": _fixed(50), "initial_student": _fixed(60)}
    return rollouts.training_data(method, _corpus(), fixed, current, LIMIT, lambda i: i)


def _response(examples, i) -> list[int]:
    return examples.example_tokens(i)[examples.prompt_lengths[i] :].tolist()


def test_seqkd_learns_the_teachers_answers(sampled, tmp_path):
    (term,) = _data("seqkd", tmp_path)(_part(0, 0, range(COUNT)), 70)
    assert not term.equal_examples and term.teacher_rows is None
    assert _response(term.examples, 1) == [50] * 5 + [EOS]  # ended by itself
    assert _response(term.examples, 0) == [50] * 6
    assert _response(term.examples, 6) == [50] * 5  # a prompt of 9 tokens: truncated at 14
    assert _response(term.examples, 8) == [7, EOS]  # a prompt without room keeps its reference
    assert term.examples.lengths[[0, 1, 6, 8]].tolist() == [9, 10, 14, 13]
    assert not sampled


def test_half_of_each_batch_is_the_current_students(sampled, tmp_path):
    order = np.random.default_rng(0).permutation([i for i in range(COUNT) if i % 9 < 8])[:32]
    (term,) = _data("skl_on_policy", tmp_path)(_part(0, 0, order), 70)
    sampled = [_response(term.examples, int(i))[0] == 70 for i in order]
    assert np.reshape(sampled, (-1, BATCH)).sum(axis=1).tolist() == [4, 4, 4, 4]
    assert all(_response(term.examples, int(i)) == [7, EOS] for i in order[~np.array(sampled)])


def test_distillm2_pairs_the_teachers_answers_with_the_students(sampled, tmp_path):
    off = _data("distillm2", tmp_path)(_part(0, 0, range(16)), 70)
    on = _data("distillm2_on_policy", tmp_path)(_part(0, 0, range(16)), 70)
    for terms, student in ((off, 60), (on, 70)):
        assert [term.equal_examples for term in terms] == [True, True]
        assert [_response(term.examples, 3)[0] for term in terms] == [50, student]
        assert [type(term.objective.divergence) for term in terms] == [SkewKL, SkewReverseKL]
        assert not terms[1].objective.divergence.mixture_gradient
        assert [term.objective.scale for term in terms] == [2, 2]


def test_a_resumed_part_reads_its_responses_and_the_next_one_samples(sampled, tmp_path):
    first = _data("skl_on_policy", tmp_path)(_part(0, 1, range(8)), 70)[0].examples
    calls = len(sampled)
    resumed = _data("skl_on_policy", tmp_path)
    again = resumed(_part(0, 1, range(8)), 71)[0].examples
    assert len(sampled) == calls
    assert [_response(again, i) for i in range(8)] == [_response(first, i) for i in range(8)]
    following = resumed(_part(0, 2, range(8)), 71)[0].examples
    assert _response(following, 1)[0] == 71


def test_replay_takes_a_share_from_earlier_epochs_and_resumes_the_same(sampled, tmp_path):
    settings = Rollouts(student_share=1.0, replay_share=0.5)
    orders = [np.random.default_rng(epoch).permutation(8) for epoch in range(3)]
    data = _data("skl_on_policy", tmp_path, settings)
    for epoch in range(3):
        examples = data(_part(epoch, 0, orders[epoch]), 70 + epoch)[0].examples
        sources = [_response(examples, i)[0] for i in range(8)]
        assert sources.count(70 + epoch) == (8 if epoch == 0 else 4)
    assert set(sources) == {70, 71, 72}
    resumed = _data("skl_on_policy", tmp_path, settings)(_part(2, 0, orders[2]), 99)[0].examples
    assert [_response(resumed, i)[0] for i in range(8)] == sources


@pytest.mark.parametrize(
    ("share", "count"), [(0.5, 7), (0.1, 30), (0.29, 100), (1.0, 5), (0.0, 5), (1 / 3, 9)]
)
def test_a_share_is_spread_evenly(share, count):
    mask = rollouts.spread(count, share)
    for end in range(count + 1):
        assert abs(mask[:end].sum() - share * end) < 1
    assert mask.sum() == int(share * count + 1e-6)


def _started(part: Part) -> Part:
    return dataclasses.replace(part, started=True)


@pytest.mark.parametrize("damage", ["changed", "removed", "no checksums", "damaged checksums", "all gone"])
def test_damaged_responses_are_never_sampled_from_later_parameters(sampled, tmp_path, damage):
    settings = Rollouts(student_share=1.0, replay_share=0.5)
    data = _data("skl_on_policy", tmp_path / "rollouts" / "student-0123", settings)
    for epoch in (0, 1):
        data(_part(epoch, 0, range(8)), 70 + epoch)
    file, record = (tmp_path / "rollouts" / "student-0123" / name for name in (
        "stage01_epoch000_part000.jsonl", "checksums.json"
    ))  # fmt: skip
    match damage:
        case "changed":
            file.write_text(file.read_text().replace("70", "71"))
        case "removed":
            file.unlink()
        case "no checksums":
            record.unlink()
        case "damaged checksums":
            record.write_text("{")
        case "all gone":
            shutil.rmtree(tmp_path / "rollouts")
    calls = len(sampled)
    said = rf"\.jsonl?: missing, or not what was written; .*delete \S+student-0123 and {tmp_path}/checkpoints/student to"
    with pytest.raises(InputError, match=said.replace(r"\.jsonl?", r"\.json\w?")):
        _data("skl_on_policy", tmp_path / "rollouts" / "student-0123", settings)(
            _started(_part(1, 0, range(8))), 99
        )
    assert len(sampled) == calls


def test_a_file_that_a_kill_left_unrecorded_is_sampled_again(sampled, tmp_path):
    first = _data("skl_on_policy", tmp_path)(_part(0, 0, range(8)), 70)[0].examples
    (tmp_path / "checksums.json").write_text("{}")
    again = _data("skl_on_policy", tmp_path)(_part(0, 0, range(8)), 70)[0].examples
    assert [_response(again, i) for i in range(8)] == [_response(first, i) for i in range(8)]
    assert len(sampled) == 2
