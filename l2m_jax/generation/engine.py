"""The decode engine: prompts and sampling rules in, answers out."""

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from l2m_jax import progress
from l2m_jax.errors import InputError
from l2m_jax.files import fingerprint
from l2m_jax.generation import programs
from l2m_jax.generation.programs import Moves, Prefilled, Slots
from l2m_jax.generation.responses import Answer, ResponseFile
from l2m_jax.generation.sampling import Prompts, SamplingRules, answer_keys
from l2m_jax.generation.schedule import Move, PrefillBatch, Schedule, bucket
from l2m_jax.models import DecoderConfig
from l2m_jax.multihost import first, is_first
from l2m_jax.parallel import Placement
from l2m_jax.types import Params

_MIN_CACHE, _SMALL_CACHE = 64, 256
_CACHE_BYTES = 8 * 2**30
_MIN_SLOTS, _MAX_SLOTS = 8, 64
PREFILL_TOKENS = 2048
_SCHEDULED_TOGETHER = 1 << 16  # prompts in a share; slots fall idle only at its end

# Fields of a config that affect only cost, rounding or training: changing them does not discard answers.
_NOT_IDENTITY = (
    "dtype", "param_dtype", "remat", "attention", "scan_layers",
    "embedding_dropout", "attention_dropout", "residual_dropout",
)  # fmt: skip
# Fields that came later: at their defaults they are left out, so that answers from before them stay.
_LATER = (
    "layer_types", "sliding_window", "sliding_rope", "norm_zero_centered", "update_norm", "qk_norm",
    "attention_out_bias", "query_scalar", "scale_embeddings",
)  # fmt: skip


def default_slots(config: DecoderConfig, max_length: int) -> int:
    """Slots on each device, from 8 to 64, so that the KV cache for sequences of `max_length` tokens fits in 8 GiB."""
    itemsize = np.dtype(jax.numpy.dtype(config.dtype)).itemsize
    bytes_per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
    return min(max(_CACHE_BYTES // (bytes_per_token * max_length), _MIN_SLOTS), _MAX_SLOTS)


def choose_slots(config: DecoderConfig, slots: int, max_length: int, answers: int, devices: int) -> int:
    """Slots on each device: `slots` (0: `default_slots`), and no more than there are answers to generate."""
    return min(slots or default_slots(config, max_length), -(-answers // devices))


def cache_size(config: DecoderConfig, length: int) -> int:
    """Tokens that a slot has room for when the longest sequence has `length`: one of few sizes.

    A small cache costs more to enlarge than to read, and a large one more to read: its sizes are closer to each other.
    """
    per_octave = 2 if length <= _SMALL_CACHE else 4
    return min(bucket(length, per_octave, _MIN_CACHE), config.max_positions)


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """A model that is ready to generate.

    Attributes:
        config: its `eos_token_id` ends an answer; if there are several, any of them does.
        params: placed by `placement`. They are read in place, so those of a training state will do.
        placement: the devices that share the work.
        tokenizer: decodes tokens into `Answer.text`; None leaves the text empty.
        slots: sequences decoded at once on each device; 0 chooses a number from the size of the model.
        shrinks: whether the slots become fewer once half are enough, which compiles programs for each number.

    Raises:
        InputError: the config has no `eos_token_id`.
    """

    config: DecoderConfig
    params: Params
    placement: Placement
    tokenizer: Any = None
    slots: int = 0
    shrinks: bool = True

    def __post_init__(self):
        if not self.config.eos_token_ids:
            raise InputError(
                f"eos_token_id: {self.config.eos_token_id!r} ends no answer; set it in the model's config.json to the "
                "tokenizer's end-of-sequence token"
            )

    def fingerprint(self, *facts: Any) -> str:
        """Changes with `facts` and with the architecture, but not with what only changes cost or rounding."""
        identity = dataclasses.asdict(self.config)
        defaults = {field.name: field.default for field in dataclasses.fields(self.config)}
        for name in (*_NOT_IDENTITY, *(n for n in _LATER if identity[n] == defaults[n])):
            del identity[name]
        return fingerprint(identity, *facts)


class Engine:
    """Decodes answers to many prompts.

    Attributes:
        utilisation: in the last `run`, the share of the slots' steps that made a token of an answer.
    """

    def __init__(self, generator: Generator, rules: SamplingRules, *, prefill_tokens: int = PREFILL_TOKENS):
        """`prefill_tokens` is about how many tokens of prompts a device prefills at once."""
        self._generator, self._rules, self._prefill_tokens = generator, rules, prefill_tokens
        self._config, self._placement = generator.config, generator.placement
        self._cache_config = programs.cache_config(self._config, self._placement)
        self._layers = programs.prepare_on_devices(self._config, generator.params, self._placement)
        self.utilisation = 0.0

    def run(
        self, prompts: Prompts, wanted: Iterable[tuple[int, int]]
    ) -> Iterator[list[tuple[int, int, tuple[int, ...]]]]:
        """Generates the answer for each wanted (prompt index, seed).

        Yields:
            Lists of (prompt index, seed, tokens without the end of sequence) as answers end. Shorter prompts begin
            earlier.

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
        schedule = self._schedule([len(prompt) for prompt in prompts], seeds)
        keys = answer_keys(prompts, list(columns))
        prefilled: dict[PrefillBatch, Prefilled] = {}
        slots = self._empty_slots(schedule.slots)

        while True:
            for batch, moves in schedule.begin():
                if batch not in prefilled:
                    prefilled[batch] = self._prefill(prompts, batch)
                source = prefilled[batch] if schedule.is_waiting(batch) else prefilled.pop(batch)
                slots = self._fit(slots, schedule.longest() + schedule.steps())
                arrays = self._placement.feed(_arrays(moves, schedule.slots, keys, columns))
                slots = self._map(programs.begin)(slots, source, arrays, max(map(len, moves)))
            if not schedule.is_running:
                return
            rows = schedule.shrink()
            if rows is not None:
                slots = self._map(programs.keep)(slots, self._placement.feed(np.array(rows, np.int32)))

            steps = schedule.steps()
            slots = self._fit(slots, schedule.longest() + steps)
            slots = self._map(programs.decode)(
                self._config, self._rules, self._config.eos_token_ids, self._layers, slots, steps
            )
            now = self._placement.gather(slots._replace(cache=(), keys_Bx2=()))
            new_tokens = now.lengths_B - now.prompt_lengths_B
            ended = [
                (work.prompt, work.seed, self._answer(now, device, slot))
                for device, slot, work in schedule.advance(steps, new_tokens, now.active_B)
            ]
            self.utilisation = schedule.utilisation
            if ended:
                yield ended

    def _map(self, function: Any) -> Any:
        return self._placement.map(function)

    def _schedule(self, lengths: Sequence[int], seeds: dict[int, list[int]]) -> Schedule:
        new, devices = self._rules.max_new_tokens, self._placement.num_devices
        answers = sum(map(len, seeds.values()))
        return Schedule(
            lengths,
            seeds,
            devices=devices,
            slots=choose_slots(
                self._cache_config, self._generator.slots, max(lengths) + new, answers, devices
            ),
            max_new_tokens=new,
            prefill_tokens=self._prefill_tokens,
            shrinks=self._generator.shrinks,
        )

    def _empty_slots(self, slots: int) -> Slots:
        size = cache_size(self._config, 1)
        return self._placement.create(programs.empty_slots, self._cache_config, slots, size)

    def _answer(self, now: Slots, device: int, slot: int) -> tuple[int, ...]:
        """The tokens of an answer that has ended, without the end of sequence. `now` holds NumPy arrays."""
        start, stop = now.prompt_lengths_B[device, slot], now.lengths_B[device, slot]
        tokens = tuple(now.tokens_BxS[device, slot, start:stop].tolist())
        return tokens[:-1] if tokens[-1] in self._config.eos_token_ids else tokens

    def _prefill(self, prompts: Prompts, batch: PrefillBatch) -> Prefilled:
        devices, length = self._placement.num_devices, min(batch.length, self._config.max_positions)
        tokens_AxPxL = np.zeros((devices, batch.rows, length), np.int32)
        lengths_AxP = np.ones((devices, batch.rows), np.int32)
        for device, indices in enumerate(batch.prompts):
            for row, prompt in enumerate(indices):
                lengths_AxP[device, row] = len(prompts[prompt])
                tokens_AxPxL[device, row, : len(prompts[prompt])] = prompts[prompt]
        fed = self._placement.feed((tokens_AxPxL, lengths_AxP))
        return self._map(programs.prefill)(self._config, self._generator.params, *fed)

    def _fit(self, slots: Slots, need: int) -> Slots:
        """Slots with room for `need` tokens: enlarged if necessary, shrunk where that is worth the copy.

        A step reads all keys and values that there is room for, so the room follows the longest active sequence.
        """
        size, have = cache_size(self._config, need), slots.tokens_BxS.shape[-1]
        return self._map(programs.resize)(size, slots) if size > have or size <= have * 2 // 3 else slots


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


def _check_all(generator: Generator, prompts: Prompts, rules: SamplingRules, seeds: Sequence[int]) -> None:
    if len(set(seeds)) != len(seeds) or not all(0 <= seed < 2**32 for seed in seeds):
        raise InputError(f"seeds: {tuple(seeds)} must differ from each other and lie between 0 and 2^32 - 1")
    _check(generator.config, rules, prompts)


def _check(config: DecoderConfig, rules: SamplingRules, prompts: Prompts) -> None:
    room = config.max_positions - rules.max_new_tokens
    if room < 1:
        raise InputError(
            f"max_new_tokens: {rules.max_new_tokens} leaves no room for a prompt in the model's "
            f"{config.max_positions} positions; lower it"
        )
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {i} has no tokens: begin it with the model's BOS or end-of-text token")
        if len(prompt) > room:
            raise InputError(
                f"prompt {i} has {len(prompt)} tokens and {rules.max_new_tokens} new ones may follow, but the model "
                f"has {config.max_positions} positions: cut prompts to {room} tokens or lower max_new_tokens"
            )
        least, most = int(np.min(prompt)), int(np.max(prompt))
        if not 0 <= least <= most < config.vocab_size:
            raise InputError(
                f"prompt {i} has token {most if least >= 0 else least}, but the model's vocabulary "
                f"has {config.vocab_size} entries: its tokenizer belongs to another model"
            )


def generate(
    generator: Generator,
    prompts: Prompts,
    rules: SamplingRules,
    seeds: Sequence[int],
    *,
    output: ResponseFile | None = None,
    title: str = "answers",
) -> list[Answer]:
    """Answers every prompt once with each seed. Holds all answers; for many, see `generate_file`.

    An answer depends only on the parameters, prompt, seed and rules: its random numbers come from the seed, the
    prompt's tokens and the position. Batch shapes can still change a logit in its last bits. Equal prompts with
    equal seeds get equal answers.

    With several processes, all of them call this together. They share the work, the first one writes `output`, and
    all of them get all answers.

    Args:
        prompts: token ids, used as they are: nothing is added or cut off.
        seeds: each from 0 to 2³² - 1.
        output: the file that answers are written to as they end. Answers it already holds are not generated again,
            provided the prompts, the rules, the architecture and `output.key` are the same.
        title: of the progress bar.

    Returns:
        The answers in the order of the prompts, and for each prompt in the order of the seeds.

    Raises:
        InputError: a prompt is empty, has a token outside the model's vocabulary, or leaves no room for
            `max_new_tokens` more; seeds are out of range or repeated; `output` holds other answers.
    """
    _check_all(generator, prompts, rules, seeds)
    answers: dict[tuple[int, int], Answer] = {}
    if output is not None:
        output = _keyed(generator, prompts, rules, output)
        found = first(lambda: [(a.prompt, a.seed, a.tokens, a.text) for a in output.read()])
        answers = {(p, seed): Answer(p, seed, tuple(tokens), text) for p, seed, tokens, text in found}
    known_PxS = _known(answers, len(prompts), seeds)
    for made in _missing(generator, prompts, rules, seeds, known_PxS, output, title):
        answers.update({(answer.prompt, answer.seed): answer for answer in made})
    return [answers[prompt, seed] for prompt in range(len(prompts)) for seed in seeds]


def generate_file(
    generator: Generator,
    prompts: Prompts,
    rules: SamplingRules,
    seeds: Sequence[int],
    output: ResponseFile,
    *,
    title: str = "answers",
) -> None:
    """As `generate`, but the answers are in `output` alone, in the order in which they ended.

    Prompts are read a share at a time, so `prompts` may be a view of a file. What is held for all of them is a byte for
    each answer.
    """
    _check_all(generator, prompts, rules, seeds)
    output = _keyed(generator, prompts, rules, output)

    def look() -> str:
        works = ((answer.prompt, answer.seed) for _, answer in output.lines())
        return np.packbits(_known(works, len(prompts), seeds)).tobytes().hex()

    bits = np.unpackbits(np.frombuffer(bytes.fromhex(first(look)), np.uint8))
    known_PxS = bits[: len(prompts) * len(seeds)].astype(bool).reshape(len(prompts), len(seeds))
    for _ in _missing(generator, prompts, rules, seeds, known_PxS, output, title):
        pass


def _known(works: Iterable[tuple[int, int]], prompts: int, seeds: Sequence[int]) -> np.ndarray:
    """bool [prompts, seeds]: which answers are among `works`, (prompt, seed) each."""
    known_PxS = np.zeros((prompts, len(seeds)), bool)
    columns = {seed: s for s, seed in enumerate(seeds)}
    for prompt, seed in works:
        if 0 <= prompt < prompts and seed in columns:
            known_PxS[prompt, columns[seed]] = True
    return known_PxS


def _missing(
    generator: Generator,
    prompts: Prompts,
    rules: SamplingRules,
    seeds: Sequence[int],
    known_PxS: np.ndarray,
    output: ResponseFile | None,
    title: str,
) -> Iterator[list[Answer]]:
    """Generates the answers that are not known, and appends them to `output` as they end."""
    if known_PxS.all():
        return
    # The same number of slots in each share of the prompts, so that all run the same programs.
    longest = max(map(len, prompts)) + rules.max_new_tokens
    config = programs.cache_config(generator.config, generator.placement)
    slots = generator.slots or default_slots(config, longest)
    engine = Engine(dataclasses.replace(generator, slots=slots), rules)
    with contextlib.ExitStack() as stack:
        append = stack.enter_context(output.appending()) if output is not None and is_first() else None
        bar = stack.enter_context(progress.bar(title, known_PxS.size))
        bar.resume_at(int(known_PxS.sum()))
        start, new_tokens = time.monotonic(), 0
        for begin in range(0, len(prompts), _SCHEDULED_TOGETHER):
            chosen = slice(begin, begin + _SCHEDULED_TOGETHER)
            wanted = [(int(p), seeds[s]) for p, s in np.argwhere(~known_PxS[chosen])]
            for ended in engine.run(prompts[chosen], wanted):
                new = [
                    Answer(begin + p, seed, tokens, _text(generator.tokenizer, tokens))
                    for p, seed, tokens in ended
                ]
                if append is not None:
                    append(new)
                new_tokens += sum(len(answer.tokens) for answer in new)
                rate = new_tokens / max(time.monotonic() - start, 1e-9)
                bar.advance(len(new), **{"tokens/s": f"{rate:,.0f}"})
                yield new


def _keyed(
    generator: Generator, prompts: Prompts, rules: SamplingRules, output: ResponseFile
) -> ResponseFile:
    each = (np.asarray(prompt) for prompt in prompts)
    return ResponseFile(output.path, generator.fingerprint(output.key, rules, each))


def _text(tokenizer: Any, tokens: tuple[int, ...]) -> str:
    return "" if tokenizer is None else tokenizer.decode(list(tokens), skip_special_tokens=True)
