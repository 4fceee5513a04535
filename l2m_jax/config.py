"""Every setting of a run, as frozen dataclasses.

A file in `configs/` starts from `defaults()`, changes what it needs and returns the ConfigDict; `parse` turns
that into a validated `Config`. Nothing else in the package sees a ConfigDict.
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

from l2m_jax.errors import InputError


@dataclass(frozen=True)
class SyntheticData:
    """Graded instruction tasks made from a seed (`data.source = "synthetic"`)."""

    train: int = 2000
    validation: int = 100
    test: int = 200
    seed: int = 0
    tokenizer_size: int = 1024  # entries of the tokenizer trained on the tasks


@dataclass(frozen=True)
class Data:
    source: str = "files"  # "files" (JSON lines or hub names in train, validation, test) or "synthetic"
    train: str = "databricks/databricks-dolly-15k"
    validation: str = ""  # empty: split off the training rows
    test: str = ""  # empty: split off the training rows
    validation_rows: int = 1000  # rows split off, or the most rows used of a given file (0: all)
    test_rows: int = 500
    train_rows: int = 0  # the most rows used (0: all)
    split_seed: int = 42
    tokenizer: str = ""  # folder or hub name; empty: the teacher's
    max_length: int = 1024  # tokens of prompt and response; longer examples are dropped and counted
    max_prompt_length: int = 0  # 0: no limit of its own
    truncate: bool = False  # cut long prompts and responses to the limits instead of dropping the example
    # What begins with the beginning-of-sequence token: "none", "training" (and the answers to training prompts),
    # "evaluation" (validation, test and other sets) or "both".
    bos: str = "none"
    synthetic: SyntheticData = field(default_factory=SyntheticData)


@dataclass(frozen=True)
class Training:
    """AdamW with a linear schedule: the paper's values."""

    epochs: int = 10
    batch_size: int = 16  # examples an update, over all devices
    learning_rate: float = 1e-4
    weight_decay: float = 0.01  # not on biases and norms
    adam_b1: float = 0.9
    adam_b2: float = 0.999
    warmup_fraction: float = 0.1
    clip_norm: float = 1.0


@dataclass(frozen=True)
class Architecture:
    """A model to be made with random weights (used where `path` is empty)."""

    family: str = "gpt2"  # "gpt2", "opt" or "llama"
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 0  # 0: as many as num_heads
    hidden_size: int = 128
    intermediate_size: int = 0  # 0: four times hidden_size
    max_positions: int = 1024


@dataclass(frozen=True)
class Model:
    path: str = ""  # Hugging Face folder, GGUF file or hub name; empty: random weights of `architecture`
    init: str = "pretrained"  # "pretrained", "random" or (student) "teacher_layers"
    layers: tuple[int, ...] = ()  # for "teacher_layers": which of the teacher's layers, in order
    architecture: Architecture = field(default_factory=Architecture)
    dropout: float = 0.1
    dtype: str = "auto"  # compute type; auto: bfloat16 on GPU and TPU, float32 on CPU
    remat: str = "none"  # "none", "block" (recompute each block) or "dots" (keep matmul outputs)


@dataclass(frozen=True)
class Teacher:
    model: Model = field(default_factory=Model)
    finetune: Training = field(default_factory=Training)  # epochs = 0: taken as it is
    signal: str = "store"  # "store" (hidden states computed once) or "live"
    store_dtype: str = "bfloat16"


@dataclass(frozen=True)
class Student:
    model: Model = field(default_factory=Model)
    warmup: Training = field(
        default_factory=lambda: Training(epochs=0)
    )  # SFT before ranking, for random weights
    seed: int = -1  # of distillation alone: order of examples, dropout, random subsets, rollouts (-1: seed)


@dataclass(frozen=True)
class Curriculum:
    stages: int = 4
    epochs_per_stage: int = 8  # on cumulative quarters: 20 epochs' worth, which single-stage methods also get
    ranking: str = "fusion"  # "fusion", "rouge", "rouge_then_cross_entropy" or "random"
    ranking_model: str = ""  # folder of the student that ranks; empty: the student's initial weights
    subsets: tuple[int, ...] = ()  # which of the subsets are trained on, 1 the easiest (empty: all)
    alpha: float = 0.1  # α_n of Eq. 6
    beta_first: float = 0.7  # β_1 and β_n of Eq. 7
    beta_last: float = 1.0
    restart_optimizer: bool = True  # a new schedule and optimiser state in each stage
    patience: int = 0  # end a stage after so many validations without a better Rouge-L (0: never)


@dataclass(frozen=True)
class Overrides:
    """What a named method fixes, to be changed by hand (empty or negative: the method's own)."""

    divergence: str = ""
    alpha: float = -1.0
    beta: float = -1.0
    temperature: float = 1.0
    policy: str = "own"  # "on" (with responses of the current student, see `rollouts`) or "off"


@dataclass(frozen=True)
class Rollouts:
    """Responses that the student generates as it learns: what on-policy methods train on."""

    student_share: float = (
        0.5  # of the examples; the others keep their response (DistiLLM-2 has both of each)
    )
    refreshes: int = 0  # times an epoch that responses are sampled anew; 0: the method's own number
    replay_share: float = (
        0.0  # of the student's responses, those taken from an earlier epoch where there are any
    )


@dataclass(frozen=True)
class Sampling:
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    no_repeat_ngram: int = 0
    max_new_tokens: int = 512
    slots: int = 0  # sequences decoded at once on a device; 0: chosen from the model's size


@dataclass(frozen=True)
class Evaluation:
    sets: tuple[str, ...] = ("test",)  # "test" (of the data), names (self_inst, vicuna, ...) or name=file
    seeds: tuple[int, ...] = (10, 20, 30, 40, 50)
    rows: int = 0  # the most rows of each set (0: all)
    validation_every: int = 1  # epochs between validations
    validation_rows: int = 0  # the most rows used for validation Rouge-L (0: all)
    select: str = "best"  # student kept: "best" by validation Rouge-L, or "last"


@dataclass(frozen=True)
class Devices:
    mapping: str = "pmap"  # "pmap" (replicated) or "fsdp" (sharded parameters)
    count: int = 0  # 0: all
    coordinator: str = ""  # host:port of process 0; empty: from the environment, or one process
    num_processes: int = (
        0  # 0: from the environment (SLURM, Open MPI, Kubernetes, TPU pods); 1: only this one
    )
    process_id: int = -1  # 0, 1, ...; -1: from the environment
    timeout: int = 300  # seconds that processes wait for each other at the start


@dataclass(frozen=True)
class Config:
    seed: int = 42
    method: str = "l2m"
    baselines: tuple[str, ...] = ()  # trained as well, on the same budget, and added to the table
    data: Data = field(default_factory=Data)
    teacher: Teacher = field(default_factory=Teacher)
    student: Student = field(default_factory=Student)
    curriculum: Curriculum = field(default_factory=Curriculum)
    overrides: Overrides = field(default_factory=Overrides)
    training: Training = field(
        default_factory=Training
    )  # of the student; its epochs come from the curriculum
    rollouts: Rollouts = field(default_factory=Rollouts)
    sampling: Sampling = field(default_factory=Sampling)
    evaluation: Evaluation = field(default_factory=Evaluation)
    devices: Devices = field(default_factory=Devices)
    max_shapes: int = 4  # compiled shapes of packed rows in a run
    chunk_size: int = 512  # tokens whose logits are held at once
    checkpoint_every: int = 200  # steps
    tensorboard: bool = False  # also write TensorBoard events (extra: tracking)

    @property
    def student_seed(self) -> int:
        """Of everything that is random in distilling the student."""
        return self.seed if self.student.seed < 0 else self.student.seed


PRESETS: dict[str, dict[str, Any]] = {
    # The paper's protocol: drop examples over 1,024 tokens, top-k 50, at most 512 new tokens.
    "paper": {},
    # MiniLLM's: prompt at most 256, 512 in all, 256 new tokens, no repeated 6-gram, whole vocabulary.
    "minillm": {
        "data.max_length": 512,
        "data.max_prompt_length": 256,
        "data.truncate": True,
        "sampling.top_k": 0,
        "sampling.max_new_tokens": 256,
        "sampling.no_repeat_ngram": 6,
    },
}


def _to_dict(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value


def defaults(preset: str = "paper") -> ConfigDict:
    """All settings at their defaults, with the lengths and sampling rules of a protocol ("paper" or "minillm")."""
    config = ConfigDict(_to_dict(Config()))
    config.update_from_flattened_dict(PRESETS[preset])
    return config


def parse(config: ConfigDict | dict[str, Any]) -> Config:
    """The validated settings.

    Raises:
        InputError: an unknown key, a value of the wrong type, or one out of range; the key is named.
    """
    values = config.to_dict() if isinstance(config, ConfigDict) else config
    parsed = _build(Config, values, "config")
    _validate(parsed)
    return parsed


def change(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with some settings changed, as in `{"curriculum.alpha": 0.3}`."""
    changed = ConfigDict(_to_dict(config))
    changed.update_from_flattened_dict(changes)
    return parse(changed)


def _build(kind: type, values: Any, place: str) -> Any:
    hints = typing.get_type_hints(kind)
    unknown = set(values) - set(hints)
    if unknown:
        name = sorted(unknown)[0]
        near = difflib.get_close_matches(name, hints, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(hints)}"
        raise InputError(f"{place}.{name}: no such setting ({hint})")
    built = {}
    for name, value in values.items():
        hint, where = hints[name], f"{place}.{name}"
        if dataclasses.is_dataclass(hint):
            built[name] = _build(typing.cast(type, hint), value, where)
        else:
            built[name] = _convert(hint, value, where)
    return kind(**built)


def _convert(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, types.GenericAlias):  # tuple[X, ...]
        if not isinstance(value, tuple | list):
            raise InputError(f"{where}: expected a tuple such as (1, 2), got {value!r}")
        return tuple(_convert(hint.__args__[0], item, where) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise InputError(f"{where}: expected {hint.__name__}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where}: {value} must be a finite number")
    return value


_CHOICES = {
    "data.source": ("files", "synthetic"),
    "data.bos": ("none", "training", "evaluation", "both"),
    "teacher.signal": ("store", "live"),
    "teacher.store_dtype": ("float32", "bfloat16", "float16"),
    "curriculum.ranking": ("fusion", "rouge", "rouge_then_cross_entropy", "random"),
    "overrides.policy": ("own", "on", "off"),
    "evaluation.select": ("best", "last"),
    "devices.mapping": ("pmap", "fsdp"),
    **{f"{who}.model.init": ("pretrained", "random", "teacher_layers") for who in ("teacher", "student")},
    **{f"{who}.model.dtype": ("auto", "float32", "bfloat16") for who in ("teacher", "student")},
    **{f"{who}.model.remat": ("none", "block", "dots") for who in ("teacher", "student")},
    **{f"{who}.model.architecture.family": ("gpt2", "opt", "llama") for who in ("teacher", "student")},
}

_POSITIVE = (
    "training.batch_size",
    "training.learning_rate",
    "curriculum.stages",
    "curriculum.epochs_per_stage",
    "rollouts.student_share",
    "sampling.max_new_tokens",
    "evaluation.validation_every",
    "data.max_length",
    "max_shapes",
    "chunk_size",
    "checkpoint_every",
    "devices.timeout",
)

_FRACTIONS = (
    "curriculum.alpha",
    "curriculum.beta_first",
    "curriculum.beta_last",
    "rollouts.student_share",
    "rollouts.replay_share",
)


def _validate(config: Config) -> None:
    def at(path: str) -> Any:
        value: Any = config
        for name in path.split("."):
            value = getattr(value, name)
        return value

    for path, allowed in _CHOICES.items():
        if at(path) not in allowed:
            raise InputError(f"config.{path}: {at(path)!r} is none of {', '.join(allowed)}")
    for path in _POSITIVE:
        if at(path) <= 0:
            raise InputError(f"config.{path}: {at(path)!r} must be greater than 0")
    for path in _FRACTIONS:
        if not 0 <= at(path) <= 1:
            raise InputError(f"config.{path}: {at(path)!r} must lie between 0 and 1")
    c = config.curriculum
    if outside := [i for i in c.subsets if not 1 <= i <= c.stages]:
        raise InputError(
            f"config.curriculum.subsets: {outside[0]} is none of the {c.stages} subsets, which count from 1"
        )
    if config.rollouts.refreshes < 0:
        raise InputError(f"config.rollouts.refreshes: {config.rollouts.refreshes} must be 0 or more")
    if not config.evaluation.seeds:
        raise InputError("config.evaluation.seeds: empty; give at least one seed, as in (10,)")
    d = config.devices
    if d.coordinator and not d.coordinator.rpartition(":")[2].isdigit():
        raise InputError(
            f"config.devices.coordinator: {d.coordinator!r} is no host:port, as in 'node1:12345'"
        )
    if d.num_processes > 0 and d.process_id >= d.num_processes:
        raise InputError(
            f"config.devices.process_id: {d.process_id} is not below num_processes {d.num_processes}; ranks start at 0"
        )
    if config.teacher.model.init == "teacher_layers":
        raise InputError("config.teacher.model.init: 'teacher_layers' is for students only")
    if config.student.model.init == "teacher_layers" and not config.student.model.layers:
        raise InputError(
            "config.student.model.layers: empty; name the teacher's layers to keep, as in (0, 3, 6)"
        )
