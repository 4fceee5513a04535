import dataclasses
import math

import pytest

from l2m_jax.data.settings import Data, SyntheticData
from l2m_jax.data.tokenizer import MIN_VOCAB_SIZE, train_tokenizer
from l2m_jax.errors import InputError

NAN = math.nan


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("source", "hub"),
        ("bos", "all"),
        ("train", ""),
        ("validation_rows", -1),
        ("validation_rows", 0),
        ("test_rows", 0),
        ("test_rows", NAN),
        ("train_rows", -1),
        ("train_rows", NAN),
        ("split_seed", -1),
        ("split_seed", NAN),
        ("max_length", 2),
        ("max_length", NAN),
        ("max_prompt_length", -1),
        ("max_prompt_length", NAN),
        ("max_prompt_length", 1024),
    ],
)
def test_a_bad_setting_of_the_data_is_named(name, value):
    with pytest.raises(InputError, match=rf"^{name}: "):
        dataclasses.replace(Data(), **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train", 0),
        ("validation", 0),
        ("test", NAN),
        ("seed", -1),
        ("tokenizer_size", MIN_VOCAB_SIZE - 1),
        ("tokenizer_size", NAN),
    ],
)
def test_a_bad_setting_of_synthetic_data_is_named(name, value):
    with pytest.raises(InputError, match=rf"^{name}: "):
        dataclasses.replace(SyntheticData(), **{name: value})


def test_the_smallest_tokenizer_can_be_trained():
    settings = SyntheticData(1, 1, 1, 0, MIN_VOCAB_SIZE)
    assert len(train_tokenizer(["a b"], settings.tokenizer_size)) == MIN_VOCAB_SIZE


def test_limits_that_are_allowed():
    assert Data(max_length=3, max_prompt_length=2).max_prompt_length == 2
    assert Data(max_length=512, max_prompt_length=256).max_length == 512
    # Sizes of a split do not matter where nothing is split off.
    assert Data(validation="v.jsonl", test="t.jsonl", validation_rows=0, test_rows=0).test_rows == 0
    assert Data(source="synthetic", train="", validation_rows=0, test_rows=0).train == ""
