"""One side of the comparison of distillation steps, ours: python -m l2m_jax.bench.distil request.json

A process of its own, as the peers' sides are, so that its peak memory is its own. Reads what to do from the request
(`workload.Request`) and prints one JSON line.
"""

import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from l2m_jax import losses, models
from l2m_jax.bench.common import Spread, matmul_rate, peak_rss_bytes, seconds, temporary_bytes
from l2m_jax.bench.workload import Request, step_flops
from l2m_jax.data.batches import ListedExamples, micro_batches, prefetch
from l2m_jax.data.packing import choose_shapes
from l2m_jax.losses import Objective
from l2m_jax.parallel import Parallel
from l2m_jax.training import step
from l2m_jax.training.loop import StepFunctions
from l2m_jax.training.optimizer import OptimizerSettings
from l2m_jax.training.step import StepSettings, Teacher, TrainState, target_hidden
from l2m_jax.training.teacher import build_store
from l2m_jax.types import MicroBatch

_DEVICES = 1  # as the peers have one


class _Corpus(ListedExamples):
    fingerprint = ""

    @property
    def response_lengths(self) -> np.ndarray:
        return self.lengths - self.prompt_lengths

    def __len__(self) -> int:
        return len(self.tokens)


def run(request: Request) -> dict[str, Any]:
    """Builds the teacher store for the request's examples, then trains on its batches twice and times the second time.

    Returns:
        `losses` of the first pass; `step_seconds` of the second, each from batch to batch, feeding included;
        `store_seconds`; `compile_seconds`, what the first pass took longer; `parts`: seconds, flops and the part of
        the matmul rate of teacher pass, loss, student and update; `temporary_mb` of the step; `peak_rss_mb`.
    """
    corpus = _Corpus(
        [np.array(t, np.int32) for t in request.tokens], np.array(request.prompt_lengths, np.int32)
    )
    parallel = Parallel("pmap", tuple(jax.local_devices()[:_DEVICES]))
    student_config, student = models.load(request.student)
    teacher_config, teacher = models.load(request.teacher)
    settings = StepSettings(student_config, teacher_config, student_config.valid_vocab_size)
    objective = Objective(alpha=0.0)  # KL(teacher‖student)
    with tempfile.TemporaryDirectory() as folder:
        store, store_seconds = _store(Path(folder), parallel, teacher_config, teacher, corpus)
        head = parallel.place(models.head(teacher_config, teacher))
        del teacher
        signal = Teacher(head)
        shapes = choose_shapes(corpus.lengths, len(request.batches[0]), _DEVICES)
        functions = StepFunctions(OptimizerSettings(learning_rate=request.learning_rate), parallel)
        params = parallel.place(student)
        state = TrainState(params, functions.start(params))
        sums = functions.zeros(state.params)

        def batches():
            for indices in request.batches:
                packed = micro_batches(corpus, indices, shapes, _DEVICES, teacher_rows=store.read)
                yield [parallel.feed(m) for m in packed]

        def one_pass(state: TrainState, sums: Any):
            values, times = [], []
            last = time.perf_counter()
            for batch in prefetch(batches(), depth=4):
                for m in batch:
                    sums = functions.accumulate(settings, objective, state.params, sums, m, signal, None)
                state, sums, metrics = functions.update(state, sums, np.float32(request.learning_rate))
                values.append(float(parallel.read(metrics)["loss"]))
                now = time.perf_counter()
                times.append(now - last)
                last = now
            return state, sums, values, times

        state, sums, first_losses, first_times = one_pass(state, sums)
        state, sums, _, times = one_pass(state, sums)
        peak = peak_rss_bytes()  # before the parts are taken for themselves
        example_batch = next(iter(batches()))[0]
        temporary = temporary_bytes(
            functions.accumulate.lower(
                settings, objective, state.params, sums, example_batch, signal, None
            ).compile()
        )
        loss_seconds = _loss_seconds(settings, objective, parallel, state.params, signal, batches)
        update_seconds = _update_seconds(functions, state, sums, request.learning_rate)
    rate = matmul_rate()
    flops = step_flops(student_config, teacher_config, corpus, request.batches)
    step_seconds = float(np.mean(times))
    parts = {
        "teacher pass (once)": (store_seconds / len(request.batches), flops["teacher_body"]),
        "loss, both heads": (loss_seconds, flops["heads"]),
        "student": (step_seconds - loss_seconds - update_seconds, flops["student_body"]),
        "update": (update_seconds, 0.0),
        "step": (step_seconds, flops["heads"] + flops["student_body"]),
    }
    return {
        "losses": first_losses,
        "step_seconds": times,
        "store_seconds": store_seconds,
        "compile_seconds": sum(first_times) - sum(times),
        "parts": [
            {
                "part": name,
                "seconds_a_batch": took,
                "gflop_a_batch": flop / 1e9,
                "of_matmul_rate": flop / took / rate,
            }
            for name, (took, flop) in parts.items()
        ],
        "matmul_gflops": rate / 1e9,
        "shapes": [list(shape) for shape in shapes],
        "temporary_mb": temporary / 1e6,
        "peak_rss_mb": peak / 1e6,
    }


def _store(folder: Path, parallel: Parallel, config: Any, params: Any, corpus: _Corpus):
    def forward(params: Any, batch: MicroBatch, *, axis_name: str | None) -> jax.Array:
        del axis_name
        return target_hidden(config, params, batch)

    hidden, placed = parallel.map(forward), parallel.place(params)

    def build(name: str):
        return build_store(
            folder / name,
            lambda batch: hidden(placed, parallel.feed(batch)),
            corpus,
            teacher="bench",
            width=config.embed_size,
            dtype="float32",
            num_devices=_DEVICES,
        )

    build("warm_up")
    start = time.perf_counter()
    return build("store"), time.perf_counter() - start


def _loss_seconds(settings, objective, parallel: Parallel, params, signal: Teacher, batches) -> float:
    """Seconds a batch of the loss and its gradient alone, from hidden states."""

    def loss(hidden_TxE, head_VxE, batch: MicroBatch, teacher_head_VxE):
        return losses.fused_distillation_sums(
            hidden_TxE,
            head_VxE,
            batch.teacher_hidden_TxE,
            teacher_head_VxE,
            batch.labels_T,
            batch.weights_T,
            objective,
            valid_vocab_size=settings.valid_vocab_size,
            chunk_size=settings.chunk_size,
        ).loss

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    hidden = jax.jit(partial(target_hidden, settings.student))
    params = parallel.unplace(params)
    head_VxE, teacher_head_VxE = models.head(settings.student, params), parallel.unplace(signal.head_VxE)
    given = [
        (hidden(params, m), head_VxE, m, teacher_head_VxE)
        for batch in batches()
        for m in map(parallel.unplace, batch)
    ]
    took = seconds(lambda: [gradient(*arguments) for arguments in given], 1)
    return took.median / len(list(batches()))


def _update_seconds(
    functions: StepFunctions, state: TrainState, sums: step.Sums, learning_rate: float
) -> float:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        state, sums, _ = jax.block_until_ready(functions.update(state, sums, np.float32(learning_rate)))
        times.append(time.perf_counter() - start)
    return Spread.of(times[1:]).median


if __name__ == "__main__":
    print(json.dumps(run(Request.read(Path(sys.argv[1])))))
