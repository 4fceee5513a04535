import urllib.error
import urllib.request

import huggingface_hub.constants
import pytest

from l2m_jax.data.online import require_hub
from l2m_jax.errors import InputError


@pytest.fixture
def answer(monkeypatch):
    """Makes the hub answer with a value, or raise it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def set_answer(value):
        def urlopen(*_, **__):
            if isinstance(value, Exception):
                raise value
            return value

        monkeypatch.setattr(urllib.request, "urlopen", urlopen)

    return set_answer


def test_no_network_says_what_to_pass(answer):
    answer(urllib.error.URLError("no route"))
    with pytest.raises(InputError, match=r"cannot download 'a/b' \(the hub cannot be reached\): pass a file"):
        require_hub("a/b", "a file")


@pytest.mark.parametrize("value", [None, urllib.error.HTTPError("", 405, "not allowed", None, None)])  # type: ignore
def test_any_answer_will_do(answer, value):
    answer(value)
    assert require_hub("a/b", "a file") is None  # it raises where there is no answer
