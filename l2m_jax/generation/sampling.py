"""How the next token is chosen: rules on logits, in Hugging Face's order, and random numbers that belong to the answer.

The random numbers of an answer depend on its seed, its prompt's tokens and the position in the answer, and on
nothing else: not on the batch, the slot, the device or the order of the work.
"""

import dataclasses
import hashlib
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from l2m_jax.errors import InputError

_PRNG = "threefry2x32"  # by name: the default can be configured, and answers must not change with it
_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class SamplingRules:
    """Rules as in Hugging Face `generate`, applied in this order: bans, temperature, top-k, top-p. Hashable.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token (top-k and top-p then change nothing).
        top_k: only the k most likely tokens; 0 for all.
        top_p: of these, the smallest set of most likely tokens that holds at least this probability.
        no_repeat_ngram: no n tokens in a row occur twice in prompt and answer together; 0 allows it.
        min_new_tokens: tokens of the answer before which the end of sequence is banned.
        max_new_tokens: the most tokens of an answer, the end of sequence included.

    Raises:
        InputError: a value outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    no_repeat_ngram: int = 0
    min_new_tokens: int = 0
    max_new_tokens: int = 256

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature {self.temperature} must be 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p} must lie above 0 and not above 1 (1 switches it off)")
        for name in ("top_k", "no_repeat_ngram", "min_new_tokens"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} {getattr(self, name)} must not be negative (0 switches it off)")
        if self.max_new_tokens < max(1, self.min_new_tokens):
            raise InputError(
                f"max_new_tokens {self.max_new_tokens} must be at least 1 and at least "
                f"min_new_tokens ({self.min_new_tokens})"
            )


def answer_keys(prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> np.ndarray:
    """uint32 [prompts, seeds, 2]: the key of each answer, from its seed and a hash of its prompt's tokens."""
    digests = [hashlib.sha256(np.asarray(prompt, "<i4").tobytes()).digest()[:8] for prompt in prompts]
    words_Px2 = np.frombuffer(b"".join(digests), "<u4").reshape(len(prompts), 2).astype(np.uint32)

    return np.asarray(_answer_keys(np.asarray(seeds, np.uint32), words_Px2))


@jax.jit
def _answer_keys(seeds_C: jax.Array, words_Px2: jax.Array) -> jax.Array:
    def key(words_2, seed):
        key = jax.random.key(seed, impl=_PRNG)
        return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, words_2[0]), words_2[1]))

    return jax.vmap(jax.vmap(key, in_axes=(None, 0)), in_axes=(0, None))(words_Px2, seeds_C)


def sample(
    logits_BxV: jax.Array,
    tokens_BxS: jax.Array,
    lengths_B: jax.Array,
    new_tokens_B: jax.Array,
    keys_Bx2: jax.Array,
    rules: SamplingRules,
    eos_token_id: int,
) -> jax.Array:
    """The next token of each row, int32.

    Args:
        logits_BxV: float32; -inf for entries that are no token.
        tokens_BxS, lengths_B: prompt and answer so far, and how many of the S entries they fill.
        new_tokens_B: how many of them belong to the answer: the position that the random numbers depend on.
        keys_Bx2: from `answer_keys`.
    """
    if rules.no_repeat_ngram:
        logits_BxV = ban_repeated_ngrams(logits_BxV, tokens_BxS, lengths_B, rules.no_repeat_ngram)
    if rules.min_new_tokens:
        logits_BxV = ban_early_end(logits_BxV, new_tokens_B, rules.min_new_tokens, eos_token_id)
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
    """-inf for each token that would complete an n-gram which the row already holds."""
    B, S = tokens_BxS.shape
    windows = S - n + 1
    if windows < 1:
        return logits_BxV
    # Where does the row hold its own last n-1 tokens, with one more known token behind them?
    repeats = jnp.arange(windows)[None] + n <= lengths_B[:, None]
    for j in range(n - 1):
        last_Bx1 = jnp.take_along_axis(tokens_BxS, jnp.maximum(lengths_B - (n - 1) + j, 0)[:, None], axis=1)
        repeats &= tokens_BxS[:, j : j + windows] == last_Bx1
    bans = jnp.where(repeats, -jnp.inf, jnp.inf)
    return logits_BxV.at[jnp.arange(B)[:, None], tokens_BxS[:, n - 1 :]].min(bans)


def ban_early_end(
    logits_BxV: jax.Array, new_tokens_B: jax.Array, min_new_tokens: int, eos_token_id: int
) -> jax.Array:
    """-inf for the end of sequence in rows whose answer is shorter than `min_new_tokens`."""
    is_eos_V = jnp.arange(logits_BxV.shape[1]) == eos_token_id
    return jnp.where(is_eos_V[None] & (new_tokens_B < min_new_tokens)[:, None], -jnp.inf, logits_BxV)


def candidates(logits_BxV: jax.Array, rules: SamplingRules) -> tuple[jax.Array, jax.Array | None]:
    """What temperature, top-k and top-p leave over.

    With top-k these are k logits a row and their token ids, else all V logits (and None), -inf where top-p drops one.
    Hugging Face keeps every token that ties with the k-th; here the k-th is the one with the lowest id.
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
    # In the order of ids, so that two candidates that swap ranks in a logit's last bits keep their places in `draw`.
    order = jnp.argsort(ids_BxC, axis=-1)
    return jnp.take_along_axis(logits_BxC, order, axis=-1), jnp.take_along_axis(ids_BxC, order, axis=-1)


def _top_p(logits_BxV: jax.Array, top_p: float) -> jax.Array:
    """Keeps a token if the tokens more likely than it hold less than `top_p`: no sort, but a search for the border.

    Non-negative floats are ordered as their bits are, so 30 halvings of an integer interval find it exactly.
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
    """An index in each row, int32, with the probabilities softmax(logits).

    By inversion of the distribution function, where a logit that differs in its last bits moves the borders by as
    little. One uniform number finds the chunk of 256 entries and another the entry in it, so that C random numbers
    a row, or a cumulative sum over all of them, are never needed.
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
    """The first entry at which the cumulative weight passes u times the total; never one of weight 0."""
    cumulative = jnp.where(weights_BxC > 0, jnp.cumsum(weights_BxC, axis=-1), -1.0)
    threshold = u_B * jnp.max(cumulative, axis=-1)
    return jnp.argmax(cumulative > threshold[:, None], axis=-1).astype(jnp.int32)
