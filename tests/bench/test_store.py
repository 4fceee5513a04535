import json

import numpy as np

from l2m_jax.bench import store


def test_figures_of_each_dtype():
    result = store.run(repeats=1, examples=60, width=16, vocabulary=101)
    rows = {row["dtype"]: row for row in result["rows"]}
    assert {name: row["bytes_a_target"] for name, row in rows.items()} == {
        "float32": 64,
        "float16": 32,
        "bfloat16": 32,
        "int8": 16 + 4,  # with one scale
    }
    for row in rows.values():
        assert row["gigabytes"] == row["bytes_a_target"] * result["targets"] / 1e9
        assert row["write_targets_a_second"]["median"] > 0 and row["read_targets_a_second"]["median"] > 0
    differences = [row["divergence_difference"] for row in result["rows"]]
    assert differences[0] == 0 and 0 < differences[1] < min(differences[2:]) and max(differences) < 0.1
    json.dumps(result)


def test_lengths_are_about_dollys():
    corpus = store._corpus(4000)
    assert abs(np.mean(corpus.lengths) - 151) < 15
    assert abs(np.mean(corpus.response_lengths) - 80) < 8
