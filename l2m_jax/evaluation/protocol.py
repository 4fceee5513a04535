"""The evaluation protocol: answers to each set with each seed, scored by Rouge-L and exact match.

Validation during training, the evaluation phase and `eval.py` all use it, so they sample by the same rules.
"""

import collections
import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from l2m_jax import files
from l2m_jax.errors import InputError
from l2m_jax.evaluation.rouge import exact_match, rouge_l_many
from l2m_jax.evaluation.sets import PromptSet
from l2m_jax.generation import Answer, Generator, ResponseFile, SamplingRules, generate
from l2m_jax.multihost import first, is_first

RESULTS, RESPONSES = "results.json", "responses.jsonl"
_DIGEST = "responses_sha256"  # in results.json
_ANSWERS = ".answers"  # in the folder until it is finished


@dataclasses.dataclass(frozen=True)
class Score:
    """A measure × 100: the mean over seeds, their sample standard deviation (0 for one seed), and one value a seed."""

    mean: float
    std: float
    per_seed: tuple[float, ...]

    @classmethod
    def of(cls, per_seed: Sequence[float]) -> "Score":
        values = tuple(float(value) for value in per_seed)
        return cls(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0, values)


@dataclasses.dataclass(frozen=True)
class Group:
    """The scores of a group of rows."""

    rows: int
    rouge_l: Score
    exact_match: Score


@dataclasses.dataclass(frozen=True)
class SetResult:
    """The scores of one set (see `PromptSet` for the fields of the same name).

    Attributes:
        rows: answered prompts.
        response_tokens: mean length of the answers, without the end of sequence.
        categories: scores of each category, if the rows have categories.
    """

    name: str
    title: str
    rows: int
    left_out: int
    unreportable: bool
    rouge_l: Score
    exact_match: Score
    response_tokens: float
    categories: dict[str, Group]


@dataclasses.dataclass(frozen=True)
class Results:
    """The scores of a model on all sets; `results.json` holds them.

    Attributes:
        made_from: fingerprint of the model, the rules, the seeds and the sets.
    """

    made_from: str
    seeds: tuple[int, ...]
    rules: SamplingRules
    sets: tuple[SetResult, ...]

    @property
    def rouge_l(self) -> float:
        """The mean over the sets that may be reported, × 100, or over all sets if none may."""
        sets = [found for found in self.sets if not found.unreportable] or self.sets
        return float(np.mean([found.rouge_l.mean for found in sets]))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Results":
        """The inverse of `dataclasses.asdict`. Lists may stand for tuples."""

        def read_score(value: Mapping[str, Any]) -> Score:
            return Score(value["mean"], value["std"], tuple(value["per_seed"]))

        def read_group(value: Mapping[str, Any]) -> Group:
            return Group(value["rows"], read_score(value["rouge_l"]), read_score(value["exact_match"]))

        def read_set(value: Mapping[str, Any]) -> SetResult:
            scores = {name: read_score(value[name]) for name in ("rouge_l", "exact_match")}
            categories = {name: read_group(found) for name, found in value["categories"].items()}
            return SetResult(**{**value, **scores, "categories": categories})

        return cls(
            value["made_from"],
            tuple(value["seeds"]),
            SamplingRules(**value["rules"]),
            tuple(map(read_set, value["sets"])),
        )


def evaluate(
    generator: Generator,
    sets: Sequence[PromptSet],
    rules: SamplingRules,
    seeds: Sequence[int],
    *,
    folder: Path | None = None,
    key: str | None = None,
    title: str = "evaluation",
) -> Results:
    """Answers every prompt of every set once with each seed, and scores the answers.

    Args:
        generator: the model, with its tokenizer.
        folder: for `results.json` and `responses.jsonl` (one object for each answer: set, id, category, seed,
            prompt, response, references, rouge_l). Answers are written there as they end: an interrupted
            evaluation resumes, and a finished one is read back.
        key: changes with the model's weights and the tokenizer; required with `folder`.
        title: of the progress bars, followed by the set's title.

    Raises:
        InputError: two sets have the same name; `folder` holds another evaluation; see also `generate`.
    """
    if generator.tokenizer is None:
        raise ValueError("the generator needs a tokenizer: answers are scored as text")
    if folder is not None and key is None:
        raise ValueError("folder needs a key, which says whose results it holds")
    names = [prompt_set.name for prompt_set in sets]
    if (twice := next((name for name in names if names.count(name) > 1), None)) is not None:
        raise InputError(f"two evaluation sets are called '{twice}': give them as name=file")
    asked = [(s.name, s.prompts, s.references) for s in sets]
    made_from = generator.fingerprint(key, rules, tuple(seeds), asked)
    if folder is not None and (found := first(lambda: _finished(folder / RESULTS, made_from))):
        return Results.from_json(found)

    results, lines = [], []
    for prompt_set in sets:
        output = None
        if folder is not None and key is not None:
            output = ResponseFile(folder / _ANSWERS / f"{prompt_set.name}.jsonl", key)
        answers = generate(
            generator, prompt_set.prompts, rules, seeds, output=output, title=f"{title}: {prompt_set.title}"
        )
        rouge_l = rouge_l_many([a.text for a in answers], [prompt_set.references[a.prompt] for a in answers])
        results.append(summarise(prompt_set, answers, rouge_l, seeds))
        lines += [_line(prompt_set, *scored) for scored in zip(answers, rouge_l, strict=True)]
    evaluated = Results(made_from, tuple(seeds), rules, tuple(results))
    if folder is not None and is_first():
        files.write_text(folder / RESPONSES, "".join(lines))
        digest = {_DIGEST: files.digest(folder / RESPONSES)}
        files.write_json(folder / RESULTS, dataclasses.asdict(evaluated) | digest)
        shutil.rmtree(folder / _ANSWERS)
    return evaluated


def _finished(path: Path, made_from: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = dict(json.loads(path.read_text(encoding="utf-8")))
        answers = path.with_name(RESPONSES)
        damaged = (
            path if _DIGEST not in value else answers if files.digest(answers) != value[_DIGEST] else None
        )
    except (ValueError, TypeError):
        damaged, value = path, {}
    except FileNotFoundError:
        damaged, value = path.with_name(RESPONSES), {}
    if damaged is not None:
        raise InputError(
            f"{damaged}: missing, or not what was written; restore it, or delete {path.parent} to evaluate again"
        )
    if value.get("made_from") != made_from:
        raise InputError(
            f"{path}: holds the results of another model, or with other sets, sampling rules or seeds; choose another "
            "folder, or delete this one"
        )
    return value


def _line(prompt_set: PromptSet, answer: Answer, rouge_l: float) -> str:
    i = answer.prompt
    line = {
        "set": prompt_set.name,
        "id": prompt_set.ids[i],
        "category": prompt_set.categories[i],
        "seed": answer.seed,
        "prompt": prompt_set.texts[i],
        "response": answer.text,
        "references": prompt_set.references[i],
        "rouge_l": rouge_l,
    }
    return json.dumps(line, ensure_ascii=False) + "\n"


def summarise(
    prompt_set: PromptSet, answers: Sequence[Answer], rouge_l: Sequence[float], seeds: Sequence[int]
) -> SetResult:
    """The scores of a set from the scores of its answers, one for each prompt and seed."""
    shape = (len(prompt_set), len(seeds))
    rouge_l_PxS, exact_PxS = np.full(shape, np.nan), np.full(shape, np.nan)
    column = {seed: s for s, seed in enumerate(seeds)}
    for answer, value in zip(answers, rouge_l, strict=True):
        at = answer.prompt, column[answer.seed]
        rouge_l_PxS[at] = value
        exact_PxS[at] = exact_match(answer.text, prompt_set.references[answer.prompt])

    def group(rows: Sequence[int] | slice) -> Group:
        scores = [Score.of(100 * values_PxS[rows].mean(axis=0)) for values_PxS in (rouge_l_PxS, exact_PxS)]
        return Group(len(rouge_l_PxS[rows]), *scores)

    rows_of = collections.defaultdict(list)
    for i, category in enumerate(prompt_set.categories):
        rows_of[category].append(i)
    whole = group(slice(None))
    return SetResult(
        name=prompt_set.name,
        title=prompt_set.title,
        rows=whole.rows,
        left_out=prompt_set.left_out,
        unreportable=prompt_set.unreportable,
        rouge_l=whole.rouge_l,
        exact_match=whole.exact_match,
        response_tokens=float(np.mean([len(answer.tokens) for answer in answers])),
        categories={name: group(rows) for name, rows in sorted(rows_of.items()) if name},
    )
