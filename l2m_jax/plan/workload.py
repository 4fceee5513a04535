"""What a config asks for, without weights: the models' sizes, the examples' lengths, the shapes of its batches."""

import collections
import dataclasses
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from l2m_jax import config as settings
from l2m_jax import methods, models
from l2m_jax.curriculum import Stage, steps
from l2m_jax.data.packing import Shape, choose_shapes, pack
from l2m_jax.errors import InputError
from l2m_jax.losses.chunks import choose_chunk_size, parts_of_chunk
from l2m_jax.models import DecoderConfig
from l2m_jax.models.hf.published import PUBLISHED
from l2m_jax.run import build

# Dolly by the paper's rules (at most 1,024 GPT-2 tokens with the prompt): every 32nd part of 11,500 training examples.
_DOLLY_LENGTHS = (
    33, 46, 51, 55, 58, 62, 67, 72, 78, 85, 91, 97, 102, 109, 116, 124, 132, 142, 152, 163, 176, 191, 207, 222,
    239, 260, 285, 316, 353, 403, 482, 619, 1023,
)  # fmt: skip
_DOLLY_RESPONSE_SHARE = 0.4
_DOLLY_ROWS = 11_500
_SAMPLED_BATCHES = 64


@dataclass(frozen=True)
class Workload:
    """
    Attributes:
        lengths: tokens of each training example.
        response_tokens: targets of an example, on average.
        micro_batches: how many of each shape an update takes, on average.
        stages: of the student's training.
        assumptions: sentences on what was not known.
    """

    config: settings.Config
    teacher: DecoderConfig
    student: DecoderConfig
    lengths: np.ndarray
    response_tokens: float
    shapes: tuple[Shape, ...]
    micro_batches: dict[Shape, float]
    stages: tuple[Stage, ...]
    assumptions: tuple[str, ...]

    @property
    def updates(self) -> int:
        return steps(self.stages, self.config.training.batch_size)

    @property
    def largest(self) -> Shape:
        return max(self.micro_batches, key=lambda shape: shape.cost)

    @property
    def longest_sequence(self) -> int:
        """Prompt and answer together, as far as decoding goes."""
        longest = int(self.lengths.max() * (1 - self.response_tokens / self.lengths.mean()))
        return min(longest + self.config.sampling.max_new_tokens, self.student.max_positions)


def workload(config: settings.Config, platform: str, num_devices: int) -> Workload:
    """
    Args:
        platform: "cuda", "tpu" or "cpu": decides the compute type where the config leaves it open.

    Raises:
        InputError: a model whose architecture is neither here nor known.
    """
    with tempfile.TemporaryDirectory() as folder:
        lengths, response_tokens, tokenizer, assumptions = _data(config, Path(folder))
    teacher = _architecture(config.teacher.model, "teacher", tokenizer)
    student_model = config.student.model
    if student_model.init == "teacher_layers":
        student = dataclasses.replace(teacher, num_layers=len(student_model.layers))
    else:
        student = _architecture(student_model, "student", tokenizer)
    shapes = choose_shapes(
        lengths,
        batch_size=config.training.batch_size,
        num_devices=num_devices,
        max_shapes=config.max_shapes,
    )
    method = methods.get(config.method, config)
    return Workload(
        config=config,
        teacher=build.computed_as(teacher, config.teacher.model, platform),
        student=build.computed_as(student, student_model, platform),
        lengths=lengths,
        response_tokens=response_tokens,
        shapes=shapes,
        micro_batches=_micro_batches(lengths, shapes, config.training.batch_size, num_devices),
        stages=methods.stages(method, config, np.arange(len(lengths))),
        assumptions=tuple(assumptions),
    )


def _architecture(model: settings.Model, who: str, tokenizer: Any) -> DecoderConfig:
    if not model.path:
        if tokenizer is None:
            raise InputError(
                f"config.{who}.model.path: empty, and the size of its vocabulary is not known without a tokenizer; "
                "set config.data.tokenizer to a folder"
            )
        return build.architecture(model.architecture, tokenizer)
    if model.path in PUBLISHED:
        return PUBLISHED[model.path]
    try:
        return models.read_config(model.path)
    except InputError as error:
        raise InputError(
            f"config.{who}.model.path: {error}; without a network, the plan knows {', '.join(PUBLISHED)}"
        ) from error


def _data(config: settings.Config, folder: Path) -> tuple[np.ndarray, float, Any, list[str]]:
    """Lengths, mean response length, the tokenizer where it is here, and what was assumed."""
    data = config.data
    tokenizer = None
    source = data.tokenizer or config.teacher.model.path
    if data.source == "synthetic" or (source and Path(source).exists()):
        tokenizer = build.build_tokenizer(config, folder / "tokenizer")
    if tokenizer is not None and (data.source == "synthetic" or Path(data.train).is_file()):
        train = build.build_splits(data, tokenizer, folder).train
        # Copied, for the files go with the folder.
        return np.array(train.lengths), float(train.response_lengths.mean()), tokenizer, []
    rows = data.train_rows or _DOLLY_ROWS
    points = np.linspace(0, len(_DOLLY_LENGTHS) - 1, rows)
    lengths = np.interp(points, np.arange(len(_DOLLY_LENGTHS)), _DOLLY_LENGTHS).round().astype(np.int32)
    lengths = np.minimum(lengths, data.max_length) if data.truncate else lengths[lengths <= data.max_length]
    response_tokens = _DOLLY_RESPONSE_SHARE * float(lengths.mean())
    assumed = (
        f"{len(lengths):,} training examples as long as Dolly's ({lengths.mean():.0f} tokens, {response_tokens:.0f} "
        f"of them response, on average), for {data.train!r} and its tokenizer are not here"
    )
    return lengths, response_tokens, tokenizer, [assumed]


def _micro_batches(
    lengths: np.ndarray, shapes: tuple[Shape, ...], batch_size: int, num_devices: int
) -> dict[Shape, float]:
    random = np.random.default_rng(0)
    counts: collections.Counter[Shape] = collections.Counter()
    for _ in range(_SAMPLED_BATCHES):
        batch = random.choice(lengths, min(batch_size, len(lengths)), replace=False)
        counts.update(packed.shape for packed in pack(batch.tolist(), shapes, num_devices))
    return {shape: counts[shape] / _SAMPLED_BATCHES for shape in shapes if counts[shape]}


def vocabulary_trips(workload: Workload, shape: Shape, num_devices: int) -> float:
    """How often each loop of the loss runs in a micro-batch of `shape` on a device, on average.

    One goes over chunks of targets and, with a large vocabulary, another over parts of one. Both are counted equally
    often, so that together they do the work of the targets.
    """
    slots = sum(s.slots * n for s, n in workload.micro_batches.items()) * num_devices
    tokens = workload.response_tokens * min(workload.config.training.batch_size, len(workload.lengths))
    targets = tokens / slots * shape.slots
    chunk_size = choose_chunk_size(shape.slots, workload.config.chunk_size)
    parts = parts_of_chunk(chunk_size, workload.student.vocab_size)
    needed = max(1, math.ceil(targets / (chunk_size // parts)))
    return needed if parts == 1 else needed / (parts + 1)
