"""Which evaluation sets there are, and where their rows come from."""

import difflib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from l2m_jax.data.sources import ROW_FORM, Row, read_rows
from l2m_jax.data.tokenizer import load_tokenizer
from l2m_jax.errors import InputError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONGEST_NAME = 200  # bytes; file systems allow 255, and suffixes are added


class EvaluationSet(NamedTuple):
    """One of the paper's sets: its name in tables and its data set on the hub.

    The paper uses a subset of the hub's rows: those whose first reference has at least `min_reference_tokens` of
    GPT-2's tokens, and of these the first `max_rows`.
    """

    title: str
    hub_name: str
    min_reference_tokens: int = 0
    max_rows: int | None = None


EVALUATION_SETS = {
    "dolly": EvaluationSet("DollyEval", "MiniLLM/dolly"),
    "self_inst": EvaluationSet("SelfInst", "MiniLLM/self-inst"),
    "vicuna": EvaluationSet("VicunaEval", "MiniLLM/Vicuna"),
    "s_ni": EvaluationSet("S-NI", "MiniLLM/sinst", min_reference_tokens=11),
    "un_ni": EvaluationSet("UnNI", "MiniLLM/uinst", min_reference_tokens=11, max_rows=10_000),
}


def parse_set(source: str) -> tuple[str, str]:
    """The name of an evaluation set and its path, "" for the paper's own on the hub.

    Args:
        source: a name of `EVALUATION_SETS`, a JSON-lines file, or `name=file` for a file that holds the set `name`.

    Raises:
        InputError: the name cannot be that of a folder.
    """
    name, separator, path = source.partition("=")
    if not separator and source not in EVALUATION_SETS:
        name, path = Path(source).stem, source
    if (separator and not path) or not _is_file_name(name):
        raise InputError(
            f"evaluation set {shown(source)}: expected name=file, where the name holds no '/' and could be a file's"
        )
    return name, path


def _is_file_name(name: str) -> bool:
    plain = name.isprintable() and "/" not in name and not name.startswith(".")
    return plain and 0 < len(name.encode(errors="replace")) <= _LONGEST_NAME


def read_evaluation_set(source: str) -> Iterator[Row]:
    """One of `EVALUATION_SETS` from the hub or from a file, or any other set from its file (see `parse_set`).

    A file is used as it is. Rows from the hub are selected by the paper's rule, which counts GPT-2's tokens
    whichever tokenizer the model has.

    Raises:
        InputError: as in `read_rows`; or `source` is neither a known set nor a file; or GPT-2's tokenizer is
            needed and cannot be loaded.
    """
    name, path = parse_set(source)
    if path:
        require_set(source)
        return read_rows(path, "test")
    found = EVALUATION_SETS[name]
    rows = read_rows(found.hub_name, "test")
    if not found.min_reference_tokens:
        return rows
    try:
        gpt2 = load_tokenizer("gpt2")
    except InputError as error:
        raise InputError(
            f"evaluation set '{name}': its rows are selected by the length of their references in GPT-2's tokens, and "
            f"{error}; or pass a file of selected rows as {name}=FILE"
        ) from error
    return long_references(rows, gpt2, found.min_reference_tokens, found.max_rows)


def require_set(source: str) -> None:
    """Raises InputError if `source` is neither `name=file`, nor a known set, nor a file that exists."""
    if "=" not in source and source not in EVALUATION_SETS and not Path(source).is_file():
        near = difflib.get_close_matches(source, ["test", *EVALUATION_SETS], n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        known = ", ".join(EVALUATION_SETS)
        raise InputError(f"'{source}' is neither an evaluation set ({known}) nor a file ({ROW_FORM}){hint}")


def long_references(
    rows: Iterable[Row],
    tokenizer: "PreTrainedTokenizerBase",
    min_tokens: int,
    max_rows: int | None = None,
) -> Iterator[Row]:
    """The first `max_rows` rows whose first reference has at least `min_tokens` tokens."""
    long = (
        row
        for row in rows
        if row.references and len(tokenizer.encode(row.references[0], add_special_tokens=False)) >= min_tokens
    )
    return itertools.islice(long, max_rows)
