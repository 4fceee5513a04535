"""The parts that a plan's phases are made of: passes over examples, and generation."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from l2m_jax.data.batches import FORWARD_SLOTS, forward_shapes
from l2m_jax.data.packing import Shape
from l2m_jax.generation.engine import choose_slots
from l2m_jax.generation.programs import cache_config
from l2m_jax.models import DecoderConfig
from l2m_jax.plan import programs
from l2m_jax.plan.estimate import seconds
from l2m_jax.plan.moments import Moments
from l2m_jax.plan.programs import Compiler, Decoding, Program
from l2m_jax.plan.targets import Target
from l2m_jax.plan.workload import Workload
from l2m_jax.types import Params

_UTILISATION = 0.8  # of the decoder's slots
_SET_ROWS = {"self_inst": 242, "vicuna": 80, "s_ni": 1694, "un_ni": 10_000}


class Parts:
    """Parts of the phases of `workload` on `target`, with the programs that `compiler` compiles."""

    def __init__(self, workload: Workload, target: Target, compiler: Compiler):
        self._w, self._target, self._compiler = workload, target, compiler
        self._moments = Moments(compiler, max(1, workload.config.devices.num_processes))
        self._devices = compiler.placement.num_devices
        self.teacher = programs.attention_for(workload.teacher, target.platform)
        self.student = programs.attention_for(workload.student, target.platform)

    def _pass(
        self, name: str, shape: Shape, function: Callable, *arguments: Any, trips: float = 1.0
    ) -> Program:
        size = f"{shape.rows} × {shape.length} tokens"
        return self._compiler.program(name, size, function, arguments, trips)

    def _forward(self, lengths: np.ndarray, slots: int = FORWARD_SLOTS) -> tuple[Shape, int]:
        """The larger of the shapes in which a pass goes over examples of these lengths, and the calls that it takes."""
        usual, long = forward_shapes(lengths, self._devices, slots=slots)
        needed = (usual, long) if int(lengths.max()) > usual.length else (usual,)
        shape = max(needed, key=lambda shape: shape.cost)
        return shape, math.ceil(float(lengths.sum()) / (shape.slots * self._devices))

    @property
    def _diagnosed(self) -> np.ndarray:
        """Lengths of the rows of the diagnostics: as many of validation as of training."""
        lengths = self._w.lengths
        rows = min(2 * self._w.config.evaluation.diagnostic_rows, len(lengths))
        return lengths[np.linspace(0, len(lengths) - 1, rows).astype(int)]

    def _decoding(self, model: DecoderConfig, params: Params, answers: int) -> Decoding:
        w, rules = self._w, self._w.config.sampling
        prompt = w.longest_prompt(model)
        slots = choose_slots(
            cache_config(model, self._compiler.placement),
            w.config.devices.slots,
            prompt + rules.max_new_tokens,
            answers,
            self._devices,
        )
        return programs.decoding(self._compiler, model, params, rules, slots, prompt)

    def _decoding_seconds(self, found: Decoding, tokens: float) -> float:
        return self._seconds(found.decode) * tokens / (found.slots * self._devices * _UTILISATION)

    @property
    def _validation_rows(self) -> int:
        data, most = self._w.config.data, self._w.config.evaluation.validation_rows
        rows = data.synthetic.validation if data.source == "synthetic" else data.validation_rows
        return max(1, min(rows, most) if most else rows)

    def _set_rows(self, source: str) -> int:
        data, most = self._w.config.data, self._w.config.evaluation.rows
        test = data.synthetic.test if data.source == "synthetic" else data.test_rows
        rows = _SET_ROWS.get(source.partition("=")[0], test)
        return min(rows, most) if most else rows

    def _seconds(self, program: Program) -> float:
        return 0.0 if self._compiler.dry else seconds(program, self._target, self._devices)
