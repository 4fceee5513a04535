"""Two processes on this machine: they give the result of one, end together, and go on where they stopped."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from l2m_jax import models
from l2m_jax.config import defaults, parse
from l2m_jax.errors import InputError
from l2m_jax.run import context

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (
    "--config.data.synthetic.train=40",
    "--config.student.warmup.epochs=0",
    "--config.curriculum.stages=2",
    "--config.evaluation.select=last",
    "--config.evaluation.seeds=(10,)",
    "--config.devices.count=0",
    "--config.devices.timeout=10",
)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class _Processes:
    """train.py, started `count` times on `devices` fake devices each."""

    def __init__(self, folder: Path, count: int, devices: int, *flags: str, slurm: bool = False):
        config = ROOT / "tests" / "configs" / "tiny.py"
        command = [sys.executable, str(ROOT / "train.py"), f"--config={config}:no_dropout"]
        command += [f"--workdir={folder / 'run'}", *SETTINGS, *flags]
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        port = _free_port()
        self.running = []
        for rank in range(count):
            address, own = [], {}
            if slurm:
                own = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count)}
                own |= {"SLURM_PROCID": str(rank), "SLURM_LOCALID": "0", "JAX_COORDINATOR_PORT": str(port)}
            elif count > 1:
                address = [f"--config.devices.coordinator=127.0.0.1:{port}"]
                address += [f"--config.devices.num_processes={count}", f"--config.devices.process_id={rank}"]
            self.running.append(
                subprocess.Popen(
                    command + address,
                    cwd=ROOT,
                    env=environment | own,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def ended(self) -> list[tuple[int, str, str]]:
        """Status, output and errors of each."""
        texts = [process.communicate(timeout=300) for process in self.running]
        return [(p.returncode, out, errors) for p, (out, errors) in zip(self.running, texts, strict=True)]

    def succeed(self) -> None:
        for status, out, errors in self.ended():
            assert status == 0, out + errors


def _student(folder: Path) -> dict:
    return models.load(folder / "run" / "student")[1]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    _Processes(folder, 1, 4).succeed()
    return folder


def _assert_same(folder: Path, expected: Path) -> None:
    """To rounding: what processes add up comes in another order than what one process does."""

    def same(path, a, b):
        # A bias of the keys shifts all scores of a query alike: its gradient is 0, and Adam makes a step of the rounding.
        if [str(key.key) for key in path[-2:]] != ["key", "bias"]:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=str(path))

    jax.tree_util.tree_map_with_path(same, _student(folder), _student(expected))
    lines, others = (
        [json.loads(line) for line in (f / "run" / "metrics.jsonl").read_text().splitlines()]
        for f in (folder, expected)
    )
    steps, other_steps = ([line for line in found if "loss" in line] for found in (lines, others))
    assert [(s["phase"], s["step"]) for s in steps] == [(s["phase"], s["step"]) for s in other_steps]
    for name in ("loss", "target_tokens", "examples"):
        np.testing.assert_allclose([s[name] for s in steps], [s[name] for s in other_steps], rtol=1e-4)
    results = [json.loads((f / "run/evaluation/results.json").read_text()) for f in (folder, expected)]
    assert [list(found) for found in results] == [["teacher", "student before", "l2m"]] * 2


def _student_reaches(step: int, folder: Path, running: subprocess.Popen) -> None:
    metrics = folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and running.poll() is None:
        if metrics.is_file() and f'"phase": "student", "step": {step},' in metrics.read_text():
            break
        time.sleep(0.02)


@pytest.fixture(scope="module")
def asked_to_end(tmp_path_factory) -> tuple[Path, list[tuple[int, str, str]]]:
    """A run of two processes, one of which got a signal in training; and how they ended."""
    folder = tmp_path_factory.mktemp("asked")
    asked = _Processes(folder, 2, 2, "--config.checkpoint_minutes=60")
    _student_reaches(1, folder, asked.running[0])
    asked.running[1].terminate()
    return folder, asked.ended()


def _last_step(folder: Path) -> int:
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return max(line["step"] for line in lines if line["phase"] == "student")


def test_a_signal_to_one_ends_both_with_a_checkpoint_of_the_last_step(asked_to_end):
    folder, ended = asked_to_end
    assert [status for status, _, _ in ended] == [75, 75], ended
    kept = folder / "run" / "checkpoints" / "student"
    assert max(int(f.name) for f in kept.iterdir() if f.name.isdigit()) == _last_step(folder)


def test_the_death_of_one_ends_the_other_and_both_go_on_to_the_result_of_one(one_process, asked_to_end):
    folder, _ = asked_to_end
    first = _Processes(folder, 2, 2, slurm=True)
    _student_reaches(_last_step(folder) + 1, folder, first.running[0])
    first.running[1].kill()
    (status, out, errors), _ = first.ended()
    assert status != 0 and "another task died" in errors, out + errors
    assert not (folder / "run" / "student").exists()

    _Processes(folder, 2, 2).succeed()
    _assert_same(folder, one_process)


def test_sharded_parameters_over_two_processes_give_the_same(one_process, tmp_path):
    _Processes(tmp_path, 2, 2, "--config.devices.mapping=fsdp").succeed()
    _assert_same(tmp_path, one_process)


def test_bad_input_ends_all_processes_with_its_message(tmp_path):
    both = _Processes(tmp_path, 2, 1, "--config.data.source=files", "--config.data.train=nowhere.jsonl",
                      f"--config.data.tokenizer={tmp_path}")  # fmt: skip
    for status, _, errors in both.ended():
        assert status == 2 and "error:" in errors and "Traceback" not in errors, errors


@pytest.mark.parametrize("rank", [0, 1])  # a process that waits for another, and one with a wrong address
def test_processes_that_do_not_meet_say_so(tmp_path, rank):
    alone = _Processes(
        tmp_path,
        1,
        1,
        f"--config.devices.coordinator=127.0.0.1:{_free_port()}",
        "--config.devices.num_processes=2",
        f"--config.devices.process_id={rank}",
        "--config.devices.timeout=2",
    )
    ((status, _, errors),) = alone.ended()
    assert status == 1 and "did not all meet at '127.0.0.1:" in errors and "within 2 s" in errors
    assert "Check failure stack trace" not in errors


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"coordinator": "node1"}, "coordinator: 'node1' is not host:port"),
        ({"coordinator": "node1:1", "num_processes": 2, "process_id": 2}, "process_id: 2 is not below"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, named):
    config = defaults()
    config.devices.update(settings)
    with pytest.raises(InputError, match=named):
        parse(config)


@dataclasses.dataclass
class _Device:
    process_index: int
    platform: str = "cpu"


@pytest.mark.parametrize(("count", "hosts", "share"), [(0, (4, 4), 4), (4, (4, 4), 2), (6, (3, 3), 3)])
def test_each_process_has_the_same_share_of_the_devices(monkeypatch, count, hosts, share):
    _fake_hosts(monkeypatch, hosts)
    found = context.placement_of(_config(count).devices).devices
    assert [device.process_index for device in found] == [0] * share + [1] * share


@pytest.mark.parametrize(("count", "hosts"), [(3, (4, 4)), (0, (4, 2)), (9, (4, 4))])
def test_devices_that_cannot_be_shared_out_are_refused(monkeypatch, count, hosts):
    _fake_hosts(monkeypatch, hosts)
    with pytest.raises(InputError, match=r"config\.devices\.count"):
        context.placement_of(_config(count).devices)


def _fake_hosts(monkeypatch, hosts: tuple[int, ...]) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: len(hosts))
    monkeypatch.setattr(
        jax, "local_devices", lambda process_index: [_Device(process_index)] * hosts[process_index]
    )


def _config(count: int):
    config = defaults()
    config.devices.count = count
    return parse(config)
