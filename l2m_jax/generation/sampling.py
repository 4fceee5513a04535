"""Sampling of the next token: rules on logits in Hugging Face's order, and the answer's own random numbers.

The random numbers of an answer depend only on its seed, its prompt's tokens and the position in the answer. They
do not depend on the batch, the slot, the device or the order of the work.
"""

import dataclasses
import functools
import hashlib
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2m_jax.errors import InputError, require_at_least

Prompts = Sequence[Sequence[int] | np.ndarray]  # the tokens of each; may be read from a file when asked for

_PRNG = "threefry2x32"  # named, because answers must not depend on the configurable default
_CHUNK = 256
_KEYS = 1024  # keys that are made at once: one shape, which is compiled once


@dataclasses.dataclass(frozen=True)
class SamplingRules:
    """Rules as in Hugging Face `generate`, applied in this order: bans, temperature, top-k, top-p.

    The defaults are the paper's.

    Attributes:
        temperature: divides the logits. 0 is greedy decoding, where top-k and top-p make no difference.
        top_k: samples from the k most likely tokens; 0 from all.
        top_p: samples from the smallest set of most likely tokens with at least this total probability; 1 from all.
        no_repeat_ngram: no sequence of n tokens occurs twice in the prompt and answer together; 0 allows it.
        min_new_tokens: the end of sequence is banned before the answer has this many tokens.
        max_new_tokens: maximum length of an answer, including its end of sequence.

    Raises:
        InputError: a value outside its range.
    """

    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    no_repeat_ngram: int = 0
    min_new_tokens: int = 0
    max_new_tokens: int = 512

    def __post_init__(self):
        require_at_least(self, 0, "temperature", "top_k", "no_repeat_ngram", "min_new_tokens")
        require_at_least(self, 1, "max_new_tokens")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: {self.top_p!r} must be greater than 0 and at most 1 (1 turns it off)")
        if self.max_new_tokens < self.min_new_tokens:
            raise InputError(
                f"max_new_tokens: {self.max_new_tokens!r} must be at least min_new_tokens ({self.min_new_tokens!r})"
            )

    def generation_config(self) -> dict[str, Any]:
        """The rules as in generation_config.json.

        Without `max_new_tokens`: in a folder, it would override the `max_length` that callers of `generate` pass.
        """
        rules: dict[str, Any] = {"do_sample": self.temperature > 0}
        if self.temperature > 0:
            rules |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        if self.no_repeat_ngram:
            rules["no_repeat_ngram_size"] = self.no_repeat_ngram
        if self.min_new_tokens:
            rules["min_new_tokens"] = self.min_new_tokens
        return rules

    def described(self) -> str:
        """Such as "temperature 1, top-k 50, at most 512 new tokens"."""
        words = ["greedy"]
        if self.temperature > 0:
            words = [f"temperature {self.temperature:g}"] + [f"top-k {self.top_k}"] * bool(self.top_k)
            words += [f"top-p {self.top_p:g}"] * (self.top_p < 1)
        words += [f"no repeated {self.no_repeat_ngram}-gram"] * bool(self.no_repeat_ngram)
        return ", ".join([*words, f"at most {self.max_new_tokens} new tokens"])


def answer_keys(prompts: Prompts, seeds: Sequence[int]) -> np.ndarray:
    """uint32 [prompts, seeds, 2]: the key of each answer, from its seed and a hash of its prompt's tokens."""
    digests = [hashlib.sha256(np.asarray(prompt, "<i4").tobytes()).digest()[:8] for prompt in prompts]
    words_Px2 = np.frombuffer(b"".join(digests), "<u4").reshape(len(prompts), 2).astype(np.uint32)
    words_Nx2 = np.repeat(words_Px2, len(seeds), axis=0)
    seeds_N = np.tile(np.asarray(seeds, np.uint32), len(prompts))
    padded = -(-len(seeds_N) // _KEYS) * _KEYS
    words_Nx2, seeds_N = np.resize(words_Nx2, (padded, 2)), np.resize(seeds_N, padded)
    found = [_keys(seeds_N[i : i + _KEYS], words_Nx2[i : i + _KEYS]) for i in range(0, padded, _KEYS)]
    return np.concatenate(found)[: len(prompts) * len(seeds)].reshape(len(prompts), len(seeds), 2)


@jax.jit
@jax.vmap
def _keys(seed: jax.Array, words_2: jax.Array) -> jax.Array:
    key = jax.random.key(seed, impl=_PRNG)
    return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, words_2[0]), words_2[1]))


def sample(
    logits_BxV: jax.Array,
    tokens_BxS: jax.Array,
    lengths_B: jax.Array,
    new_tokens_B: jax.Array,
    keys_Bx2: jax.Array,
    rules: SamplingRules,
    eos_token_ids: tuple[int, ...],
) -> jax.Array:
    """The next token of each row, int32.

    Args:
        logits_BxV: float32; -inf for entries that are not tokens.
        tokens_BxS, lengths_B: the prompt followed by the answer so far, and its length.
        new_tokens_B: length of the answer so far: the position that the random numbers depend on.
        keys_Bx2: from `answer_keys`.
        eos_token_ids: tokens that end an answer.
    """
    if rules.no_repeat_ngram:
        logits_BxV = ban_repeated_ngrams(logits_BxV, tokens_BxS, lengths_B, rules.no_repeat_ngram)
    if rules.min_new_tokens:
        logits_BxV = ban_early_end(logits_BxV, new_tokens_B, rules.min_new_tokens, eos_token_ids)
    if rules.temperature == 0:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    logits_BxC, ids_BxC = candidates(logits_BxV, rules)
    chosen_B = draw(logits_BxC, keys_Bx2, new_tokens_B)
    if ids_BxC is None:
        return chosen_B
    return jnp.take_along_axis(ids_BxC, chosen_B[:, None], axis=1)[:, 0]


def ban_repeated_ngrams(
    logits_BxV: jax.Array, tokens_BxS: jax.Array, lengths_B: jax.Array, n: int
) -> jax.Array:
    """-inf for each token that would repeat an n-gram of its row."""
    B, S = tokens_BxS.shape
    windows = S - n + 1
    if windows < 1:
        return logits_BxV
    # Where do the row's last n-1 tokens occur, followed by one more known token?
    repeats = jnp.arange(windows)[None] + n <= lengths_B[:, None]
    for j in range(n - 1):
        last_Bx1 = jnp.take_along_axis(tokens_BxS, jnp.maximum(lengths_B - (n - 1) + j, 0)[:, None], axis=1)
        repeats &= tokens_BxS[:, j : j + windows] == last_Bx1
    bans = jnp.where(repeats, -jnp.inf, jnp.inf)
    return logits_BxV.at[jnp.arange(B)[:, None], tokens_BxS[:, n - 1 :]].min(bans)


def ban_early_end(
    logits_BxV: jax.Array, new_tokens_B: jax.Array, min_new_tokens: int, eos_token_ids: tuple[int, ...]
) -> jax.Array:
    """-inf for every end of sequence in rows whose answer is shorter than `min_new_tokens`."""
    is_eos_V = is_any_of(jnp.arange(logits_BxV.shape[1]), eos_token_ids)
    return jnp.where(is_eos_V[None] & (new_tokens_B < min_new_tokens)[:, None], -jnp.inf, logits_BxV)


def is_any_of(tokens: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    """Whether each token is one of `ids`, elementwise."""
    return functools.reduce(operator.or_, (tokens == id for id in ids))


def candidates(logits_BxV: jax.Array, rules: SamplingRules) -> tuple[jax.Array, jax.Array | None]:
    """The logits to sample from, after temperature, top-k and top-p, and their token ids.

    With top-k there are k logits a row. Otherwise there are V, and the ids are None. Logits that top-p drops are
    -inf. Hugging Face keeps every token that ties with the k-th; here the lowest ids win.
    """
    logits_BxV = logits_BxV / rules.temperature
    V = logits_BxV.shape[1]
    if not 0 < rules.top_k < V:
        return (logits_BxV if rules.top_p == 1 else _top_p(logits_BxV, rules.top_p)), None
    logits_BxC, ids_BxC = jax.lax.top_k(logits_BxV, rules.top_k)
    if rules.top_p < 1:
        probabilities = jax.nn.softmax(logits_BxC, axis=-1)
        mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
        logits_BxC = jnp.where(mass_before < rules.top_p, logits_BxC, -jnp.inf)
    # Sorted by id: candidates whose logits differ only by rounding then keep their places in `draw`.
    order = jnp.argsort(ids_BxC, axis=-1)
    return jnp.take_along_axis(logits_BxC, order, axis=-1), jnp.take_along_axis(ids_BxC, order, axis=-1)


def _top_p(logits_BxV: jax.Array, top_p: float) -> jax.Array:
    """Keeps a token if the more likely tokens have a total probability below `top_p`.

    Finds the lowest probability that is kept by bisection, without sorting. Non-negative floats are ordered like
    their bit patterns, so 30 halvings of an integer interval find it exactly.
    """
    probabilities = jax.nn.softmax(logits_BxV, axis=-1)
    bits_BxV = jax.lax.bitcast_convert_type(probabilities, jnp.int32)

    def halve(_, interval):
        low_B, high_B = interval
        middle_B = (low_B + high_B) // 2
        above_B = jnp.sum(jnp.where(bits_BxV > middle_B[:, None], probabilities, 0), axis=-1)
        enough = above_B < top_p
        return jnp.where(enough, low_B, middle_B + 1), jnp.where(enough, middle_B, high_B)

    B = logits_BxV.shape[0]
    one = int(np.float32(1).view(np.int32))
    start = (jnp.zeros((B,), jnp.int32), jnp.full((B,), one, jnp.int32))
    _, border_B = jax.lax.fori_loop(0, one.bit_length(), halve, start)
    return jnp.where(bits_BxV >= border_B[:, None], logits_BxV, -jnp.inf)


def draw(logits_BxC: jax.Array, keys_Bx2: jax.Array, position_B: jax.Array) -> jax.Array:
    """Samples an index in each row, int32, from softmax(logits).

    Inverts the cumulative distribution, so a rounding difference in a logit shifts the borders between indices by
    as little. One uniform number selects a chunk of 256 entries and another an entry in it. This needs neither C
    random numbers a row nor a cumulative sum over all entries.
    """

    def uniforms(key_2, position):
        key = jax.random.wrap_key_data(key_2, impl=_PRNG)
        return jax.random.uniform(jax.random.fold_in(key, position), (2,))

    u_Bx2 = jax.vmap(uniforms)(keys_Bx2, position_B)
    B, C = logits_BxC.shape
    chunk = min(C, _CHUNK)
    weights = jnp.exp(logits_BxC - jnp.max(logits_BxC, axis=-1, keepdims=True))
    weights = jnp.pad(weights, ((0, 0), (0, -C % chunk))).reshape(B, -1, chunk)
    chunk_B = _invert(jnp.sum(weights, axis=-1), u_Bx2[:, 0])
    inside = jnp.take_along_axis(weights, chunk_B[:, None, None], axis=1)[:, 0]
    return chunk_B * chunk + _invert(inside, u_Bx2[:, 1])


def _invert(weights_BxC: jax.Array, u_B: jax.Array) -> jax.Array:
    """The first entry whose cumulative weight exceeds u times the total; never an entry of weight 0."""
    cumulative = jnp.where(weights_BxC > 0, jnp.cumsum(weights_BxC, axis=-1), -1.0)
    threshold = u_B * jnp.max(cumulative, axis=-1)
    return jnp.argmax(cumulative > threshold[:, None], axis=-1).astype(jnp.int32)
