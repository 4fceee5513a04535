"""The training step by its parts: seconds, flops, and the part of the machine's matmul rate that each reaches."""

import tempfile
from pathlib import Path
from typing import Any

from l2m_jax.bench import distil
from l2m_jax.bench.common import Spread
from l2m_jax.bench.workload import STUDENT, TEACHER, make_request
from l2m_jax.models import DecoderConfig


def run(
    data: Path,
    tokenizer: Path,
    *,
    batches: int = 8,
    batch_size: int = 16,
    student: DecoderConfig = STUDENT,
    teacher: DecoderConfig = TEACHER,
) -> dict[str, Any]:
    """Distillation by KL from stored hidden states, packed, in float32.

    Returns:
        `rows`, one for each part; `step_seconds`; `examples_a_second`; `temporary_mb` of the largest program, by
        `memory_analysis()`; the packed `shapes` in use.
    """
    with tempfile.TemporaryDirectory() as folder:
        request = make_request(
            Path(folder),
            data,
            tokenizer,
            batches=batches,
            batch_size=batch_size,
            student=student,
            teacher=teacher,
        )
        measured = distil.run(request)
    took = Spread.of(measured["step_seconds"])
    return {
        "rows": measured["parts"],
        "step_seconds": took._asdict(),
        "examples_a_second": batch_size * batches / sum(measured["step_seconds"]),
        "matmul_gflops": measured["matmul_gflops"],
        "compile_seconds": measured["compile_seconds"],
        "temporary_mb": measured["temporary_mb"],
        "shapes": str(measured["shapes"]),
    }
