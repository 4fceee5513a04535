"""Plans of very small models: on CPU devices from end to end, and for cards where their compilers are installed."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from l2m_jax import models
from l2m_jax.config import defaults, parse
from l2m_jax.errors import InputError
from l2m_jax.parallel import Parallel
from l2m_jax.plan import plan, targets
from l2m_jax.plan.programs import Compiler, device_bytes, parameters

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "teacher.model.architecture.hidden_size": 32,
    "teacher.model.architecture.num_layers": 2,
    "student.model.architecture.num_layers": 2,
    "student.warmup.epochs": 0,
    "sampling.slots": 4,
    "chunk_size": 32,
}


@pytest.fixture(scope="module")
def config(tiny):
    values = tiny.copy_and_resolve_references()
    values.update_from_flattened_dict(SETTINGS)
    return parse(values)


@pytest.fixture(scope="module")
def on_cpu(config):
    return plan.make(config, "cpu", 4)


def _sharded(config):
    return dataclasses.replace(config, devices=dataclasses.replace(config.devices, mapping="fsdp"))


def _count(config):
    return sum(leaf.size for leaf in jax.tree.leaves(parameters(config)))


def test_what_stays_on_a_device_is_the_models_own_size(on_cpu):
    student, teacher = _count(on_cpu.workload.student), _count(on_cpu.workload.teacher)
    memory = on_cpu.phase("student").memory
    assert memory.parameters == 4 * student
    assert memory.optimizer == 2 * 4 * student + 4  # Adam's count
    assert memory.gradients == 4 * student + 4 * 4  # and four loss sums
    assert memory.teacher == 4 * on_cpu.workload.teacher.vocab_size * 32  # its head alone
    assert memory.loaded == 4 * (student + teacher)
    assert on_cpu.phase("teacher fine-tuning").memory.parameters == 4 * teacher


def test_replicated_gradients_are_summed_once_a_step(on_cpu):
    accumulate, update = on_cpu.phase("student").programs
    assert accumulate.module.collectives == []
    summed = sum(c.bytes * c.count for c in update.module.collectives)
    assert summed == on_cpu.phase("student").memory.gradients
    assert {c.kind for c in update.module.collectives} == {"all-reduce"}


def test_operations_of_a_step_follow_from_the_sizes(on_cpu):
    """6 a parameter of a matrix and token, and the vocabulary's products for whole chunks."""
    w = on_cpu.workload
    (shape,) = w.shapes
    params = parameters(w.student)["blocks"]
    kernels = sum(x.size for p, x in jax.tree.leaves_with_path(params) if p[-1].key == "kernel")
    attention = 2 * 2 * shape.length * 16 * w.student.num_layers
    body = 3 * shape.slots * (2 * kernels + attention)
    vocabulary = (
        2 * w.student.vocab_size * (3 * 16 + 32)
    )  # three products of the student's head, one of the teacher's
    per_micro_batch = on_cpu.phase("student").flops_per_step / 4 / w.micro_batches[shape]
    chunks = (per_micro_batch - body) / vocabulary / 32
    assert chunks == pytest.approx(round(chunks)) and 1 <= chunks <= shape.slots / 32


def test_no_logits_beyond_a_chunk(on_cpu):
    logits = plan.document(on_cpu)["largest_logits"]
    assert 0 < logits["tokens"] <= 32 < logits["of"]


def test_the_document_is_json_with_the_promised_keys(on_cpu):
    document = json.loads(json.dumps(plan.document(on_cpu)))
    assert document["fits"] is True
    parts = dict(document["bytes_per_device"])
    assert parts.pop("total") == sum(parts.values())
    assert document["flops_per_step"] > 0
    assert document["estimate"]["hours"] > 0
    assert "roofline" in document["estimate"]["basis"]
    assert document["compilations"]["total"] > 0
    assert document["attention"]["student"]["why_not"] == "there is no cuDNN on cpu"


@pytest.fixture(scope="module")
def sharded(config):
    return plan.make(_sharded(config), "cpu", 4)


def test_sharding_spreads_the_state_over_the_devices(sharded, on_cpu):
    ours, replicated = sharded.phase("student").memory, on_cpu.phase("student").memory
    assert replicated.optimizer / 4 <= ours.optimizer < replicated.optimizer / 3
    assert any(c.kind == "all-gather" for c in sharded.phase("student").programs[0].module.collectives)


@pytest.mark.parametrize("mapping", ["pmap", "fsdp"])
def test_planned_arrays_lie_as_placed_ones(on_cpu, mapping):
    parallel = Parallel(mapping, tuple(jax.devices()[:4]))
    student = on_cpu.workload.student
    placed = parallel.place(models.init(student, jax.random.key(0)))
    planned = Compiler(parallel).placed(parameters(student))
    for real, shape in zip(jax.tree.leaves(placed), jax.tree.leaves(planned), strict=True):
        assert real.shape == shape.shape and real.dtype == shape.dtype
        assert real.sharding.is_equivalent_to(shape.sharding, real.ndim)
    on_first = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(placed))
    assert device_bytes(planned) == on_first


def test_what_does_not_fit_says_what_would(config, on_cpu, sharded, monkeypatch):
    name = "teacher fine-tuning"
    totals = [found.phase(name).memory.total for found in (sharded, on_cpu)]
    room, real = sum(totals) / 2, targets.get
    monkeypatch.setattr(targets, "get", lambda name: dataclasses.replace(real(name), memory=room / 0.95))
    small = dataclasses.replace(on_cpu, target=targets.get("cpu"), phases=(on_cpu.phase(name),))
    assert not small.fits
    tried = plan.what_would_fit(config, small)
    assert tried[0].settings == {"data.max_length": 80, "chunk_size": 32}
    assert [change.fits for change in tried] == [False] * (len(tried) - 1) + [True]
    assert tried[-1].compiled and tried[-1].total <= room


def test_nothing_is_compiled_where_the_state_alone_is_too_large(config, on_cpu, monkeypatch):
    real = targets.get
    monkeypatch.setattr(targets, "get", lambda name: dataclasses.replace(real(name), memory=1.0))
    tried = plan.what_would_fit(config, dataclasses.replace(on_cpu, target=targets.get("cpu")))
    assert tried and not any(change.fits or change.compiled for change in tried)
    assert tried[-1].settings["devices.mapping"] == "fsdp"  # more CPU devices share one memory


def test_the_papers_models_are_known_without_files():
    values = defaults()
    values.teacher.model.path = "gpt2-xl"
    values.student.model.path = "gpt2"
    found = plan.make(parse(values), "cpu", 2, dry=True)
    assert found.workload.teacher.num_layers == 48
    assert "Dolly" in found.workload.assumptions[0]
    assert found.phase("teacher fine-tuning").memory.optimizer == pytest.approx(2 * 4 * 1557.6e6, rel=1e-4)


def test_a_model_that_nobody_knows(config):
    values = defaults()
    values.teacher.model.path = "/no/such/model"
    with pytest.raises(InputError, match=r"config\.teacher\.model\.path: .*the plan knows gpt2, gpt2-medium"):
        plan.make(parse(values), "cpu", 1)


@pytest.mark.parametrize("name", ["a100", "h100_80g", "v5e8", "a100_80gb:2"])
def test_unknown_targets_list_the_known_ones(config, name):
    with pytest.raises(
        InputError, match=rf"--target: no target '{name}' \(.*known: a100_80gb, h100_80gb, v4"
    ):
        plan.make(config, name, 1)


def test_more_cpu_devices_than_there_are(config):
    with pytest.raises(InputError, match="--devices: 64 CPU devices asked for"):
        plan.make(config, "cpu", 64)
    with pytest.raises(InputError, match="--devices 0: at least 1"):
        plan.make(config, "cpu", 0)


@pytest.mark.parametrize(("target", "extra"), [("a100_80gb", "cuda12"), ("v5e", "tpu")])
def test_a_compiler_that_is_not_installed_is_named(config, monkeypatch, target, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"--target: compiling for .* needs .*uv sync --extra {extra}"):
        plan.make(config, target, 1)


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
    assert document["attention"]["student"]["why_not"].startswith("dropout on attention probabilities")
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
