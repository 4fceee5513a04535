"""Checkpoints: what is restored is what was saved, on however many devices."""

import dataclasses

import jax
import numpy as np
import pytest

from l2m_jax import models
from l2m_jax.errors import InputError
from l2m_jax.models import DecoderConfig
from l2m_jax.parallel import Parallel
from l2m_jax.training.checkpoint import Checkpoints, Position
from l2m_jax.training.optimizer import OptimizerSettings, make_optimizer
from l2m_jax.training.step import TrainState

CONFIG = DecoderConfig(
    family="gpt2", vocab_size=64, valid_vocab_size=64, hidden_size=24, embed_size=24, num_layers=2, num_heads=2,
    num_kv_heads=2, head_dim=12, intermediate_size=48, max_positions=16,
)  # fmt: skip


def _parallel(mapping: str, count: int) -> Parallel:
    return Parallel(mapping, tuple(jax.devices()[:count]))


def _state(seed: int) -> TrainState:
    params = models.init(CONFIG, jax.random.key(seed))
    noise = models.init(dataclasses.replace(CONFIG, init_std=1.0), jax.random.key(seed + 1))
    optimizer = make_optimizer(OptimizerSettings())
    _, state = optimizer.update(noise, optimizer.init(params), params)
    return TrainState(params, state)


@pytest.mark.parametrize(
    ("saved_on", "restored_on"),
    [
        (("pmap", 4), ("pmap", 2)),
        (("fsdp", 4), ("fsdp", 2)),
        (("fsdp", 2), ("fsdp", 3)),
        (("fsdp", 4), ("pmap", 1)),
        (("pmap", 2), ("fsdp", 4)),
    ],
)
def test_another_number_of_devices_restores_all_the_same(tmp_path, saved_on, restored_on):
    before, after, state = _parallel(*saved_on), _parallel(*restored_on), _state(0)
    checkpoints = Checkpoints(tmp_path / "run", "inputs")
    checkpoints.save(before.snapshot(before.place(state)), Position(step=7))
    checkpoints.close()

    checkpoints = Checkpoints(tmp_path / "run", "inputs")
    found = checkpoints.restore_latest(after.snapshot(after.place(_state(5))))
    checkpoints.close()
    assert found is not None and found[1] == Position(step=7)
    placed = after.place(found[0])
    jax.tree.map(np.testing.assert_array_equal, after.collect(placed), state)
    for leaf in jax.tree.leaves(placed):
        assert leaf.sharding.device_set == set(after.devices)
    if restored_on[0] == "fsdp":
        largest = placed.params["blocks"]["mlp"]["up"]["kernel"]
        assert largest.addressable_shards[0].data.size * after.num_devices == largest.size


def test_checkpoints_of_other_inputs_are_refused(tmp_path):
    Checkpoints(tmp_path / "run", "inputs").close()
    with pytest.raises(InputError, match="belong to other settings or data"):
        Checkpoints(tmp_path / "run", "others")
