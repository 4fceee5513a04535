"""The first phase: the tokenised training, validation and test rows."""

import dataclasses
import functools
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from l2m_jax import files
from l2m_jax.data.corpus import Corpus, write_corpus
from l2m_jax.data.encoding import Counts
from l2m_jax.data.settings import Data, SyntheticData
from l2m_jax.data.shards import Tokeniser
from l2m_jax.data.splits import Part, part_examples, token_limits
from l2m_jax.errors import InputError
from l2m_jax.multihost import first
from l2m_jax.progress import console
from l2m_jax.run import sources, tokenizers
from l2m_jax.run.artefacts import Artefact, Source, described
from l2m_jax.run.tokenizers import Tokenizer

PARTS: tuple[Part, ...] = ("train", "validation", "test")
_TOKENISED = ".tokenised"


@dataclass(frozen=True)
class CorpusInputs:
    """One part of the data.

    Attributes:
        data: the settings that matter to this part; the others, and all paths, are at their defaults.
        source: the file or hub name of its rows; None for synthetic tasks.
        split: whether the part is split off the training rows.
        world: of training rows; 0 for the other parts.
        world_rows: training rows of each world before; 0: as many as of this one.
    """

    part: Part
    data: Data
    source: Source | None
    split: bool
    tokenizer: Tokenizer
    world: int = 0
    world_rows: int = field(default=0, metadata={"absent_at_default": True})


def corpus_inputs(
    data: Data, part: Part, tokenizer: Tokenizer, world: int = 0, world_rows: int = 0
) -> CorpusInputs:
    """The inputs of one part: only what matters to it."""
    world = world if part == "train" else 0
    separate = bool(getattr(data, part)) if part != "train" else bool(data.validation and data.test)
    kept: dict[str, Any] = {
        name: getattr(data, name)
        for name in ("source", "max_length", "max_prompt_length", "truncate", "prompt")
    }
    if data.source == "synthetic":
        sizes = {"train": part == "train", "validation": part != "test", "test": True}
        small = {name: getattr(SyntheticData(), name) for name, used in sizes.items() if not used}
        synthetic = dataclasses.replace(
            data.synthetic, tokenizer_size=SyntheticData().tokenizer_size, **small
        )
        kept |= {"synthetic": synthetic, "bos": _bos(data, part)}
        return CorpusInputs(part, Data(**kept), None, False, tokenizer, world)
    if separate:
        kept |= {"bos": _bos(data, part), "validation": "given", "test": "given"}
        rows = [part]
    else:
        # Test rows are drawn first, then validation rows; the rest is for training.
        drawn = [p for p in ("test", "validation") if not getattr(data, p)]
        rows = [*drawn, part] if part == "train" else drawn[: drawn.index(part) + 1]
        kept |= {"split_seed": data.split_seed, "bos": data.bos}
        before = {"train": ("test", "validation"), "validation": ("test",), "test": ()}[part]
        kept |= {p: "given" for p in before if getattr(data, p)}
    kept |= {f"{p}_rows": getattr(data, f"{p}_rows") for p in rows}
    path = getattr(data, part) if separate else data.train
    kept_data = Data(train="given", **kept)
    world_rows = 0 if world == 0 or world_rows == data.train_rows else world_rows
    return CorpusInputs(part, kept_data, sources.given(path), not separate, tokenizer, world, world_rows)


def _bos(data: Data, part: Part) -> str:
    """The setting as it affects this part: "both" or "none"."""
    return "both" if data.bos in ("both", "training" if part == "train" else "evaluation") else "none"


def make_corpora(artefacts: Iterable[Artefact[CorpusInputs]], processes: int = 0) -> list[Corpus]:
    """The tokenised rows of parts. Prints how many were kept of each, and why others were dropped.

    Parts in one folder that are split off the same source are tokenised once.

    Args:
        processes: as `data.processes`.
    """
    artefacts = list(artefacts)
    corpora = [_make_corpus(artefact, processes) for artefact in artefacts]
    for folder in {artefact.path.parent / _TOKENISED for artefact in artefacts}:
        first(functools.partial(shutil.rmtree, folder, ignore_errors=True))
    return corpora


def _make_corpus(artefact: Artefact[CorpusInputs], processes: int) -> Corpus:
    inputs = artefact.inputs
    if not artefact.is_finished:
        data, counts = inputs.data, Counts()
        if inputs.source is not None:
            name = "train" if inputs.split else inputs.part
            data = dataclasses.replace(data, **{name: inputs.source.path})
        kept = artefact.path.parent / _TOKENISED / _tokenised_from(artefact)
        tokeniser = Tokeniser(tokenizers.load(inputs.tokenizer), data.prompt, kept, processes)

        try:
            examples = part_examples(data, inputs.part, tokeniser, counts, inputs.world, inputs.world_rows)

            def write() -> None:
                with artefact.writing() as folder:
                    write_corpus(folder, examples, token_limits(data, inputs.part), counts)

            first(write)
        except InputError as error:
            raise InputError(f"config.data, {inputs.part} rows: {error}") from error
    corpus = Corpus.open(artefact.path)
    console.print(f"  {inputs.part}: {corpus.counts}, {len(corpus.tokens):,} tokens")
    return corpus


def _tokenised_from(artefact: Artefact[CorpusInputs]) -> str:
    """Changes with what tokens are made from. Parts that are split off one source share it."""
    inputs = artefact.inputs
    if inputs.source is None:
        return artefact.key
    return files.fingerprint(inputs.source.content, described(inputs.tokenizer), inputs.data.prompt)


def open_corpus(artefact: Artefact[CorpusInputs]) -> Corpus:
    """The corpus, which stays open."""
    return _opened(artefact.path, artefact.key)


@functools.cache
def _opened(path: Path, key: str) -> Corpus:
    return Corpus.open(path)


def close_corpora() -> None:
    """Forgets what is open, in case that files have changed."""
    _opened.cache_clear()
