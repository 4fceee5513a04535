"""Staged knowledge distillation of language models (L2M-KD) in JAX and Flax.

The parts are imported by name (`from l2m_jax import losses`), so that each pulls in only what it needs.
"""

__version__ = "0.1.0"
