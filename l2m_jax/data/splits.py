"""The split into training, validation and test rows.

Parts without a file of their own are split off the training source. The order in which rows are drawn depends only on
the source and `split_seed`: test rows come first, then validation rows, and the rest is for training. The number of
training rows therefore does not affect the other parts, and never turns a test row into a training row.

World 0 trains on the first `train_rows` rows that are left, world 1 on the next, and so on: the training rows of two
worlds have no row in common, and all worlds have the same validation and test rows.
"""

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from l2m_jax.data.encoding import Counts, TokenLimits, encode_rows
from l2m_jax.data.settings import Data
from l2m_jax.data.sources import Row, check_rows, read_rows
from l2m_jax.data.synthetic import synthetic_rows
from l2m_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Part = Literal["train", "validation", "test"]


def token_limits(data: Data, part: Part) -> TokenLimits:
    """The limits of a part. Parts differ in whether rows begin with the beginning-of-sequence token."""
    use = "training" if part == "train" else "evaluation"  # only training rows are trained on
    return _limits(data, bos=data.bos in (use, "both"))


def check_sources(data: Data) -> None:
    """Checks that every file exists and that its first row parses. Does not use the hub.

    Raises:
        InputError: naming the setting, as in "data.train: no such file ...".
    """
    if data.source == "synthetic":
        return
    for name in ("train", "validation", "test"):
        if source := getattr(data, name):
            try:
                check_rows(source, data.prompt)
            except InputError as error:
                raise InputError(f"data.{name}: {error}") from error


def part_rows(data: Data, part: Part, tokenizer: "PreTrainedTokenizerBase", world: int = 0) -> Iterator[Row]:
    """The rows of one part, read lazily. The three parts have no rows in common.

    Rows that are split off fit into the limits, with a beginning-of-sequence token if any part has one, so that the
    parts have the requested sizes whatever their own limits are. Other rows are not filtered: `write_corpus`
    drops and counts those that are too long.

    Args:
        world: of the training rows; another than 0 needs `train_rows`, unless the rows are synthetic.

    Raises:
        InputError: from reading the source, or it has fewer fitting rows than the parts need.
    """
    if data.source == "synthetic":
        s = data.synthetic
        yield from getattr(synthetic_rows(s.seed, s.train, s.validation, s.test, world), part)
    elif part != "train" and (source := getattr(data, part)):
        yield from islice(read_rows(source, "evaluation"), getattr(data, f"{part}_rows") or None)
    elif data.validation and data.test:
        first = world * data.train_rows
        yield from islice(read_rows(data.train), first, first + data.train_rows if data.train_rows else None)
    else:
        yield from _split_rows(data, part, tokenizer, world)


def _limits(data: Data, bos: bool) -> TokenLimits:
    long = "truncate" if data.truncate else "drop"
    return TokenLimits(
        max_length=data.max_length,
        max_prompt_length=data.max_prompt_length or None,
        long_prompt=long,
        long_response=long,
        bos=bos,
        prompt=data.prompt,
    )


def _split_rows(data: Data, part: Part, tokenizer: Any, world: int) -> Iterator[Row]:
    """Validation and test rows in the order of the draw; training rows in the order of the source.

    The source is read several times: only row numbers, and the chosen validation or test rows, are kept in memory.
    """
    size = sum(1 for _ in read_rows(data.train))
    # numpy guarantees the same raw random bits in every version, but not the same permutations.
    keys = np.random.PCG64(np.random.SeedSequence(data.split_seed)).random_raw(size)
    order = np.argsort(keys, kind="stable")
    num_test = 0 if data.test else data.test_rows
    num_held_out = num_test + (0 if data.validation else data.validation_rows)
    if part != "train":
        start, end = (0, num_test) if part == "test" else (num_test, num_held_out)
        places = {i: place for place, i in enumerate(_fitting(data, tokenizer, order, end)[start:])}
        chosen = ((places[i], row) for i, row in enumerate(read_rows(data.train)) if i in places)
        yield from (row for _, row in sorted(chosen))
        return
    fitting = _fitting(data, tokenizer, order, num_held_out + ((world + 1) * data.train_rows or 1))
    wanted = np.full(size, not data.train_rows)
    wanted[fitting[num_held_out + world * data.train_rows :]] = True
    wanted[fitting[:num_held_out]] = False
    rows = (row for row, is_wanted in zip(read_rows(data.train), wanted, strict=True) if is_wanted)
    limits = _split_limits(data)
    if data.train_rows or limits == token_limits(data, part):
        yield from rows
    else:
        yield from (encoded.row for encoded in encode_rows(rows, tokenizer, limits, Counts()))


def _split_limits(data: Data) -> TokenLimits:
    return _limits(data, bos=data.bos != "none")


def _fitting(data: Data, tokenizer: Any, order: np.ndarray, count: int) -> list[int]:
    """The first `count` row numbers in `order` whose rows fit into the limits. Tokenises few other rows."""
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    found: list[int] = []
    start, step = 0, count + count // 4 + 64  # most rows fit
    while len(found) < count and start < len(order):
        # The rank goes along as the category: messages name a row by its id.
        drawn = (
            row._replace(category=str(r))
            for r, row in zip(rank, read_rows(data.train), strict=True)
            if start <= r < start + step
        )
        encoded = encode_rows(drawn, tokenizer, _split_limits(data), Counts())
        found += sorted(int(e.row.category) for e in encoded)
        start += step
    if len(found) < count:
        raise InputError(
            f"data.train: '{data.train}' has {len(found)} rows within the token limits, but the split needs at least "
            f"{count}; lower data.validation_rows, data.test_rows or data.train_rows, or raise data.max_length"
        )
    return order[found[:count]].tolist()
