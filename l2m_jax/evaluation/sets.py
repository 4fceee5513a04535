"""Evaluation sets: tokenised prompts, and the references to compare the answers with."""

import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from l2m_jax.data.corpus import Corpus, build_corpus
from l2m_jax.data.encoding import Counts, TokenLimits, encode_rows
from l2m_jax.data.sources import is_hub_name, read_file
from l2m_jax.errors import InputError
from l2m_jax.evaluation.sources import EVALUATION_SETS, parse_set, read_evaluation_set, require_set
from l2m_jax.multihost import first

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, eq=False)
class PromptSet:
    """Prompts with their references. All tuples have one entry per prompt.

    Attributes:
        name: the name used in files; the data's own parts are called "test" and "validation".
        title: the name used in tables.
        indices: row numbers in the corpus.
        ids: row ids.
        prompts: token ids of each prompt.
        texts: the prompts as text.
        references: the correct answers to each prompt.
        categories: the category of each row, or "".
        left_out: number of rows left out, because the prompt is too long or there is no reference.
        unreportable: the set is not the paper's set of that name, so its scores cannot be compared with the
            paper's: most references are shorter than the paper's minimum.
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
    """The prompts of a corpus, such as the test part.

    Args:
        rows: use this many rows, from the front, including those that are left out; 0 uses all.
        longest_prompt: prompts with more tokens are left out and counted. To leave room for answers, this is at
            most the model's positions minus `max_new_tokens`.

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
    min_tokens = rules.min_reference_tokens if rules else 0
    # The model's tokenizer may count differently from GPT-2's, hence the majority. Lengths include the end of
    # sequence.
    unreportable = bool(np.mean(corpus.response_lengths[kept] > min_tokens) < 0.5)
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


def check_set(source: str) -> None:
    """Checks a source of `read_set` cheaply: that it is known or exists, and that the rows of a file parse.

    "test" is the test part of the data, which is always there. Asks no hub.

    Raises:
        InputError: naming the source, with the known set that was probably meant.
    """
    if source == "test":
        return
    require_set(source)
    _, path = parse_set(source)
    if path and not is_hub_name(path):
        for _ in read_file(path):  # all rows: a run reads them only after the training
            pass


def read_set(
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    *,
    max_prompt_length: int,
    long_prompt: str = "drop",
    bos: bool = False,
    prompt: str = "alpaca",
    rows: int = 0,
) -> PromptSet:
    """Reads an evaluation set by name or from a file.

    Args:
        source: a name of `EVALUATION_SETS`, a JSON-lines file, or `name=file` for a file that holds the set `name`.
        folder: its tokens are stored here, in a subfolder.
        max_prompt_length: the maximum number of tokens in a prompt.
        long_prompt: "drop" rows with longer prompts and count them, or "truncate" the prompts, before
            "### Response:". Scores of the two cannot be compared: they cover different rows.
        bos: begin prompts with the tokenizer's beginning-of-sequence token.
        prompt: "alpaca", or "chat" for the tokenizer's chat template.
        rows: use this many rows, from the front, including those that are dropped; 0 uses all.

    Raises:
        InputError: the source is neither a known set nor a file, has no references, or no prompt that fits.
    """
    name, _ = parse_set(source)
    limits = _limits(max_prompt_length, long_prompt, bos, prompt)

    def build() -> int:
        chosen = itertools.islice(read_evaluation_set(source), rows or None)
        return build_corpus(chosen, tokenizer, folder / name, limits).counts.dropped

    dropped = first(build)
    return dataclasses.replace(from_corpus(name, Corpus.open(folder / name)), left_out=dropped)


def require_prompts(
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_prompt_length: int,
    long_prompt: str = "drop",
    bos: bool = False,
    prompt: str = "alpaca",
    rows: int = 0,
) -> None:
    """Checks that `read_set` would find a prompt in a file. Arguments as there; the paper's own sets on the hub are not
    read.

    Raises:
        InputError: no row of the file has a reference and a prompt that fits.
    """
    if not parse_set(source)[1]:
        return
    counts, limits = Counts(), _limits(max_prompt_length, long_prompt, bos, prompt)
    chosen = itertools.islice(read_evaluation_set(source), rows or None)
    if next(encode_rows(chosen, tokenizer, limits, counts), None) is None:
        raise InputError(
            f"'{source}': no example is left: {counts}; prompts may have {max_prompt_length} tokens; set data.truncate, or "
            "give other rows"
        )


def _limits(max_prompt_length: int, long_prompt: str, bos: bool, prompt: str) -> TokenLimits:
    # Answers are compared as text, so a long reference must not drop a row. Its tokens are not used.
    return TokenLimits(
        max_length=max(3, 2 * max_prompt_length),
        max_prompt_length=max_prompt_length,
        long_prompt=long_prompt,
        long_response="truncate",
        bos=bos,
        prompt=prompt,
    )
