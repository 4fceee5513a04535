"""Sampling answers from a decoder: many at once, and independent of how the work is split up."""

from l2m_jax.generation.engine import Engine, Generator, default_slots, generate, generate_file
from l2m_jax.generation.responses import Answer, ResponseFile
from l2m_jax.generation.sampling import SamplingRules

__all__ = [
    "Answer",
    "Engine",
    "Generator",
    "ResponseFile",
    "SamplingRules",
    "default_slots",
    "generate",
    "generate_file",
]
