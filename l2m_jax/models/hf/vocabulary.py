"""A model with a part of its vocabulary: the embeddings of the chosen tokens, which are then numbered from 0."""

import dataclasses

import numpy as np

from l2m_jax.errors import InputError
from l2m_jax.models.architecture import DecoderConfig
from l2m_jax.models.hf.config_json import SPECIAL_TOKENS
from l2m_jax.models.hf.weights import Source, Weight

_EMBEDDINGS = ("embeddings/tokens/embedding", "head/embedding")


def restricted_config(config: DecoderConfig, tokens: np.ndarray) -> DecoderConfig:
    """`config` with the vocabulary `tokens` and its special tokens renumbered; one that is not kept becomes None.

    Args:
        tokens: the entries of the vocabulary to keep, ascending.

    Raises:
        InputError: the model has no such entry.
    """
    if tokens[-1] >= config.valid_vocab_size:
        raise InputError(
            f"token {tokens[-1]} is to be kept, but the model has {config.valid_vocab_size} tokens; all models must "
            "share one tokenizer"
        )
    new = {int(old): i for i, old in enumerate(tokens)}

    def renumbered(old: int | tuple[int, ...] | None) -> int | tuple[int, ...] | None:
        if isinstance(old, tuple):
            return tuple(new[i] for i in old if i in new) or None
        return None if old is None else new.get(old)

    special = {name: renumbered(getattr(config, name)) for name in SPECIAL_TOKENS}
    return dataclasses.replace(config, vocab_size=len(tokens), valid_vocab_size=len(tokens), **special)


class RestrictedSource:
    """`source` with the rows `tokens` of its embeddings alone.

    Args:
        table: of the model's family, which names the embeddings.
    """

    def __init__(self, source: Source, table: list[Weight], tokens: np.ndarray):
        self._source, self._tokens = source, tokens
        names = {weight.name for weight in table if weight.path in _EMBEDDINGS}
        self._restricted = names & source.shapes.keys()
        self.shapes = source.shapes | {
            name: (len(tokens), *source.shapes[name][1:]) for name in self._restricted
        }

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        if name not in self._restricted:
            return self._source.read(name, index)
        rows = self._tokens[index[0]]
        first, end = int(rows[0]), int(rows[-1]) + 1
        return self._source.read(name, (slice(first, end), *index[1:]))[rows - first]

    def place(self, name: str) -> str:
        return self._source.place(name)
