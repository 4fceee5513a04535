"""Evaluation: Rouge-L, evaluation sets, the protocol, cross-entropy and the LLM judge.

The names exported here need neither JAX nor a model.
"""

from l2m_jax.evaluation.rouge import exact_match, rouge_l, rouge_l_many

__all__ = ["exact_match", "rouge_l", "rouge_l_many"]
