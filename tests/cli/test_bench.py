import importlib
import inspect
import json

import pytest

from l2m_jax.bench import common
from l2m_jax.cli import bench


def test_every_suite_has_a_run_of_known_options():
    options = {"config", "data", "tokenizer", "peer_python", "repeats", "workdir"}
    for name in bench.SUITES:
        parameters = inspect.signature(importlib.import_module(f"l2m_jax.bench.{name}").run).parameters
        required = {key for key, p in parameters.items() if p.default is inspect.Parameter.empty}
        assert required <= options


def test_figures_on_screen_and_as_json(tmp_path, monkeypatch, capsys):
    from l2m_jax.bench import loss, rouge

    rows = [{"path": "fused", "seconds": {"median": 2.0, "min": 1.5, "max": 2.5}, "tokens": 4096}]
    calls = []

    def run_loss(*, repeats: int = 3):
        calls.append(repeats)
        return {"rows": rows, "ratio_time": 0.5}

    def run_rouge(data):
        calls.append(data)
        return {"ratio_all": 7.0, "identical": True}

    monkeypatch.setattr(loss, "run", run_loss)
    monkeypatch.setattr(rouge, "run", run_rouge)
    monkeypatch.setattr(common, "matmul_rate", lambda: 5e9)
    file = tmp_path / "out.json"
    data = tmp_path / "rows.jsonl"
    bench.main(["--suite", "loss,rouge", "--json", str(file), "--repeats", "2", "--data", str(data)])
    assert calls == [2, data]
    document = json.loads(file.read_text())
    assert document["suites"] == {
        "loss": {"rows": rows, "ratio_time": 0.5},
        "rouge": {"ratio_all": 7.0, "identical": True},
    }
    assert document["ratio_time"] == 0.5 and document["ratio_all"] == 7.0
    assert document["machine"]["matmul_gflops"] == 5 and document["peak_rss_mb"] > 0
    shown = capsys.readouterr().out
    assert "2 (1.5 to 2.5)" in shown and "4,096" in shown and "ratio_all: 7" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "speed"], "--suite speed: no such suite"),
        (["--suite", "rouge"], "--data: suite rouge needs it"),
        (["--suite", "loss", "--repeats", "0"], "--repeats 0: must be at least 1"),
        (["--suite", "throughput"], "--config: suite throughput needs it"),
        (["--suite", "loss", "--config.seed=1"], "--config.seed: needs a --config whose setting it changes"),
        (["--suite", "loss", "--steps", "0"], "--steps 0: must be at least 1"),
        (["--suite", "loss", "--repeats", "x"], "argument --repeats: invalid int value: 'x'"),
    ],
)
def test_bad_arguments(arguments, message, monkeypatch, refused):
    monkeypatch.setattr(common, "machine", dict)
    monkeypatch.setattr(common, "show", lambda *_: None)
    assert refused("bench", *arguments).startswith(message)
