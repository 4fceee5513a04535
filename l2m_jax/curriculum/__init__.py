"""The curriculum of L2M-KD: ranking, partition, Baby-Step stages and schedules.

Pure functions that need neither JAX nor a model.
"""

from l2m_jax.curriculum.difficulty import RANKINGS, Difficulty, rank, sample_weights
from l2m_jax.curriculum.exposure import Exposure, exposure
from l2m_jax.curriculum.schedules import Schedule
from l2m_jax.curriculum.settings import Curriculum
from l2m_jax.curriculum.stages import (
    SampleCoefficients,
    Stage,
    baby_steps,
    by_rank,
    examples_seen,
    partition,
    shuffled_over_time,
    single_stage,
    stage_examples,
    steps,
)
from l2m_jax.curriculum.strata import length_strata, stratified

__all__ = [
    "RANKINGS",
    "Curriculum",
    "Difficulty",
    "Exposure",
    "SampleCoefficients",
    "Schedule",
    "Stage",
    "baby_steps",
    "by_rank",
    "examples_seen",
    "exposure",
    "length_strata",
    "partition",
    "rank",
    "sample_weights",
    "shuffled_over_time",
    "single_stage",
    "stage_examples",
    "steps",
    "stratified",
]
