"""What a method trains on: reference responses, or others that a model generates to the same prompts.

The teacher's and the initial student's are generated once, into a file beside the other shared artefacts. The
current student's (rollouts) are sampled anew as it learns, and kept beside its checkpoints: a run that resumes reads
them there, because the parameters they came from may be gone.
"""

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from l2m_jax import files, methods
from l2m_jax.data.batches import AnsweredExamples, Examples
from l2m_jax.data.packing import Shape, choose_shapes
from l2m_jax.generation import Answer, generate
from l2m_jax.models import DecoderConfig
from l2m_jax.multihost import first
from l2m_jax.progress import console
from l2m_jax.run.context import FinishedModel, Run
from l2m_jax.training.loop import Part, Term
from l2m_jax.training.teacher import TeacherStore
from l2m_jax.types import Params

Responses = Mapping[
    int, tuple[int, ...]
]  # example number -> response, with its end of sequence if it came to one


def training_data(
    run: Run,
    method: methods.Method,
    teacher: FinishedModel,
    initial: FinishedModel,
    store: TeacherStore | None,
    folder: Path,
) -> Callable[[Part, Params], list[Term]]:
    """What `method` trains on, part by part of an epoch.

    Args:
        store: of the reference responses; None with a live teacher, or without one.
        folder: where rollouts are kept.
    """
    limit = longest_example(run, teacher, initial)
    references = run.splits.train
    examples: Examples = references
    if method.responses == "teacher":
        examples = _with(references, generated_once(run, teacher, "teacher"), limit)
    of_initial = None
    if method.contrast and not method.on_policy:
        of_initial = _with(references, generated_once(run, initial, "initial_student"), limit)
    rollouts = Rollouts(run, initial.config, folder) if method.on_policy else None
    rows = store.read if store is not None and method.on_references_alone else None

    def data(part: Part, params: Params) -> list[Term]:
        used = (examples,)
        if method.contrast:
            students = of_initial
            if rollouts is not None:
                students = _with(references, rollouts.of(part, part.indices, params), limit)
            assert students is not None
            used = (examples, students)
        elif rollouts is not None:
            chosen = part.indices[spread(len(part.indices), run.config.rollouts.student_share)]
            used = (_with(examples, rollouts.of(part, chosen, params), limit),)
        objectives = methods.objectives(method, run.config, part.stage)
        return [
            Term(objective, of_term, rows, equal_examples=method.contrast > 0)
            for objective, of_term in zip(objectives, used, strict=True)
        ]

    return data


def generated_for(chosen: Iterable[methods.Method]) -> list[str]:
    """Whose responses, generated once, any of these methods trains on: "teacher", "initial_student"."""
    chosen = list(chosen)
    wanted = {
        "teacher": any(method.responses == "teacher" for method in chosen),
        "initial_student": any(method.contrast and not method.on_policy for method in chosen),
    }
    return [name for name, needed in wanted.items() if needed]


def shapes(run: Run, method: methods.Method, limit: int) -> tuple[Shape, ...]:
    """Those of the run, or with rows that are long enough for what may be generated."""
    if method.on_references_alone:
        return run.shapes
    train = run.splits.train
    longest = min(limit, int(train.prompt_lengths.max()) + run.rules.max_new_tokens)
    return choose_shapes(
        train.lengths,
        batch_size=run.config.training.batch_size,
        num_devices=run.parallel.num_devices,
        max_length=max(longest, int(train.lengths.max())),
        max_shapes=run.config.max_shapes,
    )


def longest_example(run: Run, teacher: FinishedModel, student: FinishedModel) -> int:
    """The most tokens of an example with a generated response: it is truncated there, and has no end then."""
    return min(run.config.data.max_length, teacher.config.max_positions, student.config.max_positions)


def generated_once(run: Run, model: FinishedModel, name: str) -> Responses:
    """The response of `model` to each training prompt, from `NAME_responses.jsonl` as far as it is there already."""
    indices = np.arange(len(run.splits.train))
    found = _generate(
        run,
        model.config,
        model.params,
        indices,
        run.config.evaluation.seeds[0],  # whatever the run's own seed, so that runs have it in common
        output=run.shared / f"{name}_responses.jsonl",
        made_from=files.fingerprint(model.fingerprint, run.splits.fingerprint),
        title=f"responses of the {name.replace('_', ' ')}",
    )
    if left := len(indices) - len(found):
        console.print(f"  {left:,} prompts leave no room for an answer: these keep their reference response")
    return found


class Rollouts:
    """The current student's responses, in one file for each part of an epoch.

    Args:
        folder: of the files. They belong to one training phase, and are as old as its checkpoints.
    """

    def __init__(self, run: Run, config: DecoderConfig, folder: Path):
        self._run, self._config, self._folder = run, config, folder
        self._latest: dict[int, tuple[int, ...]] | None = None

    def of(self, part: Part, indices: np.ndarray, params: Params) -> Responses:
        """Responses to the prompts of `indices`: a share replayed, the others sampled from `params` (placed).

        Where the part's file is there, all is as when it was written, whatever `params` are.
        """
        file = self._folder / _name(part)
        latest = self._before(file)
        known = np.array([i for i in indices.tolist() if i in latest], np.int64)
        share = self._run.config.rollouts.replay_share * len(indices) / max(len(known), 1)
        replayed = known[spread(len(known), min(share, 1.0))]
        if not first(file.is_file):
            fresh = indices[~np.isin(indices, replayed)]
            # One seed an epoch: a prompt that comes again gets other random numbers.
            words = [self._run.config.student_seed, part.stage.index, part.epoch]
            seed = int(np.random.SeedSequence(words).generate_state(1)[0])
            params = self._run.parallel.unplace(params)
            new = _generate(self._run, self._config, params, fresh, seed, title="the student's responses")
            first(functools.partial(_write, file, new, self._run.tokenizer))
        sampled = _read(file)
        responses = {i: latest[i] for i in replayed.tolist()} | sampled
        if self._run.config.rollouts.replay_share:
            latest.update(sampled)
        return responses

    def _before(self, file: Path) -> dict[int, tuple[int, ...]]:
        """The latest response to each prompt before `file` was written; empty without replay."""
        if self._latest is None:
            self._latest = {}
            if self._run.config.rollouts.replay_share:
                # One process looks, for all must find the same files.
                files = first(lambda: sorted(self._folder.glob("*.jsonl")))
                for earlier in files:
                    if earlier.name < file.name:
                        self._latest.update(_read(earlier))
        return self._latest


def spread(count: int, share: float) -> np.ndarray:
    """bool [count]: `share` of them True, evenly spread, so that each batch has its share."""
    return np.diff(np.floor(np.arange(count + 1) * share + 1e-9)) > 0


def _name(part: Part) -> str:
    return f"stage{part.stage.index:02}_epoch{part.epoch:03}_part{part.number:03}.jsonl"


def _generate(
    run: Run,
    config: DecoderConfig,
    params: Params,
    indices: Iterable[int] | np.ndarray,
    seed: int,
    *,
    title: str,
    output: Path | None = None,
    made_from: str | None = None,
) -> Responses:
    """Responses to those prompts that leave room for one; `params` as `generate` takes them."""
    train, room, eos = run.splits.train, run.longest_prompt(config), run.tokenizer.eos_token_id
    kept = [int(i) for i in indices if train.prompt_lengths[i] <= room]
    if not kept:
        return {}
    answers = generate(
        config,
        params,
        [train.prompt_tokens(i).tolist() for i in kept],
        run.rules,
        [seed],
        eos_token_id=eos,
        tokenizer=run.tokenizer,
        output=output,
        made_from=made_from,
        title=title,
        **run.placement,
    )
    return {i: _response(answer, run, eos) for i, answer in zip(kept, answers, strict=True)}


def _response(answer: Answer, run: Run, eos: int) -> tuple[int, ...]:
    ended = len(answer.tokens) < run.rules.max_new_tokens
    return (*answer.tokens, eos) if ended else answer.tokens


def _with(examples: Examples, responses: Responses, limit: int) -> AnsweredExamples:
    def tokens(i: int, response: tuple[int, ...]) -> np.ndarray:
        prompt = examples.example_tokens(i)[: examples.prompt_lengths[i]]
        return np.concatenate([prompt, np.asarray(response, np.int32)])[:limit]

    return AnsweredExamples(examples, {i: tokens(i, response) for i, response in responses.items()})


def _write(file: Path, responses: Responses, tokenizer) -> None:
    lines = [
        {"example": i, "tokens": r, "text": tokenizer.decode(list(r), skip_special_tokens=True)}
        for i, r in responses.items()
    ]
    files.write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _read(file: Path) -> dict[int, tuple[int, ...]]:
    with file.open(encoding="utf-8") as lines:
        found = (json.loads(line) for line in lines)
        return {line["example"]: tuple(line["tokens"]) for line in found}
