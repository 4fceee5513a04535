from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from l2m_jax.losses import Objective
from l2m_jax.losses.chunks import Static, choose_chunk_size, over_chunks, sizes_of_chunk

CHUNK, EIGHTH, TOKENS = 64, 8, 192
LARGE = 1 << 16  # a vocabulary for which chunks are divided


@partial(jax.jit, static_argnums=1)
def visits(weights: jax.Array, vocab_size: int) -> tuple[jax.Array, jax.Array]:
    """How often each token is visited, and the number of visits by size."""

    def body(start, size, done):
        visited, by_size = done
        part = lax.dynamic_slice_in_dim(visited, start, size)
        return lax.dynamic_update_slice_in_dim(visited, part + 1, start, 0), by_size.at[size].add(1)

    static = Static(Objective(), vocab_size, CHUNK)
    return over_chunks(static, weights, body, (jnp.zeros(TOKENS, jnp.int32), jnp.zeros(CHUNK + 1, jnp.int32)))


@pytest.mark.parametrize(
    ("end", "sizes"),
    [
        (0, []),
        (1, [8]),
        (8, [8]),
        (9, [16]),
        (24, [16, 8]),
        (25, [32]),
        (56, [32, 16, 8]),
        (57, [64]),
        (64, [64]),
        (65, [64, 8]),
        (145, [64, 64, 16, 8]),
        (185, [64, 64, 64]),
        (192, [64, 64, 64]),
    ],
)
def test_tokens_are_visited_once_and_none_far_behind_the_last_with_weight(end, sizes):
    weights = np.zeros(TOKENS, np.float32)
    weights[: end // 2], weights[end - 1 : end] = 0.25, -1.0  # whatever the sign; zeros before the last count
    for given in (weights, np.array([0 * weights, weights])):  # with leading axes the furthest decides
        visited, by_size = visits(jnp.asarray(given), LARGE)
        covered = -(-end // EIGHTH) * EIGHTH
        assert visited.tolist() == [1] * covered + [0] * (TOKENS - covered)
        assert by_size.tolist() == [sizes.count(size) for size in range(CHUNK + 1)]


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 128, 129, 500, 512, 513, 1025, 8192])
def test_chunks_are_about_equal(tokens):
    size = choose_chunk_size(tokens, 512)
    chunks = -(-tokens // size)
    assert size % 64 == 0 and size <= 512
    assert chunks * size - tokens < chunks * 64
    assert chunks == max(-(-tokens // 512), min(2, -(-tokens // 64)))


@pytest.mark.parametrize(("end", "chunks"), [(0, 0), (1, 1), (64, 1), (65, 2), (192, 3)])
def test_a_small_vocabulary_is_not_worth_more_loops(end, chunks):
    visited, by_size = visits(jnp.asarray(np.arange(TOKENS) < end, jnp.float32), LARGE // 2)
    assert visited.tolist() == [1] * (chunks * CHUNK) + [0] * (TOKENS - chunks * CHUNK)
    assert by_size[CHUNK] == chunks == by_size.sum()
    assert sizes_of_chunk(512, 50257) == [512, 256, 128, 64] and sizes_of_chunk(512, 1024) == [512]
