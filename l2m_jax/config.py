"""All settings of a run: the nested settings dataclasses of the components.

A file in `configs/` starts from `defaults()`, changes what it needs and returns the ConfigDict. `parse` turns that into
a validated `Config`, which the rest of the package uses.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict

from l2m_jax import methods
from l2m_jax.curriculum import Curriculum
from l2m_jax.data.settings import Data
from l2m_jax.errors import InputError, require_at_least, require_choice, require_positive, shown
from l2m_jax.evaluation.settings import Evaluation
from l2m_jax.generation.sampling import SamplingRules
from l2m_jax.methods import Overrides, Rollouts
from l2m_jax.models.freezing import Part
from l2m_jax.models.lora import Lora
from l2m_jax.models.settings import Compute, Model
from l2m_jax.multihost import Devices
from l2m_jax.training.optimizer import FineTuning, Pretraining, Training
from l2m_jax.training.trackers import TRACKERS

STORE_DTYPES = ("float32", "bfloat16", "float16", "int8")
_SEEDS = 10_000  # of a world: further ones would be those of the next


@dataclass(frozen=True)
class Teacher:
    model: Model = field(default_factory=Model)
    compute: Compute = field(default_factory=Compute)
    pretrain: Pretraining = field(default_factory=Pretraining)  # on plain text, before the fine-tuning
    finetune: FineTuning = field(default_factory=FineTuning)  # epochs = 0: no fine-tuning
    signal: str = "store"  # "store" (computed once) or "live"
    store_dtype: str = "bfloat16"
    store_top_k: int = (
        0  # store the log-probabilities of so many tokens (0: final hidden states, which give all)
    )
    store_tail: bool = (
        True  # with store_top_k, the other tokens are one further class of the loss; or left out
    )
    weights: str = (
        "float"  # of its signal: "float" (in the compute dtype), or "int8" for the kernels of its layers
    )
    world: int = 0  # whose training rows and seed it has (-1: those of `world`)
    train_rows: int = 0  # to fine-tune on, from the first of that world on (0: data.train_rows)

    def __post_init__(self):
        require_choice(self, "signal", ("store", "live"))
        require_choice(self, "store_dtype", STORE_DTYPES)
        require_choice(self, "weights", ("float", "int8"))
        require_at_least(self, -1, "world")
        require_at_least(self, 0, "train_rows", "store_top_k")
        if self.store_top_k and self.store_dtype == "int8":
            raise InputError(
                f"store_top_k: log-probabilities of {self.store_top_k} tokens have no form in int8; choose another "
                "store_dtype"
            )
        if self.pretrain.from_teacher:
            raise InputError("pretrain.from_teacher: for students only")
        if self.model.init == "teacher_layers":
            raise InputError("model.init: 'teacher_layers' is for students only")

    @property
    def has_weights(self) -> bool:
        """Whether the teacher has learnt a language before its fine-tuning."""
        return bool(self.pretrain.text) or (bool(self.model.path) and self.model.init == "pretrained")


@dataclass(frozen=True)
class Student:
    model: Model = field(default_factory=Model)
    compute: Compute = field(default_factory=Compute)
    pretrain: Pretraining = field(default_factory=Pretraining)  # on plain text, before the warm-up
    # Before the ranking; random weights need it.
    warmup: FineTuning = field(default_factory=lambda: FineTuning(epochs=0))
    lora: Lora = field(default_factory=Lora)  # distillation trains adapters instead of the student's weights
    seed: int = -1  # only of distillation: order of examples, dropout, random subsets, rollouts (-1: as seed)

    def __post_init__(self):
        require_at_least(self, -1, "seed")


@dataclass(frozen=True)
class Config:
    seed: int = 42
    # Each world has other training rows, another initial student and ranking, and another seed of the distillation.
    # Validation and test rows, the tokenizer and (see `teacher.world`) the teacher are the same in all worlds.
    world: int = 0
    method: str = "l2m"
    baselines: tuple[str, ...] = ()  # methods to train as well, on the same budget
    data: Data = field(default_factory=Data)
    teacher: Teacher = field(default_factory=Teacher)
    student: Student = field(default_factory=Student)
    curriculum: Curriculum = field(default_factory=Curriculum)
    overrides: Overrides = field(default_factory=Overrides)
    training: Training = field(default_factory=Training)  # of the student, in each stage
    rollouts: Rollouts = field(default_factory=Rollouts)
    sampling: SamplingRules = field(default_factory=SamplingRules)
    evaluation: Evaluation = field(default_factory=Evaluation)
    devices: Devices = field(default_factory=Devices)
    max_shapes: int = 4  # maximum number of compiled shapes of packed rows in a phase
    chunk_size: int = 512  # tokens whose logits are held at once
    checkpoint_minutes: float = 10.0  # minutes between checkpoints within a stage; 0: as often as possible
    # Skip batches whose loss or gradient is not finite, instead of ending the run. Without such batches, it changes nothing.
    skip_nonfinite: bool = False
    tracking: tuple[str, ...] = ()  # of "tensorboard", "wandb", "trackio", "mlflow": docs/tracking.md

    def __post_init__(self):
        require_at_least(self, 0, "seed", "world", "checkpoint_minutes")
        for name, seed in (("seed", self.seed), ("student.seed", self.student.seed)):
            if seed >= _SEEDS:
                raise InputError(f"{name}: {seed} is a seed of another world; choose one below {_SEEDS}")
        for name, world in (("world", self.world), ("teacher.world", self.teacher.world)):
            if world > 0 and self.data.source == "files" and not self.data.train_rows:
                raise InputError(
                    f"{name}: {world} has no training rows of its own, as world 0 takes all; set data.train_rows"
                )
        require_positive(self, "max_shapes", "chunk_size")
        if self.teacher.train_rows and self.data.source == "synthetic":
            raise InputError(
                f"teacher.train_rows: {self.teacher.train_rows} is for rows from files; of synthetic tasks, teacher and "
                "student have equally many"
            )
        for setting, names in (("method", (self.method,)), ("baselines", self.baselines)):
            for name in names:
                methods.require(name, setting)
                methods.get(name, self.overrides, self.rollouts, self.curriculum)
        self._check_tail()
        if self.student.lora.rank and self.training.trainable_layers:
            raise InputError(
                f"student.lora.rank: {self.student.lora.rank} freezes all layers, and training.trainable_layers "
                f"{self.training.trainable_layers} trains some; set one of them to 0"
            )
        pretrain, teacher = self.student.pretrain, self.teacher
        for setting, used in (
            ("student.pretrain.from_teacher", pretrain.from_teacher),
            ("student.model.init", self.student.model.init == "teacher_layers"),
        ):
            if pretrain.text and used and not teacher.has_weights:
                raise InputError(
                    f"{setting}: the student is pretrained before the teacher is fine-tuned, when the teacher has random "
                    "weights; give teacher.model.path or teacher.pretrain.text"
                )
        if self.data.trim_vocabulary and "synthetic" in (pretrain.text, teacher.pretrain.text):
            raise InputError(
                f"data.trim_vocabulary: {self.data.trim_vocabulary} is for texts from files, and a model is pretrained on "
                "synthetic text"
            )
        if unknown := [name for name in self.tracking if name not in TRACKERS]:
            raise InputError(f"tracking: no tracker {shown(unknown[0])} (known: {', '.join(TRACKERS)})")
        if len(set(self.tracking)) < len(self.tracking):
            raise InputError(f"tracking: {', '.join(self.tracking)} names one twice; name each once")
        if twice := [name for name in self.method_names if self.method_names.count(name) > 1]:
            raise InputError(f"baselines: {twice[0]!r} is named twice; each method is trained once")

    def _check_tail(self) -> None:
        """The tail of the teacher's top k has no mass at another temperature than 1."""
        teacher = self.teacher
        if not teacher.store_top_k or not teacher.store_tail:
            return
        for name in self.method_names:
            method = methods.get(name, self.overrides, self.rollouts, self.curriculum)
            if not self.reads_store(method):
                continue
            temperatures = methods.coefficients(method, self.curriculum)["temperature"].values
            if any(temperature != 1 for temperature in temperatures):
                raise InputError(
                    f"teacher.store_tail: the mass of the tokens beyond the top {teacher.store_top_k} is known at "
                    f"temperature 1 alone, and {name} has others; set store_tail to False, or store_top_k to 0"
                )

    @property
    def method_names(self) -> tuple[str, ...]:
        """The method and its baselines."""
        return (self.method, *self.baselines)

    def reads_store(self, method: methods.Method) -> bool:
        """Whether the teacher's signal for `method` comes from the teacher store."""
        stored = self.teacher.signal == "store" and method.on_references_alone
        return stored and methods.needs_teacher(method, self.curriculum)

    @property
    def student_seed(self) -> int:
        """The seed of everything random in the distillation."""
        return self.seed_of(self.world, self.student.seed)

    @property
    def student_part(self) -> Part | None:
        """What distillation trains of the student; None: all of it."""
        return self.student.lora if self.student.lora.rank else self.training.part

    @property
    def teacher_world(self) -> int:
        return self.world if self.teacher.world < 0 else self.teacher.world

    def seed_of(self, world: int, seed: int = -1) -> int:
        """The seed `seed` (-1: that of the config) in a world: another one for each pair."""
        return (self.seed if seed < 0 else seed) + _SEEDS * world


PRESETS: dict[str, dict[str, Any]] = {
    # The paper's protocol: at most 1,024 tokens (longer examples are dropped), top-k 50, at most 512 new tokens.
    "paper": {},
    # MiniLLM's: at most 256 prompt tokens, 512 in total, 256 new ones, no repeated 6-gram, the whole vocabulary.
    "minillm": {
        "data.max_length": 512,
        "data.max_prompt_length": 256,
        "data.truncate": True,
        "sampling.top_k": 0,
        "sampling.max_new_tokens": 256,
        "sampling.no_repeat_ngram": 6,
    },
    # The protocol of POCL (arXiv 2506.05695), by the same authors, from its published arguments: MiniLLM's lengths, larger
    # batches, the last student and not the best, and nearly greedy answers for the ranking.
    "pocl": {
        "method": "pocl",
        "data.max_length": 512,
        "data.max_prompt_length": 256,
        "data.truncate": True,
        "sampling.top_k": 0,
        "sampling.max_new_tokens": 256,
        "sampling.no_repeat_ngram": 6,
        "training.batch_size": 64,
        "training.learning_rate": 1e-4,
        "training.warmup_fraction": 0.0,
        "training.schedule": "cosine",
        "curriculum.ranking_temperature": 0.01,
        "evaluation.validation_rows": 500,
        "evaluation.select": "last",
    },
}


def to_dict(value: Any) -> Any:
    """A settings dataclass as nested dicts."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value


def defaults(preset: str = "paper") -> ConfigDict:
    """All settings at their defaults, with those of a protocol (a name in `PRESETS`)."""
    config = ConfigDict(to_dict(Config()))
    config.update_from_flattened_dict(PRESETS[preset])
    return config


def parse(config: ConfigDict | dict[str, Any]) -> Config:
    """The validated settings.

    Raises:
        InputError: names an unknown setting, a value of the wrong type, or one out of range.
    """
    values = config.to_dict() if isinstance(config, ConfigDict) else config
    return _build(Config, values, "config")


def change(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with changed settings, as in `{"curriculum.alpha": 0.3}`."""
    changed = ConfigDict(to_dict(config))
    changed.update_from_flattened_dict(changes)
    return parse(changed)


def _build(kind: type, values: Any, place: str) -> Any:
    if not isinstance(values, Mapping):
        raise InputError(f"{place}: expected settings by name, got {shown(values)}")
    hints = typing.get_type_hints(kind)
    unknown = set(values) - set(hints)
    if unknown:
        name = min(map(str, unknown))
        near = difflib.get_close_matches(name, hints, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(hints)}"
        raise InputError(f"{place}.{name if len(name) < 80 else shown(name)}: no such setting ({hint})")
    built = {}
    for name, value in values.items():
        hint, where = hints[name], f"{place}.{name}"
        if dataclasses.is_dataclass(hint):
            built[name] = _build(typing.cast(type, hint), value, where)
        else:
            built[name] = _convert(hint, value, where)
    try:
        return kind(**built)
    except InputError as error:
        raise InputError(f"{place}.{error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, types.GenericAlias):  # tuple[X, ...]
        if not isinstance(value, tuple | list):
            raise InputError(f"{where}: expected a tuple such as (1, 2), got {shown(value)}")
        return tuple(_convert(hint.__args__[0], item, where) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**63 else value  # a larger one is refused as out of range
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise InputError(f"{where}: expected {hint.__name__}, got {shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where}: {value} must be a finite number")
    return value
