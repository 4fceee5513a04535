"""A tokenizer with fewer tokens, which splits the text that it was made for as the whole one does."""

import json
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from l2m_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def kept_tokens(tokenizer: "PreTrainedTokenizerBase", used: Iterable[int], extra: int = 0) -> np.ndarray:
    """The tokens to keep, ascending, int64: `used`, all that no merge makes, and the parts of both.

    Tokens that no merge makes are the 256 bytes (or the characters, for a tokenizer with byte fallback), special and
    added tokens, so every text can still be encoded. BPE applies the merge of lowest rank among those possible. If
    all merges that lead to the tokens of a text are kept, these are still the lowest at each step, whatever other
    merges are dropped, and the text keeps its tokens.

    Args:
        extra: this many more of the other tokens with the lowest ids, the most frequent in the tokenizer's own
            training.

    Raises:
        InputError: the tokenizer is not BPE.
    """
    state = _state(tokenizer)
    ids: dict[str, int] = state["model"]["vocab"]
    parts: dict[int, set[int]] = {}
    for left, right in _merges(state):
        parts.setdefault(ids[left + right], set()).update((ids[left], ids[right]))
    kept = set(tokenizer.get_vocab().values()) - parts.keys()

    def keep(token: int) -> None:
        waiting = [token]
        while waiting:
            if (token := waiting.pop()) not in kept:
                kept.add(token)
                waiting += parts[token]

    for token in used:
        keep(int(token))
    others = sorted(parts.keys() - kept)
    for token in others[:extra]:
        keep(token)
    return np.array(sorted(kept), np.int64)


def trim(tokenizer: "PreTrainedTokenizerBase", kept: np.ndarray) -> "PreTrainedTokenizerFast":
    """The tokenizer with the tokens of `kept_tokens` alone; token `kept[i]` becomes token i.

    Raises:
        InputError: the tokenizer is not BPE.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = _state(tokenizer)
    new = {int(old): i for i, old in enumerate(kept)}
    model, vocab = state["model"], state["model"]["vocab"]
    model["merges"] = [
        [left, right]
        for left, right in _merges(state)
        if {vocab[left], vocab[right], vocab[left + right]} <= new.keys()
    ]
    model["vocab"] = {token: new[i] for token, i in vocab.items() if i in new}
    state["added_tokens"] = [token | {"id": new[token["id"]]} for token in state["added_tokens"]]
    _renumber(state["post_processor"], new)
    special = {name: token for name in _SPECIAL if (token := getattr(tokenizer, name)) is not None}
    trimmed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        clean_up_tokenization_spaces=False,
        model_max_length=tokenizer.model_max_length,
        **special,
    )
    trimmed.chat_template = tokenizer.chat_template
    return trimmed


def _state(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """The tokenizer as its tokenizer.json."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {}
    if (kind := state.get("model", {}).get("type")) != "BPE":
        raise InputError(
            f"the tokenizer is {kind or type(tokenizer).__name__}; only the vocabulary of BPE can be trimmed"
        )
    return state


def _merges(state: dict[str, Any]) -> list[list[str]]:
    """The two parts of each merge, which older files write as one string."""
    merges = state["model"]["merges"]
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]


def _renumber(processor: Any, new: dict[int, int]) -> None:
    """Changes, in place, the ids in a post-processor, such as those of the tokens around a text."""
    if isinstance(processor, list):
        for item in processor:
            _renumber(item, new)
    elif isinstance(processor, dict):
        for name, value in processor.items():
            if name == "ids":  # of a template
                processor[name] = [new[i] for i in value]
            elif name in ("sep", "cls"):  # [token, id]
                processor[name] = [value[0], new[value[1]]]
            else:
                _renumber(value, new)
