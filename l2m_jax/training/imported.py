"""The teacher's signal from the files of other tools, in the form that a teacher store encodes."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from l2m_jax import models
from l2m_jax.errors import InputError
from l2m_jax.losses import TopK
from l2m_jax.models import DecoderConfig
from l2m_jax.training.outputs import Outputs, Read
from l2m_jax.training.store import Corpus
from l2m_jax.types import Params

# Log-probabilities of float32 or less leave the mass of the other tokens no more precise than this.
_LEAST_TAIL = 2.0**-24
# Rounded to bfloat16, k probabilities may add up to a little more than 1.
_MOST_MASS = 1.02
# What a final norm returns, without its scale and bias, has a root mean square of 1, and rounding changes it little.
_NORM_TOLERANCE = 0.1
# Positions that the final norm is applied to at once are a multiple of this: each number of them is compiled.
_PADDED = 256


@dataclass(frozen=True)
class ImportedTeacher:
    """The teacher whose outputs are read.

    Attributes:
        config: of the teacher; its vocabulary is the store's.
        vocab_size: of the model that the other tool ran, whose tokens may be more.
        output: the parameters of its final norm and projection, float32.
        kept: the numbers that its tokens have in the other tool's vocabulary, ascending; None: their own.
        top_k: of so many tokens log-probabilities are stored; 0: hidden states.
    """

    config: DecoderConfig
    vocab_size: int
    output: Params
    kept: np.ndarray | None
    top_k: int


class Imported:
    """The rows of `outputs` that are the examples of `corpus`. They are found by a hash of their tokens.

    Raises:
        InputError: an example that no row has; token ids that are not the teacher's; a damaged file.
    """

    def __init__(self, outputs: Outputs, corpus: Corpus, teacher: ImportedTeacher):
        self._outputs, self._corpus, self._teacher = outputs, corpus, teacher
        self._files = outputs.files
        self._file_N = np.full(len(corpus), -1, np.int32)
        self._row_N = np.zeros(len(corpus), np.int64)
        self._find()
        if (absent := np.flatnonzero(self._file_N < 0)).size:
            self._refuse_absent(absent)

    def read(self, examples: np.ndarray) -> Iterator[tuple[int, Any]]:
        """For each of `examples`, in the order of the files: its number, and what the store encodes of its targets.

        Raises:
            InputError: numbers that are not finite, of another width, or of another kind; names file and row.
        """
        for i in examples[np.lexsort((self._row_N[examples], self._file_N[examples]))].tolist():
            file, row = self._files[self._file_N[i]], int(self._row_N[i])
            positions = self._corpus.target_positions(i) - 1
            start = int(positions[0])
            found = self._outputs.read(file, row, slice(start, int(positions[-1]) + 1))
            try:
                yield i, self._convert({name: values[positions - start] for name, values in found.items()})
            except InputError as error:
                name = self._corpus.ids[i]
                raise InputError(f"{file}: row {row} (training example {name}) {error}") from error

    def _convert(self, found: Read) -> np.ndarray | TopK:
        """What the store encodes of positions; errors follow the name of their row."""
        for name, values in found.items():
            if not np.isfinite(values).all():
                raise InputError(f"has {name} that are not finite; write this row again")
        return self._top_k(found) if self._teacher.top_k else self._hidden_states(found)

    def _find(self) -> None:
        hash_N = np.fromiter((_hash(self._theirs(i)) for i in range(len(self._corpus))), np.uint64)
        order_N = np.argsort(hash_N, kind="stable")
        sorted_N = hash_N[order_N]
        for number, file in enumerate(self._files):
            token_ids, lengths = self._outputs.tokens(file)
            self._check_tokens(token_ids, lengths, f"{file}")
            for cut in range(1 + self._outputs.may_end_with_padding):
                ends = np.cumsum(lengths)
                found = (_hash(token_ids[end - n : end - cut]) for end, n in zip(ends, lengths, strict=True))
                hashes = np.fromiter(found, np.uint64, len(lengths))
                firsts, lasts = (np.searchsorted(sorted_N, hashes, side) for side in ("left", "right"))
                for row in np.flatnonzero(firsts < lasts).tolist():
                    equal = order_N[firsts[row] : lasts[row]]
                    new = equal[self._file_N[equal] < 0]
                    self._file_N[new], self._row_N[new] = number, row

    def _theirs(self, example: int) -> np.ndarray:
        """An example's tokens, by their numbers in the other tool's vocabulary."""
        tokens, kept = self._corpus.example_tokens(example), self._teacher.kept
        return tokens if kept is None else kept[tokens]

    def _check_tokens(self, token_ids: np.ndarray, lengths: np.ndarray, place: str) -> None:
        size = self._teacher.vocab_size
        wrong = np.flatnonzero((token_ids < 0) | (token_ids >= size))
        if wrong.size:
            row = int(np.searchsorted(np.cumsum(lengths), wrong[0], side="right"))
            raise InputError(
                f"{place}: row {row} has token {token_ids[wrong[0]]}, and the teacher's vocabulary has {size:,} entries; "
                "these are outputs of a model with another tokenizer"
            )

    def _refuse_absent(self, absent: np.ndarray) -> None:
        i, count = int(absent[0]), len(self._corpus)
        tokens = ", ".join(map(str, self._theirs(i)[:8].tolist()))
        raise InputError(
            f"{self._outputs.folder}: no row has the {self._corpus.lengths[i]} tokens of training example "
            f"{self._corpus.ids[i]} ({tokens}, ...), and {len(absent):,} of {count:,} examples are missing; give the "
            "teacher exactly the tokens that `l2m store rows` makes"
        )

    def _hidden_states(self, found: Read) -> np.ndarray:
        states, config = _required(found, "hidden_states"), self._teacher.config
        width = config.hidden_size if self._outputs.before_norm else config.embed_size
        if states.shape[1] != width:
            raise InputError(
                f"has hidden_states of width {states.shape[1]}, and the teacher's is {width}; these are outputs of "
                "another model"
            )
        states = states.astype(np.float32)
        if self._outputs.before_norm:
            return self._normalised(states)
        if not _is_normalised(config, self._teacher.output, states):
            raise InputError(
                "has hidden_states from before the final norm; write those after it, which the head multiplies"
            )
        return states

    def _normalised(self, states: np.ndarray) -> np.ndarray:
        padded = np.zeros((-(-len(states) // _PADDED) * _PADDED, states.shape[1]), np.float32)
        padded[: len(states)] = states
        return np.asarray(_apply_output(self._teacher.config, self._teacher.output, padded))[: len(states)]

    def _top_k(self, found: Read) -> TopK:
        k, size = self._teacher.top_k, self._teacher.config.valid_vocab_size
        ids, log_probs = _required(found, "top_ids"), _required(found, "log_probs")
        if ids.shape != log_probs.shape or ids.shape[1] < k:
            raise InputError(
                f"has top_ids of shape {ids.shape} and log_probs of shape {log_probs.shape} at its targets; they "
                f"must be equal, and have at least the {k} tokens of config.teacher.store_top_k"
            )
        order = np.argsort(-log_probs.astype(np.float32), axis=1, kind="stable")[:, :k]
        ids, log_probs = (np.take_along_axis(x, order, axis=1) for x in (ids, log_probs.astype(np.float32)))
        if wrong := ids[(ids < 0) | (ids >= size)].tolist():
            raise InputError(
                f"has {wrong[0]} among its top_ids, and the teacher has {size:,} tokens; leave out entries of the "
                "vocabulary that are not tokens"
            )
        mass = np.exp(log_probs.astype(np.float64)).sum(axis=1)
        repeated = (np.diff(np.sort(ids, axis=1), axis=1) == 0).any()
        if repeated or mass.max() > _MOST_MASS:
            what = "a token twice" if repeated else f"probabilities that add up to {mass.max():.3g}"
            raise InputError(
                f"has {what} among its top {k}; log_probs are log-probabilities over the whole vocabulary, in "
                "nats, and not logits"
            )
        return TopK._make((ids, log_probs, np.log(np.maximum(1 - mass, _LEAST_TAIL))))


def _required(found: Read, name: str) -> np.ndarray:
    if name not in found:
        has, setting = (
            ("top_ids", "the number of these to keep") if "top_ids" in found else ("hidden_states", "0")
        )
        raise InputError(f"has {has} and no {name}; set config.teacher.store_top_k to {setting}")
    return found[name]


def _hash(tokens: np.ndarray) -> int:
    """64 bits."""
    digest = hashlib.blake2b(np.ascontiguousarray(tokens, "<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@jax.jit(static_argnums=0)
def _apply_output(config: DecoderConfig, output: Params, hidden: jax.Array) -> jax.Array:
    return models.apply_output(config, output, hidden)


def _is_normalised(config: DecoderConfig, output: Params, states: np.ndarray) -> bool:
    """Whether states look like those after the final norm; True where that cannot be told."""
    scale, bias = (np.asarray(output.get("norm", {}).get(name, 0.0)) for name in ("scale", "bias"))
    if config.norm_zero_centered or not config.norm_affine:
        scale = 1 + scale
    if not config.final_norm or config.embed_size != config.hidden_size or not scale.all():
        return True
    root_mean_square = np.sqrt(np.square((states - bias) / scale).mean(axis=1))
    return bool(abs(np.median(root_mean_square) - 1) < _NORM_TOLERANCE)
