import json

import pytest

from l2m_jax.bench import peers
from l2m_jax.errors import InputError


@pytest.fixture
def sides(monkeypatch):
    """What each side prints, by a word of its command."""
    peer = {
        "losses": [2.0, 1.0],
        "step_seconds": [9.0, 6.0],
        "peak_rss_mb": 1000.0,
        "matmul_gflops": 40.0,
        "threads": 2,
        "torch": "x",
    }
    sides = {
        "l2m_jax.bench.distil": {
            "losses": [2.0, 1.0], "step_seconds": [0.5, 1.5], "store_seconds": 4.0, "compile_seconds": 3.0,
            "peak_rss_mb": 250.0, "matmul_gflops": 80.0,
            "parts": [
                {"part": "teacher pass (once)", "seconds_a_batch": 2.0, "gflop_a_batch": 20.0, "of_matmul_rate": 0.1},
                {"part": "step", "seconds_a_batch": 1.0, "gflop_a_batch": 40.0, "of_matmul_rate": 0.5},
            ],
        },
        "padded_512": peer,
        "padded_longest": peer | {"step_seconds": [9.0, 3.0]},
        "trl": peer | {"step_seconds": [9.0, 12.0], "peak_rss_mb": 500.0},
    }  # fmt: skip

    def result(command, what):
        (side,) = [side for name, side in sides.items() if name in command]
        return side

    monkeypatch.setattr(peers, "_result", result)
    return sides


def _run(work):
    _, arguments = work
    return peers.run(peer_python="python", batches=2, peer_steps=2, batch_size=3, **arguments)


def test_rates_and_ratios(work, sides):
    result = _run(work)
    # 6 examples: 2 s a pass; 20 passes and the store take 44 s.
    rates = [row["examples_a_second"] for row in result["rows"]]
    assert rates == pytest.approx([6 / 2, 120 / 44, 3 / 6, 3 / 3, 3 / 12])
    assert result["ratio_vs_padded"] == pytest.approx(120 / 44 / (3 / 6))
    assert result["ratio_vs_trl"] == pytest.approx(120 / 44 / (3 / 12))
    # A peer whose products are half as fast has twice the time for them.
    assert result["ratio_normalised_vs_padded"] == pytest.approx(result["ratio_vs_padded"] / 2)
    assert [row["of_matmul_rate"] for row in result["rows"][:2]] == pytest.approx([0.5, 41 / 1.1 / 80])
    assert result["memory_ratio_vs_padded"] == 0.25 and result["memory_ratio_vs_trl"] == 0.5
    json.dumps(result)


@pytest.mark.parametrize("losses", [[2.0, 1.01], [2.0, float("nan")]])
def test_other_losses_are_other_work(work, sides, losses):
    sides["trl"] = sides["trl"] | {"losses": losses}
    with pytest.raises(RuntimeError, match="trl: losses of the first steps"):
        _run(work)


def test_a_python_that_cannot(tmp_path):
    with pytest.raises(InputError, match=r"--peer-python .*nowhere: cannot run"):
        peers._result([str(tmp_path / "nowhere"), "x"], f"--peer-python {tmp_path / 'nowhere'}")
