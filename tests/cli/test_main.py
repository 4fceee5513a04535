"""The entry points: what they import, what they refuse, and how they end."""

import errno
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from l2m_jax.cli import common, train
from l2m_jax.cli.main import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_help_lists_the_commands_and_imports_no_library():
    code = "import sys\nfrom l2m_jax.cli.main import main\ntry: main(sys.argv[1:])\nfinally: print(sorted(sys.modules))"
    for arguments in (
        ["--help"],
        ["train", "--help"],
        ["sweep", "--bad"],
        ["plan", "--help"],
        ["bench", "--help"],
    ):
        done = python("-c", code, *arguments)
        assert done.returncode == 2 * ("--bad" in arguments), done.stderr
        assert "'l2m_jax.cli.main'" in done.stdout
        assert not any(
            f"'{name}'" in done.stdout for name in ("jax", "numpy", "transformers", "ml_collections")
        )
        assert arguments != ["--help"] or all(f"  {name}" in done.stdout for name in COMMANDS)


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"l2m_jax {metadata.version('l2m_jax')}\n"


def test_the_console_script():
    (script,) = metadata.entry_points(group="console_scripts", name="l2m")
    assert script.load() is main


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc's")
@pytest.mark.parametrize("entry", [("train.py",), ("-m", "l2m_jax.cli.main", "train")])
@pytest.mark.parametrize(("given", "used"), [(None, "glibc.malloc.hugetlb=1"), ("glibc.malloc.check=0",) * 2])
def test_a_command_runs_with_huge_pages_unless_told_otherwise(entry, given, used, tmp_path, monkeypatch):
    """The config sees the environment and the arguments of the process that trains."""
    config = tmp_path / "a config.py"
    config.write_text(
        "import sys\n"
        "environment = open('/proc/self/environ').read().split('\\0')  # as the process began\n"
        "def get_config():\n"
        "    raise ValueError([e for e in environment if e.startswith('GLIBC_TUNABLES=')], sys.argv[-2:])\n"
    )
    if given:
        monkeypatch.setenv("GLIBC_TUNABLES", given)
    else:
        monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    done = python(*entry, f"--config={config}", f"--workdir={tmp_path / 'a run'}")
    arguments = [f"--config={config}", f"--workdir={tmp_path / 'a run'}"]
    assert done.returncode == 2 and str(([f"GLIBC_TUNABLES={used}"], arguments)) in done.stderr, done.stderr


@pytest.mark.parametrize(
    "entry", [("train.py",), ("-m", "l2m_jax.cli.train"), ("-m", "l2m_jax.cli.main", "train")]
)
def test_every_entry_point_refuses_in_one_sentence(entry, tmp_path):
    done = python(*entry, "--config=configs/quickstart.py:x", f"--workdir={tmp_path}")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "error: --config configs/quickstart.py:x: no variant 'x' of configs/quickstart.py; known: compare, random, "
        "lab, lab_random\n"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: COMMAND (see l2m --help)"),
        (["trian"], "argument COMMAND: invalid choice: 'trian'"),
        (["train"], "the following arguments are required: --config, --workdir (see l2m train --help)"),
        (["train", "--config=x", "--workdir=y", "--share=z"], "unrecognized arguments: --share=z"),
        (
            ["train", "--config.seed", "--workdir=y"],
            "--config.seed: has no value; give one, as in --config.seed=VALUE",
        ),
        (
            ["bench", "--suite=loss", "--config.seed=1"],
            "--config.seed: needs a --config whose setting it changes",
        ),
        (
            ["push", "--model=a", "--repo=b/c", "--config.seed=1"],
            "--config.seed: this command has no --config",
        ),
    ],
)
def test_wrong_flags(refused, arguments, said):
    assert refused(*arguments).startswith(said)


def test_flags_in_any_order_and_with_underscores():
    parser = common.Parser("eval", None)
    common.add_config(parser)
    parser.add_argument("--max-new-tokens", type=int)
    options = parser.parse_args(
        ["--config.a_b=x=1", "--max_new_tokens=3", "--config.c", "-1", "--config", "a_b.py:v", "--config.d="]
    )
    assert options.config == "a_b.py:v" and options.max_new_tokens == 3
    assert options.overrides == [("a_b", "x=1"), ("c", "-1"), ("d", "")]


def test_train_hands_its_settings_to_the_run(tmp_path, monkeypatch):
    from l2m_jax.run import pipeline

    calls = []
    monkeypatch.setattr(pipeline, "run", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr("l2m_jax.multihost.start", lambda devices: calls.append(devices))
    flags = f"--config={ROOT / 'tests/configs/tiny.py'}", "--workdir=w", "--config.devices.timeout=9"
    main(["train", *flags, "--shared=s", "--config.seed", "5"])
    train.main(flags)
    devices, (config, *folders), _, (_, *alone) = calls
    assert devices.timeout == 9 and config.seed == 5 and config.devices == devices
    assert folders == [Path("w"), Path("s")] and alone == [Path("w"), None]


def test_an_interrupt_says_how_to_resume(capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        common.run(common.Parser("train", None), interrupted, [])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted: run the same command again to resume\n"


def test_a_full_disk_is_one_sentence(capsys):
    def command(options):
        try:
            raise OSError(errno.ENOSPC, "no room")
        except OSError as error:
            raise ValueError("a library's own words") from error

    with pytest.raises(SystemExit) as ended:
        common.run(common.Parser("test", ""), command, [])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert "make room and run the same command again" in said

    def broken(options):
        raise OSError(errno.EIO, "broken")

    with pytest.raises(OSError):
        common.run(common.Parser("test", ""), broken, [])
