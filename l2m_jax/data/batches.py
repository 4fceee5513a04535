"""Batches: the arrays of packed micro-batches, and prefetching."""

import math
import queue
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from l2m_jax.data.packing import PackedRows, Shape, pack, pack_rows
from l2m_jax.types import MicroBatch, TeacherRows

T = TypeVar("T")

# Slots per token when many examples are packed together.
_PACKING_LOSS = 1.02

# Of micro-batches in passes without gradients, on each device.
FORWARD_SLOTS, FORWARD_ROW_LENGTH = 8192, 512

# How many examples are packed together in a pass over the whole data set.
_POOL = 8192


class Examples(Protocol):
    """Indexed token sequences, each a prompt followed by a response, such as a `Corpus`."""

    @property
    def prompt_lengths(self) -> np.ndarray:
        """Number of prompt tokens of each example, [n]."""
        ...

    @property
    def response_lengths(self) -> np.ndarray:
        """Number of targets of each example, [n]."""
        ...

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each example, [n]."""
        ...

    def example_tokens(self, i: int) -> np.ndarray: ...

    def target_positions(self, i: int) -> np.ndarray:
        """The places of an example's targets among its tokens, ascending: the response, and in a chat also the
        assistant's earlier turns."""
        ...


@dataclass(frozen=True)
class ListedExamples:
    """Examples held in memory.

    Attributes:
        targets: the places of the targets of each example; None: all that follows the prompt.
    """

    tokens: Sequence[np.ndarray]
    prompt_lengths: np.ndarray
    targets: Sequence[np.ndarray] | None = None

    @property
    def lengths(self) -> np.ndarray:
        return self._lengths

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.array([len(tokens) for tokens in self.tokens], np.int32)

    @property
    def response_lengths(self) -> np.ndarray:
        """Number of targets of each example, [n]."""
        if self.targets is not None:
            return np.array([len(places) for places in self.targets], np.int32)
        return self.lengths - self.prompt_lengths

    def __len__(self) -> int:
        return len(self.tokens)

    def example_tokens(self, i: int) -> np.ndarray:
        return self.tokens[i]

    def target_positions(self, i: int) -> np.ndarray:
        return np.arange(self.prompt_lengths[i], self.lengths[i]) if self.targets is None else self.targets[i]


@dataclass(frozen=True)
class AnsweredExamples:
    """`examples` in which some responses are replaced, for instance by generated ones.

    Attributes:
        answered: maps the index of each replaced example to its tokens, prompt and response. Only the response is a
            target then, and no earlier turn of a chat.
        answered_lengths: the lengths of `answered`, in its order; None: counted.
    """

    examples: Examples
    answered: Mapping[int, np.ndarray]
    answered_lengths: np.ndarray | None = None

    @property
    def prompt_lengths(self) -> np.ndarray:
        return self.examples.prompt_lengths

    @property
    def lengths(self) -> np.ndarray:
        return self._lengths

    @cached_property
    def _lengths(self) -> np.ndarray:
        lengths, found = self.examples.lengths.copy(), self.answered_lengths
        if found is None:
            found = [len(tokens) for tokens in self.answered.values()]
        lengths[self._indices] = found
        return lengths

    @cached_property
    def _indices(self) -> np.ndarray:
        return np.fromiter(self.answered, np.int64, len(self.answered))

    @property
    def response_lengths(self) -> np.ndarray:
        return self._response_lengths

    @cached_property
    def _response_lengths(self) -> np.ndarray:
        lengths, answered = self.examples.response_lengths.copy(), self._indices
        lengths[answered] = self.lengths[answered] - self.prompt_lengths[answered]
        return lengths

    def example_tokens(self, i: int) -> np.ndarray:
        tokens = self.answered.get(i)
        return self.examples.example_tokens(i) if tokens is None else tokens

    def target_positions(self, i: int) -> np.ndarray:
        if i not in self.answered:
            return self.examples.target_positions(i)
        return np.arange(self.prompt_lengths[i], self.lengths[i])


def micro_batches(
    examples: Examples,
    indices: Sequence[int] | np.ndarray,
    shapes: Sequence[Shape],
    num_devices: int = 1,
    teacher_rows: Callable[[int], TeacherRows] | None = None,
    *,
    filled: Container[int] | None = None,
    equal_examples: bool = False,
    coefficients: Mapping[str, float | np.ndarray] | None = None,
) -> list[MicroBatch]:
    """Packs one batch into NumPy arrays with a leading device axis A.

    Args:
        indices: the examples of the batch.
        shapes: the shapes that a micro-batch may have (`choose_shapes`).
        teacher_rows: returns what is stored of the teacher at the targets of an example.
        filled: devices whose arrays are needed, for instance those of this process; the others stay 0. None: all.
        equal_examples: each target has weight 1/r_i, so that every example has weight 1.
        coefficients: "alpha", "beta" or "temperature" of the loss, where it is not the objective's, and "weight", a
            factor of the targets' weights. Each is a number, or an array with one entry for each of `examples`.

    Raises:
        ValueError: an example is longer than the longest row, or has no prompt.
    """
    packed = pack(examples.lengths[indices].tolist(), shapes, num_devices)
    arranged = [_arrange(examples, indices, rows, teacher_rows, filled, equal_examples) for rows in packed]
    return [_with_coefficients(batch, owners, coefficients or {}) for batch, owners, _ in arranged]


def _with_coefficients(
    batch: MicroBatch, owners: np.ndarray, coefficients: Mapping[str, float | np.ndarray]
) -> MicroBatch:
    """`batch` with the coefficients of each target's example, `owners`; those of padding (-1) don't matter."""
    by_target = {
        name: np.broadcast_to(np.float32(value), owners.shape)
        if np.ndim(value) == 0
        else np.asarray(value, np.float32)[owners]
        for name, value in coefficients.items()
    }
    weights = batch.weights_T * by_target.pop("weight", np.float32(1))
    return batch._replace(weights_T=weights, **{f"{name}_T": value for name, value in by_target.items()})


class ForwardBatch(NamedTuple):
    """A micro-batch of a pass over the data set, and the origin of its targets.

    Attributes:
        micro_batch: NumPy arrays with a leading device axis A.
        example_AxT: the example of each target; -1 for padding.
        target_AxT: the index of the target within its example.
        indices: the examples in this micro-batch; each example is in exactly one.
    """

    micro_batch: MicroBatch
    example_AxT: np.ndarray
    target_AxT: np.ndarray
    indices: np.ndarray


def forward_batches(
    examples: Examples,
    indices: Sequence[int] | np.ndarray,
    num_devices: int = 1,
    *,
    slots: int = FORWARD_SLOTS,
    row_length: int = FORWARD_ROW_LENGTH,
    teacher_rows: Callable[[int], TeacherRows] | None = None,
) -> Iterator[ForwardBatch]:
    """All of `indices`, tightly packed, for passes without gradients: teacher store, cross-entropy.

    There are at most two shapes: rows of `row_length` slots, and longer rows for the examples that need them. They
    depend on `examples` and not on `indices`, so that passes over different subsets share their compiled programs.

    Args:
        slots: maximum number of slots per device in a micro-batch; a longer row is allowed by itself.
        teacher_rows: as in `micro_batches`.
    """
    indices = np.asarray(indices)
    shapes = forward_shapes(examples.lengths, num_devices, slots=slots, row_length=row_length)
    row_length, longest = (shape.length for shape in shapes)
    for start in range(0, len(indices), _POOL):
        pool = indices[start : start + _POOL]
        packed = pack_rows(examples.lengths[pool].tolist(), row_length, longest)
        for rows, shape in zip(packed, shapes, strict=True):
            at_once = num_devices * shape.rows
            for first in range(0, len(rows), at_once):
                chosen = rows[first : first + at_once]
                chosen += [[] for _ in range(at_once - len(chosen))]
                rows_AxR = [chosen[device::num_devices] for device in range(num_devices)]
                arrays = _arrange(examples, pool, PackedRows(shape, rows_AxR), teacher_rows)
                yield ForwardBatch(*arrays, pool[[i for row in chosen for i in row]])


def forward_shapes(
    lengths: np.ndarray,
    num_devices: int = 1,
    *,
    slots: int = FORWARD_SLOTS,
    row_length: int = FORWARD_ROW_LENGTH,
) -> tuple[Shape, Shape]:
    """The two shapes of `forward_batches` for examples of these lengths: the usual rows, and rows for the longest."""
    longest = -(-int(lengths.max()) // 64) * 64
    row_length = min(row_length, longest)
    is_long = lengths > row_length
    return (
        _forward_shape(int(lengths[~is_long].sum()), row_length, num_devices, slots),
        _forward_shape(int(lengths[is_long].sum()), longest, num_devices, slots),
    )


def _forward_shape(tokens: int, length: int, num_devices: int, slots: int) -> Shape:
    """Rows of `length` in at most `slots`, such that the micro-batches that hold `tokens` are equally full."""
    max_rows = max(1, slots // length)
    all_rows = _PACKING_LOSS * tokens / (num_devices * length)
    rows = all_rows / max(1, math.ceil(all_rows / max_rows))
    return Shape(max(1, math.ceil(rows)), length)


def _arrange(
    examples: Examples,
    indices: Sequence[int] | np.ndarray,
    packed: PackedRows,
    teacher_rows: Callable[[int], TeacherRows] | None = None,
    filled: Container[int] | None = None,
    equal_examples: bool = False,
) -> tuple[MicroBatch, np.ndarray, np.ndarray]:
    """The arrays of packed rows, with the example of each target and its index within the example."""
    num_devices, (rows, length) = len(packed.rows_AxR), packed.shape
    tokens, segment_ids, positions = np.zeros((3, num_devices, rows, length), np.int32)
    labels, targets = np.zeros((2, num_devices, rows * length), np.int32)
    # Padding targets have indices that are out of range and distinct (see `MicroBatch`).
    target_index = np.tile(np.arange(rows * length, 2 * rows * length, dtype=np.int32), (num_devices, 1))
    owners = np.full((num_devices, rows * length), -1, np.int64)
    weights = np.zeros((num_devices, rows * length), np.float32)
    of_teacher: dict[str, np.ndarray] = {}
    if teacher_rows is not None:
        any_rows = teacher_rows(int(indices[0]))
        of_teacher = {name: np.zeros((*labels.shape, *x.shape[1:]), x.dtype) for name, x in any_rows.items()}
    for device, rows_R in enumerate(packed.rows_AxR):
        if filled is not None and device not in filled:
            continue
        done = 0
        for row, row_examples in enumerate(rows_R):
            start = 0
            for segment, place in enumerate(row_examples, start=1):
                example = int(indices[place])
                ids, places = examples.example_tokens(example), examples.target_positions(example)
                if len(places) and places[0] < 1:
                    raise ValueError(f"example {example} has no prompt to predict its first target from")
                end, responses = start + len(ids), len(places)
                tokens[device, row, start:end] = ids
                segment_ids[device, row, start:end] = segment
                positions[device, row, start:end] = np.arange(len(ids))
                at = slice(done, done + responses)
                # A target is predicted from the slot before it.
                target_index[device, at] = row * length + start + places - 1
                labels[device, at] = ids[places]
                weights[device, at] = 1 / responses if equal_examples else 1
                owners[device, at] = example
                targets[device, at] = np.arange(responses)
                if teacher_rows is not None:
                    for name, stored in teacher_rows(example).items():
                        of_teacher[name][device, at] = stored
                start, done = end, done + responses
    batch = MicroBatch(tokens, segment_ids, positions, target_index, labels, weights, **of_teacher)  # type: ignore[arg-type]
    return batch, owners, targets


def prefetch(items: Iterator[T], depth: int = 2) -> Iterator[T]:
    """Iterates over `items`, which a thread computes ahead of time, at most `depth` of them.

    Exceptions of the thread are raised here. The thread ends when the iterator is exhausted, closed or dropped.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not stopped.is_set():
            try:
                ready.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stopped.set()
        thread.join()
