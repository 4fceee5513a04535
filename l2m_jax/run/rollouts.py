"""What a method trains on: reference responses, or responses that a model generates to the same prompts.

Those of the teacher and the initial student are generated once (`responses.py`). Those of the current student
(rollouts) are sampled anew as it learns, and kept in files: a run that resumes reads them there, because the parameters
that they came from may be gone.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from l2m_jax import files, methods
from l2m_jax.data.batches import AnsweredExamples, Examples
from l2m_jax.errors import InputError
from l2m_jax.generation import Generator, SamplingRules, generate
from l2m_jax.models import DecoderConfig
from l2m_jax.multihost import first
from l2m_jax.parallel import Placement
from l2m_jax.run.responses import ResponseTokens, with_end
from l2m_jax.training.loop import Part, Term
from l2m_jax.types import Params, TeacherRows

_CHECKSUMS = "checksums.json"

Responses = Mapping[int, tuple[int, ...]]  # example number -> response, with the end of sequence if it ended


@dataclass(frozen=True)
class Sampler:
    """Samples the current student's responses to training prompts.

    Attributes:
        end: the token that ends a response.
        longest_prompt: examples with longer prompts keep their current response.
        seed: that of the training.
    """

    config: DecoderConfig
    placement: Placement
    tokenizer: Any
    end: int
    slots: int
    rules: SamplingRules
    longest_prompt: int
    seed: int

    def __call__(self, references: Examples, indices: np.ndarray, params: Params, part: Part) -> Responses:
        kept = [int(i) for i in indices if references.prompt_lengths[i] <= self.longest_prompt]
        if not kept:
            return {}
        # One seed per epoch, so that a repeated prompt gets other random numbers.
        words = [self.seed, part.stage.index, part.epoch]
        seed = int(np.random.SeedSequence(words).generate_state(1)[0])
        generator = Generator(self.config, params, self.placement, self.tokenizer, self.slots)
        prompts = [_prompt(references, i).tolist() for i in kept]
        answers = generate(generator, prompts, self.rules, [seed], title="the student's responses")
        return {i: with_end(a, self.rules, self.end) for i, a in zip(kept, answers, strict=True)}


def training_data(
    method: methods.Method,
    references: Examples,
    fixed: Mapping[str, Responses],
    rollouts: "Rollouts | None",
    limit: int,
    teacher_rows: Callable[[int], TeacherRows] | None,
) -> Callable[[Part, Params], list[Term]]:
    """What `method` trains on in each part of an epoch.

    Args:
        fixed: responses that were generated once, by model ("teacher", "initial_student"); only those in use.
        rollouts: None unless the method is on-policy.
        limit: the maximum number of tokens of an example with a generated response. Longer ones are cut, and then
            have no end of sequence.
        teacher_rows: reads what is stored of the teacher at the reference responses; None with a live teacher.
    """
    examples: Examples = references
    if method.responses == "teacher":
        examples = answered(references, fixed["teacher"], limit)
    rows = teacher_rows if method.on_references_alone else None
    of_student: Examples | None = None
    if method.contrast is not None and rollouts is None:
        of_student = answered(references, fixed["initial_student"], limit)

    def data(part: Part, params: Params) -> list[Term]:
        used = (examples,)
        if of_student is not None:
            used = (examples, of_student)
        elif method.contrast is not None and rollouts is not None:
            used = (examples, answered(references, rollouts.of(part, part.indices, params), limit))
        elif rollouts is not None:
            chosen = part.indices[spread(len(part.indices), rollouts.settings.student_share)]
            used = (answered(examples, rollouts.of(part, chosen, params), limit),)
        return [
            Term(objective, of_term, rows, equal_examples=method.contrast is not None)
            for objective, of_term in zip(methods.objectives(method, part.stage), used, strict=True)
        ]

    return data


class Rollouts:
    """The current student's responses, kept in one file for each part of an epoch.

    Args:
        folder: the folder of the files, which belong to one training phase.
        sample: returns responses to the prompts of some examples, from placed parameters.
    """

    def __init__(
        self,
        settings: methods.Rollouts,
        references: Examples,
        sample: Callable[[Examples, np.ndarray, Params, Part], Responses],
        decode: Callable[[tuple[int, ...]], str],
        folder: Path,
    ):
        self.settings = settings
        self._references, self._sample, self._decode, self._folder = references, sample, decode, folder
        self._latest: dict[int, tuple[int, ...]] | None = None

    def of(self, part: Part, indices: np.ndarray, params: Params) -> Responses:
        """Responses to the prompts of `indices`: a share is replayed, the others are sampled from `params` (placed).

        If the part's file exists, the result is the same as when it was written, whatever `params` are.
        """
        # An epoch may have an example several times; its response is the same.
        indices = indices[np.sort(np.unique(indices, return_index=True)[1])]
        file = self._folder / _name(part)
        latest = self._before(file)
        known = np.array([i for i in indices.tolist() if i in latest], np.int64)
        share = self.settings.replay_share * len(indices) / max(len(known), 1)
        replayed = known[spread(len(known), min(share, 1.0))]
        if not first(functools.partial(self._is_there, file, part)):
            fresh = indices[~np.isin(indices, replayed)]
            new = self._sample(self._references, fresh, params, part)
            first(functools.partial(self._write, file, new))
        sampled = _read(file)
        responses = {i: latest[i] for i in replayed.tolist()} | sampled
        if self.settings.replay_share:
            latest.update(sampled)
        return responses

    def _before(self, file: Path) -> dict[int, tuple[int, ...]]:
        """The latest response to each prompt from before `file`; empty without replay."""
        if self._latest is None:
            self._latest = {}
            if self.settings.replay_share:
                # One process looks, because all must find the same files.
                for earlier in first(lambda: sorted(self._recorded())):
                    if earlier < file.name:
                        self._latest.update(_read(self._folder / earlier))
        return self._latest

    def _recorded(self) -> dict[str, list]:
        """The checksums of the files that are complete, by name. The first process looks.

        A file that is not as it was written cannot be sampled again: the parameters have changed since.
        """
        record = self._folder / _CHECKSUMS
        if not record.is_file():
            if any(self._folder.glob("*.jsonl")):
                self._refuse(record)
            return {}
        try:
            recorded = dict(json.loads(record.read_text(encoding="utf-8")))
            damaged = files.damaged(self._folder, recorded)
        except (ValueError, TypeError):
            damaged, recorded = record, {}
        if damaged is not None:
            self._refuse(damaged)
        return recorded

    def _is_there(self, file: Path, part: Part) -> bool:
        known = file.name in self._recorded()
        if part.started and not known:
            self._refuse(file)
        return known

    def _refuse(self, file: Path) -> NoReturn:
        checkpoints = self._folder.parent.parent / "checkpoints" / self._folder.name.rpartition("-")[0]
        raise InputError(
            f"{file}: missing, or not what was written; restore it, or delete {self._folder} and {checkpoints} to "
            "train from the start"
        )

    def _write(self, file: Path, responses: Responses) -> None:
        recorded = self._recorded()
        if not recorded:
            files.write_json(self._folder / _CHECKSUMS, {})  # files without it have lost it
        lines: Iterable[dict[str, Any]] = (
            {"example": i, "tokens": r, "text": self._decode(r)} for i, r in responses.items()
        )
        files.write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        recorded[file.name] = files.checksums(file)["."]
        files.write_json(self._folder / _CHECKSUMS, recorded)


def spread(count: int, share: float) -> np.ndarray:
    """bool [count]: a `share` of them True, evenly spread, so that each batch has its share."""
    return np.diff(np.floor(np.arange(count + 1) * share + 1e-9)) > 0


def answered(examples: Examples, responses: Responses, limit: int) -> AnsweredExamples:
    """`examples` with other responses to some prompts, cut at `limit` tokens."""
    prompts_P = examples.prompt_lengths[np.fromiter(responses, np.int64, len(responses))]
    lengths_P = np.minimum(prompts_P + _lengths(responses), limit)
    return AnsweredExamples(examples, _Answered(examples, responses, limit), lengths_P)


class _Answered(Mapping[int, np.ndarray]):
    """The tokens of each answered example, put together when they are asked for."""

    def __init__(self, examples: Examples, responses: Responses, limit: int):
        self._examples, self._responses, self._limit = examples, responses, limit

    def __getitem__(self, i: int) -> np.ndarray:
        response = np.asarray(self._responses[i], np.int32)
        return np.concatenate([_prompt(self._examples, i), response])[: self._limit]

    def __contains__(self, i: object) -> bool:
        return i in self._responses

    def __iter__(self) -> Iterator[int]:
        return iter(self._responses)

    def __len__(self) -> int:
        return len(self._responses)


def _lengths(responses: Responses) -> np.ndarray:
    if isinstance(responses, ResponseTokens):
        return responses.lengths_P  # known without reading the responses
    return np.array([len(response) for response in responses.values()], np.int64)


def _prompt(examples: Examples, i: int) -> np.ndarray:
    return examples.example_tokens(i)[: examples.prompt_lengths[i]]


def _name(part: Part) -> str:
    return f"stage{part.stage.index:02}_epoch{part.epoch:03}_part{part.number:03}.jsonl"


def _read(file: Path) -> dict[int, tuple[int, ...]]:
    with file.open(encoding="utf-8") as lines:
        found = (json.loads(line) for line in lines)
        return {line["example"]: tuple(line["tokens"]) for line in found}
