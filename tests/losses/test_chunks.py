from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from l2m_jax.losses import Objective
from l2m_jax.losses.chunks import PARTS, Static, choose_chunk_size, over_chunks, parts_of_chunk

CHUNK, PART, TOKENS = 32, 8, 96
LARGE = 1 << 17  # a vocabulary for which chunks are divided


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
    ("end", "whole", "parts"),
    [
        (0, 0, 0),
        (1, 0, 1),
        (8, 0, 1),
        (9, 0, 2),
        (24, 0, 3),
        (25, 1, 0),
        (32, 1, 0),
        (33, 1, 1),
        (89, 3, 0),
        (96, 3, 0),
    ],
)
def test_tokens_are_visited_once_and_none_far_behind_the_last_with_weight(end, whole, parts):
    weights = np.zeros(TOKENS, np.float32)
    weights[: end // 2], weights[end - 1 : end] = 0.25, -1.0  # whatever the sign; zeros before the last count
    for given in (weights, np.array([0 * weights, weights])):  # with leading axes the furthest decides
        visited, by_size = visits(jnp.asarray(given), LARGE)
        covered = -(-end // PART) * PART
        assert visited.tolist() == [1] * covered + [0] * (TOKENS - covered)
        assert (by_size[CHUNK], by_size[PART]) == (whole, parts)


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 500, 512, 513, 1025, 8192])
def test_chunks_are_about_equal(tokens):
    size = choose_chunk_size(tokens, 512)
    chunks = -(-tokens // size)
    assert size % (8 * PARTS) == 0 and size <= 512 and chunks == -(-tokens // 512)
    assert chunks * size - tokens < chunks * 8 * PARTS


@pytest.mark.parametrize(("end", "chunks"), [(0, 0), (1, 1), (32, 1), (33, 2), (96, 3)])
def test_a_small_vocabulary_is_not_worth_a_second_loop(end, chunks):
    visited, by_size = visits(jnp.asarray(np.arange(TOKENS) < end, jnp.float32), LARGE // 2)
    assert visited.tolist() == [1] * (chunks * CHUNK) + [0] * (TOKENS - chunks * CHUNK)
    assert by_size[CHUNK] == chunks and by_size[PART] == 0
    assert parts_of_chunk(512, 50257) == PARTS and parts_of_chunk(512, 1024) == 1
