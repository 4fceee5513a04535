"""One side of the comparison of distillation steps, ours: python -m l2m_jax.bench.distil request.json

A process of its own, as the peers' sides are, so that its peak memory is its own. Reads what to do from the request
(`workload.Request`) and prints one JSON line.
"""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator
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
from l2m_jax.losses import ForwardKL, Objective
from l2m_jax.parallel import Placement
from l2m_jax.training import step
from l2m_jax.training.optimizer import OptimizerSettings, make_optimizer
from l2m_jax.training.step import StepSettings, Teacher, TrainState
from l2m_jax.training.store import TeacherStore
from l2m_jax.training.store_format import HiddenStates
from l2m_jax.types import MicroBatch

_DEVICES = 1  # as the peers have one


class _Corpus(ListedExamples):
    @property
    def ids(self) -> list[str]:
        return [str(i) for i in range(len(self))]


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
    placement = Placement("pmap", tuple(jax.local_devices()[:_DEVICES]))
    with tempfile.TemporaryDirectory() as folder:
        store, store_seconds = _store(Path(folder), placement, request, corpus)
        pair = _Pair(request, placement, corpus, store)
        first_losses, first_times = pair.one_pass()
        rates = [matmul_rate()]
        _, times = pair.one_pass()
        rates.append(matmul_rate())
        peak = peak_rss_bytes()  # before the parts are measured by themselves
        temporary = temporary_bytes(pair.compiled_step())
        loss_seconds, update_seconds = pair.loss_seconds(), pair.update_seconds()
    rate = float(np.mean(rates))
    flops = step_flops(pair.student, pair.teacher, corpus, request.batches)
    heads = flops["student_head"] + flops["teacher_head"]
    step_seconds = float(np.mean(times))
    parts = {
        "teacher pass (once)": (store_seconds / len(request.batches), flops["teacher_body"]),
        "loss, both heads": (loss_seconds, heads),
        "student": (step_seconds - loss_seconds - update_seconds, flops["student_body"]),
        "update": (update_seconds, 0.0),
        "step": (step_seconds, heads + flops["student_body"]),
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
        "shapes": [list(shape) for shape in pair.shapes],
        "temporary_mb": temporary / 1e6,
        "peak_rss_mb": peak / 1e6,
    }


def _store(
    folder: Path, placement: Placement, request: Request, corpus: _Corpus
) -> tuple[TeacherStore, float]:
    config, params = models.load(request.teacher, put=placement.put)
    config = dataclasses.replace(config, dtype=request.dtype)
    hidden = placement.map(step.hidden_pass)

    def build(name: str) -> TeacherStore:
        form = HiddenStates(config.embed_size, request.dtype)
        store = TeacherStore(folder / name, corpus, key="bench", form=form)
        store.fill(placement, lambda batch: hidden(config, params, batch))
        return store

    build("warm_up")
    start = time.perf_counter()
    return build("store"), time.perf_counter() - start


class _Pair:
    """A student that learns from a teacher's stored hidden states, by the functions that a run maps."""

    def __init__(self, request: Request, placement: Placement, corpus: _Corpus, store: TeacherStore):
        self._request, self._placement, self._corpus, self._store = request, placement, corpus, store
        student, params = models.load(request.student, put=placement.put)
        self.student = dataclasses.replace(student, dtype=request.dtype)
        self.teacher = dataclasses.replace(models.read_config(request.teacher), dtype=request.dtype)
        self._settings = StepSettings(self.student, self.teacher, self.student.valid_vocab_size)
        self._objective = Objective(ForwardKL())  # KL(teacher‖student)
        self._signal = Teacher(models.load_head(request.teacher, dtype=request.dtype, put=placement.put))
        self.shapes = choose_shapes(corpus.lengths, len(request.batches[0]), _DEVICES)
        self._optimizer = make_optimizer(OptimizerSettings(learning_rate=request.learning_rate))
        self._accumulate, self._update = placement.map(step.accumulate), placement.map(step.update)
        self._state = TrainState(params, placement.map(step.init_optimizer)(self._optimizer, params))
        self._sums = placement.map(step.zero_sums)(params)

    def _batches(self) -> Iterator[list[MicroBatch]]:
        for indices in self._request.batches:
            rows = self._store.read
            packed = micro_batches(self._corpus, indices, self.shapes, _DEVICES, teacher_rows=rows)
            yield [self._placement.feed(m) for m in packed]

    def _arguments(self, batch: MicroBatch) -> tuple:
        return (self._settings, self._objective, self._state.params, self._sums, batch, self._signal, None)

    def _update_once(self) -> Any:
        rate = np.float32(self._request.learning_rate)
        self._state, self._sums, values = self._update(
            self._optimizer, 0.0, False, self._state, self._sums, rate
        )
        return values

    def one_pass(self) -> tuple[list[float], list[float]]:
        """The loss of each batch, and the seconds from batch to batch."""
        values, times = [], []
        last = time.perf_counter()
        for batch in prefetch(self._batches(), depth=4):
            for m in batch:
                self._sums = self._accumulate(*self._arguments(m))
            values.append(float(self._placement.to_host(self._update_once())["loss"]))
            now = time.perf_counter()
            times.append(now - last)
            last = now
        return values, times

    def compiled_step(self) -> Any:
        batch = next(self._batches())[0]
        return self._accumulate.lower(*self._arguments(batch)).compile()  # type: ignore[attr-defined]

    def loss_seconds(self) -> float:
        """Seconds a batch of the loss and its gradient alone, from hidden states."""
        objective, settings = self._objective, self._settings

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
        hidden = jax.jit(partial(step.target_hidden, settings.student))
        params, teacher_head_VxE = self._placement.to_host((self._state.params, self._signal.head_VxE))
        head_VxE = models.head(settings.student, params)
        given = jax.device_put(
            [
                (hidden(params, one), head_VxE, one, teacher_head_VxE)
                for batch in self._batches()
                for one in self._placement.to_host(batch)
            ]
        )
        took = seconds(lambda: [gradient(*arguments) for arguments in given], 1)
        return took.median / len(self._request.batches)

    def update_seconds(self) -> float:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            jax.block_until_ready((self._update_once(), self._state))
            times.append(time.perf_counter() - start)
        return Spread.of(times[1:]).median


if __name__ == "__main__":
    print(json.dumps(run(Request.read(Path(sys.argv[1])))))
