import json

import pytest

from l2m_jax.bench import rouge
from l2m_jax.errors import InputError


def test_figures_and_equal_values(tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = [{"output": f"the {i} cats sat on {i % 3} mats"} for i in range(8)]
    rows += [{"response": "a single answer"}, {"output": ["one of two", "another"]}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = rouge.run(data, repeats=1, peer_pairs=10)
    assert result["identical"] is True
    assert result["pairs"] == 200
    for name in ("first_pass", "one_thread", "all_cores"):
        rates = result["pairs_per_second"]
        assert result[f"ratio_{name}"] == rates[name]["median"] / rates["rouge_score"]["median"] > 0
    json.dumps(result)


def test_a_difference_is_seen(tmp_path, monkeypatch):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"output": "a b"}\n{"output": "b c"}\n', encoding="utf-8")
    monkeypatch.setattr(rouge.rouge, "rouge_l", lambda *_: 0.5000001)
    assert rouge.run(data, repeats=1)["identical"] is False


@pytest.mark.parametrize("content, message", [(None, "no such file"), ('{"output": "x"}\n', "at least 2")])
def test_bad_data(tmp_path, content, message):
    data = tmp_path / "rows.jsonl"
    if content:
        data.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        rouge.run(data)
