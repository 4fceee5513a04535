"""The last phase: scores a model's answers to the evaluation sets."""

import functools
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from l2m_jax import files
from l2m_jax.errors import InputError
from l2m_jax.evaluation.protocol import RESPONSES, RESULTS, Results, evaluate
from l2m_jax.evaluation.sets import PromptSet, from_corpus, read_set
from l2m_jax.evaluation.sources import parse_set
from l2m_jax.generation import Generator, SamplingRules
from l2m_jax.models import Compute
from l2m_jax.multihost import first, is_first
from l2m_jax.parallel import Placement
from l2m_jax.run import data, sources, tokenizers
from l2m_jax.run.artefacts import Artefact, Source
from l2m_jax.run.models import load_frozen, read_config
from l2m_jax.run.responses import longest_prompt


@dataclass(frozen=True)
class SetInputs:
    """An evaluation set: the test rows of the data, a known set, or a file."""

    name: str
    rows: Artefact | Source


@dataclass(frozen=True)
class EvaluationInputs:
    """
    Attributes:
        rows: the maximum number of rows of each set (0: all).
        truncate: truncate long prompts instead of leaving them out.
        bos: begin prompts with the beginning-of-sequence token.
    """

    model: Artefact | Source
    sets: tuple[SetInputs, ...]
    tokenizer: tokenizers.Tokenizer
    sampling: SamplingRules
    seeds: tuple[int, ...]
    rows: int
    max_prompt_length: int
    truncate: bool
    bos: bool


def make_evaluation(
    artefact: Artefact[EvaluationInputs], name: str, compute: Compute, placement: Placement, slots: int
) -> Results:
    """The scores of a model. Its answers are kept as they come, so an interrupted evaluation resumes.

    Args:
        slots: sequences decoded at once on a device; 0: chosen from the model's size.

    Raises:
        InputError: a set that cannot be read, or no room for prompts.
    """
    inputs = artefact.inputs
    if not artefact.is_finished:
        config = read_config(inputs.model, compute, inputs.tokenizer)
        room = longest_prompt(config, inputs.sampling, inputs.max_prompt_length)
        if room < 1:
            raise InputError(
                f"max_new_tokens: {inputs.sampling.max_new_tokens} leaves no room for a prompt within the model's "
                f"{config.max_positions} positions; lower it"
            )
        artefact.begin()
        sets = _sets(inputs, room, artefact.path / "sets")
        config, params = load_frozen(inputs.model, compute, inputs.tokenizer, placement)
        generator = Generator(config, params, placement, tokenizers.load(inputs.tokenizer), slots)
        evaluate(
            generator,
            sets,
            inputs.sampling,
            inputs.seeds,
            folder=artefact.path,
            key=artefact.key,
            title=name,
        )
        first(functools.partial(shutil.rmtree, artefact.path / "sets", ignore_errors=True))
        first(artefact.finish)
    return Results.from_json(first(lambda: json.loads((artefact.path / RESULTS).read_text(encoding="utf-8"))))


def _sets(inputs: EvaluationInputs, room: int, folder: Path) -> list[PromptSet]:
    """The prompts of at most `room` tokens; sets are tokenised in `folder`."""
    found = []
    for chosen in inputs.sets:
        if isinstance(chosen.rows, Artefact):
            corpus = data.open_corpus(chosen.rows)
            found.append(from_corpus(chosen.name, corpus, rows=inputs.rows, longest_prompt=room))
            continue
        is_file = chosen.rows.path != chosen.name
        found.append(
            read_set(
                f"{chosen.name}={chosen.rows.path}" if is_file else chosen.name,
                tokenizers.load(inputs.tokenizer),
                folder,
                max_prompt_length=room,
                long_prompt="truncate" if inputs.truncate else "drop",
                bos=inputs.bos,
                prompt=tokenizers.prompt_of(inputs.tokenizer),
                rows=inputs.rows,
            )
        )
    return found


def set_inputs(source: str, test: Artefact | None = None) -> SetInputs:
    """A set by its name in `config.evaluation.sets`: "test", a known name, a file, or name=file."""
    if source == "test" and test is not None:
        return SetInputs(source, test)
    name, path = parse_set(source)
    return SetInputs(name, sources.given(path) if path else Source(name, f"hub:{name}"))


def write_summary(workdir: Path, results: Mapping[str, Results], folders: Mapping[str, Path]) -> None:
    """Writes the scores of all models into one file, and their answers into another."""
    if is_first():
        summary = workdir / "evaluation"
        files.write_json(summary / RESULTS, results)
        files.write_text(summary / RESPONSES, "".join(_responses(folders)))


def _responses(folders: Mapping[str, Path]) -> Iterator[str]:
    """The answers of all models, each line with its model."""
    for name, folder in folders.items():
        with (folder / RESPONSES).open(encoding="utf-8") as lines:
            for line in lines:
                yield json.dumps({"model": name, **json.loads(line)}, ensure_ascii=False) + "\n"
