"""Which slot decodes which answer next, decided on the host from lengths alone.

Short prompts come first, so that prompts which are prefilled or decoded together have similar lengths. A prompt is
prefilled once. Its answers move into slots as these become free.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from l2m_jax.errors import InputError

MAX_WAITING = 4  # prefilled batches
_CALLS_PER_ANSWER, _MAX_STEPS = 16, 32
_MIN_SLOTS = 8


def bucket(length: int, per_octave: int = 2, smallest: int = 16) -> int:
    """`length` rounded up to one of few sizes, `per_octave` for each power of two, so that few programs are compiled."""
    octave = max(1 << (length - 1).bit_length() >> 1, smallest)
    step = octave // per_octave
    return max(octave, -(-length // step) * step)


def prefill_shape(length: int, prefill_tokens: int) -> tuple[int, int]:
    """Rows on each device and padded length of a batch of prompts, the longest of which has `length` tokens."""
    length = bucket(length)
    return max(1, prefill_tokens // length), length


@dataclasses.dataclass(frozen=True)
class Work:
    """One answer to generate."""

    prompt: int
    seed: int


@dataclasses.dataclass(frozen=True)
class PrefillBatch:
    """Prompts that are prefilled together: `prompts[device]`, at most `rows` each, padded to `length` tokens."""

    prompts: tuple[tuple[int, ...], ...]
    rows: int
    length: int


@dataclasses.dataclass(frozen=True)
class Move:
    """An answer begins: `row` of a prefilled batch is copied to `slot` on the same device."""

    row: int
    slot: int
    work: Work


class Schedule:
    """Keeps `slots` on each of `devices` busy until no work is left.

    Attributes:
        slots: current number of slots on each device; fewer towards the end.
        slot_steps, used_slot_steps: decoding steps times slots so far, and how many of them made a token of an answer.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        seeds: Mapping[int, Sequence[int]],
        *,
        devices: int,
        slots: int,
        max_new_tokens: int,
        prefill_tokens: int,
        shrinks: bool = True,
    ):
        """`lengths` are those of all prompts; `seeds` has the wanted seeds for each prompt."""
        if slots < 1:
            raise InputError(f"slots: {slots} must be 1 or more")
        self._lengths, self._seeds = lengths, seeds
        self._max_new_tokens, self._prefill_tokens = max_new_tokens, prefill_tokens
        self._todo = collections.deque(sorted((p for p in seeds if seeds[p]), key=lambda p: (lengths[p], p)))
        # For each batch and device, the rows and answers that wait for a slot.
        self._waiting: dict[PrefillBatch, list[collections.deque[tuple[int, Work]]]] = {}
        self._running: list[dict[int, Work]] = [{} for _ in range(devices)]
        self._tokens: list[dict[int, int]] = [{} for _ in range(devices)]
        self._finished = self._finished_tokens = 0
        self.slots, self._shrinks = slots, shrinks
        self.slot_steps = self.used_slot_steps = 0

    def begin(self) -> Iterator[tuple[PrefillBatch, list[list[Move]]]]:
        """Assigns work to every free slot while there is any.

        Yields:
            A batch, and for each device the moves from it. The caller prefills a batch when it first appears, and
            keeps it while it `is_waiting`.
        """
        while True:
            for batch, waiting in list(self._waiting.items()):
                moves = [self._take(device, answers) for device, answers in enumerate(waiting)]
                if not any(waiting):
                    del self._waiting[batch]
                if any(moves):
                    yield batch, moves
            hungry = any(len(running) < self.slots for running in self._running)
            if not (hungry and self._todo and len(self._waiting) < MAX_WAITING):
                return
            batch = self._next_batch()
            self._waiting[batch] = [
                collections.deque((row, Work(p, s)) for row, p in enumerate(prompts) for s in self._seeds[p])
                for prompts in batch.prompts
            ]

    def is_waiting(self, batch: PrefillBatch) -> bool:
        """Whether some answers to its prompts have not begun yet."""
        return batch in self._waiting

    def _take(self, device: int, answers: collections.deque[tuple[int, Work]]) -> list[Move]:
        moves = []
        free = (slot for slot in range(self.slots) if slot not in self._running[device])
        while answers and (slot := next(free, None)) is not None:
            row, work = answers.popleft()
            self._running[device][slot] = work
            self._tokens[device][slot] = 0
            moves.append(Move(row, slot, work))
        return moves

    def _next_batch(self) -> PrefillBatch:
        devices = len(self._running)
        taken, rows, length = 0, 1, 0
        for prompt in self._todo:
            fitting, padded = prefill_shape(self._lengths[prompt], self._prefill_tokens)
            if taken + 1 > fitting * devices:
                break
            taken, rows, length = taken + 1, fitting, padded
        prompts = [self._todo.popleft() for _ in range(taken)]
        fewest = -(-taken // devices)
        rows = min(rows, 1 << (fewest - 1).bit_length())
        return PrefillBatch(tuple(tuple(prompts[d::devices]) for d in range(devices)), rows, length)

    @property
    def is_running(self) -> bool:
        return any(self._running)

    def steps(self) -> int:
        """How many steps to decode before new answers can begin: a small part of an answer, so that slots are rarely idle."""
        unfinished = [n for tokens in self._tokens for n in tokens.values()]
        mean = self._finished_tokens / self._finished if self._finished else self._max_new_tokens / 4
        wanted = max(1, min(_MAX_STEPS, round(mean / _CALLS_PER_ANSWER)))
        return min(wanted, self._max_new_tokens - min(unfinished))

    def longest(self) -> int:
        """Length of the longest running sequence in tokens."""
        return max(
            self._lengths[work.prompt] + self._tokens[device][slot]
            for device, running in enumerate(self._running)
            for slot, work in running.items()
        )

    def advance(self, steps: int, new_tokens: Sequence[Sequence[int]], active: Sequence[Sequence[bool]]):
        """Records decoded steps; yields (device, slot, work) for each answer that has ended.

        `new_tokens[device][slot]` is the length of the answer so far.
        """
        self.slot_steps += steps * self.slots * len(self._running)
        for device, running in enumerate(self._running):
            for slot, work in list(running.items()):
                count = int(new_tokens[device][slot])
                self.used_slot_steps += count - self._tokens[device][slot]
                self._tokens[device][slot] = count
                if not active[device][slot]:
                    self._finished += 1
                    self._finished_tokens += count
                    del running[slot], self._tokens[device][slot]
                    yield device, slot, work

    def shrink(self) -> list[list[int]] | None:
        """Halves the slots, down to 8, once no work waits and half are enough.

        Returns:
            The slots to keep on each device, or None.
        """
        if not self._shrinks:
            return None
        half = self.slots // 2
        fullest = max(len(running) for running in self._running)
        if self._todo or self._waiting or half < _MIN_SLOTS or not 0 < fullest <= half:
            return None
        self.slots = half
        kept = []
        for device, running in enumerate(self._running):
            used = sorted(running)
            idle = [slot for slot in range(2 * half) if slot not in running]
            kept.append((used + idle)[:half])
            place = {slot: i for i, slot in enumerate(used)}
            self._running[device] = {place[slot]: work for slot, work in running.items()}
            self._tokens[device] = {place[slot]: n for slot, n in self._tokens[device].items()}
        return kept

    @property
    def utilisation(self) -> float:
        """Share of the slots' steps that made a token of an answer, including its end of sequence."""
        return self.used_slot_steps / max(self.slot_steps, 1)
