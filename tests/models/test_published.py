"""The published number of parameters of each model, as its authors or its files' sizes give it."""

import jax
import pytest

from l2m_jax import models
from l2m_jax.models.hf.published import PUBLISHED

MILLIONS = {
    "gpt2": 124.4,
    "gpt2-medium": 354.8,
    "gpt2-large": 774.0,
    "gpt2-xl": 1557.6,
    "facebook/opt-125m": 125.2,
    "facebook/opt-350m": 331.2,
    "facebook/opt-1.3b": 1315.8,
    "facebook/opt-2.7b": 2651.6,
    "openlm-research/open_llama_3b_v2": 3426.5,
    "openlm-research/open_llama_7b_v2": 6738.4,
    "Qwen/Qwen2.5-0.5B": 494.0,
    "Qwen/Qwen2.5-1.5B": 1543.7,
    "Qwen/Qwen2.5-3B-Instruct": 3085.9,
    "Qwen/Qwen2.5-7B-Instruct": 7615.6,
    "Qwen/Qwen3-0.6B": 596.0,
    "Qwen/Qwen3-1.7B": 1720.6,
    "Qwen/Qwen3-4B": 4022.5,
    "mistralai/Mistral-7B-v0.1": 7241.7,
    "HuggingFaceTB/SmolLM3-3B": 3075.1,
    "google/gemma-3-270m": 268.1,
    "google/gemma-3-1b-pt": 999.9,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters(name):
    params = jax.eval_shape(lambda: models.init(PUBLISHED[name], jax.random.key(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count / 1e6 == pytest.approx(MILLIONS[name], abs=0.06)
