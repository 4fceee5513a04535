import pytest

from l2m_jax.errors import InputError
from l2m_jax.sweep.claims import METRICS, Claims, Contrast
from l2m_jax.sweep.presets import Row


def contrast(left: str, right: str, **fields) -> Contrast:
    return Contrast("name", "A statement.", left, right, **fields)


@pytest.mark.parametrize(
    ("left", "right", "weights"),
    [
        ("a", "b", {"a": 1, "b": -1}),
        ("a - b", "c - d", {"a": 1, "b": -1, "c": -1, "d": 1}),
        ("(a + b) / 2", "c", {"a": 0.5, "b": 0.5, "c": -1}),
        ("2 * a - b", "a", {"a": 1, "b": -1}),
        ("-(b - a)", "0.5 * (c - c)", {"a": 1, "b": -1}),
    ],
)
def test_the_weights_of_the_arms(left, right, weights):
    assert contrast(left, right).weights == weights


@pytest.mark.parametrize(
    ("left", "said"),
    [
        ("a *", "is not a sum of arms"),
        ("a * b", "is not a sum of arms"),
        ("a / 0", "is not a sum of arms"),
        ("1", "is not a sum of arms"),
        ("f(a)", "is not a sum of arms"),
        ("a + b", "must add up to 0"),
    ],
)
def test_what_is_no_difference_of_arms_is_refused(left, said):
    with pytest.raises(InputError, match=said):
        contrast(left, "b")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"metric": "bleu"}, "metric: 'bleu' is not one of"),
        ({"sign": "up"}, "sign: 'up'"),
        ({"paper": -0.4}, "paper: -0.4 does not have the sign of the statement, positive"),
        ({"metric": "validation_kl", "sets": ("test",)}, "sets: validation_kl is of the validation rows"),
    ],
)
def test_fields_out_of_range_are_refused(fields, said):
    with pytest.raises(InputError, match=said):
        contrast("a", "b", **fields)


def test_contrasts_need_known_arms_and_ids_of_their_own():
    arms = {"a": Row("sft"), "b": Row("kld")}
    with pytest.raises(InputError, match=r"contrasts\.name: no arm 'c' \(known: a, b\)"):
        Claims("", arms, (contrast("a", "c"),))
    with pytest.raises(InputError, match="two are called 'name'"):
        Claims("", arms, (contrast("a", "b"), contrast("b", "a")))


def test_the_metrics_are_those_of_a_set_and_of_the_validation():
    assert {"rouge_l", "exact_match", "response_tokens", "validation_rouge_l", "validation_kl"} <= set(
        METRICS
    )
    assert not {"name", "rows", "categories"} & set(METRICS)
