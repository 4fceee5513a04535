"""The loop: whose buffers it uses, and what it computes in."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2m_jax import models
from l2m_jax.curriculum import baby_steps, examples_seen, partition, single_stage
from l2m_jax.data.batches import ListedExamples
from l2m_jax.data.packing import Shape
from l2m_jax.losses import Objective
from l2m_jax.models import DecoderConfig
from l2m_jax.parallel import Placement
from l2m_jax.training.checkpoint import Checkpoints
from l2m_jax.training.loop import Task, Term, Trainer, _validation_steps
from l2m_jax.training.metrics import MetricsLog, read_metrics
from l2m_jax.training.optimizer import OptimizerSettings
from l2m_jax.training.step import StepSettings

CONFIG = DecoderConfig(
    family="gpt2", vocab_size=60, valid_vocab_size=60, hidden_size=16, embed_size=16, num_layers=1, num_heads=2,
    num_kv_heads=2, head_dim=8, intermediate_size=32, max_positions=32, init_std=0.3,
)  # fmt: skip
EXAMPLES = 12


def _train(folder, mapping: str, params, dtype: str = "float32", seen=lambda: None):
    """Parameters after one epoch of fine-tuning, those it started from, and the losses."""
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 60, size=n).astype(np.int32) for n in rng.integers(6, 30, EXAMPLES)]
    examples = ListedExamples(tokens, np.full(EXAMPLES, 3, np.int32))
    config = dataclasses.replace(CONFIG, dtype=dtype)
    task = Task(
        phase="test",
        settings=StepSettings(config, None, 60, chunk_size=16),
        stages=single_stage(np.arange(EXAMPLES), EXAMPLES, beta=0.0),
        shapes=(Shape(1, 32),),
        optimizer=OptimizerSettings(learning_rate=1e-2),
        batch_size=6,
        seed=0,
    )
    placement = Placement(mapping, tuple(jax.devices()[:2]))
    placed, metrics = placement.place(params), MetricsLog(folder / "metrics.jsonl")
    checkpoints = Checkpoints(folder / "checkpoints", placement)
    terms = (Term(Objective(beta=0.0), examples),)

    def data(part, params):
        seen()
        return terms

    trainer = Trainer(task, placement, data, None, checkpoints, metrics)
    last = trainer.run(lambda: placed)
    checkpoints.close()
    losses = [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]
    return placement.to_host(last), placed, losses


@pytest.mark.parametrize("mapping", ["pmap", "fsdp"])
def test_an_update_takes_over_the_buffers_of_the_state(tmp_path, mapping):
    _, started_from, _ = _train(tmp_path, mapping, models.init(CONFIG, jax.random.key(0)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(started_from))


def test_bfloat16_computes_on_float32_master_weights(tmp_path):
    params = models.init(CONFIG, jax.random.key(0))
    exact, _, losses = _train(tmp_path / "float32", "pmap", params)
    mixed, _, mixed_losses = _train(tmp_path / "bfloat16", "pmap", params, "bfloat16")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(mixed))
    np.testing.assert_allclose(mixed_losses, losses, rtol=0.02)
    assert losses != mixed_losses  # or bfloat16 was not used
    # Steps of 1e-2 on weights of 0.3: were these kept in bfloat16, they would lie on its grid of 2⁻⁹ or so.
    kernel = np.asarray(mixed["blocks"]["mlp"]["up"]["kernel"])
    assert np.mean(kernel == kernel.astype(jnp.bfloat16).astype(np.float32)) < 0.05
    np.testing.assert_allclose(kernel, exact["blocks"]["mlp"]["up"]["kernel"], atol=0.03)


def test_all_methods_are_validated_equally_often():
    """Ten epochs' worth of examples, once in four stages and once in a single one."""
    rows = np.arange(400)
    staged = baby_steps(partition(rows, 4), epochs=4)
    single = single_stage(rows, examples_seen(staged))
    settings = StepSettings(CONFIG, None, 60)
    for stages in (staged, single):
        task = Task("test", settings, stages, (), OptimizerSettings(), 10, 0, validations=20)
        due = _validation_steps(task)
        assert len(set(due)) == 20 and due[-1] == 400 and due[0] == 20


@pytest.mark.parametrize("mapping", ["pmap", "fsdp"])
def test_gradient_sums_are_freed_while_data_is_made(tmp_path, mapping):
    """It may be generated from the current parameters, beside the state: these and Adam's two moments."""
    params, held = models.init(CONFIG, jax.random.key(0)), []
    params = jax.tree.map(np.asarray, params)
    shape = params["blocks"]["mlp"]["up"]["kernel"].shape

    def seen():
        gc.collect()
        arrays = [a for a in jax.live_arrays() if not a.is_deleted() and len(a.sharding.device_set) == 2]
        held.append(sum(a.shape in (shape, (2, *shape)) for a in arrays))

    _train(tmp_path, mapping, params, seen=seen)
    assert held == [3]
