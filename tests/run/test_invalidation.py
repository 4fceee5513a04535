"""What a changed setting makes anew: every field of the config, against the table in docs/settings.md."""

import dataclasses
import json
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from l2m_jax.config import Config, change, defaults, parse
from l2m_jax.data.tokenizer import train_tokenizer
from l2m_jax.errors import InputError
from l2m_jax.run.resolve import Artefacts, resolve

# What changes cost or rounding alone.
COST_ONLY = (
    "devices",
    "data.processes",
    "teacher.compute",
    "student.compute",
    "max_shapes",
    "chunk_size",
    "checkpoint_minutes",
    "tracking",
    "evaluation.diagnostic_rows",
)
TABLE = Path(__file__).resolve().parents[2] / "docs" / "settings.md"
METHODS = {"method": "l2m", "baselines": ("skl", "distillm2", "skl_on_policy")}

# Another value of a setting, where its type does not suggest one, and what must hold for the setting to matter.
OTHERS: dict[str, Any] = {
    "method": "m2l",
    "tracking": ("tensorboard",),
    "baselines": ("skl", "distillm2", "skl_on_policy", "kld"),
    "data.source": "synthetic",
    "data.train": "other.jsonl",
    "data.validation": "other.jsonl",
    "data.test": "other.jsonl",
    "data.tokenizer": "other_tokenizer",
    "data.max_prompt_length": 20,
    "data.bos": "evaluation",
    "data.prompt": "chat",
    "teacher.model.path": "model",
    "teacher.model.init": "random",
    "teacher.model.layers": (0,),
    "student.model.path": "model",
    "student.model.init": "random",
    "student.model.layers": (1,),
    "curriculum.ranking": "rouge",
    "curriculum.ranking_model": "model",
    "curriculum.ranking_temperature": 0.01,
    "curriculum.ranking_rows": 20,
    "curriculum.subsets": (1, 2),
    "curriculum.stratify": "length",
    "curriculum.mix": 0.25,
    "curriculum.open_by": 0.4,
    "curriculum.loss_by": "sample",
    "curriculum.weight": "p(1-p)",
    "overrides.divergence": "jsd",
    "overrides.policy": "on",
    "evaluation.sets": ("test", "mine=other.jsonl"),
    "evaluation.seeds": (11, 20),
    "evaluation.select": "last",
    "devices.mapping": "fsdp",
    "devices.coordinator": "node1:12345",
    "devices.process_id": 0,
    "teacher.signal": "live",
    "teacher.store_dtype": "float32",
    "teacher.store_top_k": 8,
    "teacher.weights": "int8",
    "student.lora.targets": ("query",),
    **{f"{who}.compute.{name}": value for who in ("teacher", "student") for name, value in (("dtype", "bfloat16"), ("remat", "block"))},
    **{f"{who}.model.architecture.{name}": value for who in ("teacher", "student")
       for name, value in (("family", "llama"), ("num_heads", 2), ("num_kv_heads", 4), ("hidden_size", 64))},
    **{f"{place}.dropout": 0.3 for place in ("training", "teacher.finetune", "student.warmup", "teacher.pretrain", "student.pretrain")},
    **{f"{place}.{name}": value for place in ("training", "teacher.finetune", "student.warmup", "teacher.pretrain", "student.pretrain")
       for name, value in (("schedule", "wsd"), ("ema", 0.9))},
    "teacher.pretrain.text": "synthetic",
    "student.pretrain.text": "other.txt",
    "overrides.alpha": 0.3,
    "overrides.beta": 0.9,
    "overrides.temperature": 2.0,
    "curriculum.alphas": (0.2, 0.3),
    "curriculum.betas": (0.2, 0.3),
    "curriculum.temperatures": (1.0, 2.0),
    **{f"curriculum.{name}_by": "cosine" for name in ("alpha", "beta", "temperature")},
}  # fmt: skip
SYNTHETIC = {"data.source": "synthetic", "data.tokenizer": ""}
CONTEXT: dict[str, dict[str, Any]] = {
    **{f"data.synthetic.{name}": SYNTHETIC for name in ("train", "validation", "test", "seed", "tokenizer_size")},
    "teacher.model.init": {"teacher.model.path": "model"},
    "teacher.store_tail": {"teacher.store_top_k": 8},
    "student.model.init": {"student.model.path": "model"},
    "student.model.layers": {"student.model.init": "teacher_layers", "student.model.layers": (0,)},
    **{f"{place}.decay_fraction": {f"{place}.schedule": "wsd"} for place in ("training", "teacher.finetune", "student.warmup", "teacher.pretrain", "student.pretrain")},
    **{f"student.lora.{name}": {"student.lora.rank": 4} for name in ("alpha", "targets")},
    "overrides.alpha": {"method": "skl", "baselines": ()},
    "overrides.beta": {"method": "skl", "baselines": ()},
    "overrides.policy": {"method": "skl", "baselines": ()},
    "overrides.divergence": {"method": "skl", "baselines": ()},
}  # fmt: skip


def _leaves(kind: type, prefix: str = "") -> list[str]:
    found = []
    for name, hint in typing.get_type_hints(kind).items():
        inner = dataclasses.is_dataclass(hint)
        found += _leaves(typing.cast(type, hint), f"{prefix}{name}.") if inner else [prefix + name]
    return found


FIELDS = _leaves(Config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    import jax

    from l2m_jax import models

    folder = tmp_path_factory.mktemp("given")
    for name, count in (("rows", 40), ("other", 50)):
        rows = [{"instruction": f"say {i}", "output": f"it is {i}"} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.txt").write_text(f"a text of {name}\n")
    for name in ("tokenizer", "other_tokenizer"):
        given = train_tokenizer([f"say {name}, it is {name}"] * 3, 300)
        given.chat_template = "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}"
        given.save_pretrained(folder / name)
    tokenizer = train_tokenizer(["say tokenizer, it is tokenizer"] * 3, 300)
    config = models.random_config(models.Architecture(num_layers=2, hidden_size=16, num_heads=2), tokenizer)
    models.save(folder / "model", config, models.init(config, jax.random.key(0)))
    return folder


def _config(folder: Path, changes: dict[str, Any]) -> Config:
    values = defaults()
    values.update_from_flattened_dict(METHODS)
    values.data.update(
        train="rows.jsonl",
        validation_rows=4,
        test_rows=4,
        train_rows=20,
        tokenizer="tokenizer",
        max_length=100,
    )
    for who in (values.teacher, values.student):
        who.pretrain.text = "rows.txt"
    values.student.warmup.epochs = 1
    values.curriculum.update(beta_last=0.9, patience=5)
    return change(parse(values), changes)


def _keys(artefacts: Artefacts) -> dict[str, set[str]]:
    """The keys of all artefacts by the names of the table."""
    found = {
        "tokenizer": {str(getattr(artefacts.tokenizer, "key", getattr(artefacts.tokenizer, "content", "")))},
        **{f"{part} rows": {corpus.key} for part, corpus in artefacts.corpora.items()},
        **{f"pretrained {role}": {found.key} for role, found in artefacts.pretrained.items()},
        "teacher": {artefacts.teacher.key},
        "initial student": {artefacts.initial_student.key},
        "ranking": {artefacts.ranking.key} if artefacts.ranking else set(),
        "teacher store": {artefacts.store.key} if artefacts.store else set(),
        "responses": {generated.key for generated in artefacts.generated.values()},
        "students": {student.key for student in artefacts.students.values()},
        "scores": {evaluation.key for evaluation in artefacts.evaluations.values()},
    }
    return found


def _other(config: Config, field: str) -> Any:
    value: Any = config
    for name in field.split("."):
        value = getattr(value, name)
    if field in OTHERS:
        return OTHERS[field]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    assert isinstance(value, float), f"{field}: give another value in OTHERS"
    return value / 2 if value else 1.0


def _made_anew(folder: Path, field: str) -> str:
    before = _config(folder, CONTEXT.get(field, {}))
    if field in ("teacher.model.layers", "teacher.pretrain.from_teacher"):
        with pytest.raises(InputError):
            change(before, {field: _other(before, field)})
        return "nothing: for students only"
    after = change(before, {field: _other(before, field)})
    first, second = (_keys(resolve(config, folder / "work", folder / "work")) for config in (before, after))
    changed = [name for name in first if not first[name] <= second[name]]
    return ", ".join(changed) or "nothing"


def _table() -> dict[str, str]:
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \|$", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    return dict(rows)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_what_comes_after_pretraining_changes_no_pretrained_model(folder, monkeypatch, role):
    monkeypatch.chdir(folder)
    changes = {
        "student.warmup.epochs": 2,
        "teacher.finetune.epochs": 3,
        "data.train": "other.jsonl",
        "seed": 3,
    }
    own_seed = {"teacher.pretrain.seed": 0, "student.pretrain.seed": 0, "student.pretrain.from_teacher": True}
    before = _config(folder, own_seed)
    both = (resolve(c, folder / "w", folder / "w") for c in (before, change(before, changes)))
    first, second = (_keys(artefacts)[f"pretrained {role}"] for artefacts in both)
    assert first == second


def test_the_table_has_a_row_for_every_setting_and_no_other():
    assert list(_table()) == FIELDS


@pytest.mark.parametrize("field", FIELDS)
def test_a_changed_setting_makes_anew_what_the_table_says(folder, monkeypatch, field):
    monkeypatch.chdir(folder)
    expected = _table()[field]
    assert _made_anew(folder, field) == (
        expected if "for students only" in expected else expected.partition(":")[0]
    )
    cost_only = any(field == name or field.startswith(f"{name}.") for name in COST_ONLY)
    assert cost_only == (expected == "nothing: cost only")


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("l2m", {"rollouts.refreshes": 3, "rollouts.student_share": 0.2}),
        ("skl_on_policy", {"rollouts.refreshes": 4}),  # its own number
        ("distillm2_on_policy", {"rollouts.student_share": 0.2}),  # it has both responses to each prompt
        ("sft", {"overrides.temperature": 2.0, "overrides.divergence": "jsd", "overrides.alpha": 0.3}),
        (
            "kld",
            {"curriculum.beta_first": 0.5, "curriculum.alpha": 0.5, "curriculum.restart_optimizer": False},
        ),
        ("kld", {"curriculum.ranking": "rouge", "evaluation.seeds": (10, 21)}),
        ("kld", {"curriculum.mix": 0.3, "curriculum.open_by": 0.4, "curriculum.stratify": "length"}),
        ("kld", {"curriculum.rerank": True, "training.decay_fraction": 0.3}),
        ("kld", {"curriculum.loss_by": "sample"}),
        ("random_order", {"curriculum.rerank": True, "curriculum.stratify": "length"}),
        ("shuffled_multiset", {"curriculum.rerank": True}),
    ],
)
def test_a_student_is_not_made_anew_for_what_its_method_does_not_use(folder, monkeypatch, method, changes):
    monkeypatch.chdir(folder)
    before = _config(folder, {"method": method, "baselines": (), "evaluation.seeds": (10, 20)})
    after = change(before, changes)
    first, second = (resolve(config, folder / "w", folder / "w").students for config in (before, after))
    assert first[method].key == second[method].key
