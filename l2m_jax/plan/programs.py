"""The programs of a run, compiled ahead of time for devices that need not be there. Only shapes, never an array."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from l2m_jax import models
from l2m_jax.data.packing import Shape
from l2m_jax.generation import SamplingRules
from l2m_jax.generation import programs as generation
from l2m_jax.losses import Objective
from l2m_jax.models import DecoderConfig
from l2m_jax.models.attention import why_not_cudnn
from l2m_jax.parallel import AXIS, Parallel
from l2m_jax.plan.flops import flops
from l2m_jax.plan.hlo import Module
from l2m_jax.training import step
from l2m_jax.training.optimizer import OptimizerSettings, make_optimizer
from l2m_jax.training.step import StepSettings, Sums, Teacher, TrainState
from l2m_jax.types import MicroBatch, Params

# A card that is not there cannot time kernels. Without timing, Triton's matrix products have no tiles for some shapes.
_OPTIONS = {"gpu": {"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": "False"}}

_PREFILL_TOKENS, _PROMPT = 2048, 128  # a batch as the decode engine makes them


@dataclass(frozen=True)
class Program:
    """One compiled program; bytes and operations are one device's.

    Attributes:
        name: what it does.
        size: of what it works on, such as "4 × 512 tokens".
        seconds: to trace, lower and compile it.
        feed: bytes of its arguments that come with each call, such as a micro-batch.
        temporaries: bytes it holds besides its arguments, results included unless they take an argument's place.
        flops: of its matrix products.
        module: its optimised text.
    """

    name: str
    size: str
    seconds: float
    feed: float
    temporaries: float
    flops: float
    module: Module


def attention_for(config: DecoderConfig, platform: str) -> DecoderConfig:
    """ "auto" as the devices of `platform` would take it: what it looks at otherwise is the machine at hand."""
    if config.attention != "auto":
        return config
    fits = platform == "cuda" and why_not_cudnn(config.dtype, 64, config.head_dim) is None
    return dataclasses.replace(config, attention="cudnn" if fits else "xla")


class Compiler:
    """Compiles for `parallel`'s devices. Trees of shapes with their sharding stand for arrays on them."""

    def __init__(self, parallel: Parallel):
        self.parallel = parallel
        self._options = _OPTIONS.get(parallel.devices[0].platform)

    def placed(self, tree: Any) -> Any:
        """What `Parallel.place` makes of parameters or state."""

        def place(path, x):
            if self.parallel.mapping == "fsdp":
                stacked = "'blocks'" in jax.tree_util.keystr(path)
                return _abstract(x.shape, x.dtype, self.parallel.sharding(x.shape, stacked=stacked))
            return self.fed(x)

        return jax.tree_util.tree_map_with_path(place, tree)

    def fed(self, tree: Any) -> Any:
        """What `Parallel.feed` makes of one device's share: a leading device axis, split."""
        sharding = NamedSharding(self.parallel.mesh, PartitionSpec(AXIS))
        return jax.tree.map(
            lambda x: _abstract((self.parallel.num_devices, *x.shape), x.dtype, sharding), tree
        )

    def everywhere(self, tree: Any) -> Any:
        """The same value on every device."""
        sharding = NamedSharding(self.parallel.mesh, PartitionSpec())
        return jax.tree.map(lambda x: _abstract(x.shape, x.dtype, sharding), tree)

    def compile(
        self,
        name: str,
        size: str,
        mapped: Callable,
        arguments: Sequence[Any],
        *,
        feed: Any = (),
        flops: float,
        trips: float = 1.0,
    ) -> Program:
        start = time.monotonic()
        compiled = mapped.lower(*arguments).compile(compiler_options=self._options)  # type: ignore[attr-defined]
        seconds = time.monotonic() - start
        memory = compiled.memory_analysis()
        return Program(
            name,
            size,
            seconds,
            device_bytes(feed),
            memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
            flops,
            Module.parse(compiled.as_text(), trips),
        )


def _abstract(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def device_bytes(tree: Any) -> float:
    """Bytes of one device's share of placed shapes."""
    return float(
        sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    )


def parameters(config: DecoderConfig) -> Params:
    return jax.eval_shape(lambda: models.init(config, jax.random.key(0)))


def micro_batch(shape: Shape, teacher_width: int | None, dtype: str) -> MicroBatch:
    """Shapes of one device's share; with the teacher's stored hidden states where `teacher_width` is given."""
    rows, T = jax.ShapeDtypeStruct(shape, jnp.int32), shape.slots
    whole, real = jax.ShapeDtypeStruct((T,), jnp.int32), jax.ShapeDtypeStruct((T,), jnp.float32)
    hidden = None if teacher_width is None else jax.ShapeDtypeStruct((T, teacher_width), jnp.dtype(dtype))
    return MicroBatch(rows, rows, rows, whole, whole, real, hidden)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Training:
    """Shapes of what stays on the devices while a model trains, placed."""

    params: Params
    optimizer: Any
    sums: Sums
    teacher: Teacher | None

    @staticmethod
    def of(
        compiler: Compiler, settings: StepSettings, optimizer: OptimizerSettings, teacher: str
    ) -> "Training":
        """`teacher`: "none", "store" (its head alone) or "live"."""
        params = parameters(settings.student)
        signal = None
        if teacher != "none":
            assert settings.teacher is not None
            of_teacher = parameters(settings.teacher)
            signal = Teacher(
                models.head(settings.teacher, of_teacher), of_teacher if teacher == "live" else None
            )
        return Training(
            compiler.placed(params),
            compiler.placed(jax.eval_shape(make_optimizer(optimizer).init, params)),
            compiler.placed(jax.eval_shape(step.zero_sums, params)),
            None if signal is None else compiler.placed(signal),
        )


def accumulate(
    compiler: Compiler,
    settings: StepSettings,
    objective: Objective,
    training: Training,
    shape: Shape,
    store_dtype: str,
    trips: float,
) -> Program:
    """One micro-batch: forward, backward, gradient sums."""
    store = training.teacher is not None and training.teacher.params is None
    width = settings.teacher.embed_size if store and settings.teacher is not None else None
    batch = compiler.fed(micro_batch(shape, width, store_dtype))
    key = jax.eval_shape(lambda: jax.random.key(0)) if _drops(settings.student) else None
    mapped = compiler.parallel.map(step.accumulate, static=(0, 1), donate=(3,), broadcast=(6,))
    arguments = (settings, objective, training.params, training.sums, batch, training.teacher, key)
    return compiler.compile(
        "accumulate",
        f"{shape.rows} × {shape.length} tokens",
        mapped,
        arguments,
        feed=batch,
        flops=accumulate_flops(settings, objective, training, shape, trips),
        trips=trips,
    )


def accumulate_flops(
    settings: StepSettings, objective: Objective, training: Training, shape: Shape, trips: float
) -> float:
    """Of one device; attention is counted as plain matrix products, whatever kernel computes it."""
    teacher_config = None if settings.teacher is None else _plain(settings.teacher)
    plain = dataclasses.replace(settings, student=_plain(settings.student), teacher=teacher_config)
    params = parameters(settings.student)
    teacher, width = None, None
    if training.teacher is not None and settings.teacher is not None:
        of_teacher = parameters(settings.teacher)
        live = training.teacher.params is not None
        teacher = Teacher(models.head(settings.teacher, of_teacher), of_teacher if live else None)
        width = None if live else settings.teacher.embed_size

    def function(params, sums, batch, teacher):
        key = jax.random.key(0) if _drops(settings.student) else None
        return step.accumulate(plain, objective, params, sums, batch, teacher, key)

    sums = jax.eval_shape(step.zero_sums, params)
    return flops(function, params, sums, micro_batch(shape, width, "bfloat16"), teacher, trips=trips)


def update(compiler: Compiler, optimizer: OptimizerSettings, training: Training) -> Program:
    """The sums over all devices, one division, AdamW."""
    transformation = make_optimizer(optimizer)

    def function(state, sums, learning_rate, *, axis_name):
        return step.update(transformation, state, sums, learning_rate, axis_name=axis_name)

    mapped = compiler.parallel.map(function, donate=(0, 1), broadcast=(2,))
    state = TrainState(training.params, training.optimizer)
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    return compiler.compile("update", "once a step", mapped, (state, training.sums, rate), flops=0.0)


def teacher_pass(compiler: Compiler, config: DecoderConfig, shape: Shape) -> Program:
    """The teacher's hidden states at the targets of a micro-batch: what the teacher store keeps."""

    def function(params, batch, *, axis_name):
        del axis_name
        return step.target_hidden(config, params, batch)

    share = micro_batch(shape, None, "float32")
    params, batch = parameters(config), compiler.fed(share)
    return compiler.compile(
        "teacher pass",
        f"{shape.rows} × {shape.length} tokens",
        compiler.parallel.map(function),
        (compiler.placed(params), batch),
        feed=batch,
        flops=flops(lambda p, b: step.target_hidden(_plain(config), p, b), params, share),
    )


@dataclass(frozen=True)
class Decoding:
    """What answers prompts: its programs, and bytes of what they keep on a device.

    Attributes:
        prepared: parameters in the compute type, twice: stacked for prefill, and by layer.
        cache: keys and values of all slots, and their tokens.
    """

    prefill: Program
    decode: Program
    prepared: float
    cache: float


def decoding(
    compiler: Compiler, config: DecoderConfig, rules: SamplingRules, slots: int, length: int
) -> Decoding:
    """Prefill of a batch of prompts, and one decoding step of `slots` sequences with room for `length` tokens."""
    parallel = compiler.parallel
    sharded = parallel.mapping == "fsdp"
    programs = generation.Programs(parallel.mesh, sharded, parallel.num_devices)
    stacked, layers = jax.eval_shape(lambda p: generation.prepare(config, p), parameters(config))
    placed_stacked = compiler.placed(stacked) if sharded else compiler.everywhere(stacked)
    placed_layers = _layers_placed(compiler, layers) if sharded else compiler.everywhere(layers)

    prompt = min(_PROMPT, length)
    prompts = (
        jax.ShapeDtypeStruct((_PREFILL_TOKENS // prompt, prompt), jnp.int32),
        jax.ShapeDtypeStruct((_PREFILL_TOKENS // prompt,), jnp.int32),
    )
    fed = compiler.fed(prompts)
    prefill = compiler.compile(
        "prefill",
        f"{prompts[0].shape[0]} prompts of {prompt} tokens",
        programs.prefill,
        (config, placed_stacked, *fed),
        feed=fed,
        flops=flops(lambda p, *x: generation.prefill(_plain(config), p, *x), stacked, *prompts),
    )
    share = jax.eval_shape(lambda: generation.empty_slots(config, slots, length))
    cache = compiler.fed(share)
    eos = config.eos_token_id if isinstance(config.eos_token_id, int) else 0
    decode = compiler.compile(
        "decode",
        f"{slots} sequences of {length} tokens",
        programs.decode,
        (config, rules, eos, placed_layers, cache, jax.ShapeDtypeStruct((), jnp.int32)),
        flops=flops(lambda p, s: generation.decode(config, rules, eos, p, s, jnp.int32(1)), layers, share),
    )
    prepared = device_bytes(placed_layers) + device_bytes(placed_stacked)
    return Decoding(prefill, decode, prepared, device_bytes(cache))


def _layers_placed(compiler: Compiler, layers: Params) -> Params:
    """A layer keeps the sharding that its stack had, without the layer axis."""
    return jax.tree.map(lambda x: _abstract(x.shape, x.dtype, compiler.parallel.sharding(x.shape)), layers)


def _plain(config: DecoderConfig) -> DecoderConfig:
    return dataclasses.replace(config, attention="xla")


def _drops(config: DecoderConfig) -> bool:
    return bool(max(config.embedding_dropout, config.attention_dropout, config.residual_dropout))
