"""The training step by its parts: seconds, flops, and the part of the machine's matmul rate that each reaches."""

import dataclasses
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
    """Distillation by KL from stored hidden states, packed, with products in float32 and in bfloat16.

    Returns:
        `rows`, one for each part and dtype, both relative to the matmul rate in float32; `ratio_bfloat16`: seconds a
        step in float32 by those in bfloat16. In float32: `step_seconds`; `examples_a_second`; `temporary_mb` of the
        largest program, by `memory_analysis()`; the packed `shapes` in use.
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
        measured, low = (
            distil.run(dataclasses.replace(request, dtype=dtype)) for dtype in ("float32", "bfloat16")
        )
    took = Spread.of(measured["step_seconds"])
    return {
        "rows": [
            {"dtype": dtype, **part}
            for dtype, result in (("float32", measured), ("bfloat16", low))
            for part in result["parts"]
        ],
        "ratio_bfloat16": sum(measured["step_seconds"]) / sum(low["step_seconds"]),
        "step_seconds": took._asdict(),
        "examples_a_second": batch_size * batches / sum(measured["step_seconds"]),
        "matmul_gflops": measured["matmul_gflops"],
        "compile_seconds": measured["compile_seconds"],
        "temporary_mb": measured["temporary_mb"],
        "shapes": str(measured["shapes"]),
    }
