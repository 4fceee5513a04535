"""What a config asks for, without weights: the sizes of the models, the lengths of the examples, the shapes of batches."""

import collections
import dataclasses
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from l2m_jax import methods, models
from l2m_jax.config import Config
from l2m_jax.curriculum import Stage, steps
from l2m_jax.data.packing import Shape, choose_shapes, pack
from l2m_jax.errors import InputError
from l2m_jax.losses.chunks import choose_chunk_size, sizes_of_chunk
from l2m_jax.methods import Method
from l2m_jax.models import Compute, DecoderConfig, Model, random_config, with_compute
from l2m_jax.models.hf.published import PUBLISHED
from l2m_jax.run import data as run_data
from l2m_jax.run import tokenizers
from l2m_jax.run.artefacts import Artefact
from l2m_jax.run.distillation import longest_row
from l2m_jax.run.responses import longest_prompt
from l2m_jax.training.optimizer import FineTuning, Pretraining, Training

# Dolly by the paper's rules (at most 1,024 GPT-2 tokens with the prompt): every 32nd part of 11,500 training examples.
_DOLLY_LENGTHS = (
    33, 46, 51, 55, 58, 62, 67, 72, 78, 85, 91, 97, 102, 109, 116, 124, 132, 142, 152, 163, 176, 191, 207, 222,
    239, 260, 285, 316, 353, 403, 482, 619, 1023,
)  # fmt: skip
_DOLLY_RESPONSE_SHARE = 0.4
_DOLLY_ROWS = 11_500
_TEXT_TOKENS = 1_000_000  # of a text that is not on this machine
_SAMPLED_BATCHES = 64


class Batches(NamedTuple):
    """How one training phase packs its batches.

    Attributes:
        shapes: of the micro-batches that it may use.
        micro_batches: how many of each shape an update takes, on average.
        size: examples in a batch.
    """

    shapes: tuple[Shape, ...]
    micro_batches: dict[Shape, float]
    size: int

    @property
    def largest(self) -> Shape:
        return max(self.micro_batches, key=lambda shape: shape.cost)


@dataclass(frozen=True)
class Workload:
    """
    Attributes:
        teacher, student: computed as on the target.
        lengths, prompt_lengths, response_lengths: tokens of each training example, of its prompt, and its targets.
        num_devices: that share the work.
        assumptions: sentences about what was not known.
    """

    config: Config
    teacher: DecoderConfig
    student: DecoderConfig
    lengths: np.ndarray
    prompt_lengths: np.ndarray
    response_lengths: np.ndarray
    num_devices: int
    assumptions: tuple[str, ...]

    @property
    def response_tokens(self) -> float:
        """Targets of an example, on average."""
        return float(self.response_lengths.mean())

    def method(self, name: str) -> Method:
        c = self.config
        return methods.get(name, c.overrides, c.rollouts, c.curriculum)

    def stages(self, method: Method) -> tuple[Stage, ...]:
        order = np.arange(len(self.lengths))
        curriculum = self.config.curriculum.in_examples(self.lengths)
        return methods.stages(method, curriculum, order, self.config.student_seed)

    def updates(self, method: Method) -> int:
        return steps(self.stages(method), self.config.training.batch_size)

    def longest_prompt(self, model: DecoderConfig) -> int:
        c = self.config
        room = longest_prompt(model, c.sampling, c.data.max_prompt_length)
        return max(1, min(int(self.prompt_lengths.max()), room))

    def pretraining(self, role: str) -> Pretraining:
        """The settings of `role`: "teacher" or "student"."""
        return getattr(self.config, role).pretrain

    def of_text(self, pretrain: Pretraining) -> "Workload":
        """The same with the sequences of the text as its examples. All of a file: four bytes a token."""
        file = Path(pretrain.text)
        tokens = pretrain.tokens or (file.stat().st_size // 4 if file.is_file() else _TEXT_TOKENS)
        targets = pretrain.sequence_length - 1
        count = max(1, math.ceil(tokens / targets))
        lengths = np.full(count, min(pretrain.sequence_length, tokens + 1), np.int32)
        one = np.ones(count, np.int32)
        return dataclasses.replace(self, lengths=lengths, prompt_lengths=one, response_lengths=lengths - one)

    def of_rows(self, rows: int) -> "Workload":
        """The same with so many training examples; of more than there are, as long as these."""
        names = ("lengths", "prompt_lengths", "response_lengths")
        return dataclasses.replace(self, **{name: np.resize(getattr(self, name), rows) for name in names})

    def fine_tuning_batches(self, settings: FineTuning | Pretraining) -> Batches:
        return self._batches(settings, int(self.lengths.max()))

    def batches(self, method: Method) -> Batches:
        """Those of a student's training; its rows have room for the responses that the method generates."""
        c = self.config
        models = [self.student, *([self.teacher] if methods.needs_teacher(method, c.curriculum) else [])]
        limit = min(c.data.max_length, *(model.max_positions for model in models))
        rules = [] if method.on_references_alone else [c.sampling]
        return self._batches(c.training, longest_row(self.lengths, self.prompt_lengths, rules, limit))

    def _batches(self, settings: Training, longest: int) -> Batches:
        size, devices = settings.batch_size, self.num_devices
        shapes = choose_shapes(
            self.lengths, size, devices, max_length=longest, max_shapes=self.config.max_shapes
        )
        random = np.random.default_rng(0)
        counts: collections.Counter[Shape] = collections.Counter()
        for _ in range(_SAMPLED_BATCHES):
            batch = random.choice(self.lengths, min(size, len(self.lengths)), replace=False)
            counts.update(packed.shape for packed in pack(batch.tolist(), shapes, devices))
        used = {shape: counts[shape] / _SAMPLED_BATCHES for shape in shapes if counts[shape]}
        return Batches(shapes, used, size)

    def vocabulary_trips(self, batches: Batches, shape: Shape, vocab_size: int) -> float:
        """How often each loop of the loss runs in a micro-batch of `shape` on a device, on average.

        One loop goes over chunks of targets. With a large vocabulary, others go over fractions of a chunk. All are
        counted equally often, so that together they do the work of the targets.
        """
        slots = sum(s.slots * n for s, n in batches.micro_batches.items()) * self.num_devices
        targets = self.response_tokens * min(batches.size, len(self.lengths)) / slots * shape.slots
        sizes = sizes_of_chunk(choose_chunk_size(shape.slots, self.config.chunk_size), vocab_size)
        return max(1, math.ceil(targets / sizes[-1])) * sizes[-1] / sum(sizes)


def workload(config: Config, platform: str, num_devices: int) -> Workload:
    """
    Args:
        platform: "cuda", "tpu" or "cpu": decides the compute dtype where the config leaves it open.

    Raises:
        InputError: a model whose architecture is neither here nor known.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokens, tokenizer, assumptions = _data(config, Path(folder))
    if config.data.trim_vocabulary:
        assumptions += ("the whole vocabulary, because it is trimmed by the run",)
    teacher = _architecture(config.teacher.model, "teacher", tokenizer)
    if config.student.model.init == "teacher_layers":
        student = teacher.keep_layers(config.student.model.layers)
    else:
        student = _architecture(config.student.model, "student", tokenizer)
    return Workload(
        config,
        _computed(teacher, config.teacher.compute, platform, tokenizer),
        _computed(student, config.student.compute, platform, tokenizer),
        *tokens,
        num_devices,
        assumptions,
    )


def _computed(model: DecoderConfig, compute: Compute, platform: str, tokenizer: Any) -> DecoderConfig:
    tokens = model.valid_vocab_size if tokenizer is None else len(tokenizer)
    model = dataclasses.replace(model, valid_vocab_size=min(model.valid_vocab_size, tokens))
    return with_compute(model, compute, platform)


def _architecture(model: Model, who: str, tokenizer: Any) -> DecoderConfig:
    if not model.path:
        if tokenizer is None:
            raise InputError(
                f"config.{who}.model.path: empty, and the size of its vocabulary is not known without a tokenizer; "
                "set config.data.tokenizer to a folder"
            )
        return random_config(model.architecture, tokenizer)
    if model.path in PUBLISHED:
        return PUBLISHED[model.path]
    try:
        return models.read_config(model.path)
    except InputError as error:
        raise InputError(
            f"config.{who}.model.path: {error}; without a network, the plan knows {', '.join(PUBLISHED)}"
        ) from error


_Lengths = tuple[np.ndarray, np.ndarray, np.ndarray]


def _data(config: Config, folder: Path) -> tuple[_Lengths, Any, tuple[str, ...]]:
    """Lengths of examples, prompts and targets, the tokenizer if it is on this machine, and what was assumed."""
    data = config.data
    tokenizer = _tokenizer(config, folder)
    if tokenizer is not None and (data.source == "synthetic" or Path(data.train).exists()):
        rows = Artefact(run_data.corpus_inputs(data, "train", tokenizer), folder / "train")
        (train,) = run_data.make_corpora([rows], data.processes)
        # Copied, because the files are deleted with the folder.
        lengths = (np.array(train.lengths), np.array(train.prompt_lengths), np.array(train.response_lengths))
        return lengths, tokenizers.load(tokenizer), ()
    rows = data.train_rows or _DOLLY_ROWS
    points = np.linspace(0, len(_DOLLY_LENGTHS) - 1, rows)
    lengths = np.interp(points, np.arange(len(_DOLLY_LENGTHS)), _DOLLY_LENGTHS).round().astype(np.int32)
    lengths = np.minimum(lengths, data.max_length) if data.truncate else lengths[lengths <= data.max_length]
    prompt_lengths = (lengths * (1 - _DOLLY_RESPONSE_SHARE)).astype(np.int32)
    assumed = (
        f"{len(lengths):,} training examples as long as Dolly's ({lengths.mean():.0f} tokens on average, "
        f"{100 * _DOLLY_RESPONSE_SHARE:.0f}% of them response), because {data.train!r} and its tokenizer are not on "
        "this machine"
    )
    known = None if tokenizer is None else tokenizers.load(tokenizer)
    return (lengths, prompt_lengths, lengths - prompt_lengths), known, (assumed,)


def _tokenizer(config: Config, folder: Path) -> tokenizers.Tokenizer | None:
    source = config.data.tokenizer or config.teacher.model.path
    if source and not Path(source).exists():
        return None
    if given := tokenizers.given_tokenizer(config.data, config.teacher.model.path):
        return given
    synthetic = tokenizers.relevant_synthetic(config.data)
    found = Artefact(tokenizers.TokenizerInputs(synthetic), folder / "tokenizer")
    tokenizers.make_tokenizer(found)
    return found
