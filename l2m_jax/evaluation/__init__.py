"""Evaluation: Rouge-L, the sets and seeds of the protocol, tables, reports and the LLM judge.

What is exported here needs neither JAX nor a model.
"""

from l2m_jax.evaluation.rouge import exact_match, rouge_l, rouge_l_many

__all__ = ["exact_match", "rouge_l", "rouge_l_many"]
