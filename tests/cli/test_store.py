"""A store made ahead is the one that a run makes, and a check sees damage that size and time do not show."""

import os
from pathlib import Path

import pytest

from l2m_jax.cli.main import main

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "tiny.py"
_FLAGS = [f"--config={CONFIG}", "--config.teacher.finetune.epochs=0", "--config.devices.num_processes=1"]


def test_a_store_is_built_found_again_and_checked(tmp_path, capsys):
    run, common = tmp_path / "run", tmp_path / "common"
    build = ["store", "build", *_FLAGS, f"--workdir={run}", f"--shared={common}"]
    main(build)
    kept = {file.name for file in common.iterdir()}
    assert {"teacher", "teacher_store"} <= kept and not {"student", "difficulty.parquet"} & kept
    assert not (run / "teacher_store").exists()
    [shard] = (common / "teacher_store").glob("*.safetensors")
    before = shard.stat()
    capsys.readouterr()
    main(build)
    assert "already there" in capsys.readouterr().out and shard.stat().st_mtime_ns == before.st_mtime_ns

    check = ["store", "check", f"--folder={shard.parent}"]
    main(check)
    assert "as they were written" in capsys.readouterr().out
    with shard.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        last = opened.read(1)
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([last[0] ^ 1]))
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(SystemExit) as ended:
        main(check)
    assert ended.value.code == 1
    assert f"{shard}: differs from what was written; delete it" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build"], "--config: l2m store build needs it"),
        (["import", f"--config={CONFIG}", "--workdir=w"], "--from: l2m store import needs it"),
        (["check"], "--folder: l2m store check needs it"),
        (["check", "--folder=nowhere"], "nowhere: contains no finished shard of a teacher store"),
    ],
)
def test_what_is_missing_is_named(refused, arguments, message):
    assert refused("store", *arguments).startswith(message)


def test_a_run_without_a_store_builds_none(tmp_path, capsys):
    flags = [*_FLAGS, "--config.method=sft", f"--workdir={tmp_path}"]
    with pytest.raises(SystemExit) as ended:
        main(["store", "build", *map(str, flags)])
    assert ended.value.code == 2
    assert "needs no store; nothing is built" in capsys.readouterr().err
