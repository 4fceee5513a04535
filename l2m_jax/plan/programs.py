"""The programs of a run, compiled ahead of time for devices that need not exist. Only shapes, never an array.

What is compiled are the functions that training and generation map over devices. Their arguments are shapes of one
device's share; `Compiler` lays them out as a run does.
"""

import dataclasses
import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2m_jax import models
from l2m_jax.data.packing import Shape
from l2m_jax.generation import SamplingRules
from l2m_jax.generation import programs as generation
from l2m_jax.generation.engine import PREFILL_TOKENS, cache_size
from l2m_jax.generation.schedule import MAX_WAITING, prefill_shape
from l2m_jax.losses import Objective
from l2m_jax.models import DecoderConfig, freezing
from l2m_jax.models.attention import why_not_cudnn
from l2m_jax.models.freezing import TopLayers
from l2m_jax.models.lora import Lora, attach
from l2m_jax.models.quantised import quantise
from l2m_jax.parallel import Layout, Placement
from l2m_jax.plan.flops import flops
from l2m_jax.plan.hlo import Module
from l2m_jax.training import step
from l2m_jax.training.optimizer import OptimizerSettings, make_optimizer
from l2m_jax.training.step import StepSettings, Teacher
from l2m_jax.training.store_format import StoreFormat, TopKLogProbs
from l2m_jax.types import MicroBatch, Params

# A card that is absent cannot time kernels. Without timing, Triton's matrix products have no tiles for some shapes.
_OPTIONS = {"gpu": {"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": "False"}}


@dataclass(frozen=True)
class Program:
    """One compiled program; bytes and operations are those of one device.

    Attributes:
        name: what it does.
        size: of what it works on, such as "4 × 512 tokens".
        seconds: to trace, lower and compile it.
        temporaries: bytes it holds besides its arguments and results.
        results: bytes of its results, except those that take an argument's place.
        flops: of its matrix products.
        module: its optimised text.
    """

    name: str
    size: str
    seconds: float = 0.0
    temporaries: float = 0.0
    results: float = 0.0
    flops: float = 0.0
    module: Module = field(default_factory=lambda: Module({"": {}}, ""))

    @property
    def working(self) -> float:
        """Bytes that a call needs besides its arguments."""
        return self.temporaries + self.results


class Compiler:
    """Compiles mapped functions for the devices of `placement`, each only once. `dry` compiles nothing."""

    def __init__(self, placement: Placement, dry: bool = False):
        self.placement, self.dry = placement, dry
        self._options = _OPTIONS.get(placement.devices[0].platform)
        self._compiled: dict[Any, Program] = {}

    def program(
        self, name: str, size: str, function: Callable, arguments: Sequence[Any], trips: float = 1.0
    ) -> Program:
        """
        Args:
            function: declared with `over_devices`.
            arguments: static values, and shapes of one device's share of everything else.
            trips: how often a loop runs whose length depends on the data.
        """
        if self.dry:
            return Program(name, size)
        leaves, structure = jax.tree.flatten(tuple(arguments))
        key = (function, structure, tuple(leaves), trips)
        if key not in self._compiled:
            self._compiled[key] = self._compile(name, size, function, arguments, trips)
        return self._compiled[key]

    def lower(self, function: Callable, arguments: Sequence[Any]) -> Any:
        """The program before XLA optimises it."""
        layout: Layout = function.layout  # pyright: ignore[reportFunctionMemberAccess]
        names = list(inspect.signature(function).parameters)
        placed = [self._placed(layout, *pair) for pair in zip(names, arguments, strict=False)]
        mapped: Any = self.placement.map(function)
        return mapped.lower(*placed)

    def weights(self, tree: Any) -> float:
        """Bytes on a device of parameters or state of these shapes."""
        return device_bytes(self.placement.abstract(tree))

    def _compile(
        self, name: str, size: str, function: Callable, arguments: Sequence[Any], trips: float
    ) -> Program:
        start = time.monotonic()
        compiled = self.lower(function, arguments).compile(compiler_options=self._options)
        seconds = time.monotonic() - start
        memory = compiled.memory_analysis()
        return Program(
            name,
            size,
            seconds,
            memory.temp_size_in_bytes,
            memory.output_size_in_bytes - memory.alias_size_in_bytes,
            share_flops(function, arguments, trips),
            Module.parse(compiled.as_text(), trips),
        )

    def _placed(self, layout: Layout, name: str, argument: Any) -> Any:
        if name in layout.static or name in layout.replicated:
            return argument
        return (self.placement.abstract if name in layout.weights else self.placement.abstract_batch)(
            argument
        )


def device_bytes(tree: Any) -> float:
    """Bytes of one device's share of placed shapes."""
    return float(
        sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    )


def share_bytes(tree: Any) -> float:
    """Bytes of shapes as they are: of one device's share of a batch, or of a whole tree on the host."""
    return float(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def share_flops(function: Callable, arguments: Sequence[Any], trips: float) -> float:
    """Of one device's share. Attention counts as plain matrix products, whatever kernel computes it."""
    layout: Layout = function.layout  # pyright: ignore[reportFunctionMemberAccess]
    names = list(inspect.signature(function).parameters)
    static = {n: _plain(a) for n, a in zip(names, arguments, strict=False) if n in layout.static}
    dynamic = {n: a for n, a in zip(names, arguments, strict=False) if n not in layout.static}
    return flops(lambda dynamic: function(**static, **dynamic), dynamic, trips=trips)


def _plain(static: Any) -> Any:
    if isinstance(static, DecoderConfig):
        return dataclasses.replace(static, attention="xla")
    if isinstance(static, StepSettings):
        return dataclasses.replace(static, student=_plain(static.student), teacher=_plain(static.teacher))
    return static


def attention_for(config: DecoderConfig, platform: str) -> DecoderConfig:
    """`config` with "auto" attention decided as on `platform`; otherwise the machine at hand would decide."""
    if config.attention != "auto":
        return config
    fits = platform == "cuda" and why_not_cudnn(config.dtype, 64, config.head_dim) is None
    return dataclasses.replace(config, attention="cudnn" if fits else "xla")


def parameters(config: DecoderConfig) -> Params:
    """Shapes of a model in training, in `param_dtype`."""
    return jax.eval_shape(lambda: models.init(config, jax.random.key(0)))


def frozen(config: DecoderConfig, weights: str = "float") -> Params:
    """Shapes of a model that is not trained, in its compute dtype, or with "int8" kernels."""

    def cast(path, leaf):
        dtype = models.inference_dtype(config, jax.tree_util.keystr(path))
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype))

    params = jax.tree_util.tree_map_with_path(cast, parameters(config))
    return jax.eval_shape(quantise, params) if weights == "int8" else params


def micro_batch(shape: Shape, stored: StoreFormat | None = None) -> MicroBatch:
    """Shapes of one device's share; with what is stored of the teacher, if given."""
    rows, T = jax.ShapeDtypeStruct(shape, jnp.int32), shape.slots
    whole, real = jax.ShapeDtypeStruct((T,), jnp.int32), jax.ShapeDtypeStruct((T,), jnp.float32)
    of_teacher = {}
    if stored is not None:
        nothing = {
            name: np.zeros((0, *of_one), jnp.dtype(dtype)) for name, (dtype, of_one) in stored.tensors.items()
        }
        for name, x in stored.decode(nothing).items():
            of_teacher[name] = jax.ShapeDtypeStruct((T, *x.shape[1:]), x.dtype)
    return MicroBatch(rows, rows, rows, whole, whole, real, **of_teacher)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class TrainingShapes:
    """Shapes of what a training phase computes with.

    Attributes:
        signal: "none", "store" (the teacher's head alone, or nothing of it with its top k) or "live".
        stored: what the store keeps, with "store".
        by_target: coefficients of the loss that a micro-batch has for each target.
        teacher_weights: "float" or "int8", of a live teacher.
    """

    settings: StepSettings
    optimizer: OptimizerSettings
    signal: str = "none"
    stored: StoreFormat | None = None
    by_target: tuple[str, ...] = ()
    teacher_weights: str = "float"

    @property
    def state(self) -> step.TrainState:
        return step.state_shapes(
            make_optimizer(self.optimizer),
            self.settings.student,
            averaged=self.optimizer.ema > 0,
            part=self.settings.part,
        )

    @property
    def frozen(self) -> Params:
        """What is not trained of the model."""
        part, model = self.settings.part, self.settings.student
        if isinstance(part, Lora):
            return attach(jax.eval_shape(lambda: part.scales(model)), frozen(model))
        if isinstance(part, TopLayers):
            return jax.eval_shape(lambda whole: freezing.split(whole, part.layers)[1], parameters(model))
        return {}

    @property
    def params(self) -> Params:
        """As `step.accumulate` takes them."""
        trained = self.state.params
        return trained if self.settings.part is None else trained | {"frozen": self.frozen}

    @property
    def whole(self) -> Params:
        """All parameters, as validations and rollouts read them: `Trainer.whole`."""
        if isinstance(self.settings.part, Lora):
            return attach(self.state.params, self.frozen)
        return parameters(self.settings.student)

    @property
    def joined(self) -> Params:
        """What `Trainer.whole` copies."""
        return self.whole if isinstance(self.settings.part, TopLayers) else {}

    @property
    def sums(self) -> step.Sums:
        return jax.eval_shape(step.zero_sums, self.state.params)

    @property
    def teacher(self) -> Teacher | None:
        if self.signal == "none" or isinstance(self.stored, TopKLogProbs):
            return None
        assert self.settings.teacher is not None
        params = frozen(self.settings.teacher, self.teacher_weights)
        return Teacher(models.head(self.settings.teacher, params), params if self.signal == "live" else None)

    def batch(self, shape: Shape) -> MicroBatch:
        batch = micro_batch(shape, self.stored)
        return batch._replace(**{f"{name}_T": batch.weights_T for name in self.by_target})

    def accumulate_arguments(self, objective: Objective, shape: Shape) -> tuple:
        dropout = self.settings.student.has_dropout
        key = jax.eval_shape(lambda: jax.random.key(0)) if dropout else None
        params, batch = self.params, self.batch(shape)
        return self.settings, objective, params, self.sums, batch, self.teacher, key

    def update_arguments(self, skip_nonfinite: bool) -> tuple:
        rate = jax.ShapeDtypeStruct((), jnp.float32)
        rule = make_optimizer(self.optimizer), self.optimizer.ema, skip_nonfinite
        return *rule, self.state, self.sums, rate


@dataclass(frozen=True)
class Decoding:
    """What generates answers: its programs, and bytes of what they keep on a device.

    Attributes:
        copies: of the parameters, as decoding reads them, as far as they are not shared.
        prefilled: prompts that wait for slots, at most.
        cache: keys, values and tokens of all slots.
        smaller_cache: of the size before, which exists beside `cache` while the slots are enlarged.
        slots: on a device.
    """

    prepare: Program
    prefill: Program
    decode: Program
    copies: float
    prefilled: float
    cache: float
    smaller_cache: float
    slots: int

    @property
    def programs(self) -> tuple[Program, ...]:
        return self.prepare, self.prefill, self.decode

    @property
    def working(self) -> float:
        """The most bytes that a call needs besides what is kept; enlarging the slots is one too."""
        return max(self.prefill.working, self.decode.working, self.smaller_cache)


def decoding(
    compiler: Compiler,
    config: DecoderConfig,
    params: Params,
    rules: SamplingRules,
    slots: int,
    longest_prompt: int,
) -> Decoding:
    """Prefill of the longest prompts, and one decoding step of `slots` sequences of the greatest length.

    Args:
        params: shapes of the parameters that generation is given.
    """
    changing = generation.changed_by_prepare(config, params)
    static = config, generation.is_transposed(compiler.placement)
    layers = jax.eval_shape(partial(generation.prepare, *static), params)
    copies = compiler.weights(jax.eval_shape(partial(generation.prepare, *static), changing))
    prepare = compiler.program("prepare", "the parameters", generation.prepare, (*static, changing))

    rows, length = prefill_shape(longest_prompt, PREFILL_TOKENS)
    length = min(length, config.max_positions)
    prompts = (jax.ShapeDtypeStruct((rows, length), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32))
    size = f"{rows} prompts of {length} tokens"
    prefill = compiler.program("prefill", size, generation.prefill, (config, params, *prompts))
    prefilled = jax.eval_shape(partial(generation.prefill, config), params, *prompts)

    longest = longest_prompt + rules.max_new_tokens
    sizes = sorted({cache_size(config, n) for n in range(1, longest + 1)})
    cached = generation.cache_config(config, compiler.placement)
    smaller, largest = (
        jax.eval_shape(partial(generation.empty_slots, cached, slots, n)) for n in (sizes[-2:] * 2)[-2:]
    )
    decode = compiler.program(
        "decode",
        f"{slots} sequences of {sizes[-1]} tokens",
        generation.decode,
        (config, rules, config.eos_token_ids or (0,), layers, largest, jax.ShapeDtypeStruct((), jnp.int32)),
    )
    return Decoding(
        prepare,
        prefill,
        decode,
        copies,
        MAX_WAITING * share_bytes(prefilled),
        share_bytes(largest),
        share_bytes(smaller) if len(sizes) > 1 else 0.0,
        slots,
    )
