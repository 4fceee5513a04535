import json

from l2m_jax.bench import loss


def test_both_paths_of_each_width_and_divergence():
    widths, divergences = (8, 16), ("skew_kl",)
    result = loss.run(repeats=1, tokens=64, vocabulary=1031, widths=widths, divergences=divergences)
    rows = result["rows"]
    assert [(r["width"], r["divergence"], r["path"]) for r in rows] == [
        (width, divergence, path)
        for width in widths
        for divergence in divergences
        for path in ("plain", "fused")
    ]
    for row in rows:
        assert 0 < row["seconds"]["min"] <= row["seconds"]["median"] <= row["seconds"]["max"]
        assert row["of_matmul_rate"] > 0 and row["temporary_mb"] > 0
    assert all(row["difference"] < 1e-5 for row in rows)
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    assert result["ratio_memory"] == max(f["temporary_mb"] / p["temporary_mb"] for p, f in pairs)
    assert result["ratio_time"] == max(f["seconds"]["median"] / p["seconds"]["median"] for p, f in pairs)
    json.dumps(result)
