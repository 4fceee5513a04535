"""The loop: whose buffers it uses, and what it computes in."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2m_jax import models
from l2m_jax.curriculum import (
    SampleCoefficients,
    Schedule,
    baby_steps,
    examples_seen,
    partition,
    single_stage,
)
from l2m_jax.data.batches import ListedExamples
from l2m_jax.data.packing import Shape
from l2m_jax.losses import Objective, SkewKL
from l2m_jax.models import DecoderConfig
from l2m_jax.parallel import Placement
from l2m_jax.training.checkpoint import Checkpoints
from l2m_jax.training.loop import Task, Term, Trainer, _validation_steps
from l2m_jax.training.metrics import MetricsLog, read_metrics
from l2m_jax.training.optimizer import OptimizerSettings
from l2m_jax.training.step import StepSettings, Teacher

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
        assert _validation_steps(dataclasses.replace(task, validate_every=150)) == [150, 300, 400]
        assert _validation_steps(dataclasses.replace(task, validate_every=200)) == [200, 400]
        assert _validation_steps(dataclasses.replace(task, validate_every=500)) == [400]


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


def _teach(folder, stages, params, *, by_step=None, minutes=10.0, stop_after=None, ema=0.0):
    """Distils from a live teacher. Returns parameters, those of validations, and the metrics."""
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 60, size=n).astype(np.int32) for n in rng.integers(6, 30, EXAMPLES)]
    examples = ListedExamples(tokens, np.full(EXAMPLES, 3, np.int32))
    task = Task(
        phase="test",
        settings=StepSettings(CONFIG, CONFIG, 60, chunk_size=16),
        stages=stages,
        shapes=(Shape(1, 32),),
        optimizer=OptimizerSettings(learning_rate=1e-2, ema=ema),
        batch_size=4,
        seed=0,
        by_step=by_step or {},
        validations=2 if ema else 0,
    )
    placement, metrics = Placement("pmap", tuple(jax.devices()[:2])), MetricsLog(folder / "metrics.jsonl")
    checkpoints = Checkpoints(folder / "checkpoints", placement, minutes)
    teacher = placement.place(models.init(CONFIG, jax.random.key(1)))
    signal = Teacher(models.head(CONFIG, teacher), teacher)
    calls, validated = [], []

    def data(part, params):
        calls.append(part)
        if stop_after is not None and len(calls) > stop_after:
            raise KeyboardInterrupt
        return (Term(Objective(SkewKL(part.stage.alpha), part.stage.beta), examples),)

    def validate(params):
        validated.append(placement.to_host(params))
        return {"validation_rouge_l": float(len(validated))}

    trainer = Trainer(task, placement, data, signal, checkpoints, metrics, validate)
    try:
        last = placement.to_host(trainer.run(lambda: placement.place(params)))
    except KeyboardInterrupt:
        last = None
    checkpoints.close()
    return last, validated, read_metrics(folder / "metrics.jsonl")


def test_coefficients_by_step_are_the_schedules_also_after_a_resume(tmp_path):
    params = jax.tree.map(np.asarray, models.init(CONFIG, jax.random.key(0)))
    stages = baby_steps(partition(np.arange(EXAMPLES), 2), epochs=2, alpha=(0.5, 0.5), beta=(1.0, 1.0))
    by_step = {"alpha": Schedule((0.0, 0.4), "cosine"), "beta": Schedule((0.2, 1.0), "linear")}
    whole, _, metrics = _teach(tmp_path / "whole", stages, params, by_step=by_step)
    steps = len(metrics)
    done = np.arange(steps) / (steps - 1)
    np.testing.assert_allclose([m["alpha"] for m in metrics], 0.2 * (1 - np.cos(np.pi * done)), atol=1e-12)
    np.testing.assert_allclose([m["beta"] for m in metrics], 0.2 + 0.8 * done, atol=1e-12)
    for m in metrics:
        np.testing.assert_allclose(
            m["loss"], (1 - m["beta"]) * m["cross_entropy"] + m["beta"] * m["divergence"], rtol=1e-5
        )
    # Interrupted in the second stage, after its first epoch.
    _teach(tmp_path / "parts", stages, params, by_step=by_step, minutes=0.0, stop_after=3)
    resumed, _, again = _teach(tmp_path / "parts", stages, params, by_step=by_step)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert [(m["alpha"], m["loss"]) for m in again] == [(m["alpha"], m["loss"]) for m in metrics]


def test_constant_coefficients_of_samples_equal_those_of_the_stage(tmp_path):
    params = jax.tree.map(np.asarray, models.init(CONFIG, jax.random.key(0)))
    (stage,) = single_stage(np.arange(EXAMPLES), EXAMPLES, alpha=0.3, beta=0.6)
    expected, _, metrics = _teach(tmp_path / "stage", (stage,), params)
    constant = [np.full(EXAMPLES, value, np.float32) for value in (0.3, 0.6, 2.5)]
    other = dataclasses.replace(stage, alpha=0.9, beta=1.0, samples=SampleCoefficients(*constant))
    found, _, by_sample = _teach(tmp_path / "samples", (other,), params)
    np.testing.assert_allclose([m["loss"] for m in by_sample], [m["loss"] for m in metrics], rtol=1e-4)
    # Adam's first steps are as long for rounding as for any other gradient, here on the bias of the keys.
    for key in ("embedding", "kernel"):
        for name, a, e in zip(*_leaves(found, expected), strict=True):
            if key in name:
                np.testing.assert_allclose(a, e, atol=2e-3, err_msg=name)
    # Without weight, the hard half of the examples is as if left out.
    half = np.arange(EXAMPLES) < EXAMPLES // 2
    weighted = dataclasses.replace(stage, samples=SampleCoefficients(weight_N=half.astype(np.float32)))
    _, _, found = _teach(tmp_path / "weights", (weighted,), params)
    assert found[0]["loss"] != metrics[0]["loss"]


def _leaves(found, expected):
    flat = jax.tree_util.tree_flatten_with_path(found)[0]
    return [jax.tree_util.keystr(path) for path, _ in flat], [x for _, x in flat], jax.tree.leaves(expected)


def test_the_average_of_the_weights_is_validated_kept_and_resumed(tmp_path):
    params = jax.tree.map(np.asarray, models.init(CONFIG, jax.random.key(0)))
    stages = single_stage(np.arange(EXAMPLES), 2 * EXAMPLES)
    plain, _, _ = _teach(tmp_path / "plain", stages, params)
    average, validated, _ = _teach(tmp_path / "ema", stages, params, ema=0.5)
    jax.tree.map(np.testing.assert_array_equal, validated[-1], average)
    assert any(np.any(a != p) for a, p in zip(jax.tree.leaves(average), jax.tree.leaves(plain), strict=True))
    _teach(tmp_path / "parts", stages, params, minutes=0.0, stop_after=1, ema=0.5)
    resumed, _, _ = _teach(tmp_path / "parts", stages, params, ema=0.5)
    jax.tree.map(np.testing.assert_array_equal, resumed, average)
