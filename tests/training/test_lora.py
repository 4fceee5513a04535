"""Adapters beside a frozen model: gradients, one device and many, resumed and merged trainings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2m_jax import models
from l2m_jax.curriculum import single_stage
from l2m_jax.data.batches import ListedExamples, micro_batches
from l2m_jax.data.packing import Shape
from l2m_jax.losses import Objective
from l2m_jax.models import DecoderConfig, Lora, Rope
from l2m_jax.models.lora import attach
from l2m_jax.parallel import Placement
from l2m_jax.training import step
from l2m_jax.training.checkpoint import Checkpoints
from l2m_jax.training.loop import Task, Term, Trainer
from l2m_jax.training.metrics import MetricsLog
from l2m_jax.training.optimizer import OptimizerSettings, make_optimizer
from l2m_jax.training.step import StepSettings

CONFIG = DecoderConfig(
    family="qwen2", vocab_size=60, valid_vocab_size=60, hidden_size=16, embed_size=16, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=8, intermediate_size=24, max_positions=32, init_std=0.3, norm="rms", rope=Rope(),
    activation="silu", gated_mlp=True, mlp_bias=False, attention_out_bias=False, scan_layers=True,
)  # fmt: skip
LORA = Lora(rank=3, alpha=6.0, targets=("query", "down"))
SETTINGS = StepSettings(CONFIG, None, 60, chunk_size=16)
SHAPES = (Shape(1, 32),)
SFT = Objective(beta=0.0)


@pytest.fixture(scope="module")
def base():
    shapes = jax.eval_shape(lambda: models.init(CONFIG, jax.random.key(0)))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes)


def _adapters():
    """As after some training: B is not 0."""
    shapes = jax.eval_shape(lambda: LORA.init(CONFIG, jax.random.key(1)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), shapes)


def _frozen(base):
    return attach(LORA.scales(CONFIG), base)


def _examples() -> ListedExamples:
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 60, size=n).astype(np.int32) for n in rng.integers(6, 30, 8)]
    return ListedExamples(tokens, np.full(8, 3, np.int32))


@jax.jit
def _gradients(params, sums, batch):
    part = LORA if "frozen" in params else None
    return step.accumulate(dataclasses.replace(SETTINGS, part=part), SFT, params, sums, batch, None, None)


def test_the_adapters_gradients_are_products_of_the_merged_models(base):
    (batch,) = micro_batches(_examples(), np.array([0]), SHAPES, 1)
    batch, adapters = jax.tree.map(lambda x: x[0], batch), _adapters()
    merged = LORA.merged(adapters, base)
    whole = _gradients(merged, step.zero_sums(merged), batch)
    found = _gradients(adapters | {"frozen": _frozen(base)}, step.zero_sums(adapters), batch)
    np.testing.assert_allclose(found.losses.loss, whole.losses.loss, rtol=1e-5)
    assert jax.tree.structure(found.gradients) == jax.tree.structure(adapters)
    for group, layer in (("attention", "query"), ("mlp", "down")):
        of_kernel = np.asarray(whole.gradients["blocks"][group][layer]["kernel"])
        a, b = (adapters["blocks"][group][layer][f"lora_{m}"] for m in "ab")
        gradients = found.gradients["blocks"][group][layer]
        scale = 6.0 / 3
        expected = {
            "lora_a": scale * of_kernel @ b.swapaxes(1, 2),
            "lora_b": scale * a.swapaxes(1, 2) @ of_kernel,
        }
        for name, value in expected.items():
            np.testing.assert_allclose(gradients[name], value, rtol=1e-3, atol=1e-5)


def test_fresh_adapters_change_no_logit_and_merged_ones_are_the_applied_ones(base):
    tokens = _examples().example_tokens(0)[None]
    logits = jax.jit(lambda params: models.logits(CONFIG, params, tokens))
    fresh = attach(LORA.init(CONFIG, jax.random.key(1)), _frozen(base))
    np.testing.assert_array_equal(logits(fresh), logits(base))
    applied = logits(attach(_adapters(), _frozen(base)))
    before = jax.tree.map(np.copy, base)
    np.testing.assert_allclose(logits(LORA.merged(_adapters(), before)), applied, rtol=1e-4, atol=1e-4)
    assert np.abs(applied - logits(base)).max() > 0.1


def test_the_adapters_of_bfloat16_models_leave_its_dtype_alone(base):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    params = attach(_adapters(), _frozen(base))
    hidden = jax.eval_shape(lambda: models.hidden_states(config, params, jnp.zeros((1, 4), jnp.int32)))
    assert hidden.dtype == jnp.bfloat16


def test_there_is_state_for_the_adapters_alone():
    state = step.state_shapes(make_optimizer(OptimizerSettings()), CONFIG, averaged=True, part=LORA)
    numbers = 2 * 3 * (16 + 16 + 24 + 16)  # layers · rank · (inputs + outputs)
    assert (
        sum(leaf.size for leaf in jax.tree.leaves(state)) == 4 * numbers + 1
    )  # two moments, an average, a count


def _train(folder, base, mapping="pmap", devices=1, stop_after=None):
    """The adapters, and the whole models of the validations."""
    examples, calls, validated = _examples(), [], []
    task = Task(
        phase="test",
        settings=dataclasses.replace(SETTINGS, part=LORA),
        stages=single_stage(np.arange(8), 24, beta=0.0),
        shapes=SHAPES,
        optimizer=OptimizerSettings(learning_rate=1e-2, ema=0.5),
        batch_size=8,
        seed=0,
        validations=1,
    )
    placement = Placement(mapping, tuple(jax.devices()[:devices]))
    checkpoints = Checkpoints(folder / "checkpoints", placement, minutes=0.0)

    def data(part, now):
        calls.append(part)
        if stop_after is not None and len(calls) > stop_after:
            raise KeyboardInterrupt
        return (Term(SFT, examples),)

    def validate(now):
        validated.append(placement.to_host(now))
        return {"validation_rouge_l": 0.0}

    metrics = MetricsLog(folder / "metrics.jsonl")
    trainer = Trainer(task, placement, data, None, checkpoints, metrics, validate)
    try:
        return placement.to_host(trainer.run(lambda: placement.place(base))), validated
    except KeyboardInterrupt:
        return None, validated
    finally:
        checkpoints.close()


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    return _train(tmp_path_factory.mktemp("alone"), base)


def test_a_training_changes_the_adapters_and_a_validation_sees_them(base, alone):
    last, (validated,) = alone
    fresh = LORA.init(CONFIG, jax.random.key(0))  # the seed of the task
    changed = jax.tree.map(lambda old, new: np.abs(np.asarray(old) - new).max(), fresh, last)
    assert min(jax.tree.leaves(changed)) > 0
    jax.tree.map(np.testing.assert_array_equal, attach(last, _frozen(base)), validated)


def test_a_resumed_training_is_an_uninterrupted_one(base, alone, tmp_path):
    assert _train(tmp_path, base, stop_after=1)[0] is None
    jax.tree.map(np.testing.assert_array_equal, _train(tmp_path, base)[0], alone[0])


@pytest.mark.parametrize("mapping", ["pmap", "fsdp"])
def test_eight_devices_train_as_one_does(base, alone, tmp_path, mapping):
    found, _ = _train(tmp_path, base, mapping, devices=8)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-3, atol=2e-4), found, alone[0])
