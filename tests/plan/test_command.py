"""`l2m plan` from end to end, for CPU devices and for cards whose compilers are installed."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "teacher.model.architecture.hidden_size": 32,
    "teacher.model.architecture.num_layers": 2,
    "student.model.architecture.num_layers": 2,
    "student.warmup.epochs": 0,
    "devices.slots": 4,
    "chunk_size": 32,
}


def _command(*flags: str) -> subprocess.CompletedProcess:
    config = ROOT / "tests" / "configs" / "tiny.py"
    settings = [f"--config.{name}={value}" for name, value in SETTINGS.items()]
    command = [sys.executable, "-m", "l2m_jax.cli.main", "plan", f"--config={config}", *settings, *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_command_line_on_cpu(tmp_path):
    out = tmp_path / "out.json"
    done = _command(
        "--target",
        "cpu",
        "--devices",
        "2",
        "--config.teacher.finetune.epochs=0",
        "--json",
        str(out),
    )
    assert done.returncode == 0, done.stderr
    assert "fits: " in done.stdout and "estimate" in done.stdout
    document = json.loads(out.read_text())
    assert document["devices"] == 2 and document["config"].endswith("tiny.py")


def test_the_command_line_with_a_wrong_target(tmp_path):
    done = _command("--target", "a1000")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "error: --target: no target 'a1000'" in done.stderr


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs the extra cuda12 (no GPU)"
)
@pytest.mark.parametrize("mapping", ["pmap", "fsdp"])
def test_for_a_gpu_that_is_not_there(tmp_path, mapping):
    out = tmp_path / "out.json"
    few = ("--config.teacher.finetune.epochs=0", f"--config.devices.mapping={mapping}", "--json", str(out))
    done = _command("--target", "h100_80gb", "--devices", "2", *few)
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    assert document["memory_of_card"] == 84929347584
    assert document["attention"]["teacher"]["cudnn"] is True  # heads of 16, bfloat16, a mask
    assert "dropout on attention probabilities" in document["attention"]["student"]["why_not"]
    assert document["largest_logits"]["tokens"] <= 32


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu (no TPU)")
def test_for_a_tpu_that_is_not_there(tmp_path):
    out = tmp_path / "out.json"
    done = _command(
        "--target",
        "v5e:2x2",
        "--devices",
        "4",
        "--config.teacher.finetune.epochs=0",
        "--json",
        str(out),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["collectives_per_step"]["bytes"] > 0
