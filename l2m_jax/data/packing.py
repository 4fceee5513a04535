"""Packing: assigns examples to rows with little padding, in few shapes.

A batch is divided into micro-batches. Each has a `Shape` from a small set that is chosen once per data set, so that a
run compiles few programs. Packing determines where tokens are placed, never which batch they belong to.
"""

import bisect
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

_ROUND = 64  # row lengths are multiples of this, which suits matrix units
_ROW_LENGTHS = (64, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1280, 1536, 2048, 3072, 4096, 6144, 8192)
_ROW_COUNTS = 10  # candidates per row length, and again between the neighbours of each that is chosen
_SAMPLED_EXAMPLES = 2048  # used to compare shapes, in at least 16 batches
# A rough cost model, used only to compare layouts. A slot costs 1 in the layers' matrix products, and the same again
# in attention at this row length. A launch costs as much as this many slots.
_ATTENTION_LENGTH = 4096.0
_LAUNCH_SLOTS = 64.0


class Shape(NamedTuple):
    """The shape of a micro-batch on one device: `rows` rows of `length` slots (token positions)."""

    rows: int
    length: int

    @property
    def slots(self) -> int:
        return self.rows * self.length

    @property
    def cost(self) -> float:
        return self.slots * (1 + self.length / _ATTENTION_LENGTH) + _LAUNCH_SLOTS


class PackedRows(NamedTuple):
    """One micro-batch. `rows_AxR[a][r]` lists the examples of a row, as indices into what was packed."""

    shape: Shape
    rows_AxR: list[list[list[int]]]


def pack(lengths: Sequence[int], shapes: Sequence[Shape], num_devices: int = 1) -> list[PackedRows]:
    """Packs examples of `lengths` tokens into the cheapest micro-batches of `shapes` that hold them all.

    Uses one or two micro-batches if they suffice, and otherwise as many more of the largest shape as needed. All
    devices get the same shapes, and about the same number of tokens.

    Raises:
        ValueError: an example is longer than the longest row.
    """
    lengths = [int(length) for length in lengths]
    longest = max(shapes, key=lambda shape: (shape.length, shape.slots))
    if lengths and max(lengths) > longest.length:
        raise ValueError(f"an example of {max(lengths)} tokens does not fit into rows of {longest.length}")
    largest = max(shapes, key=lambda shape: shape.slots)
    total, longest_first = sum(lengths), sorted(lengths, reverse=True)
    repeated = max(0, math.ceil(total / (num_devices * largest.slots)) - 2)
    by_cost = sorted(_combinations(shapes), key=lambda used: sum(shape.cost for shape in used))
    while True:
        for extra in by_cost:
            # Many long examples may need the longest rows rather than the largest shape.
            for more in dict.fromkeys((largest, longest)):
                used = (*extra, *[more] * repeated)
                if total > num_devices * sum(shape.slots for shape in used):
                    continue
                rows = [shape.length for shape in used for _ in range(num_devices * shape.rows)]
                if _fit(longest_first, rows):
                    return _divide(lengths, used, rows, num_devices)
        repeated += 1


def choose_shapes(
    lengths: np.ndarray,
    batch_size: int,
    num_devices: int = 1,
    *,
    max_length: int | None = None,
    max_shapes: int = 4,
    max_slots: int = 8192,
) -> tuple[Shape, ...]:
    """Chooses the shapes in which random batches of these examples cost least. Deterministic.

    Candidates are compared on sampled batches. The search starts with one shape that holds the longest example, then
    adds the shape that helps most or exchanges one, as long as this lowers the cost. A second search tries the numbers
    of rows between those of the first.

    Args:
        lengths: number of tokens of each example, [n].
        batch_size: examples in a batch, over all devices.
        max_length: length of the longest example that must fit; by default the longest of `lengths`.
        max_shapes: maximum number of shapes.
        max_slots: maximum number of slots of a micro-batch on one device, which limits memory.
    """
    lengths = np.asarray(lengths)
    longest = _rounded_up(max_length or int(lengths.max()))
    mean = float(lengths.mean())
    group = max(1, min(batch_size, int(num_devices * max_slots / mean)))
    random = np.random.default_rng(0)
    sampled = max(16, _SAMPLED_EXAMPLES // group)
    batches = np.sort(random.choice(lengths, (sampled, group)), axis=1)[:, ::-1].tolist()
    coarse = _candidates(mean, longest, group * mean / num_devices, max(max_slots, longest))
    shapes = _cheapest(batches, coarse, frozenset(), longest, max_shapes, num_devices)
    finer = shapes.union(*(_around(shape, coarse) for shape in shapes))
    return tuple(sorted(_cheapest(batches, sorted(finer), shapes, longest, max_shapes, num_devices)))


def _cheapest(
    batches: Sequence[Sequence[int]],
    candidates: Sequence[Shape],
    start: frozenset[Shape],
    longest: int,
    max_shapes: int,
    num_devices: int,
) -> frozenset[Shape]:
    """The best of `candidates` that a search from `start` finds; without one, from the best shape for all lengths."""
    costs = _costs(batches, candidates, num_devices)
    covering = [shape for shape in candidates if shape.length >= longest]

    def cost(chosen: frozenset[Shape]) -> float:
        return float(np.min([costs[used] for used in _combinations(chosen)], axis=0).mean())

    def best(options: Iterable[frozenset[Shape]]) -> tuple[float, frozenset[Shape]]:
        return min(
            ((cost(option), option) for option in options), key=lambda found: (found[0], sorted(found[1]))
        )

    lowest, chosen = best([start] if start else [frozenset([shape]) for shape in covering])
    while True:
        options = [chosen | {shape} for shape in candidates] if len(chosen) < max_shapes else []
        options += [chosen - {old} | {new} for old in chosen for new in candidates]
        found, better = best(option for option in options if not option.isdisjoint(covering))
        if found >= lowest * (1 - 1e-3):
            return chosen
        lowest, chosen = found, better


def pack_rows(
    lengths: Sequence[int], row_length: int, longest: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Packs many examples tightly into as many rows as needed.

    Returns:
        Rows of `row_length`, and rows of `longest` for the examples that need them (and others that fit into these).
    """
    rows: dict[int, list[list[int]]] = {row_length: [], longest: []}
    opened: list[tuple[int, list[int]]] = []
    room: list[tuple[int, int]] = []  # (free slots, which opened row), ascending
    for i in _longest_first(lengths):
        at = bisect.bisect_left(room, (lengths[i], -1))
        if at < len(room):
            free, row = room.pop(at)
        else:
            free, row = (row_length if lengths[i] <= row_length else longest), len(opened)
            opened.append((free, []))
            rows[free].append(opened[-1][1])
        opened[row][1].append(i)
        bisect.insort(room, (free - lengths[i], row))
    return rows[row_length], (rows[longest] if longest != row_length else [])


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def _best_fit(lengths: Sequence[int], rows: Sequence[int]) -> list[list[int]] | None:
    """Best fit: the longest example first, each into the row with the least room left. None if they do not fit."""
    placed: list[list[int]] = [[] for _ in rows]
    room = sorted((free, row) for row, free in enumerate(rows))
    for i in _longest_first(lengths):
        at = bisect.bisect_left(room, (lengths[i], -1))
        if at == len(room):
            return None
        free, row = room.pop(at)
        placed[row].append(i)
        bisect.insort(room, (free - lengths[i], row))
    return placed


def _fit(longest_first: Sequence[int], rows: Sequence[int]) -> bool:
    """Whether `_best_fit` places all examples; takes a third of its time."""
    room = sorted(rows)
    for length in longest_first:
        at = bisect.bisect_left(room, length)
        if at == len(room):
            return False
        bisect.insort(room, room.pop(at) - length)
    return True


def _worst_fit(lengths: Sequence[int], rows: Sequence[int]) -> list[list[int]] | None:
    """Worst fit: as `_best_fit`, but into the row with the most room. Fits less often; rows are equally full."""
    placed: list[list[int]] = [[] for _ in rows]
    free = list(rows)
    for i in _longest_first(lengths):
        row = max(range(len(rows)), key=lambda r: free[r])
        if free[row] < lengths[i]:
            return None
        placed[row].append(i)
        free[row] -= lengths[i]
    return placed


def _divide(
    lengths: Sequence[int], shapes: Sequence[Shape], rows: Sequence[int], num_devices: int
) -> list[PackedRows]:
    """Assigns rows to micro-batches and devices: in rounds, the fullest row to the device with the fewest tokens."""
    placed = _worst_fit(lengths, rows) or _best_fit(lengths, rows)
    assert placed is not None
    packed, start = [], 0
    for shape in shapes:
        end = start + num_devices * shape.rows
        by_tokens = sorted(placed[start:end], key=lambda row: -sum(lengths[i] for i in row))
        devices: list[list[list[int]]] = [[] for _ in range(num_devices)]
        tokens = [0] * num_devices
        for turn in range(shape.rows):
            emptiest = sorted(range(num_devices), key=lambda device: tokens[device])
            for device, row in zip(emptiest, by_tokens[turn * num_devices :], strict=False):
                devices[device].append(row)
                tokens[device] += sum(lengths[i] for i in row)
        packed.append(PackedRows(shape, devices))
        start = end
    return packed


def _combinations(shapes: Iterable[Shape]) -> list[tuple[Shape, ...]]:
    """All combinations of one or two micro-batches."""
    shapes = sorted(shapes)
    return [*((shape,) for shape in shapes), *itertools.combinations_with_replacement(shapes, 2)]


def _candidates(mean: float, longest: int, tokens: float, max_slots: int) -> list[Shape]:
    """Shapes with between a third and twice the slots that a device's `tokens` need."""
    lengths = {length for length in _ROW_LENGTHS if mean < length <= max(longest, 4 * _ROUND)} | {longest}
    shapes = set()
    for length in lengths:
        max_rows = max(1, min(math.ceil(2 * tokens / length), max_slots // length))
        min_rows = max(1, min(max_rows, int(tokens / 3 / length)))
        shapes |= {Shape(int(rows), length) for rows in np.linspace(min_rows, max_rows, _ROW_COUNTS).round()}
    return sorted(shapes)


def _around(shape: Shape, candidates: Sequence[Shape]) -> set[Shape]:
    """Shapes of the same length, between the next smaller and the next larger candidate."""
    counts = [other.rows for other in candidates if other.length == shape.length]
    fewer = max((rows for rows in counts if rows < shape.rows), default=shape.rows)
    more = min((rows for rows in counts if rows > shape.rows), default=shape.rows)
    return {Shape(int(rows), shape.length) for rows in np.linspace(fewer, more, _ROW_COUNTS).round()}


def _costs(
    batches: Sequence[Sequence[int]], candidates: Sequence[Shape], num_devices: int
) -> dict[tuple[Shape, ...], np.ndarray]:
    """The cost of each batch (longest example first) in each combination of candidates, prohibitive where it does not fit."""
    prohibitive = 4 * max(shape.cost for shape in candidates)
    totals, longest = np.sum(batches, axis=1), np.max(batches, axis=1)
    costs = {}
    for used in _combinations(candidates):
        rows = [shape.length for shape in used for _ in range(num_devices * shape.rows)]
        costs[used] = np.full(len(batches), prohibitive)
        # A batch that fills less than half of two micro-batches has a cheaper combination.
        min_total = sum(rows) / 2 if len(used) > 1 else 0
        for j in np.flatnonzero(
            (min_total <= totals) & (totals <= sum(rows)) & (longest <= max(rows))
        ).tolist():
            if _fit(batches[j], rows):
                costs[used][j] = sum(shape.cost for shape in used)
    return costs


def _rounded_up(length: int) -> int:
    return -(-length // _ROUND) * _ROUND
