"""Each phase of a run: from finished artefacts to the next one, skipped where that is there and still matches."""

from l2m_jax.phases.distillation import card, distilled
from l2m_jax.phases.evaluation import evaluated_models
from l2m_jax.phases.preparation import (
    check_pair,
    fine_tuned_teacher,
    initial_student,
    ranked,
    reads_store,
    teacher_store,
)

__all__ = [
    "card",
    "check_pair",
    "distilled",
    "evaluated_models",
    "fine_tuned_teacher",
    "initial_student",
    "ranked",
    "reads_store",
    "teacher_store",
]
