"""Checkpoints: what is restored is what was saved, on however many devices."""

import dataclasses

import jax
import numpy as np
import pytest

from l2m_jax import models
from l2m_jax.models import DecoderConfig
from l2m_jax.parallel import Placement
from l2m_jax.training.checkpoint import Checkpoints, Position
from l2m_jax.training.optimizer import OptimizerSettings, make_optimizer
from l2m_jax.training.step import TrainState, state_shapes

CONFIG = DecoderConfig(
    family="gpt2", vocab_size=64, valid_vocab_size=64, hidden_size=24, embed_size=24, num_layers=2, num_heads=2,
    num_kv_heads=2, head_dim=12, intermediate_size=48, max_positions=16,
)  # fmt: skip

OPTIMIZER = make_optimizer(OptimizerSettings())


def _placement(mapping: str, count: int) -> Placement:
    return Placement(mapping, tuple(jax.devices()[:count]))


def _state(seed: int) -> TrainState:
    params = models.init(CONFIG, jax.random.key(seed))
    noise = models.init(dataclasses.replace(CONFIG, init_std=1.0), jax.random.key(seed + 1))
    _, state = OPTIMIZER.update(noise, OPTIMIZER.init(params), params)
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
    before, after, state = _placement(*saved_on), _placement(*restored_on), _state(0)
    placed = before.place(state)
    checkpoints = Checkpoints(tmp_path, before)
    checkpoints.save(placed, Position(step=7))
    # As a step does: it donates the buffers of the state while the files are written.
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
    jax.block_until_ready(overwrite(placed))
    checkpoints.close()

    checkpoints = Checkpoints(tmp_path, after)
    found = checkpoints.restore_latest(state_shapes(OPTIMIZER, CONFIG))
    checkpoints.close()
    assert found is not None and found[1] == Position(step=7)
    jax.tree.map(np.testing.assert_array_equal, after.to_host(found[0]), state)
    for leaf in jax.tree.leaves(found[0]):
        assert leaf.sharding.device_set == set(after.devices)
    if restored_on[0] == "fsdp":
        largest = found[0].params["blocks"]["mlp"]["up"]["kernel"]
        assert largest.addressable_shards[0].data.size * after.num_devices == largest.size


def test_the_best_outlives_later_ones_and_a_restart(tmp_path):
    placement, shapes = _placement("pmap", 1), state_shapes(OPTIMIZER, CONFIG)
    checkpoints = Checkpoints(tmp_path, placement)

    def save(step: int, best_step: int) -> None:
        checkpoints.save(placement.place(_state(step)), Position(step=step, best_step=best_step))

    save(1, 1)
    save(2, 2)
    save(3, 2)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, placement)
    found = checkpoints.restore_latest(shapes)
    assert found is not None and found[1].step == 3
    save(4, 2)
    save(5, 2)
    best = placement.to_host(checkpoints.restore_best(shapes, 2))
    jax.tree.map(np.testing.assert_array_equal, best, jax.tree.map(np.asarray, _state(2).params))
    checkpoints.close()
    assert {int(folder.name) for folder in tmp_path.iterdir() if folder.name.isdigit()} == {2, 5}


def test_a_checkpoint_is_due_after_its_minutes(tmp_path):
    placement = _placement("pmap", 1)
    at_once, later = Checkpoints(tmp_path / "0", placement, 0), Checkpoints(tmp_path / "1", placement, 60)
    assert at_once.due(1) and not later.due(1)
    at_once.close()
    later.close()
