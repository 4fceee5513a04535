"""The curriculum of L2M-KD: ranking, partition, Baby-Step stages and schedules.

Pure functions that need neither JAX nor a model.
"""

from l2m_jax.curriculum.difficulty import RANKINGS, Difficulty, rank
from l2m_jax.curriculum.schedules import Schedule
from l2m_jax.curriculum.settings import Curriculum
from l2m_jax.curriculum.stages import (
    SampleCoefficients,
    Stage,
    alpha_at,
    baby_step_examples,
    baby_steps,
    beta_at,
    examples_seen,
    partition,
    single_stage,
    steps,
)

__all__ = [
    "RANKINGS",
    "Curriculum",
    "Difficulty",
    "SampleCoefficients",
    "Schedule",
    "Stage",
    "alpha_at",
    "baby_step_examples",
    "baby_steps",
    "beta_at",
    "examples_seen",
    "partition",
    "rank",
    "single_stage",
    "steps",
]
