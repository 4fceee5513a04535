"""From examples to what the step takes: the order of an epoch, packed micro-batches, and feeding ahead."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from l2m_jax.data.packing import PackedRows, Shape, pack
from l2m_jax.types import MicroBatch

T = TypeVar("T")


class Examples(Protocol):
    """Token arrays by number: a `Corpus`, or answers made during training."""

    @property
    def prompt_lengths(self) -> np.ndarray: ...

    def example_tokens(self, i: int) -> np.ndarray: ...


class Targets(NamedTuple):
    """Where an example's targets lie in a packed micro-batch: `[device, start : start + count]` of its T axis."""

    example: int
    device: int
    start: int
    count: int


class Packed(NamedTuple):
    """A micro-batch of NumPy arrays with a leading device axis, and where each example's targets are in it."""

    batch: MicroBatch
    targets: list[Targets]


def order_of_examples(seed: int, stage: int, epoch: int, indices: np.ndarray) -> np.ndarray:
    """`indices` shuffled: a pure function of seed, stage and epoch, whatever order they come in."""
    return np.random.default_rng([seed, stage, epoch]).permutation(np.sort(indices))


def micro_batches(
    examples: Examples,
    indices: Sequence[int] | np.ndarray,
    shapes: Sequence[Shape],
    num_devices: int,
    *,
    teacher_rows: Callable[[int], np.ndarray] | None = None,
) -> list[Packed]:
    """The examples of one batch, packed.

    Args:
        teacher_rows: the stored hidden states of an example's targets, `[r_i, E]`.
    """
    indices = np.asarray(indices)
    tokens = [examples.example_tokens(int(i)) for i in indices]
    layouts = pack([len(t) for t in tokens], shapes, num_devices)
    return [_fill(examples, indices, tokens, layout, teacher_rows) for layout in layouts]


def forward_batches(
    examples: Examples,
    indices: Sequence[int] | np.ndarray,
    shapes: Sequence[Shape],
    num_devices: int,
    *,
    batch_size: int = 64,
) -> Iterator[list[Packed]]:
    """All of `indices` in their order, packed `batch_size` at a time: for passes where order means nothing."""
    for start in range(0, len(indices), batch_size):
        yield micro_batches(examples, indices[start : start + batch_size], shapes, num_devices)


def padded_batch(examples: Examples, indices: Sequence[int], length: int) -> Packed:
    """One example a row, padded to `length`, on one device: what packing is compared with."""
    tokens = [examples.example_tokens(int(i)) for i in indices]
    layout = PackedRows(Shape(len(tokens), length), [[[i] for i in range(len(tokens))]])
    return _fill(examples, np.asarray(indices), tokens, layout, None)


def _fill(
    examples: Examples,
    indices: np.ndarray,
    tokens: list[np.ndarray],
    layout: PackedRows,
    teacher_rows: Callable[[int], np.ndarray] | None,
) -> Packed:
    (rows, length), devices = layout.shape, len(layout.rows_AxR)
    slots = np.zeros((3, devices, rows, length), np.int32)
    target_index, labels = np.zeros((2, devices, rows * length), np.int32)
    weights = np.zeros((devices, rows * length), np.float32)
    teacher_hidden = None
    targets = []
    for device, of_device in enumerate(layout.rows_AxR):
        filled = 0
        for row, members in enumerate(of_device):
            at = 0
            for segment, member in enumerate(members, start=1):
                example, t = int(indices[member]), tokens[member]
                prompt = int(examples.prompt_lengths[example])
                slots[0, device, row, at : at + len(t)] = t
                slots[1, device, row, at : at + len(t)] = segment
                slots[2, device, row, at : at + len(t)] = np.arange(len(t))
                # Token j of an example is predicted from the slot before it.
                count = len(t) - prompt
                here = slice(filled, filled + count)
                target_index[device, here] = row * length + at + np.arange(prompt - 1, len(t) - 1)
                labels[device, here] = t[prompt:]
                weights[device, here] = 1
                if teacher_rows is not None:
                    stored = teacher_rows(example)
                    if teacher_hidden is None:
                        shape = (devices, rows * length, stored.shape[-1])
                        teacher_hidden = np.zeros(shape, stored.dtype)
                    teacher_hidden[device, here] = stored
                targets.append(Targets(example, device, filled, count))
                at, filled = at + len(t), filled + count
    batch = MicroBatch(slots[0], slots[1], slots[2], target_index, labels, weights, teacher_hidden)
    return Packed(batch, targets)


def prefetch(items: Iterator[T], depth: int = 4) -> Iterator[T]:
    """`items`, made in a thread up to `depth` ahead; what it raises is raised here."""
    ready: queue.Queue = queue.Queue(depth)
    stop, end = threading.Event(), object()

    def put(item: object) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(end)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, daemon=True, name="prefetch")
    thread.start()
    try:
        while (item := ready.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
