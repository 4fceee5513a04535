"""Synthetic instruction tasks of graded difficulty, generated from a seed, for runs without downloads."""

# Words are easier to read in a string than in a list.
# ruff: noqa: SIM905

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from l2m_jax.data.sources import Row

# The tasks need distinct words, none of which is a colour.
_WORDS = (
    "apple bird boat book bread cake car cat chair city cloud coat corn cow cup dog door duck farm fish flag "
    "frog game gate gift goat hand hat hill horse house ice ink jar key king kite lake lamp leaf "
    "lion map milk moon mouse night nose ocean owl paper park pear pen pig pond queen rain ring river road "
    "rock rose salt sand ship shoe snow song star stone sun table tree turtle van wall water west wind wolf wood"
).split()
_NAMES = (
    "anna ben carl dora emma finn gina hugo iris jack kate liam mona nora otto paul rosa sam tina uma".split()
)
_COLOURS = "black blue brown gold green grey orange pink red silver white yellow".split()
_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
_DRAWS = 50  # attempts at a new row of one kind before the next kind is tried


class SyntheticRows(NamedTuple):
    train: list[Row]
    validation: list[Row]
    test: list[Row]


def _copy(words: list[str], rng: np.random.Generator) -> tuple[str, str, str]:
    return "Copy the words.", " ".join(words), " ".join(words)


def _first(words: list[str], rng: np.random.Generator) -> tuple[str, str, str]:
    return "Name the first and the last word.", " ".join(words), f"first {words[0]} and last {words[-1]}"


def _repeat(words: list[str], rng: np.random.Generator) -> tuple[str, str, str]:
    return "Say each word twice.", " ".join(words), " ".join(w for word in words for w in (word, word))


def _count(words: list[str], rng: np.random.Generator) -> tuple[str, str, str]:
    return "How many words are there?", " ".join(words), f"there are {_NUMBERS[len(words)]} words"


def _reverse(words: list[str], rng: np.random.Generator) -> tuple[str, str, str]:
    return "Reverse the words.", " ".join(words), " ".join(reversed(words))


def _sort(words: list[str], rng: np.random.Generator) -> tuple[str, str, str]:
    return "Sort the words by the alphabet.", " ".join(words), " ".join(sorted(words))


def _drop_last(words: list[str], rng: np.random.Generator) -> tuple[str, str, str]:
    words = [*words, _WORDS[rng.integers(len(_WORDS))]]
    return "Leave out the last word.", " ".join(words), " ".join(words[:-1])


def _without(words: list[str], rng: np.random.Generator) -> tuple[str, str, str]:
    gone = words[rng.integers(len(words))]
    words = [*words, _WORDS[rng.integers(len(_WORDS))]]
    return f"Leave out {gone}.", " ".join(words), " ".join(word for word in words if word != gone)


def _swap(words: list[str], rng: np.random.Generator) -> tuple[str, str, str]:
    words = [*words, _WORDS[rng.integers(len(_WORDS))]]
    return "Swap the first and the last word.", " ".join(words), " ".join([words[-1], *words[1:-1], words[0]])


def _every_second(words: list[str], rng: np.random.Generator) -> tuple[str, str, str]:
    words = [*words, *(_WORDS[i] for i in rng.integers(len(_WORDS), size=len(words)))]
    return "Take every second word.", " ".join(words), " ".join(words[1::2])


def _add(words: list[str], rng: np.random.Generator) -> tuple[str, str, str]:
    terms = [int(n) for n in rng.integers(1, max(3, 20 // len(words)), size=min(len(words), 4))]
    asked = " plus ".join(_NUMBERS[n] for n in terms)
    return f"What is {asked}?", "", f"{asked} is {_NUMBERS[sum(terms)]}"


def _look_up(words: list[str], rng: np.random.Generator) -> tuple[str, str, str]:
    names = [_NAMES[i] for i in rng.permutation(len(_NAMES))[: len(words)]]
    chosen = int(rng.integers(len(names)))
    given = ", ".join(f"{name} has a {word}" for name, word in zip(names, words, strict=True))
    return f"What does {names[chosen]} have?", given, f"{names[chosen]} has a {words[chosen]}"


def _colours(words: list[str], rng: np.random.Generator) -> tuple[str, str, str]:
    colours = [_COLOURS[i] for i in rng.integers(len(_COLOURS), size=len(words))]
    given = " ".join(f"{colour} {word}" for colour, word in zip(colours, words, strict=True))
    return "Name the things without their colours.", given, " ".join(words)


# Each kind of task with its minimum and maximum number of words: more words are harder.
_TASKS: tuple[tuple[Callable[[list[str], np.random.Generator], tuple[str, str, str]], int, int], ...] = (
    (_copy, 3, 8),
    (_first, 3, 8),
    (_repeat, 2, 5),
    (_count, 2, 9),
    (_reverse, 3, 7),
    (_sort, 3, 6),
    (_drop_last, 3, 7),
    (_without, 3, 7),
    (_swap, 3, 6),
    (_every_second, 2, 4),
    (_add, 2, 4),
    (_look_up, 2, 5),
    (_colours, 2, 5),
)


def synthetic_rows(seed: int, train: int, validation: int, test: int, world: int = 0) -> SyntheticRows:
    """Rows of thirteen kinds in turn (`category` names the kind). All rows are distinct, within and across parts.

    The first rows of a part do not depend on its size. Each `world` has other training rows, and the same validation
    and test rows.
    """
    seen: set[tuple[str, str]] = set()
    # The small parts come first, so that the number of training rows does not change the test rows.
    parts = [
        _rows(np.random.default_rng(words), size, seen)
        for words, size in (
            ([seed, 0], test),
            ([seed, 1], validation),
            ([seed, 2, world] if world else [seed, 2], train),
        )
    ]
    named = [
        [row._replace(id=f"{name}/{i}") for i, row in enumerate(rows)]
        for name, rows in zip(("test", "validation", "train"), parts, strict=True)
    ]
    return SyntheticRows(named[2], named[1], named[0])


def _rows(rng: np.random.Generator, count: int, seen: set[tuple[str, str]]) -> list[Row]:
    rows: list[Row] = []
    for task, min_words, max_words in itertools.cycle(_TASKS):
        if len(rows) == count:
            return rows
        for _ in range(_DRAWS):
            words = [
                _WORDS[i] for i in rng.permutation(len(_WORDS))[: rng.integers(min_words, max_words + 1)]
            ]
            instruction, given, answer = task(words, rng)
            if (instruction, given) not in seen:
                seen.add((instruction, given))
                kind = task.__name__.strip("_").replace("_", " ")
                rows.append(Row("", instruction, given, (answer,), kind))
                break
    raise AssertionError("unreachable: the kinds repeat forever")
