import jax.numpy as jnp
import numpy as np
import pytest

from l2m_jax.losses import Objective
from l2m_jax.losses.chunks import Static, chunks_with_weight


@pytest.mark.parametrize(
    ("nonzero", "expected"),
    [([], 0), ([0], 1), ([7], 1), ([8], 2), ([0, 15], 2), ([16], 3), ([3, 31], 4)],
)
def test_no_chunk_is_run_behind_the_last_token_with_weight(nonzero, expected):
    weights = np.zeros(32, np.float32)
    weights[nonzero] = 0.25
    static = Static(Objective(), vocab_size=5, chunk_size=8)
    assert chunks_with_weight(static, jnp.asarray(weights)) == expected
    # With leading axes the furthest decides.
    assert chunks_with_weight(static, jnp.asarray([0 * weights, weights])) == expected


def test_negative_weights_count():
    static = Static(Objective(), vocab_size=5, chunk_size=8)
    assert chunks_with_weight(static, jnp.zeros(16).at[9].set(-1.0)) == 2
