"""The split into training, validation and test rows.

Parts without a file of their own are split off the training source. The order in which rows are drawn depends only on
the source and `split_seed`: test rows come first, then validation rows, and the rest is for training. The number of
training rows therefore does not affect the other parts, and never turns a test row into a training row.

World 0 trains on the first `train_rows` rows that are left, world 1 on the next, and so on: the training rows of two
worlds have no row in common, and all worlds have the same validation and test rows.
"""

import heapq
from collections.abc import Iterator
from itertools import combinations, islice
from operator import itemgetter
from typing import Literal

import numpy as np

from l2m_jax import files
from l2m_jax.data.encoding import Counts, Encoded, Fitter, TokenLimits
from l2m_jax.data.settings import Data
from l2m_jax.data.shards import Numbered, Shards, Tokeniser
from l2m_jax.data.sources import check_rows, read_rows, split_of
from l2m_jax.data.synthetic import synthetic_rows
from l2m_jax.errors import InputError
from l2m_jax.multihost import first

Part = Literal["train", "validation", "test"]
_PARTS: tuple[Part, ...] = ("train", "validation", "test")
_SIZE = "rows.json"


def token_limits(data: Data, part: Part) -> TokenLimits:
    """The limits of a part. Parts differ in whether rows begin with the beginning-of-sequence token."""
    use = "training" if part == "train" else "evaluation"  # only training rows are trained on
    return _limits(data, bos=data.bos in (use, "both"))


def check_sources(data: Data) -> None:
    """Checks that every file exists, that its first row parses, and that no two parts have the same rows.

    Uses the hub only if two parts have the same name there.

    Raises:
        InputError: naming the setting, as in "data.train: no such file ...".
    """
    if data.source == "synthetic":
        return
    for name in _PARTS:
        if source := getattr(data, name):
            try:
                check_rows(source, data.prompt, name)
            except InputError as error:
                raise InputError(f"data.{name}: {error}") from error
    for first_part, part in combinations(_PARTS, 2):
        source = getattr(data, part)
        if not source or source != getattr(data, first_part):
            continue
        if split_of(source, first_part) == split_of(source, part):
            raise InputError(
                f"data.{part}: '{source}' would have the same rows as data.{first_part}; give another source, or leave it "
                "empty to split rows off"
            )


def part_examples(
    data: Data, part: Part, tokeniser: Tokeniser, counts: Counts, world: int = 0, world_rows: int = 0
) -> Iterator[Encoded]:
    """The tokenised rows of one part that fit into its limits, in order. The three parts have no rows in common.

    Rows that are split off fit into the limits, with a beginning-of-sequence token if any part has one, so that the
    parts have the requested sizes whatever their own limits are. Of other rows, those that do not fit are dropped and
    counted. Parts of one source share the tokens that `tokeniser` keeps, so each row is tokenised once: before this
    returns, and by all processes of the run, which call it together.

    Args:
        counts: updated along the way.
        world: of the training rows; another than 0 needs `train_rows`, unless the rows are synthetic.
        world_rows: training rows of each world before, if they are not `train_rows`.

    Raises:
        InputError: from reading the source, or it has fewer fitting rows than the parts need.
    """
    fitter = Fitter(token_limits(data, part), tokeniser.tokenizer)
    before = world * (world_rows or data.train_rows)
    return fitter.fitted(_part(data, part, tokeniser, world, before), counts)


def _part(data: Data, part: Part, tokeniser: Tokeniser, world: int, before: int) -> Iterator[Encoded]:
    """
    Args:
        before: training rows of the worlds before.
    """
    start, stop = 0, getattr(data, f"{part}_rows")
    if data.source == "synthetic":
        s = data.synthetic
        rows, stop = iter(getattr(synthetic_rows(s.seed, s.train, s.validation, s.test, world), part)), 0
    elif part != "train" and (source := getattr(data, part)):
        rows = read_rows(source, part)
    elif data.validation and data.test:
        start, stop = before, before + data.train_rows
        rows = read_rows(data.train)
    else:
        return _split(data, part, tokeniser, before)
    chosen = (Numbered(number, row) for number, row in islice(enumerate(rows), start, stop or None))
    shards = tokeniser.shards(f"{part}-{start}-{stop}", chosen)
    return (example for _, example in shards.examples())


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


def _split(data: Data, part: Part, tokeniser: Tokeniser, before: int) -> Iterator[Encoded]:
    """Validation and test rows in the order of the draw; training rows in the order of the source."""
    limits = _limits(data, bos=data.bos != "none")
    draw = _Draw(data, tokeniser, Fitter(limits, tokeniser.tokenizer))
    num_test = 0 if data.test else data.test_rows
    num_held_out = num_test + (0 if data.validation else data.validation_rows)
    if part != "train":
        start, end = (0, num_test) if part == "test" else (num_test, num_held_out)
        numbers = draw.fitting(end)[start:]
        places = {number: place for place, number in enumerate(numbers.tolist())}
        is_wanted = np.zeros(draw.size, bool)
        is_wanted[numbers] = True
        found = [(places[number], example) for number, example in draw.examples(is_wanted)]
        return (example for _, example in sorted(found, key=itemgetter(0)))
    if data.train_rows:
        first = num_held_out + before
        is_wanted = np.zeros(draw.size, bool)
        is_wanted[draw.fitting(first + data.train_rows)[first:]] = True
    else:
        draw.tokenise_all()
        # Rows that do not fit are counted where the part itself drops them.
        is_wanted = np.full(draw.size, limits == token_limits(data, part))
        is_wanted[draw.tokenised_and_fitting()] = True
        is_wanted[draw.fitting(num_held_out + 1)[:num_held_out]] = False  # which leaves something to train on
    return (example for _, example in draw.examples(is_wanted))


class _Draw:
    """The rows of the training source in the order in which they are drawn, tokenised as far as they are needed."""

    def __init__(self, data: Data, tokeniser: Tokeniser, fitter: Fitter):
        self._data, self._tokeniser, self._fitter = data, tokeniser, fitter
        self.size = self._count()
        # numpy guarantees the same raw random bits in every version, but not the same permutations.
        keys = np.random.PCG64(np.random.SeedSequence(data.split_seed)).random_raw(self.size)
        self._order = np.argsort(keys, kind="stable")
        self._rank = np.empty(self.size, np.int32)
        self._rank[self._order] = np.arange(self.size, dtype=np.int32)
        self._rounds: list[Shards] = []
        self._drawn = 0
        while ends := tokeniser.finished(f"{self._prefix}{self._drawn}-"):  # for another part
            self._tokenise(max(ends))

    @property
    def _prefix(self) -> str:
        return f"draw{self._data.split_seed}-"

    def _count(self) -> int:
        """The number of rows. Counting them checks them all before any is tokenised."""
        file = self._tokeniser.folder / _SIZE

        def count() -> int:
            if not file.is_file():
                files.write_json(file, sum(1 for _ in read_rows(self._data.train)))
            return files.read_json(file, f"delete {self._tokeniser.folder}")

        return first(count)

    def _tokenise(self, end: int) -> None:
        """Tokenises the rows that are drawn up to the place `end`."""
        start, self._drawn = self._drawn, end
        is_drawn = (start <= self._rank) & (self._rank < end)
        rows = (
            Numbered(number, row)
            for number, (row, chosen) in enumerate(zip(read_rows(self._data.train), is_drawn, strict=True))
            if chosen
        )
        self._rounds.append(self._tokeniser.shards(f"{self._prefix}{start}-{end}", rows, end - start))

    def tokenise_all(self) -> None:
        if self._drawn < self.size:
            self._tokenise(self.size)

    def fitting(self, count: int) -> np.ndarray:
        """The numbers of the first `count` rows that fit into the limits, as drawn. Tokenises few other rows."""
        while len(found := self.tokenised_and_fitting()) < count and self._drawn < self.size:
            # Most rows fit.
            self._tokenise(min(self.size, self._drawn + count + count // 4 + 64))
        if len(found) < count:
            raise InputError(
                f"data.train: '{self._data.train}' has {len(found)} rows within the token limits, but the split needs at "
                f"least {count}; lower data.validation_rows, data.test_rows or data.train_rows, or raise data.max_length"
            )
        return found[:count]

    def tokenised_and_fitting(self) -> np.ndarray:
        """The numbers of the rows tokenised so far that fit into the limits, as drawn."""
        ranks = [np.zeros(0, np.int32)]
        for shards in self._rounds:
            for numbers, lengths, prompt_lengths in shards.lengths():
                ranks.append(self._rank[numbers[self._fitter.keeps(lengths, prompt_lengths)]])
        return self._order[np.sort(np.concatenate(ranks))]

    def examples(self, is_wanted: np.ndarray) -> Iterator[tuple[int, Encoded]]:
        """The tokenised rows with these numbers (bool [size]), in the order of the source."""
        yield from heapq.merge(*(shards.examples(is_wanted) for shards in self._rounds), key=itemgetter(0))
