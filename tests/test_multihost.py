"""What the first process does for all."""

import pytest

from l2m_jax.multihost import first


def test_its_value_and_its_exception_are_everyones():
    assert first(lambda: 3) == 3
    with pytest.raises(KeyError):
        first(lambda: {}["absent"])
    assert first(lambda: 4) == 4  # an exception leaves nothing behind


def test_a_nested_call_is_refused():
    """With several processes the others would wait for a call that they never make."""
    with pytest.raises(RuntimeError, match="within first"):
        first(lambda: first(lambda: 1))


def test_a_value_is_what_json_makes_of_it():
    """With one process as with several: a caller that needs a tuple must make it."""
    assert first(lambda: {"a": (1, 2.5), "b": None}) == {"a": [1, 2.5], "b": None}
    with pytest.raises(TypeError):
        first(lambda: object())
