import dataclasses
import math

import pytest

from l2m_jax.errors import InputError
from l2m_jax.evaluation.settings import Evaluation


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("sets", (), "empty"),
        ("sets", ("dolly", "test", "dolly"), "called 'dolly'"),
        ("sets", ("test", "data/test.jsonl"), "called 'test'"),
        ("sets", ("a=x.jsonl", "a=y.jsonl"), "called 'a'"),
        ("sets", ("a/b=x.jsonl",), "expected name=file"),
        ("seeds", (), "empty"),
        ("seeds", (10, 20, 10), "10 is given twice"),
        ("seeds", (10, -1), "-1 must be at least 0"),
        ("seeds", (2**32,), "4294967296 must be"),
        ("seeds", (math.nan,), "nan must be"),
        ("rows", -1, "must be 0 or more"),
        ("rows", math.nan, "must be 0 or more"),
        ("validations", 0, "must be 1 or more"),
        ("validation_rows", -1, "must be 0 or more"),
        ("select", "first", "is not one of best, last"),
    ],
)
def test_a_bad_setting_is_named(name, value, says):
    with pytest.raises(InputError, match=rf"^{name}: .*{says}"):
        dataclasses.replace(Evaluation(), **{name: value})


def test_what_is_allowed():
    sets = ("test", "s_ni", "vicuna=v.jsonl", "data/mine.jsonl")
    assert Evaluation(sets=sets, seeds=(0, 2**32 - 1)).sets == sets
