"""Where rows come from: JSON-lines files, the hub, and the sets that the paper trains and evaluates on."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from l2m_jax.data.online import require_hub
from l2m_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOLLY = "databricks/databricks-dolly-15k"
_FORM = "JSON lines with instruction, input, output"
_SPLITS_BY_USE = {"train": ("train",), "evaluation": ("test", "validation", "valid", "dev", "train")}


class Row(NamedTuple):
    """One example as text; `references` are its right answers, the first of which is trained on."""

    id: str
    instruction: str
    input: str
    references: tuple[str, ...]
    category: str = ""


class EvaluationSet(NamedTuple):
    """A set of the paper: its name in tables, and where it lies on the hub.

    `shortest_reference` and `most_rows` are the rules by which the paper's subset is taken from the hub's rows.
    """

    title: str
    hub_name: str
    shortest_reference: int = 0
    most_rows: int | None = None


EVALUATION_SETS = {
    "dolly": EvaluationSet("DollyEval", "MiniLLM/dolly"),
    "self_inst": EvaluationSet("SelfInst", "MiniLLM/self-inst"),
    "vicuna": EvaluationSet("VicunaEval", "MiniLLM/Vicuna"),
    "s_ni": EvaluationSet("S-NI", "MiniLLM/sinst", shortest_reference=11),
    "un_ni": EvaluationSet("UnNI", "MiniLLM/uinst", shortest_reference=11, most_rows=10_000),
}


def read_rows(source: str | Path, use: str = "train") -> Iterator[Row]:
    """The rows of a JSON-lines file or of a data set of the hub ("owner/name").

    Args:
        source: path or name.
        use: "train" or "evaluation", which split of a data set of the hub is meant.

    Raises:
        InputError: as in `read_jsonl`; or the hub cannot be reached.
    """
    path = Path(source)
    looks_like_a_name = (
        str(source).count("/") == 1 and not path.suffix and not str(source).startswith((".", "/"))
    )
    if path.is_file() or not looks_like_a_name:
        return read_jsonl(path)
    return _read_hub(str(source), _SPLITS_BY_USE[use])


def read_jsonl(path: str | Path) -> Iterator[Row]:
    """Rows of a file in either of Dolly's forms, one JSON object a line.

    The fields are `instruction`; `input` or `context`, which may be missing or empty; `output` or `response`, a
    text or a list of equally right texts; and `category` or `topic`, if any. Others are ignored, `prompt` too,
    since it is made from the first two. An `id` is kept, else a row is called "file/line".

    Raises:
        InputError: no such file, no rows in it, or a line that is not of this form.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such file '{path}' ({_FORM}; or a name on the hub such as {DOLLY})")
    return _read_lines(path)


def _read_lines(path: Path) -> Iterator[Row]:
    empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except ValueError as error:
                raise InputError(f"{place}: not JSON ({error}); one object a line is expected") from error
            yield _row(value, f"{path.stem}/{number}", place)
            empty = False
    if empty:
        raise InputError(f"{path} holds no rows ({_FORM})")


def _read_hub(name: str, splits: Sequence[str]) -> Iterator[Row]:
    require_hub(name, f"a file ({_FORM})")
    import datasets

    try:
        parts: Any = datasets.load_dataset(name)
    except Exception as error:  # the loaders raise whatever their parsers do
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot load '{name}' ({reason}): pass a file ({_FORM})") from error
    split = next((split for split in splits if split in parts), None)
    if split is None:
        raise InputError(f"'{name}' has no split {' or '.join(splits)} (it has {', '.join(parts)})")
    for number, value in enumerate(parts[split], start=1):
        yield _row(value, f"{split}/{number}", f"{name}, {split} row {number}")


def _row(value: Any, default_id: str, place: str) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{place}: a JSON object is expected, not {_shown(value)}")

    def text(*names: str, needed: bool = False) -> str:
        found = next((value[name] for name in names if value.get(name) is not None), None)
        if found is None and needed:
            raise InputError(f"{place}: no field '{names[0]}' (fields: {', '.join(value) or 'none'})")
        if found is not None and not isinstance(found, str):
            raise InputError(f"{place}: '{names[0]}' must be a text, not {_shown(found)}")
        return found or ""

    answer = next((value[name] for name in ("output", "response") if value.get(name) is not None), None)
    if answer is None:
        raise InputError(f"{place}: no field 'output' (or 'response'; fields: {', '.join(value) or 'none'})")
    references = [answer] if isinstance(answer, str) else answer
    if not isinstance(references, list) or not all(isinstance(reference, str) for reference in references):
        raise InputError(f"{place}: 'output' must be a text or a list of texts, not {_shown(answer)}")
    return Row(
        id=str(value.get("id", default_id)),
        instruction=text("instruction", needed=True),
        input=text("input", "context"),
        references=tuple(reference for reference in references if reference.strip()),
        category=text("category", "topic"),
    )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


def split_rows(
    rows: Sequence[Row], sizes: Sequence[int] = (11_500, 1_000, 500), seed: int = 42
) -> tuple[list[Row], ...]:
    """Disjoint parts of `sizes`, drawn at random; the paper's training, validation and test rows by default.

    Raises:
        InputError: there are fewer rows than the parts need.
    """
    if sum(sizes) > len(rows):
        raise InputError(
            f"a split into {' + '.join(map(str, sizes))} rows needs {sum(sizes)}, but there are {len(rows)}"
        )
    order = np.random.default_rng(seed).permutation(len(rows))
    ends = np.cumsum(sizes)
    return tuple([rows[i] for i in order[end - size : end]] for size, end in zip(sizes, ends, strict=True))


def read_evaluation_set(
    name: str, path: str | Path | None = None, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> Iterator[Row]:
    """One of `EVALUATION_SETS` by name, from the hub or from a file that holds it, or any other set by its path.

    A file is taken as it is; rows of the hub go through the paper's rules, for which `tokenizer` counts.

    Raises:
        InputError: as in `read_rows`; or `name` is neither a known set nor a file.
    """
    if path is not None:
        return read_rows(path, "evaluation")
    if name not in EVALUATION_SETS:
        if not Path(name).is_file():
            known = ", ".join(EVALUATION_SETS)
            raise InputError(f"'{name}' is neither an evaluation set ({known}) nor a file ({_FORM})")
        return read_jsonl(name)
    rules = EVALUATION_SETS[name]
    rows = read_rows(rules.hub_name, "evaluation")
    if rules.shortest_reference:
        if tokenizer is None:
            raise ValueError(f"'{name}' needs a tokenizer, to leave out its short references")
        rows = long_references(rows, tokenizer, rules.shortest_reference, rules.most_rows)
    return rows


def long_references(
    rows: Iterable[Row], tokenizer: "PreTrainedTokenizerBase", shortest: int, most_rows: int | None = None
) -> Iterator[Row]:
    """The first `most_rows` rows whose first reference has at least `shortest` tokens."""
    found = 0
    for row in rows:
        if found == most_rows:
            return
        if row.references and len(tokenizer.encode(row.references[0], add_special_tokens=False)) >= shortest:
            found += 1
            yield row
