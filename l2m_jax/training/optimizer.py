"""AdamW with the paper's settings. The learning rate is an argument of the step, so schedules compile nothing."""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import jax
import optax

from l2m_jax.errors import (
    InputError,
    require_at_least,
    require_choice,
    require_fraction,
    require_positive,
)
from l2m_jax.models.freezing import TopLayers
from l2m_jax.types import Params

SCHEDULES = ("linear", "cosine", "constant", "wsd")
_DECAYED = ("kernel", "embedding", "lora_a", "lora_b")


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its learning rate. The defaults are the paper's values.

    Raises:
        InputError: a value outside its range.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 0.01  # not on biases and norms
    adam_b1: float = 0.9
    adam_b2: float = 0.999
    clip_norm: float = 1.0
    warmup_fraction: float = 0.1  # of the updates
    schedule: str = "linear"  # after the warm-up: one of `SCHEDULES`; all but "constant" fall to 0
    decay_fraction: float = (
        0.1  # of the updates after the warm-up, in which "wsd" (warm-up, stable, decay) falls
    )
    # The top layers are trained, with the final norm; the others, embeddings and head stay as they are (0: all are trained).
    trainable_layers: int = field(default=0, metadata={"absent_at_default": True})
    ema: float = 0.0  # decay per step of an average of the weights, which is validated and kept instead of them (0: none)

    def __post_init__(self):
        require_positive(self, "learning_rate", "clip_norm")
        require_at_least(self, 0, "weight_decay", "trainable_layers")
        require_fraction(self, "adam_b1", "adam_b2", below_one=True)
        require_fraction(self, "warmup_fraction")
        require_choice(self, "schedule", SCHEDULES)
        require_positive(self, "decay_fraction")
        require_fraction(self, "decay_fraction")
        require_fraction(self, "ema", below_one=True)

    @property
    def part(self) -> TopLayers | None:
        """What is trained of the model; None: all of it."""
        return TopLayers(self.trainable_layers) if self.trainable_layers else None

    @property
    def relevant(self) -> Self:
        """The same with what changes nothing at its default."""
        if self.schedule == "wsd":
            return self
        return dataclasses.replace(self, decay_fraction=OptimizerSettings.decay_fraction)


def decayed(params: Params) -> Params:
    """True for the leaves with weight decay: matrices and embeddings, but not biases and norms.

    Decided by name and not by rank, because a norm's scale, stacked over layers, is a matrix as well.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: str(path[-1].key) in _DECAYED, params)


@functools.cache  # equal settings give the same object, which a compiled step depends on
def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
    """Clipping, Adam and decoupled weight decay. The step multiplies the result by minus the learning rate."""
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.scale_by_adam(b1=settings.adam_b1, b2=settings.adam_b2),
        optax.add_decayed_weights(settings.weight_decay, mask=decayed),
    )


def learning_rate_schedule(settings: OptimizerSettings, steps: int) -> Callable[[int], float]:
    """Learning rate of each of `steps` updates: rises linearly during the warm-up, then follows `schedule`."""
    warmup = min(max(round(settings.warmup_fraction * steps), 0), steps - 1)
    peak = settings.learning_rate

    def rate(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / (warmup + 1)
        if settings.schedule == "linear":
            return peak * (steps - step) / (steps - warmup)
        left = (steps - step) / (steps - warmup)
        if settings.schedule == "cosine":
            return peak * (1 - math.cos(math.pi * left)) / 2
        return peak * min(1.0, left / settings.decay_fraction) if settings.schedule == "wsd" else peak

    return rate


@dataclass(frozen=True)
class Training(OptimizerSettings):
    """How a model is trained on batches of examples.

    Raises:
        InputError: a value outside its range.
    """

    batch_size: int = 16  # examples an update, over all devices
    dropout: float = -1.0  # negative: the rates that the model was published with

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "batch_size")
        if not self.dropout < 1:
            raise InputError(f"dropout: {self.dropout!r} must be below 1 (negative: the model's own rates)")


@dataclass(frozen=True)
class FineTuning(Training):
    """Supervised fine-tuning on the reference responses, for a number of epochs.

    Raises:
        InputError: a value outside its range.
    """

    epochs: int = 10  # 0: none
    # A budget instead of epochs, which may be less than one pass (0: by epochs).
    examples: int = field(default=0, metadata={"absent_at_default": True})

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, 0, "epochs", "examples")

    @property
    def trains(self) -> bool:
        return self.epochs > 0 or self.examples > 0

    def examples_of(self, rows: int) -> int:
        """The number of examples that are seen of `rows` rows, with repetitions."""
        return self.examples or self.epochs * rows


@dataclass(frozen=True)
class Pretraining(Training):
    """Learning a language from plain text, before any task; every token carries loss.

    Raises:
        InputError: a value outside its range.
    """

    text: str = ""  # a text file or JSON lines (see `data/text.py`), or "synthetic"; empty: no pretraining
    tokens: int = 1_000_000  # of the text, from its beginning (0: all)
    epochs: int = 1
    sequence_length: int = 512  # tokens of a sequence; `batch_size` counts sequences
    from_teacher: bool = (
        False  # a student learns by KL from the teacher before its fine-tuning, not by cross-entropy
    )
    seed: int = -1  # of random weights, the synthetic text, the order of sequences and dropout (-1: as seed)

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, 0, "tokens")
        require_positive(self, "epochs")
        require_at_least(self, 2, "sequence_length")
        require_at_least(self, -1, "seed")
        if self.text == "synthetic" and not self.tokens:
            raise InputError("tokens: 0 is for files; give the number of tokens of synthetic text")

    def examples_of(self, sequences: int) -> int:
        """The number of sequences that are seen, with repetitions."""
        return self.epochs * sequences
