"""Training of the top layers alone: the same gradient, a backward pass that ends there, no state for the others."""

import dataclasses

import jax
import numpy as np
import pytest

from l2m_jax import models
from l2m_jax.curriculum import single_stage
from l2m_jax.data.batches import ListedExamples, micro_batches
from l2m_jax.data.packing import Shape
from l2m_jax.losses import Objective
from l2m_jax.models import DecoderConfig, freezing
from l2m_jax.models.freezing import TopLayers
from l2m_jax.parallel import Placement
from l2m_jax.plan.flops import flops
from l2m_jax.training import step
from l2m_jax.training.checkpoint import Checkpoints
from l2m_jax.training.loop import Task, Term, Trainer
from l2m_jax.training.metrics import MetricsLog
from l2m_jax.training.optimizer import OptimizerSettings, make_optimizer
from l2m_jax.training.step import StepSettings

LAYERS = 2
CONFIG = DecoderConfig(
    family="gpt2", vocab_size=60, valid_vocab_size=60, hidden_size=16, embed_size=16, num_layers=LAYERS, num_heads=2,
    num_kv_heads=2, head_dim=8, intermediate_size=32, max_positions=32, init_std=0.3,
)  # fmt: skip
SETTINGS = StepSettings(CONFIG, None, 60, chunk_size=64)
SHAPE = Shape(2, 32)


@pytest.fixture(scope="module")
def params():
    return models.init(CONFIG, jax.random.key(0))


def _examples() -> ListedExamples:
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 60, size=n).astype(np.int32) for n in rng.integers(6, 30, 12)]
    return ListedExamples(tokens, np.full(12, 3, np.int32))


def _accumulate(params, sums, batch):
    layers = jax.tree.leaves(params["blocks"])[0].shape[0] if "frozen" in params else 0
    settings = dataclasses.replace(SETTINGS, part=TopLayers(layers) if layers else None)
    return step.accumulate(settings, Objective(beta=0.0), params, sums, batch, None, None)


def _arguments(params, layers: int = 0):
    """Of `_accumulate`, for a model whose top layers are trained; 0: all."""
    (batch,) = micro_batches(_examples(), np.array([0, 1]), (SHAPE,), 1)
    batch = jax.tree.map(lambda x: x[0], batch)
    trained, frozen = freezing.split(params, layers) if layers else (params, None)
    return trained if frozen is None else trained | {"frozen": frozen}, step.zero_sums(trained), batch


def test_gradient_and_operations(params):
    everything, top = (
        jax.jit(_accumulate).lower(*_arguments(params, layers)).compile() for layers in (0, LAYERS)
    )
    whole, part = everything(*_arguments(params)), top(*_arguments(params, LAYERS))
    expected = {name: whole.gradients[name] for name in ("blocks", "output")}
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=1e-5), part.gradients, expected)
    np.testing.assert_allclose(part.losses.loss, whole.losses.loss, rtol=1e-6)
    # XLA drops the head's gradient: one of the three products of 64 targets with the vocabulary.
    counted = [compiled.cost_analysis()["flops"] for compiled in (everything, top)]
    assert counted[0] - counted[1] >= 2 * SHAPE.slots * 60 * 16


def test_the_backward_pass_ends_above_the_frozen_layers(params):
    everything, top, both = (flops(_accumulate, *_arguments(params, layers)) for layers in (0, 1, LAYERS))
    assert both == everything

    def forward(params, batch):
        return step.loss_sums(SETTINGS, Objective(beta=0.0), params, batch, None)

    of_head = 2 * 2 * SHAPE.slots * 60 * 16  # with respect to hidden states and head, before XLA drops one
    assert top == flops(forward, params, _arguments(params)[2]) + of_head + (both - top)


def _train(folder, params, stop_after=None):
    """The parameters and those of the last validation."""
    examples, calls, validated = _examples(), [], []
    task = Task(
        phase="test",
        settings=dataclasses.replace(SETTINGS, part=TopLayers(1)),
        stages=single_stage(np.arange(12), 36, beta=0.0),
        shapes=(SHAPE,),
        optimizer=OptimizerSettings(learning_rate=1e-2),
        batch_size=6,
        seed=0,
        validations=1,
    )
    placement = Placement("pmap", tuple(jax.devices()[:1]))
    checkpoints = Checkpoints(folder / "checkpoints", placement, minutes=0.0)

    def data(part, now):
        calls.append(placement.to_host(now))
        if stop_after is not None and len(calls) > stop_after:
            raise KeyboardInterrupt
        return (Term(Objective(beta=0.0), examples),)

    def validate(now):
        validated.append(placement.to_host(now))
        return {"validation_rouge_l": 0.0}

    metrics = MetricsLog(folder / "metrics.jsonl")
    trainer = Trainer(task, placement, data, None, checkpoints, metrics, validate)
    try:
        last = placement.to_host(trainer.whole(trainer.run(lambda: placement.place(params))))
    except KeyboardInterrupt:
        return None, validated
    finally:
        checkpoints.close()
    return last, validated


def test_a_training_changes_the_top_layers_alone_and_resumes(params, tmp_path):
    params = jax.tree.map(np.asarray, params)
    last, (validated,) = _train(tmp_path / "whole", params)
    jax.tree.map(np.testing.assert_array_equal, last, validated)
    before, after = freezing.split(params, 1), freezing.split(last, 1)
    jax.tree.map(np.testing.assert_array_equal, after[1], before[1])
    kernels = [of[0]["blocks"]["mlp"]["up"]["kernel"] for of in (before, after)]
    assert np.abs(kernels[1] - kernels[0]).min() > 0
    _train(tmp_path / "parts", params, stop_after=1)
    resumed, _ = _train(tmp_path / "parts", params)
    jax.tree.map(np.testing.assert_array_equal, resumed, last)


def test_there_is_optimizer_state_for_the_trained_layers_alone(params):
    state = step.state_shapes(make_optimizer(OptimizerSettings()), CONFIG, part=TopLayers(1))
    trained, _ = freezing.split(params, 1)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(trained))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 3 * numbers + 1  # two moments, a count
