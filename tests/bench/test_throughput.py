"""The throughput suite on the smallest run. Speed itself is not tested."""

import json

import jax
import numpy as np
import pytest

from l2m_jax import config as settings
from l2m_jax import models
from l2m_jax.bench import throughput
from l2m_jax.models.hf import gpt2
from l2m_jax.plan import targets


@pytest.mark.parametrize(
    ("changes", "devices", "student_factor", "teacher_passes"),
    [
        ({}, (1, 2), 6, 0),
        ({"teacher.signal": "live", "student.lora.rank": 2, "devices.mapping": "fsdp"}, (2,), 4, 1),
    ],
)
def test_rates_belong_to_the_same_steps(tiny, monkeypatch, changes, devices, student_factor, teacher_passes):
    monkeypatch.setattr(throughput, "matmul_rate", lambda dtype: 1e9)
    config = settings.change(settings.parse(tiny), changes | {"training.dropout": 0.0})
    found = throughput.run(config, devices=devices, steps=2)
    assert [row["devices"] for row in found["rows"]] == list(devices)
    first = found["rows"][0]
    for row in found["rows"]:
        took = row["step_seconds"]
        tokens = row["tokens_a_second"] * took.median
        assert 0 < took.min <= took.median <= took.max
        assert row["examples_a_second"] == pytest.approx(config.training.batch_size / took.median)
        assert row["mfu"] is None and row["estimated_step_seconds"] > 0 and row["peak_memory_gb"] > 0
        # One layer of GPT-2 has 12·E² weights; the widths are 16 and 24.
        needed = row["of_matmul_rate"] * 1e9 * took.median
        heads = needed - tokens * 12 * (student_factor * 16**2 + teacher_passes * 2 * 24**2)
        assert 0 < heads < tokens * 512 * (student_factor * 16 + 2 * 24)
        assert tokens == pytest.approx(first["tokens_a_second"] * first["step_seconds"].median)
        speed_up = row["tokens_a_second"] / first["tokens_a_second"]
        assert row["efficiency"] == pytest.approx(speed_up * devices[0] / row["devices"])
    json.dumps(found)


def test_random_weights_fit_the_model():
    config = gpt2.read_config({"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 300, "n_positions": 64})
    shapes = jax.eval_shape(lambda: models.init(config, jax.random.key(0)))
    made = throughput._random(shapes)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    assert all(np.isfinite(x).all() and np.std(x) > 0 for x in jax.tree.leaves(made))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100_80gb"),
        ("NVIDIA H100 80GB HBM3", "h100_80gb"),
        ("TPU v5 lite", "v5e"),
        ("TPU v4", "v4"),
        ("cpu", "cpu"),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_target_of_a_device(kind, name):
    found = targets.of_kind(kind)
    assert (found and found.name) == name
