"""Checkpoints: what is restored is what was saved, on however many devices."""

import dataclasses
import os

import jax
import numpy as np
import pytest

from l2m_jax import models
from l2m_jax.errors import InputError
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


@pytest.fixture
def two_checkpoints(tmp_path):
    """The best of step 2 and the latest of step 3; a function that opens them, and the shapes of their state."""
    placement, shapes = _placement("pmap", 1), state_shapes(OPTIMIZER, CONFIG)
    checkpoints = Checkpoints(tmp_path, placement)
    for number, best in ((2, 2), (3, 2)):
        checkpoints.save(placement.place(_state(number)), Position(step=number, best_step=best))
    checkpoints.close()
    return lambda: Checkpoints(tmp_path, placement), shapes


def _files(checkpoint) -> list:
    """Those that something is read from."""
    outside = (checkpoint / "_CHECKPOINT_METADATA", checkpoint / "commit_success.txt")
    return [f for f in sorted(checkpoint.rglob("*")) if f.is_file() and f not in outside]


def test_a_damaged_file_of_the_latest_checkpoint_is_noticed(tmp_path, two_checkpoints):
    checkpoints = two_checkpoints[0]()
    assert checkpoints._damaged(2) is None and checkpoints._damaged(3) is None
    for file in _files(tmp_path / "3"):
        content, times = file.read_bytes(), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
        for damaged in (
            b"",
            content[: len(content) // 2],
            content[:-1] + bytes([content[-1] ^ 1]) if content else b"x",
        ):
            if damaged != content:
                file.write_bytes(damaged)
                assert checkpoints._damaged(3), file
        file.unlink()
        assert checkpoints._damaged(3), file
        file.write_bytes(content)
        os.utime(file, ns=times)
    assert checkpoints._damaged(3) is None
    checkpoints.close()


def test_the_other_checkpoint_takes_the_place_of_a_damaged_one(tmp_path, two_checkpoints):
    opened, shapes = two_checkpoints
    _files(tmp_path / "3")[-1].write_bytes(b"rotten")
    checkpoints = opened()
    found = checkpoints.restore_latest(shapes, needs_best=True)
    assert found is not None and found[1].step == 2 and not (tmp_path / "3").exists()
    jax.tree.map(np.testing.assert_array_equal, _placement("pmap", 1).to_host(found[0]), _state(2))
    checkpoints.save(found[0], Position(step=3, best_step=2))  # as the repeated steps do
    checkpoints.close()
    assert opened()._damaged(3) is None


@pytest.mark.parametrize("rotten", [(2, 3), (2,)])
def test_without_what_is_needed_a_file_is_named(tmp_path, two_checkpoints, rotten):
    opened, shapes = two_checkpoints
    for step in rotten:
        _files(tmp_path / str(step))[-1].write_bytes(b"rotten")
    checkpoints = opened()
    said = rf"{tmp_path}/{max(rotten)}/.*not what was written; restore it, or delete {tmp_path} to train from the start"
    with pytest.raises(InputError, match=said):
        checkpoints.restore_latest(shapes, needs_best=True)
    if rotten == (2,):
        assert checkpoints.restore_latest(shapes) is not None  # the last one is the student
    checkpoints.close()
