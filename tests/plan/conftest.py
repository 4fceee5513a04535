"""Plans are made of programs as they are compiled for users."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def _optimised():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
