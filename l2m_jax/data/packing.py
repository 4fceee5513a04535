"""Which example goes into which row: batches without padding, in few shapes.

A batch is cut into micro-batches, each of one `Shape` out of a small set that is chosen once for a data set, so
that a run compiles few programs. Packing changes where tokens lie, never which batch they belong to.
"""

import bisect
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

_ROUND = 64  # row lengths are multiples of it, which matrix units like
_ROW_LENGTHS = (64, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1280, 1536, 2048, 3072, 4096, 6144, 8192)
_ROW_COUNTS = 10  # tried for each row length
_SAMPLED_EXAMPLES = 2048  # in at least 16 batches
# A slot costs 1 in the layers' matrix products, and in attention as much again at this row length. A launch
# costs as much as so many slots. Only the comparison of layouts rests on these, and only roughly.
_ATTENTION_LENGTH = 4096.0
_LAUNCH_SLOTS = 64.0


class Shape(NamedTuple):
    """A micro-batch on one device: `rows` rows of `length` slots."""

    rows: int
    length: int

    @property
    def slots(self) -> int:
        return self.rows * self.length

    @property
    def cost(self) -> float:
        return self.slots * (1 + self.length / _ATTENTION_LENGTH) + _LAUNCH_SLOTS


class PackedRows(NamedTuple):
    """One micro-batch: `rows_AxR[a][r]` are the examples of a row, by their place in what was packed."""

    shape: Shape
    rows_AxR: list[list[list[int]]]


def pack(lengths: Sequence[int], shapes: Sequence[Shape], num_devices: int = 1) -> list[PackedRows]:
    """Places examples of `lengths` tokens into the cheapest micro-batches of `shapes` that hold them all.

    One or two micro-batches where these are enough, else as many of the largest shape as needed besides. Each
    device gets the same shape, and rows so that devices hold about as many tokens.

    Raises:
        ValueError: an example is longer than every row.
    """
    lengths = [int(length) for length in lengths]
    longest = max(shapes, key=lambda shape: (shape.length, shape.slots))
    if lengths and max(lengths) > longest.length:
        raise ValueError(f"an example of {max(lengths)} tokens does not fit into rows of {longest.length}")
    largest = max(shapes, key=lambda shape: shape.slots)
    total = sum(lengths)
    repeated = max(0, math.ceil(total / (num_devices * largest.slots)) - 2)
    by_cost = sorted(_combinations(shapes), key=lambda used: sum(shape.cost for shape in used))
    while True:
        for extra in by_cost:
            # Many long examples may need more of the longest rows than of the largest shape.
            for more in dict.fromkeys((largest, longest)):
                used = (*extra, *[more] * repeated)
                if total > num_devices * sum(shape.slots for shape in used):
                    continue
                rows = [shape.length for shape in used for _ in range(num_devices * shape.rows)]
                if _best_fit(lengths, rows) is not None:
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
    """The shapes in which random batches of these examples cost least; the same for the same arguments.

    Candidates are compared on sampled batches: a first shape that holds the longest example, then whichever
    adds most, and exchanges as long as these help.

    Args:
        lengths: tokens of each example, [n].
        batch_size: examples in a batch, over all devices.
        max_length: the longest example that must fit; by default the longest there is.
        max_slots: the most slots of a micro-batch on a device, for the sake of memory.
    """
    lengths = np.asarray(lengths)
    longest = _rounded_up(max_length or int(lengths.max()))
    mean = float(lengths.mean())
    group = max(1, min(batch_size, int(num_devices * max_slots / mean)))
    random = np.random.default_rng(0)
    sampled = max(16, _SAMPLED_EXAMPLES // group)
    batches = np.sort(random.choice(lengths, (sampled, group)), axis=1)[:, ::-1].tolist()
    candidates = _candidates(mean, longest, group * mean / num_devices, max(max_slots, longest))
    costs = _costs(batches, candidates, num_devices)

    def cost(chosen: frozenset[Shape]) -> float:
        return float(np.min([costs[used] for used in _combinations(chosen)], axis=0).mean())

    def best(options: Iterable[frozenset[Shape]]) -> tuple[float, list[Shape]]:
        return min((cost(option), sorted(option)) for option in options)

    covering = [shape for shape in candidates if shape.length >= longest]
    lowest, shapes = best(frozenset([shape]) for shape in covering)
    while True:
        chosen = frozenset(shapes)
        options = [chosen | {shape} for shape in candidates] if len(chosen) < max_shapes else []
        options += [chosen - {old} | {new} for old in chosen for new in candidates]
        found, better = best(option for option in options if not option.isdisjoint(covering))
        if found >= lowest * (1 - 1e-3):
            return tuple(shapes)
        lowest, shapes = found, better


def pack_rows(
    lengths: Sequence[int], row_length: int, longest: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Packs many examples tightly into as many rows as they need.

    Returns:
        Rows of `row_length`, and rows of `longest` for the examples that need these (and some that fit beside).
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
    """Examples of each row, each where it leaves least room, longest first; None if they do not fit."""
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


def _worst_fit(lengths: Sequence[int], rows: Sequence[int]) -> list[list[int]] | None:
    """As `_best_fit`, but each where there is most room: fits less often, and leaves rows equally full."""
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
    """Rows to micro-batches and devices: in rounds, the fullest row to the device with the fewest tokens."""
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
    """One or two micro-batches."""
    shapes = sorted(shapes)
    return [*((shape,) for shape in shapes), *itertools.combinations_with_replacement(shapes, 2)]


def _candidates(mean: float, longest: int, tokens: float, max_slots: int) -> list[Shape]:
    """Shapes of between a third and twice the slots that a device's `tokens` need."""
    lengths = {length for length in _ROW_LENGTHS if mean < length <= max(longest, 4 * _ROUND)} | {longest}
    shapes = set()
    for length in lengths:
        most = max(1, min(math.ceil(2 * tokens / length), max_slots // length))
        least = max(1, min(most, int(tokens / 3 / length)))
        shapes |= {Shape(int(rows), length) for rows in np.linspace(least, most, _ROW_COUNTS).round()}
    return sorted(shapes)


def _costs(
    batches: Sequence[Sequence[int]], candidates: Sequence[Shape], num_devices: int
) -> dict[tuple[Shape, ...], np.ndarray]:
    """What each batch costs in each combination of candidates; one that does not fit costs too much."""
    too_much = 4 * max(shape.cost for shape in candidates)
    totals, longest = np.sum(batches, axis=1), np.max(batches, axis=1)
    costs = {}
    for used in _combinations(candidates):
        rows = [shape.length for shape in used for _ in range(num_devices * shape.rows)]
        costs[used] = np.full(len(batches), too_much)
        # A batch that fills less than half of two micro-batches is better off in others.
        least = sum(rows) / 2 if len(used) > 1 else 0
        for j in np.flatnonzero((least <= totals) & (totals <= sum(rows)) & (longest <= max(rows))).tolist():
            if _best_fit(batches[j], rows) is not None:
                costs[used][j] = sum(shape.cost for shape in used)
    return costs


def _rounded_up(length: int) -> int:
    return -(-length // _ROUND) * _ROUND
