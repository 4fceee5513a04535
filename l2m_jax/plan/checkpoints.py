"""What a run writes to disk besides text: checkpoints, models, the teacher store."""

from dataclasses import dataclass

from l2m_jax.plan.workload import Workload
from l2m_jax.run.disk import model_bytes, store_bytes_per_target

DISK_RATE = 1e9  # bytes/s; an assumption that every figure names


@dataclass(frozen=True)
class Written:
    """The checkpoints of one training phase.

    Attributes:
        bytes: of one.
        count: the most that are written if the phase takes as long as estimated.
    """

    bytes: int
    count: int

    @property
    def total(self) -> int:
        return self.bytes * self.count

    @property
    def seconds(self) -> float:
        """The time to write them; training continues meanwhile, unless the next one is due."""
        return self.total / DISK_RATE


def of_training(
    state_bytes: int, minutes: float, seconds: float, updates: int, stages: int, improvements: int
) -> Written:
    """One at the end of each stage, one for each better validation, and one each time that `minutes` have passed."""
    timed = updates if minutes == 0 else int(seconds / 60 / minutes)
    return Written(state_bytes, min(updates, stages + improvements + timed))


def disk(w: Workload) -> dict[str, int]:
    """Bytes by what takes them, as `run.disk.bytes_needed` counts them for a run."""
    config = w.config
    sizes: dict[str, int] = {}
    trained = [
        *(
            (f"pretrained {role}", model, w.pretraining(role), True)
            for role, model in (("teacher", w.teacher), ("student", w.student))
            if w.pretraining(role).text
        ),
        ("teacher", w.teacher, config.teacher.finetune, config.teacher.finetune.trains),
        ("initial student", w.student, config.student.warmup, config.student.warmup.trains),
        *((name, w.student, config.training, True) for name in config.method_names),
    ]
    for name, model, training, trains in trained:
        part = config.student_part if name in config.method_names else training.part
        sizes |= model_bytes(name, model, training, part, trains)
    if any(config.reads_store(w.method(name)) for name in config.method_names):
        targets, teacher = int(w.response_lengths.sum()), config.teacher
        of_target = store_bytes_per_target(w.teacher, teacher.store_dtype, teacher.store_top_k)
        sizes["teacher store"] = targets * of_target
    return sizes
