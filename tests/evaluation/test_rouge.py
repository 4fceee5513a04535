import doctest
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from l2m_jax.evaluation import exact_match, rouge, rouge_l, rouge_l_many

SCORER = RougeScorer(["rougeL"], use_stemmer=True)

# Words that differ before stemming and agree after it, letters that lower() turns into ASCII (the Kelvin sign, the
# dotted capital I), digits of other scripts, and ordinary punctuation.
PIECES = st.one_of(
    st.sampled_from(
        ["running", "runs", "run", "generalizations", "dying", "skies", "I'm", "K", "İs", "٣", "\u2028"]
    ),
    st.text(max_size=6),
    st.text("abcs ing-0é\n", max_size=12),
)
TEXT = st.lists(PIECES, max_size=12).map(" ".join)


def reference_score(prediction, references):
    return SCORER.score_multi(references, prediction)["rougeL"].fmeasure


def test_by_hand():
    # LCS "cat sat" = 2 of 3 predicted and of 4 expected words: P = 2/3, R = 1/2, F = 4/7.
    assert rouge_l("the cats sat", "a cat sat down") == pytest.approx(4 / 7)
    assert rouge_l("the cats sat", ["a cat sat down", "the dog"]) == pytest.approx(4 / 7)
    assert rouge_l("the dog", ["a cat sat down", "The DOG!"]) == 1.0


@pytest.mark.parametrize(
    "prediction, reference",
    [("", "words"), ("words", ""), ("", ""), ("…", "words"), ("日本語", "日本語"), ("a", "b")],
)
def test_without_common_words_it_is_zero(prediction, reference):
    assert rouge_l(prediction, reference) == 0.0 == reference_score(prediction, [reference])


def test_a_prediction_needs_a_reference():
    for function in (rouge_l, exact_match):
        with pytest.raises(ValueError, match="at least one reference"):
            function("words", [])


@given(TEXT, st.lists(TEXT, min_size=1, max_size=3))
def test_equals_rouge_score_to_the_last_bit_on_any_text(prediction, references):
    assert rouge_l(prediction, references) == reference_score(prediction, references)


@given(st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=14))
def test_equals_rouge_score_on_any_word(word):
    assert rouge_l(word + " ends", word + "s end") == reference_score(word + " ends", [word + "s end"])


def test_equals_rouge_score_on_dolly_answers(shared):
    lines = (shared / "data/dolly/test.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    answers = [json.loads(line)["output"] for line in lines]
    answers = [answer if isinstance(answer, str) else answer[0] for answer in answers]
    for i in range(len(answers)):
        references = [answers[(i + 1) % len(answers)], answers[i][: len(answers[i]) // 2] + " end"]
        assert rouge_l(answers[i], references) == reference_score(answers[i], references)


def test_many_processes_keep_the_order():
    predictions = [f"word{i} and {'more ' * (i % 4)}" for i in range(7)]
    references = ["and more more", ["nothing", "word1 and more"], "", "word3 and", "more", ["and"], "é"]
    expected = [rouge_l(*pair) for pair in zip(predictions, references, strict=True)]
    assert len(set(expected)) > 3
    assert rouge_l_many(predictions, references, processes=2) == expected
    assert rouge_l_many(predictions, references) == expected
    assert rouge_l_many([], []) == []


def test_a_pool_scores_one_batch_after_another():
    with rouge.Pool(2) as pool:
        assert pool.rouge_l(["a b\n", "é"], ["a b", "e"]) == [1.0, 0.0]
        assert pool.rouge_l(["a"], [["b", "a"]]) == [1.0]  # fewer pairs than processes
        assert pool.rouge_l([], []) == []


def test_a_process_that_ends_early_is_an_error():
    with rouge.Pool(2) as pool:
        pool._workers[1]._process.kill()
        with pytest.raises((RuntimeError, BrokenPipeError)):
            pool.rouge_l(["a", "b", "c"], ["a", "b", "c"])


def test_all_cores_are_used_only_for_much_text(monkeypatch):
    shares = []

    class Worker:
        def rouge_l(self, pairs):
            shares.append(pairs)
            return [0.25] * len(pairs)

        def close(self):
            pass

    monkeypatch.setattr(rouge, "_Worker", Worker)
    monkeypatch.setattr(rouge, "cores", lambda: 3)
    monkeypatch.setattr(rouge, "_CHARACTERS_WORTH_A_POOL", 20)
    assert rouge_l_many(["abc"] * 4, ["ab"] * 4) == [0.0] * 4 and not shares
    assert rouge_l_many(["abc"] * 5, [["ab", "c"]] * 5) == [0.25] * 5
    assert sorted(map(len, shares)) == [1, 2, 2]


def test_one_prediction_a_reference():
    with pytest.raises(ValueError):
        rouge_l_many(["a", "b"], ["a"])


def test_exact_match_ignores_case_punctuation_and_spaces():
    assert exact_match(" The  Answer, is: 42.\n", ["no", "the answer is 42"])
    assert not exact_match("the answer is 43", "the answer is 42")


def test_the_example_of_the_docstring():
    results = doctest.testmod(rouge)
    assert results.attempted == 1 and results.failed == 0


def test_the_import_needs_no_jax():
    code = "import sys; from l2m_jax.evaluation import rouge_l; rouge_l('a b', 'b'); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
