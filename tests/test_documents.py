"""README, the site's pages and the configs' first lines: what they tell a reader to type exists and is accepted.

Commands go through the commands' own parsers, configs are read with the overrides given, names of methods, presets and
suites are looked up, and Python blocks are run. No command trains anything here.
"""

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml

from l2m_jax import methods
from l2m_jax.cli import claims_file, config_file
from l2m_jax.cli.bench import SUITES
from l2m_jax.cli.main import COMMANDS
from l2m_jax.config import Config, parse
from l2m_jax.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    ]
)
SOURCES = [*PAGES, *sorted((ROOT / "configs").rglob("*.py")), *sorted((ROOT / "configs").rglob("*.yaml"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
_SCRIPTS = {"train.py": "train", "eval.py": "eval"}
_COMMAND = re.compile(
    r"(?:^|[`\s\"'])((?:uv run )?(?:python )?(?:l2m (?=[a-z])|(?:train|eval)\.py )[^`\n\"']*)"
)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands_of(text: str) -> list[list[str]]:
    """The arguments of each `l2m`, train.py and eval.py in a text, in code blocks, code spans and comments."""
    found = []
    for match in _COMMAND.finditer(re.sub(r"\\\n[\s#]*", " ", text)):
        words = shlex.split(match[1], comments=True)
        while words[0] in ("uv", "run", "python"):
            words.pop(0)
        program, *arguments = words
        arguments = [_SCRIPTS[program], *arguments] if program in _SCRIPTS else arguments
        # `l2m train` in a sentence names a command, and has no arguments to check.
        if arguments[1:] and (arguments[0] == "compare" or any(a.startswith("--") for a in arguments[1:])):
            found.append(arguments)
    return found


COMMAND_LINES = [
    pytest.param(arguments, id=f"{name_of(path)}: l2m {' '.join(arguments)}"[:110])
    for path in SOURCES
    for arguments in commands_of(path.read_text(encoding="utf-8"))
]


def test_the_commands_are_found():
    text = (
        "Type\n\n    uv run l2m train --config a.py \\\n        --workdir w  # comment\n    # python train.py --x\n"
        '`l2m eval --a b`, `l2m plan`.\n\n    sbatch --wrap "uv run l2m sweep --b"'
    )
    assert commands_of(text) == [
        ["train", "--config", "a.py", "--workdir", "w"],
        ["train", "--x"],
        ["eval", "--a", "b"],
        ["sweep", "--b"],
    ]
    assert len(COMMAND_LINES) > 50 and {line.values[0][0] for line in COMMAND_LINES} == set(COMMANDS)


@pytest.mark.parametrize("arguments", COMMAND_LINES)
def test_a_command_is_accepted(arguments):
    check(arguments)


@pytest.mark.parametrize(
    "line",
    [
        "train --config configs/quickstart.py --workdir w --config.curriculum.mixx=0.1",
        "train --config configs/quickstart.py:compared --workdir w",
        "train --config configs/quickstart.py --work-dir w",
        "train --config configs/quickstart.py",
        "sweep --config configs/quickstart.py --methods sft,kdl --workdir w",
        "sweep ... --preset table9",
        "bench --suite losses",
    ],
)
def test_a_wrong_command_is_noticed(line):
    with pytest.raises((InputError, SystemExit, AssertionError)):
        check(line.split())


def check(arguments: list[str]) -> None:
    """Parses a command line as the command does, and reads the files that it names and the repository has."""
    command, *flags = arguments
    parser = importlib.import_module(f"l2m_jax.cli.{command}")._parser()
    if any("..." in flag for flag in flags):  # the rest is as in another example
        for action in parser._actions:
            action.required = False
        for group in parser._mutually_exclusive_groups:
            group.required = False
        flags = [flag.replace("=...", "=configs/quickstart.py") for flag in flags if flag != "..."]
    if "--help" in flags:
        return
    options = parser.parse_args([flag.replace("$config", "configs/quickstart.py") for flag in flags])
    if getattr(options, "config", None):
        config_file.read(options.config, options.overrides)
    for name in getattr(options, "methods", None) or ():
        methods.require(name, "methods")
    if getattr(options, "claims", None):
        claims_file.read(options.claims)
    claims_file.grid(getattr(options, "grid", ()))
    assert set(getattr(options, "suite", ())) <= set(SUITES)


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def _blocks(path: Path, language: str) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", [p for p in PAGES if _blocks(p, "yaml")], ids=name_of)
def test_yaml_of_a_page_is_a_config(path, tmp_path):
    for block in _blocks(path, "yaml"):
        if "task" in yaml.safe_load(block):
            continue  # of another program: a task of lm_eval
        if "contrasts" in block:
            (tmp_path / "claims.yaml").write_text(block)
            claims_file.read(tmp_path / "claims.yaml")
        else:
            (tmp_path / "run.yaml").write_text(block)
            config_file.read(str(tmp_path / "run.yaml"))


@pytest.mark.parametrize("path", [p for p in PAGES if _blocks(p, "python")], ids=name_of)
def test_python_of_a_page_runs(path):
    """A block without an import is part of something, and is only parsed. Names that a page does not define are given."""
    import jax
    import jax.numpy as jnp

    logits = jax.random.normal(jax.random.key(0), (4, 16, 100))
    given = {
        "student_logits": logits,
        "teacher_logits": logits[::-1],
        "labels": jnp.zeros((4, 16), int),
        "weights": jnp.ones((4, 16)),
    }
    for block in _blocks(path, "python"):
        tree = ast.parse(block)
        imported = {
            (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
            for node in tree.body
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("l2m_jax"):
                exec(ast.unparse(node), {})
        # Others than these may be absent, or read files: of such blocks, only what they import from here is checked.
        if imported and all(name.split(".")[0] in ("jax", "l2m_jax", "numpy", "optax") for name in imported):
            # What reads a finished run is left out.
            exec("\n".join(line for line in block.splitlines() if "runs/" not in line), dict(given))


def _fields(kind: type, prefix: str = "") -> set[str]:
    found = set()
    for name, hint in typing.get_type_hints(kind).items():
        found.add(prefix + name)
        if hasattr(hint, "__dataclass_fields__"):
            found |= _fields(hint, f"{prefix}{name}.")
    return found


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_settings_and_files_of_a_page_exist(path):
    """Code spans that look like a setting of a group, a flag of `l2m`, or a file of the repository, name one."""
    fields, flags = _fields(Config), _known_flags()
    groups = {name for name in fields if "." not in name and any(f.startswith(f"{name}.") for f in fields)}
    places = groups | {
        name.rpartition(".")[2] for name in fields if any(f.startswith(f"{name}.") for f in fields)
    }
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(
        r"^\*\*(`[a-z_]+`(?:, `[a-z_]+`)*)\*\*:", text, re.MULTILINE
    ):  # of docs/curricula.md
        assert {name.strip("`") for name in heading.split(", ")} <= {f.rpartition(".")[2] for f in fields}, (
            heading
        )
    for span in re.findall(r"`([^`\n]+)`", text):
        setting = re.match(r"(?:--config\.)?([a-z_]+(?:\.[a-z_]+)+)(?:$|[ =])", span)
        if setting and setting[1].split(".")[0] in places and not setting[1].endswith((".py", ".md")):
            assert any(f == setting[1] or f.endswith(f".{setting[1]}") for f in fields), span
        value = re.fullmatch(r"([a-z_]+)=[\w.,-]+", span)
        assert (
            not value
            or value[1] == "trust_remote_code"
            or any(f.rpartition(".")[2] == value[1] for f in fields)
        ), span
        for file in re.findall(r"(?<![\w/.-])(?:configs|docs|l2m_jax|notebooks|tests)/[\w/.-]+\.\w+", span):
            assert (ROOT / file).exists(), span
        flag = re.fullmatch(r"(--[a-z][a-z-]+)(?:[ =][\w,.=:/-]+)?", span)
        if flag and path.name != "terms.md" and not span.startswith(_OTHERS):
            assert flag[1] in flags, span


# Flags of uv, SLURM and XLA, which pages mention too.
_OTHERS = (
    "--gpus-per-task",
    "--ntasks-per-node",
    "--requeue",
    "--extra",
    "--group",
    "--strict",
    "--parser",
    "--ntasks",
)


def _known_flags() -> set[str]:
    parsers = [importlib.import_module(f"l2m_jax.cli.{command}")._parser() for command in COMMANDS]
    return {option for parser in parsers for action in parser._actions for option in action.option_strings}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_of_a_page_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(
        r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    ):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.is_file(), target
        if anchor:
            assert anchor in _anchors(found), target


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def test_every_page_is_in_the_navigation_and_every_name_of_the_reference_exists():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"[\w/]+\.md", str(yaml.safe_load(text)["nav"]))
    assert sorted(listed) == sorted(str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md"))
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE):
            module, _, member = name.rpartition(".")
            assert hasattr(importlib.import_module(module), member), name


def test_the_reference_lists_every_group_of_settings():
    def groups(kind: type) -> set[type]:
        inner = [h for h in typing.get_type_hints(kind).values() if hasattr(h, "__dataclass_fields__")]
        return {kind}.union(*map(groups, inner))

    page = (ROOT / "docs" / "reference" / "settings.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\{\{ fields: (\S+) (\w+) \}\}$", page, re.MULTILINE))
    for kind in groups(Config):
        assert (kind.__module__.replace(".", "/") + ".py", kind.__name__) in listed, kind


def test_readme_fits_on_two_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110
    assert (ROOT / "docs" / "images" / "quickstart.png").stat().st_size < 60_000


def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="the site's packages are not installed (uv sync --group docs)")
    pytest.importorskip("mkdocstrings", reason="the site's packages are not installed (uv sync --group docs)")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # A listing of settings and a docstring, which come from the code.
    assert "beta_first" in (tmp_path / "reference/settings/index.html").read_text()
    assert "teacher" in (tmp_path / "reference/losses/index.html").read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_has_no_outputs_and_runs(path, tmp_path, monkeypatch, tiny):
    """A run with the settings of the quickstart is made with those of the tests' smallest config instead."""
    from l2m_jax.run import pipeline

    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert "".join(code[0]["source"]).startswith("%pip install")  # so that the rest runs on Colab, too

    smallest = tiny.copy_and_resolve_references()
    smallest.checkpoint_minutes = 10.0
    smallest.teacher.finetune.epochs = smallest.student.warmup.epochs = 0
    smallest.curriculum.update(stages=2, epochs_per_stage=1)
    smallest.evaluation.validations = 1
    run = pipeline.run

    def small(config: Config, workdir: Path) -> None:
        assert config == config_file.read(str(ROOT / "configs" / "quickstart.py:compare"))
        run(parse(smallest), workdir)

    monkeypatch.setattr(pipeline, "run", small)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in code[1:]:
        exec("".join(cell["source"]), names)
