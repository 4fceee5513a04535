"""Settings from Python files, YAML files and the command line, and what is said about each mistake."""

from pathlib import Path

import pytest

from l2m_jax.cli import config_file
from l2m_jax.config import change, defaults, parse
from l2m_jax.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """
from l2m_jax.config import defaults

def get_config(variant=""):
    config = defaults("minillm")
    config.method = "kld"
    config.tracking = ("tensorboard",)
    config.training.update(learning_rate=1e-4, batch_size=8)
    config.student.model.update(init="teacher_layers", layers=(0, 2))
    config.overrides.policy = "off"
    config.evaluation.update(sets=("test", "mine=rows.jsonl"), seeds=(1, 2))
    if variant == "short":
        config.curriculum.stages = 2
    elif variant:
        raise ValueError(f"no variant {variant!r}; known: short")
    return config
"""

# 1e-4 would be text and `off` a boolean by YAML's own rules.
YAML = """
preset: minillm
method: kld
tracking: [tensorboard]
training: {learning_rate: 1e-4, batch_size: 8}
student:
  model:
    init: teacher_layers
    layers: [0, 2]
overrides:
  policy: off
evaluation:
  sets:
    - test
    - mine=rows.jsonl
  seeds: [1, 2]
"""


def write(folder, name, text):
    file = folder / name
    file.write_text(text)
    return str(file)


def test_python_and_yaml_give_the_same_settings(tmp_path):
    from_python = config_file.read(write(tmp_path, "run.py", PYTHON))
    assert from_python == config_file.read(write(tmp_path, "run.yaml", YAML))
    assert from_python.training.learning_rate == 1e-4 and from_python.sampling.max_new_tokens == 256
    assert from_python.overrides.policy == "off"


def test_a_variant(tmp_path):
    file = write(tmp_path, "run.py", PYTHON)
    assert config_file.read(f"{file}:short") == change(config_file.read(file), {"curriculum.stages": 2})


def test_a_yaml_file_without_a_preset_has_the_papers_defaults(tmp_path):
    assert config_file.read(write(tmp_path, "run.yml", "seed: 3")) == change(parse(defaults()), {"seed": 3})


@pytest.mark.parametrize(
    ("setting", "text", "value"),
    [
        ("curriculum.alpha", "0.3", 0.3),
        ("curriculum.alpha", "1", 1.0),
        ("training.learning_rate", "5e-5", 5e-5),
        ("overrides.alpha", "-1", -1.0),
        ("seed", "7", 7),
        ("skip_nonfinite", "true", True),
        ("data.truncate", "False", False),
        ("data.tokenizer", "", ""),
        ("data.train", "('odd', name).jsonl", "('odd', name).jsonl"),
        ("evaluation.sets", "test,self_inst", ("test", "self_inst")),
        ("evaluation.sets", "test", ("test",)),
        ("evaluation.sets", "('test','a=b.jsonl')", ("test", "a=b.jsonl")),
        ("evaluation.sets", "('a=b,c.jsonl',)", ("a=b,c.jsonl",)),
        ("evaluation.sets", "(test, self_inst)", ("test", "self_inst")),
        ("evaluation.seeds", "1,2", (1, 2)),
        ("evaluation.seeds", "(3)", (3,)),
        ("evaluation.seeds", "[3, 4]", (3, 4)),
        ("baselines", "()", ()),
        ("baselines", "", ()),
    ],
)
def test_overrides_are_converted_to_the_type_of_the_setting(tmp_path, setting, text, value):
    file = write(tmp_path, "run.yaml", "curriculum: {alpha: 0.5}\nbaselines: [sft]")
    found = config_file.read(file, [(setting, text)])
    assert found == change(config_file.read(file), {setting: value})


def test_the_last_of_equal_overrides_counts_and_others_keep_their_values(tmp_path):
    file = write(tmp_path, "run.yaml", "curriculum: {alpha: 0.5, stages: 2}")
    found = config_file.read(file, [("curriculum.alpha", "0.3"), ("seed", "1"), ("curriculum.alpha", "0.4")])
    assert (found.curriculum.alpha, found.curriculum.stages, found.seed) == (0.4, 2, 1)


@pytest.mark.parametrize(
    ("setting", "text", "said"),
    [
        ("curriculum.alfa", "0.3", "config.curriculum.alfa: no such setting (did you mean 'alpha'?)"),
        ("curiculum.alpha", "0.3", "config.curiculum: no such setting (did you mean 'curriculum'?)"),
        (
            "curriculum",
            "0.3",
            "config.curriculum: a group of settings, which has no value of its own; set config.",
        ),
        ("seed.x", "1", "config.seed.x: no such setting (config.seed is a single setting)"),
        ("seed", "1.5", "config.seed: expected a whole number, got '1.5'"),
        ("training.learning_rate", "fast", "config.training.learning_rate: expected a number, got 'fast'"),
        ("training.learning_rate", "nan", "config.training.learning_rate: nan must be a finite number"),
        ("training.weight_decay", "-inf", "config.training.weight_decay: -inf must be a finite number"),
        ("skip_nonfinite", "yes", "config.skip_nonfinite: expected true or false, got 'yes'"),
        ("evaluation.seeds", "1,x", "config.evaluation.seeds: expected a whole number, got 'x'"),
        ("curriculum.alpha", "2", "config.curriculum.alpha: 2.0 must "),
    ],
)
def test_wrong_overrides(tmp_path, refused, setting, text, said):
    config = write(tmp_path, "run.yaml", "method: l2m")
    flags = f"--config={config}", f"--workdir={tmp_path / 'run'}"
    assert refused("train", f"--config.{setting}={text}", *flags).startswith(said)
    assert refused("plan", flags[0], f"--config.{setting}", text).startswith(said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected settings by name, such as 'method: l2m', got None"),
        ("- method", "expected settings by name, such as 'method: l2m', got ['method']"),
        ("seed: 1\nseed: 2", "line 2: 'seed' is set twice"),
        ("student:\n  model:\n    path: a\n    path: b", "line 4: 'path' is set twice"),
        ("seed: [1", "line 1: not valid YAML ("),
        (
            "preset: minilm",
            "preset: no preset 'minilm' (known: paper, minillm, pocl); did you mean 'minillm'?",
        ),
        ("preset: [paper]", "preset: no preset ['paper'] (known: paper, minillm, pocl)"),
        ("? [1, 2]\n: 3", "line 1: not valid YAML ("),
    ],
)
def test_wrong_yaml(tmp_path, text, said):
    file = write(tmp_path, "run.yaml", text)
    with pytest.raises(InputError) as error:
        config_file.read(file)
    assert str(error.value).startswith(f"--config {file}: {said}") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sed: 1", "config.sed: no such setting (did you mean 'seed'?)"),
        ("curriculum: 3", "config.curriculum: a group of settings"),
        ("curriculum:", "config.curriculum: a group of settings"),
        ("seed: {a: 1}", "config.seed.a: no such setting (config.seed is a single setting)"),
        ("seed: [1]", "config.seed: expected a whole number, got ['1']"),
        ("evaluation: {seeds: [[1]]}", "config.evaluation.seeds: expected a whole number, got ['1']"),
        ("training: {learning_rate: .nan}", "config.training.learning_rate: expected a number, got '.nan'"),
        ("curriculum: {alpha: 1e3}", "config.curriculum.alpha: 1000.0 must "),
    ],
)
def test_wrong_settings_in_yaml(tmp_path, text, said):
    with pytest.raises(InputError) as error:
        config_file.read(write(tmp_path, "run.yaml", text))
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "no function get_config"),
        ("def get_config(:", "line 1: not valid Python ("),
        (
            "import nothing_of_this_name",
            "line 1: ModuleNotFoundError: No module named 'nothing_of_this_name'",
        ),
        ("def get_config(variant=''):\n    return 1 / 0", "line 2: ZeroDivisionError: division by zero"),
        ("def get_config(variant=''):\n    return {'seed': 1}", "get_config must return a ConfigDict"),
        ("def get_config():\n    return 3", "get_config must return a ConfigDict"),
        (
            "from l2m_jax.config import defaults\n"
            "def get_config():\n    config = defaults()\n    config.seed = 'x'\n    return config",
            "line 4: TypeError: ",
        ),
    ],
)
def test_wrong_python(tmp_path, text, said):
    file = write(tmp_path, "run.py", text)
    with pytest.raises(InputError) as error:
        config_file.read(file)
    assert str(error.value).startswith(f"--config {file}: {said}") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("config.sed = 1", "config.sed: no such setting (did you mean 'seed'?)"),
        ("config.overrides.temperature = float('nan')", "config.overrides.temperature: nan must be"),
    ],
)
def test_wrong_settings_in_python(tmp_path, line, said):
    lines = "from l2m_jax.config import defaults", "def get_config():", " config = defaults()", f" {line}"
    with pytest.raises(InputError) as error:
        config_file.read(write(tmp_path, "run.py", "\n".join((*lines, " return config"))))
    assert str(error.value).startswith(said)


def test_files_and_variants_that_do_not_exist(tmp_path):
    python, yaml = write(tmp_path, "run.py", PYTHON), write(tmp_path, "other.yaml", "seed: 1")
    plain = write(tmp_path, "plain.py", "def get_config():\n    return None")
    for source, said in (
        (f"{tmp_path}/rum.py", f"no such file; did you mean {python!r}?"),
        (f"{tmp_path}/rum.py:short", f"no such file; did you mean {python!r}?"),
        (f"{tmp_path}", "no such file"),
        (write(tmp_path, "run.json", "{}"), "expected a Python file (.py) or a YAML file (.yaml)"),
        (f"{python}:long", "no variant 'long'; known: short"),
        (f"{plain}:long", "get_config has no parameter, so there are no variants"),
        (f"{yaml}:minillm", f"a YAML file has no variants; name {yaml} alone"),
    ):
        with pytest.raises(InputError) as error:
            config_file.read(source)
        assert str(error.value).startswith(f"--config {source}: {said}")


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_every_yaml_config_of_the_repository_is_valid(file):
    config_file.read(str(file))


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.py")), ids=lambda file: file.name)
def test_every_config_of_the_repository_is_valid_and_names_its_variants(file):
    config_file.read(str(file))
    with pytest.raises(InputError, match="'nothing'") as error:
        config_file.read(f"{file}:nothing")
    assert "\n" not in str(error.value)
