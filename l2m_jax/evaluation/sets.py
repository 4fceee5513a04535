"""Evaluation sets: prompts ready to be answered, and the references to compare the answers with."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from l2m_jax.data.corpus import Corpus, build_corpus
from l2m_jax.data.encoding import TokenLimits
from l2m_jax.data.sources import EVALUATION_SETS, read_evaluation_set
from l2m_jax.errors import InputError
from l2m_jax.multihost import first

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, eq=False)
class PromptSet:
    """Prompts with their references, one entry each in all tuples.

    Attributes:
        name: in files; the corpus's own splits are called "test" and "validation".
        title: in tables.
        indices: where the rows stand in their corpus.
        ids: of the rows.
        prompts: token ids of each prompt.
        texts: the same prompts as text.
        references: the right answers to each.
        categories: "" where the rows have none.
        left_out: rows whose prompt was too long.
        unreportable: holds other rows than the paper's set of that name, so its figures must not stand beside
            the paper's: most references are shorter than that set's shortest.
    """

    name: str
    title: str
    indices: tuple[int, ...]
    ids: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]
    categories: tuple[str, ...]
    left_out: int = 0
    unreportable: bool = False

    def __len__(self) -> int:
        return len(self.ids)


def from_corpus(
    name: str,
    corpus: Corpus,
    *,
    rows: int = 0,
    longest_prompt: int | None = None,
) -> PromptSet:
    """The prompts of a corpus, such as the test split.

    Args:
        rows: the most rows used, from the front; 0 takes all.
        longest_prompt: prompts with more tokens are left out and counted. Answers need room in the model, so this is
            its positions less `max_new_tokens`, or less.

    Raises:
        InputError: no prompt is left.
    """
    chosen = range(min(rows, len(corpus)) if rows else len(corpus))
    prompts = [tuple(corpus.prompt_tokens(i).tolist()) for i in chosen]
    kept = [i for i in chosen if longest_prompt is None or len(prompts[i]) <= longest_prompt]
    if not kept:
        raise InputError(
            f"evaluation set '{name}': none of {len(chosen)} prompts has at most {longest_prompt} tokens; "
            "truncate prompts, or lower max_new_tokens to leave them more of the model's positions"
        )
    found = [corpus.row(i) for i in kept]
    rules = EVALUATION_SETS.get(name)
    shortest = rules.shortest_reference if rules else 0
    # Counted with whatever tokenizer the model has, hence the majority; the end of sequence is one more.
    unreportable = bool(np.mean(corpus.response_lengths[kept] > shortest) < 0.5)
    return PromptSet(
        name=name,
        title=rules.title if rules else name,
        indices=tuple(kept),
        ids=tuple(row.id for row in found),
        prompts=tuple(prompts[i] for i in kept),
        texts=tuple(corpus.prompt_text(i) for i in kept),
        references=tuple(row.references for row in found),
        categories=tuple(row.category for row in found),
        left_out=len(chosen) - len(kept),
        unreportable=unreportable,
    )


def read_set(
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    *,
    max_prompt_length: int,
    long_prompt: str = "drop",
    bos: bool = False,
    rows: int = 0,
) -> PromptSet:
    """An evaluation set by name, or from a file.

    Args:
        source: a name of `EVALUATION_SETS`, a JSON-lines file, or `name=file` for a file that holds the set `name`.
        folder: where its tokens are kept, in a folder of its own.
        max_prompt_length: the most tokens of a prompt.
        long_prompt: what becomes of longer ones: "drop" or "truncate" (in front of "### Response:").
        bos: begin prompts with the tokenizer's beginning-of-sequence token.
        rows: the most rows used, from the front; 0 takes all.

    Raises:
        InputError: neither a known set nor a file, no references in it, or no prompt that fits.
    """
    name, separator, path = source.partition("=")
    if not separator and name not in EVALUATION_SETS:
        name, path = Path(source).stem, source
        if not Path(path).is_file():
            list(read_evaluation_set(source))  # says which sets there are
    # The answer is compared as text, so its length drops no row: it may take as much again as the prompt.
    limits = TokenLimits(
        max_length=2 * max_prompt_length,
        max_prompt_length=max_prompt_length,
        long_prompt=long_prompt,
        long_response="truncate",
        bos=bos,
    )

    def build() -> int:
        found = read_evaluation_set(name, path or None, tokenizer)
        return build_corpus(found, tokenizer, folder / name, limits).counts.dropped

    dropped = first(build)
    prompts = from_corpus(name, Corpus.open(folder / name), rows=rows)
    return dataclasses.replace(prompts, left_out=dropped)
