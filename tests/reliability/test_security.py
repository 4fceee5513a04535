"""No pickle, no code from data, and no key in a file."""

import ast
from pathlib import Path

import pytest

from l2m_jax.errors import InputError
from l2m_jax.evaluation.sources import parse_set

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    *(ROOT / "l2m_jax").rglob("*.py"),
    ROOT / "train.py",
    ROOT / "eval.py",
    *(ROOT / "configs").glob("*.py"),
]
# bench/ runs PyTorch and TRL in another process to compare with; those scripts load nothing from files.
FORBIDDEN_IMPORTS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "tarfile", "zipfile"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "np.load", "numpy.load", "torch.load", "yaml.unsafe_load", "yaml.full_load", "os.system",
    "shutil.unpack_archive", "pd.read_pickle",
}  # fmt: skip
# The only reader of Python configs, which are code.
MAY_RUN_CODE = {"cli/config_file.py"}


def _trees():
    for file in SOURCES:
        yield file, ast.parse(file.read_text(encoding="utf-8"))


def test_nothing_unpickles_unpacks_or_evaluates():
    wrong = []
    for file, tree in _trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.split(".")[0] for alias in node.names}
                names.add((getattr(node, "module", None) or "").split(".")[0])
                wrong += [f"{file}: imports {name}" for name in names & FORBIDDEN_IMPORTS]
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                wrong += [f"{file}: {called}" for name in FORBIDDEN_CALLS if called == name]
                for keyword in node.keywords:
                    given = keyword.arg, ast.unparse(keyword.value)
                    if given in (("allow_pickle", "True"), ("shell", "True")):
                        wrong.append(f"{file}: {given}")
                    if keyword.arg == "trust_remote_code" and given[1] != "False":
                        wrong.append(f"{file}: {given}")
    assert not wrong


def test_only_the_reader_of_configs_runs_a_given_file():
    found = {
        file.relative_to(ROOT / "l2m_jax").as_posix()
        for file in (ROOT / "l2m_jax").rglob("*.py")
        if "spec_from_file_location" in file.read_text(encoding="utf-8")
    }
    assert found == MAY_RUN_CODE


def test_yaml_builds_text_alone():
    import yaml

    from l2m_jax.cli import config_file

    assert issubclass(config_file.TextLoader, yaml.BaseLoader)
    read = yaml.load("a: !!python/object/apply:os.getcwd []\nb: 1", config_file.TextLoader)
    assert read == {"a": [], "b": "1"}


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", ".", ".x", "", "a\0b", "a\nb", "n" * 201])
def test_names_of_sets_are_names_of_files(name):
    with pytest.raises(InputError, match="expected name=file"):
        parse_set(f"{name}=rows.jsonl")
