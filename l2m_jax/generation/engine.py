"""The decode engine: prompts and sampling rules in, answers out."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from l2m_jax import progress
from l2m_jax.errors import InputError
from l2m_jax.files import fingerprint
from l2m_jax.generation.programs import Moves, Prefilled, Programs, Slots
from l2m_jax.generation.responses import Answer, ResponseFile
from l2m_jax.generation.sampling import SamplingRules, answer_keys
from l2m_jax.generation.schedule import Move, PrefillBatch, Schedule, bucket
from l2m_jax.models import DecoderConfig
from l2m_jax.multihost import first, is_first
from l2m_jax.types import Params

_SMALLEST_CACHE, _CACHE_SIZES_PER_OCTAVE = 64, 4
_CACHE_BYTES = 8 * 2**30
_FEWEST_SLOTS, _MOST_SLOTS = 8, 64


def default_slots(config: DecoderConfig, longest: int) -> int:
    """Slots a device whose KV cache stays within 8 GiB for sequences of `longest` tokens, from 8 to 64."""
    itemsize = np.dtype(jax.numpy.dtype(config.dtype)).itemsize
    bytes_per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
    return min(max(_CACHE_BYTES // (bytes_per_token * longest), _FEWEST_SLOTS), _MOST_SLOTS)


class Engine:
    """Decodes answers to many prompts on the devices at hand.

    Attributes:
        utilisation: of the slots in the last `run`: steps that made a token somebody wanted, as a share of all.
    """

    def __init__(
        self,
        config: DecoderConfig,
        params: Params,
        rules: SamplingRules,
        *,
        eos_token_id: int,
        slots: int | None = None,
        devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
        mesh: Mesh | None = None,
        prefill_tokens: int = 2048,
    ):
        """Arguments as in `generate`; `prefill_tokens` is how many a device prefills at once, about."""
        self._config, self._rules, self._eos_token_id = config, rules, eos_token_id
        self._slots, self._prefill_tokens = slots, prefill_tokens
        if mesh is None:
            self._programs = Programs.replicated(tuple(devices or jax.devices()))
        else:
            self._programs = Programs.sharded_over(mesh)
        self._stacked_params, self._layer_params = self._programs.prepare(config, params)
        self.utilisation = 0.0

    def run(
        self, prompts: Sequence[Sequence[int]], wanted: Iterable[tuple[int, int]]
    ) -> Iterator[list[tuple[int, int, tuple[int, ...]]]]:
        """Makes the answer of each wanted (prompt index, seed).

        Yields:
            Lists of (prompt index, seed, tokens without the end of sequence) as answers end, shortest prompts first.

        Raises:
            InputError: see `generate`.
        """
        _check(self._config, self._rules, prompts)
        seeds: dict[int, list[int]] = {}
        for prompt, seed in wanted:
            seeds.setdefault(prompt, []).append(seed)
        columns = {seed: i for i, seed in enumerate(dict.fromkeys(s for of in seeds.values() for s in of))}
        if not columns:
            return
        A = self._programs.num_devices
        lengths = [len(prompt) for prompt in prompts]
        slots_wanted = self._slots or default_slots(self._config, max(lengths) + self._rules.max_new_tokens)
        schedule = Schedule(
            lengths,
            seeds,
            devices=A,
            slots=min(slots_wanted, -(-sum(map(len, seeds.values())) // A)),
            max_new_tokens=self._rules.max_new_tokens,
            prefill_tokens=self._prefill_tokens,
        )
        keys = answer_keys(prompts, list(columns))
        prefilled: dict[PrefillBatch, Prefilled] = {}
        slots = self._programs.empty_slots(self._config, schedule.slots, self._cache_size(1))

        while True:
            for batch, moves in schedule.begin():
                if batch not in prefilled:
                    prefilled[batch] = self._prefill(prompts, batch)
                source = prefilled[batch] if schedule.is_waiting(batch) else prefilled.pop(batch)
                need = max(source.tokens_PxL.shape[-1], schedule.longest() + schedule.steps())
                slots = self._fit(slots, need)
                arrays = self._programs.feed(_arrays(moves, schedule.slots, keys, columns))
                slots = self._programs.begin(slots, source, arrays, max(map(len, moves)))
            if not schedule.is_running:
                return
            rows = schedule.shrink()
            if rows is not None:
                slots = self._programs.keep(slots, self._programs.feed(np.array(rows, np.int32)))

            steps = schedule.steps()
            slots = self._fit(slots, schedule.longest() + steps)
            slots = self._programs.decode(
                self._config, self._rules, self._eos_token_id, self._layer_params, slots, steps
            )
            now = self._programs.read(slots._replace(cache=(), keys_Bx2=()))
            new_tokens = now.lengths_B - now.prompt_lengths_B
            ended = []
            for device, slot, work in schedule.advance(steps, new_tokens, now.active_B):
                start, stop = now.prompt_lengths_B[device, slot], now.lengths_B[device, slot]
                tokens = tuple(now.tokens_BxS[device, slot, start:stop].tolist())
                ended.append(
                    (work.prompt, work.seed, tokens[:-1] if tokens[-1] == self._eos_token_id else tokens)
                )
            self.utilisation = schedule.utilisation
            if ended:
                yield ended

    def _prefill(self, prompts: Sequence[Sequence[int]], batch: PrefillBatch) -> Prefilled:
        shape = (self._programs.num_devices, batch.rows, min(batch.length, self._config.max_positions))
        tokens, lengths = np.zeros(shape, np.int32), np.ones(shape[:2], np.int32)
        for device, indices in enumerate(batch.prompts):
            for row, prompt in enumerate(indices):
                lengths[device, row] = len(prompts[prompt])
                tokens[device, row, : len(prompts[prompt])] = prompts[prompt]
        fed = self._programs.feed((tokens, lengths))
        return self._programs.prefill(self._config, self._stacked_params, *fed)

    def _cache_size(self, need: int) -> int:
        return min(bucket(need, _CACHE_SIZES_PER_OCTAVE, _SMALLEST_CACHE), self._config.max_positions)

    def _fit(self, slots: Slots, need: int) -> Slots:
        """Slots with room for `need` tokens: larger where they must be, smaller where that pays for the copy.

        A step reads every key and value that there is room for, so room follows the longest running sequence.
        """
        size, have = self._cache_size(need), slots.tokens_BxS.shape[-1]
        return self._programs.resize(size, slots) if size > have or size <= have * 2 // 3 else slots


def _arrays(moves: list[list[Move]], slots: int, keys: np.ndarray, columns: dict[int, int]) -> Moves:
    A = len(moves)
    arrays = Moves(
        np.zeros((A, slots), np.int32),
        np.full((A, slots), slots, np.int32),
        np.zeros((A, slots, 2), np.uint32),
    )
    for device, on_device in enumerate(moves):
        for i, move in enumerate(on_device):
            arrays.rows_M[device, i] = move.row
            arrays.slots_M[device, i] = move.slot
            arrays.keys_Mx2[device, i] = keys[move.work.prompt, columns[move.work.seed]]
    return arrays


def _check(config: DecoderConfig, rules: SamplingRules, prompts: Sequence[Sequence[int]]) -> None:
    room = config.max_positions - rules.max_new_tokens
    if room < 1:
        raise InputError(
            f"max_new_tokens {rules.max_new_tokens} leaves no room for a prompt in the model's "
            f"{config.max_positions} positions: lower it"
        )
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {i} has no tokens: begin it with the model's BOS or end-of-text token")
        if len(prompt) > room:
            raise InputError(
                f"prompt {i} has {len(prompt)} tokens and {rules.max_new_tokens} new ones may follow, but the model "
                f"holds {config.max_positions} positions: cut prompts to {room} tokens or lower max_new_tokens"
            )
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise InputError(
                f"prompt {i} has token {max(prompt) if min(prompt) >= 0 else min(prompt)}, but the model's vocabulary "
                f"has {config.vocab_size} entries: its tokenizer belongs to another model"
            )


def generate(
    config: DecoderConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    rules: SamplingRules,
    seeds: Sequence[int],
    *,
    eos_token_id: int,
    tokenizer: Any = None,
    slots: int | None = None,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
    mesh: Mesh | None = None,
    output: Path | None = None,
    made_from: str | None = None,
    title: str = "answers",
) -> list[Answer]:
    """Answers every prompt once with each seed.

    An answer depends on (params, prompt, seed, rules) alone: its random numbers come from the seed, the prompt's
    tokens and the position. Batch shapes can still change a logit in its last bits. Equal prompts with equal
    seeds get equal answers.

    Args:
        prompts: token ids. Nothing is added to them, and nothing cut off.
        seeds: each from 0 to 2³² - 1.
        eos_token_id: ends an answer, and is not part of it.
        tokenizer: turns tokens into `Answer.text`, if given.
        slots: sequences decoded at once on each device; None: from the model's size.
        devices: where to decode, each with its own copy of the parameters: those of all processes, one process
            after another. None: all there are.
        mesh: instead of `devices`, where `params` are global arrays sharded over it.
        output: JSON lines file that takes the answers as they come. What it already holds is not made again, if it
            was made from the same prompts, rules, config and `made_from`.
        made_from: fingerprint of the parameters (and the tokenizer); needed with `output`.
        title: of the progress bar.

    Several processes call this together. They share the work, the first one writes `output`, and all get all answers.

    Returns:
        The answers in the order of prompts, and of seeds within each.

    Raises:
        InputError: a prompt is empty, or too long for `max_new_tokens` more within the model's positions, or not
            of the model's vocabulary; seeds out of range or repeated; a foreign file at `output`.
    """
    if len(set(seeds)) != len(seeds) or not all(0 <= seed < 2**32 for seed in seeds):
        raise InputError(f"seeds {tuple(seeds)} must differ from each other and lie between 0 and 2^32 - 1")
    _check(config, rules, prompts)
    file = None
    if output is not None:
        if made_from is None:
            raise ValueError("output needs made_from: the file could not tell whose answers it holds")
        made_from = fingerprint(made_from, config, rules, eos_token_id, [list(map(int, p)) for p in prompts])
        file = first(lambda: ResponseFile(output, made_from))
    answers = {(a.prompt, a.seed): a for a in (file.answers if file else ())}
    wanted = [(p, seed) for p in range(len(prompts)) for seed in seeds]
    missing = [work for work in wanted if work not in answers]

    with contextlib.ExitStack() as stack:
        file = file if is_first() else None
        if file is not None:
            stack.enter_context(file)
        bar = stack.enter_context(progress.bar(title, len(wanted)))
        bar.resume_at(len(wanted) - len(missing))
        if missing:
            engine = Engine(
                config, params, rules, eos_token_id=eos_token_id, slots=slots, devices=devices, mesh=mesh
            )
            start, tokens_made = time.monotonic(), 0
            for ended in engine.run(prompts, missing):
                new = [Answer(p, seed, tokens, _text(tokenizer, tokens)) for p, seed, tokens in ended]
                answers.update({(a.prompt, a.seed): a for a in new})
                if file is not None:
                    file.add(new)
                tokens_made += sum(len(a.tokens) for a in new)
                rate = tokens_made / max(time.monotonic() - start, 1e-9)
                bar.advance(len(new), **{"tokens/s": f"{rate:,.0f}"})
    return [answers[work] for work in wanted]


def _text(tokenizer: Any, tokens: tuple[int, ...]) -> str:
    return "" if tokenizer is None else tokenizer.decode(list(tokens), skip_special_tokens=True)
