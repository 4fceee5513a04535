"""Answers sampled from a decoder, many at once and the same everywhere."""

from l2m_jax.generation.engine import Engine, default_slots, generate
from l2m_jax.generation.responses import Answer
from l2m_jax.generation.sampling import SamplingRules

__all__ = ["Answer", "Engine", "SamplingRules", "default_slots", "generate"]
