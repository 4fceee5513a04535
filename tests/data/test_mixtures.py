import itertools
from fractions import Fraction

import pytest

from l2m_jax.data.mixtures import interleave, is_mixture, parse_mixture
from l2m_jax.errors import InputError


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("0.7*a.jsonl + 0.3*b", [(0.7, "a.jsonl"), (0.3, "b")]),
        ("2 * x/y + .5*owner/name + 1*c d.parquet", [(2, "x/y"), (0.5, "owner/name"), (1, "c d.parquet")]),
        ("1*a+b + 1*c", [(1, "a+b"), (1, "c")]),
    ],
)
def test_weights_and_sources(text, shares):
    assert is_mixture(text)
    assert parse_mixture(text) == shares


@pytest.mark.parametrize("text", ["a.jsonl", "owner/name", "a*b + c*d", "", "2a*b"])
def test_other_sources_are_no_mixtures(text):
    assert not is_mixture(text)


def test_a_file_that_looks_like_a_mixture_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "2*a").touch()
    assert not is_mixture("2*a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1*a + b", "'b' in the mixture '1\\*a \\+ b' is not WEIGHT\\*SOURCE"),
        ("1*a + 1..2*b", "'1..2\\*b' in the mixture"),
        ("1*a + 0*b", "weight: 0.0 must be greater than 0"),
        ("1*a", "has one source; add another"),
    ],
)
def test_wrong_mixtures(text, message):
    with pytest.raises(InputError, match=message):
        parse_mixture(text)


@pytest.mark.parametrize("weights", [(1, 1), (7, 3), (0.9, 0.1), (5, 3, 2), (0.25, 0.25, 0.5), (1000, 1)])
def test_every_beginning_has_the_shares(weights):
    sources = [itertools.repeat(i) for i in range(len(weights))]
    drawn = list(itertools.islice(interleave(weights, sources), 3000))
    exact = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    taken = [0] * len(weights)
    for n, source in enumerate(drawn, start=1):
        taken[source] += 1
        assert all(abs(count - share * n) <= 1 for count, share in zip(taken, exact, strict=True))


def test_nothing_is_repeated_and_the_scarce_source_ends_it():
    found = list(interleave((1, 1), (["a", "b", "c"], [1, 2])))
    assert found == ["a", 1, "b", 2, "c"]
    assert list(interleave((1, 1), ([], [1, 2]))) == []
