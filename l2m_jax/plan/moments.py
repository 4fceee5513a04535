"""What a run holds at each moment: bytes on a device, and on the host of one process.

Each function below mirrors what the named part of the run keeps alive; `tests/plan/test_against_run.py` compares
them with a run.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import numpy as np

from l2m_jax.models import DecoderConfig
from l2m_jax.models.hf.folder import SHARD_BYTES
from l2m_jax.plan.programs import Compiler, Decoding, Program, TrainingShapes, parameters, share_bytes
from l2m_jax.types import Params


@dataclass(frozen=True)
class Weights:
    """Bytes of parameters and state on a device; all devices hold about the same.

    Attributes:
        parameters, optimizer, gradients: of the model in training, or the parameters of the one that runs. An average
            of the weights counts as part of the optimizer's state.
        frozen: of the model in training, what is not trained.
        teacher: its head with the teacher store, all of it if it runs live.
        copies: parameters as decoding reads them, or joined again of trained and frozen ones.
    """

    parameters: float = 0.0
    frozen: float = 0.0
    optimizer: float = 0.0
    gradients: float = 0.0
    teacher: float = 0.0
    copies: float = 0.0


@dataclass(frozen=True)
class Activations:
    """Bytes of everything else on a device.

    Attributes:
        batches: fed to the device ahead of their use.
        cache: KV caches of the slots, and of the prompts that wait for one.
        working: temporaries and results of the program that needs most.
    """

    batches: float = 0.0
    cache: float = 0.0
    working: float = 0.0


@dataclass(frozen=True)
class Moment:
    """
    Attributes:
        host: bytes on the host of one process, by what they are. The programs, libraries and cached files are not
            counted.
    """

    name: str
    weights: Weights
    activations: Activations = Activations()
    host: dict[str, float] = field(default_factory=dict)

    @property
    def weight_bytes(self) -> float:
        return sum(asdict(self.weights).values())

    @property
    def device_bytes(self) -> float:
        return self.weight_bytes + sum(asdict(self.activations).values())

    @property
    def host_bytes(self) -> float:
        return sum(self.host.values())


class Moments:
    """The moments of a run under `compiler`'s placement, on `processes` hosts."""

    def __init__(self, compiler: Compiler, processes: int):
        self._compiler, self._processes = compiler, processes
        self._replicated = compiler.placement.mapping == "pmap"

    def training(
        self, shapes: TrainingShapes, batches: float, programs: Sequence[Program]
    ) -> tuple[Moment, ...]:
        """Of `Trainer.run`, without validations.

        Args:
            batches: bytes of all that is fed ahead.
        """
        state = self._state(shapes)
        without_sums = Weights(**asdict(state) | {"gradients": 0.0})
        fed = Activations(batches=batches)
        working = max(program.working for program in programs)
        # Under "pmap" the state goes by way of the host; else Orbax moves this process's shards.
        on_host = share_bytes(shapes.state) / (1 if self._replicated else self._processes)
        restored = {"restored state": on_host} if self._replicated else {}
        # Orbax copies arrays that are on the host already, and encodes those that are not.
        saved = {"state": on_host, "Orbax's copy": on_host}
        best = Weights(**asdict(without_sums) | ({"optimizer": 0.0} if self._replicated else {}))
        return (
            Moment("start", without_sums, host=self._loading(shapes.params)),
            Moment("training", state, Activations(batches, working=working)),
            Moment("checkpoint", state, fed, saved),
            Moment("resume", without_sums, host=restored),
            Moment("best", best, host=restored),
        )

    def _state(self, shapes: TrainingShapes) -> Weights:
        weights = self._compiler.weights
        return Weights(
            parameters=weights(shapes.state.params),
            frozen=weights(shapes.frozen),
            optimizer=weights((shapes.state.optimizer, shapes.state.average)),
            gradients=weights(shapes.sums),
            teacher=0.0 if shapes.teacher is None else weights(shapes.teacher),
        )

    def generation_beside(self, name: str, shapes: TrainingShapes, batches: float, found: Decoding) -> Moment:
        """Generation beside the state, whose gradient sums are freed: validations and rollouts."""
        return self._generation(name, self._without_sums(shapes), batches, found)

    def _without_sums(self, shapes: TrainingShapes) -> dict[str, float]:
        """The state beside what reads the whole model."""
        joined = self._compiler.weights(shapes.joined)
        return asdict(self._state(shapes)) | {"gradients": 0.0, "copies": joined}

    def beside(
        self, name: str, shapes: TrainingShapes, fed: float, batch: float, program: Program, head: Any = None
    ) -> Moment:
        """A pass without gradients beside the state, whose gradient sums are freed.

        Args:
            fed: bytes of batches of the training; `batch`: of one of the pass.
            head: of the teacher, which is placed for the pass if it is not there.
        """
        held = self._without_sums(shapes)
        held["teacher"] = held["teacher"] or self._compiler.weights(head)
        return Moment(
            name, Weights(**held), Activations(fed + 2 * batch, working=program.working + program.results)
        )

    def generation(self, name: str, params: Params, found: Decoding) -> Moment:
        """A model that does nothing but generate; it has just been loaded."""
        held = {"parameters": self._compiler.weights(params)}
        return self._generation(name, held, 0.0, found, self._loading(params))

    def _generation(
        self,
        name: str,
        held: dict[str, float],
        batches: float,
        found: Decoding,
        host: dict[str, float] | None = None,
    ) -> Moment:
        cached = found.cache + found.prefilled
        # The copies are made before there is a cache.
        working = max(found.working, found.prepare.temporaries - cached)
        activations = Activations(batches, cached, working)
        copies = held.get("copies", 0.0) + found.copies
        return Moment(name, Weights(**held | {"copies": copies}), activations, host or {})

    def frozen_pass(self, name: str, params: Params, batch: float, program: Program) -> Moment:
        """A pass over the data: while one batch is computed, the results of the one before are read."""
        devices = self._compiler.placement.num_devices
        return Moment(
            name,
            Weights(parameters=self._compiler.weights(params)),
            Activations(2 * batch, working=program.working + program.results),
            self._loading(params) | {"results": devices * program.results},
        )

    def saving(self, config: DecoderConfig, held: Params | None = None) -> Moment:
        """A finished model: a copy on the host, of which one file at a time is written.

        Args:
            held: what the devices hold of it; None: all of it.
        """
        params = parameters(config)
        size = share_bytes(params)
        host = {"parameters": size, "file": min(size, SHARD_BYTES)}
        return Moment("saving", Weights(parameters=self._compiler.weights(held or params)), host=host)

    def _loading(self, params: Params) -> dict[str, float]:
        """Parameters are read one by one, each as far as this process's devices need it."""
        leaves = jax.tree.leaves(params)
        largest = max(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
        return {"largest parameter": largest / (1 if self._replicated else self._processes)}
