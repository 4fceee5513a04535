"""Mixtures of sources: what shares of the rows come from which.

`0.7*chats.jsonl + 0.3*news.parquet` has seven rows of the first source for three of the second. A weight is a share of
the rows: weights count relative to their sum, and rows are those of the sources, long ones included. No row is
repeated, so a mixture ends where the source whose turn it is has no more rows.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from l2m_jax.errors import InputError, require_positive

T = TypeVar("T")
_BEGINS = re.compile(r"\s*[\d.]+\s*\*")
_TERM = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*\*\s*(\S.*?)\s*", re.DOTALL)


class Share(NamedTuple):
    weight: float
    source: str


def is_mixture(source: str | Path) -> bool:
    """Whether `source` begins with a weight, and is not a file."""
    return _BEGINS.match(str(source)) is not None and not Path(source).exists()


def parse_mixture(text: str) -> list[Share]:
    """The weights and sources of a mixture.

    Raises:
        InputError: a part has no weight, or one that is not above 0; or there is only one source.
    """
    found = []
    for part in text.split(" + "):
        if (term := _TERM.fullmatch(part)) is None:
            raise InputError(
                f"'{part.strip()}' in the mixture '{text}' is not WEIGHT*SOURCE, as in '0.7*a.jsonl + 0.3*b.jsonl'"
            )
        share = Share(float(term[1]), term[2])
        require_positive(share, "weight")
        found.append(share)
    if len(found) == 1:
        raise InputError(
            f"the mixture '{text}' has one source; add another, or leave out the weight and limit the number of rows"
        )
    return found


def interleave(weights: Sequence[float], sources: Sequence[Iterable[T]]) -> Iterator[T]:
    """Items of all sources, each time from the source that is furthest behind its share, in the order of each source.

    In the first n items, each source has its share of n to within one item (for two sources; a little more for many).
    Ends with the first source that should give an item and has none. Nothing is random, so the items are the same each
    time, and the first n of them are a mixture, too.
    """
    shares = [weight / sum(weights) for weight in weights]
    iterators, taken = [iter(source) for source in sources], [0] * len(shares)
    for n in itertools.count(1):
        chosen = max(range(len(shares)), key=lambda i: shares[i] * n - taken[i])
        try:
            item = next(iterators[chosen])
        except StopIteration:
            return
        taken[chosen] += 1
        yield item
