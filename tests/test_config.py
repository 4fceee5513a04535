"""The config: what a component refuses is refused by name, in one sentence, before anything else happens."""

import dataclasses
import math
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l2m_jax.cli import config_file
from l2m_jax.config import Config, change, defaults, parse
from l2m_jax.errors import InputError

# Names and paths: whatever is there, or is refused when it is looked for.
FREE = {
    "data.train", "data.validation", "data.test", "data.tokenizer", "teacher.model.path", "student.model.path",
    "curriculum.ranking_model", "teacher.pretrain.text", "student.pretrain.text",
}  # fmt: skip


def _leaves(kind: type, prefix: str = "") -> dict[str, typing.Any]:
    found = {}
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            found |= _leaves(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            found[prefix + name] = hint
    return found


FIELDS = _leaves(Config)
OUT_OF_RANGE: list[tuple[str, object]] = [
    *((name, value) for name, hint in FIELDS.items() if hint is float for value in (math.nan, math.inf, -math.inf)),
    *((name, -5) for name, hint in FIELDS.items() if hint is int),
    *((name, "nonsense") for name, hint in FIELDS.items() if hint is str and name not in FREE),
    *((name, 1.5) for name in FIELDS if name != "student.lora.alpha" and name.rpartition(".")[2] in ("alpha", "beta", "beta_first", "beta_last",
      "student_share", "replay_share", "warmup_fraction", "adam_b1", "adam_b2", "dropout", "top_p")),
    *((name, 0.0) for name in FIELDS if name.rpartition(".")[2] in ("learning_rate", "clip_norm", "top_p",
      "student_share")),
    *((name, 0) for name in FIELDS if name.rpartition(".")[2] in ("batch_size", "stages", "epochs_per_stage",
      "num_layers", "num_heads", "hidden_size", "max_positions", "max_new_tokens", "max_length", "validations",
      "max_shapes", "chunk_size", "timeout")),
    ("overrides.temperature", 0.0),
    ("evaluation.seeds", (1, 1)),
    ("evaluation.seeds", ()),
    ("evaluation.seeds", (-1,)),
    ("evaluation.sets", ()),
    ("baselines", ("l2n",)),
    ("tracking", ("x",)),
    ("tracking", ("wandb", "wandb")),
    ("baselines", ("l2m",)),
    ("curriculum.alphas", (0.0, 1.5)),
    ("curriculum.betas", (0.1, 0.2, 0.3)),  # of four stages
    ("curriculum.temperatures", (0.0,)),
    ("curriculum.subsets", (5,)),
    ("curriculum.subsets", (1, 1)),
    ("teacher.model.init", "teacher_layers"),
    ("student.model.init", "teacher_layers"),
    ("student.model.layers", (0, 1)),
    ("student.lora.targets", ("q_proj",)),
    ("teacher.model.layers", (0,)),
    ("teacher.model.architecture.num_heads", 3),
    ("overrides.alpha", 0.3),  # l2m is staged
    ("overrides.beta", 0.3),
    ("overrides.policy", "on"),  # of a method with cross-entropy
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_name(name, value):
    values = defaults()
    values.update_from_flattened_dict({name: value})
    with pytest.raises(InputError) as error:
        parse(values)
    said = str(error.value)
    assert said.startswith("config.") and "\n" not in said
    assert (
        name.rpartition(".")[2] in said or "curriculum.beta_first" in said
    )  # what on-policy learning contradicts


def test_every_setting_that_can_be_wrong_is_tried():
    tried = {name for name, _ in OUT_OF_RANGE}
    assert (
        set(FIELDS) - tried
        == FREE | {name for name, hint in FIELDS.items() if hint is bool} | {"devices.coordinator"} - tried
    )


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(FIELDS)),
    value=st.one_of(
        st.integers(), st.floats(), st.text(max_size=8), st.booleans(), st.tuples(st.integers()), st.none()
    ),
)
def test_any_value_is_taken_or_refused_in_a_sentence(name, value):
    values = defaults().to_dict()
    *groups, last = name.split(".")
    inner = values
    for group in groups:
        inner = inner[group]
    inner[last] = value
    try:
        config = parse(values)
    except InputError as error:
        assert str(error).startswith("config.") and "\n" not in str(error)
    else:
        assert parse(defaults()) == config or config is not None


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(FIELDS)), text=st.text(max_size=12))
def test_any_text_on_the_command_line_is_taken_or_refused_in_a_sentence(tmp_path_factory, name, text):
    file = tmp_path_factory.getbasetemp() / "empty.yaml"
    file.write_text("preset: paper\n")
    try:
        config_file.read(str(file), [(name, text)])
    except InputError as error:
        assert str(error).startswith("config.")


def test_a_change_is_validated():
    config = parse(defaults())
    assert change(config, {"curriculum.alpha": 0.3}).curriculum.alpha == 0.3
    with pytest.raises(InputError, match=r"config\.curriculum\.alpha: 3\.0 must be between 0 and 1"):
        change(config, {"curriculum.alpha": 3.0})
