import json

import pytest

from l2m_jax.bench import loss


def test_both_paths_of_each_divergence_and_of_each_width(monkeypatch):
    monkeypatch.setattr(loss, "matmul_rate", lambda dtype, repeats: 1e9)
    widths, divergences = (8, 16), ("skew_kl", "jsd")
    result = loss.run(repeats=1, tokens=64, vocabulary=1031, widths=widths, divergences=divergences)
    rows = result["rows"]
    assert [(r["width"], r["divergence"], r["path"]) for r in rows] == [
        (width, divergence, path)
        for width, divergence in ((8, "skew_kl"), (8, "jsd"), (16, "skew_kl"))
        for path in ("plain", "fused")
    ]
    for row in rows:
        assert 0 < row["seconds"]["min"] <= row["seconds"]["median"] <= row["seconds"]["max"]
        # student and teacher logits, gradients of hidden states and head
        operations = 4 * 2 * 64 * row["width"] * 1031
        assert row["of_matmul_rate"] == pytest.approx(operations / row["seconds"]["median"] / 1e9)
        assert row["temporary_mb"] > 0
    assert all(row["difference"] < 1e-5 for row in rows)
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    assert result["ratio_memory"] == max(f["temporary_mb"] / p["temporary_mb"] for p, f in pairs)
    assert result["ratio_time"] == max(f["seconds"]["median"] / p["seconds"]["median"] for p, f in pairs)
    json.dumps(result)
