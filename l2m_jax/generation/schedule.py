"""Who decodes what next, decided on the host from lengths alone.

Prompts are taken shortest first, so that those prefilled together and decoded side by side have similar lengths.
A prompt is prefilled once; its answers follow one another into slots as these become free.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from l2m_jax.errors import InputError

_MOST_WAITING = 4  # prefilled batches
_CALLS_PER_ANSWER, _MOST_STEPS = 16, 32
_FEWEST_SLOTS = 8


def bucket(length: int, per_octave: int = 2, smallest: int = 16) -> int:
    """The next larger of few sizes, `per_octave` from each power of two to the next: fewer programs to compile."""
    octave = max(1 << (length - 1).bit_length() >> 1, smallest)
    step = octave // per_octave
    return max(octave, -(-length // step) * step)


@dataclasses.dataclass(frozen=True)
class Work:
    """One answer to be made."""

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
    """An answer begins: `row` of the prefilled batch goes to `slot`, both on one device."""

    row: int
    slot: int
    work: Work


class Schedule:
    """Fills `slots` on each of `devices` until no work is left.

    Attributes:
        slots: slots a device now; fewer towards the end.
        slot_steps, used_slot_steps: decoding steps times slots, run so far and spent on a token that somebody wanted.
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
    ):
        """`lengths` of all prompts; `seeds` of the answers wanted, by prompt."""
        if slots < 1:
            raise InputError(f"{slots} slots: at least 1 sequence must be decoded at a time")
        self._lengths, self._seeds = lengths, seeds
        self._max_new_tokens, self._prefill_tokens = max_new_tokens, prefill_tokens
        self._todo = collections.deque(sorted((p for p in seeds if seeds[p]), key=lambda p: (lengths[p], p)))
        # By batch and device: the rows, and what is to be made from them, that wait for a slot.
        self._waiting: dict[PrefillBatch, list[collections.deque[tuple[int, Work]]]] = {}
        self._running: list[dict[int, Work]] = [{} for _ in range(devices)]
        self._tokens: list[dict[int, int]] = [{} for _ in range(devices)]
        self._finished = self._finished_tokens = 0
        self.slots = slots
        self.slot_steps = self.used_slot_steps = 0

    def begin(self) -> Iterator[tuple[PrefillBatch, list[list[Move]]]]:
        """Gives every free slot work while there is any.

        Yields:
            A batch and the moves from it on each device. It has to be prefilled when it comes for the first time,
            and kept while it `is_waiting`.
        """
        while True:
            for batch, waiting in list(self._waiting.items()):
                moves = [self._take(device, answers) for device, answers in enumerate(waiting)]
                if not any(waiting):
                    del self._waiting[batch]
                if any(moves):
                    yield batch, moves
            hungry = any(len(running) < self.slots for running in self._running)
            if not (hungry and self._todo and len(self._waiting) < _MOST_WAITING):
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
        length = bucket(self._lengths[self._todo[0]])
        while True:
            rows = max(1, self._prefill_tokens // length)
            taken = min(rows * devices, len(self._todo))
            longest = self._lengths[self._todo[taken - 1]]
            if longest <= length:
                break
            length = bucket(longest)
        prompts = [self._todo.popleft() for _ in range(taken)]
        fewest = -(-taken // devices)
        rows = min(rows, 1 << (fewest - 1).bit_length())
        return PrefillBatch(tuple(tuple(prompts[d::devices]) for d in range(devices)), rows, length)

    @property
    def is_running(self) -> bool:
        return any(self._running)

    def steps(self) -> int:
        """How many steps to decode before the next look: a small part of an answer, so that slots idle little."""
        unfinished = [n for tokens in self._tokens for n in tokens.values()]
        mean = self._finished_tokens / self._finished if self._finished else self._max_new_tokens / 4
        wanted = max(1, min(_MOST_STEPS, round(mean / _CALLS_PER_ANSWER)))
        return min(wanted, self._max_new_tokens - min(unfinished))

    def longest(self) -> int:
        """Tokens in the longest running sequence."""
        return max(
            self._lengths[work.prompt] + self._tokens[device][slot]
            for device, running in enumerate(self._running)
            for slot, work in running.items()
        )

    def advance(self, steps: int, new_tokens: Sequence[Sequence[int]], active: Sequence[Sequence[bool]]):
        """Takes note of decoded steps; yields (device, slot, work) of each answer that has ended.

        `new_tokens[device][slot]` are those of the answer so far.
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
        """Half the slots (but 8 at least), once no work waits and half are enough: the rows to keep on each device, else None."""
        half = self.slots // 2
        fullest = max(len(running) for running in self._running)
        if self._todo or self._waiting or half < _FEWEST_SLOTS or not 0 < fullest <= half:
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
        """Share of the slots' steps that made a token of an answer (its end included)."""
        return self.used_slot_steps / max(self.slot_steps, 1)
