"""Numbers that are not numbers: where they end a training, and that skipping them leaves no trace."""

import math

import jax
import numpy as np
import pytest

from l2m_jax import models
from l2m_jax.curriculum import single_stage
from l2m_jax.data.batches import ListedExamples
from l2m_jax.data.order import order_of_examples
from l2m_jax.data.packing import Shape
from l2m_jax.errors import InputError
from l2m_jax.losses import ForwardKL, LossSums, Objective
from l2m_jax.models import DecoderConfig
from l2m_jax.parallel import Placement
from l2m_jax.training import step
from l2m_jax.training.checkpoint import Checkpoints
from l2m_jax.training.loop import Task, Term, Trainer
from l2m_jax.training.metrics import MetricsLog, missing_steps, read_metrics
from l2m_jax.training.optimizer import OptimizerSettings, make_optimizer
from l2m_jax.training.step import StepSettings, Sums, Teacher, TrainState

CONFIG = DecoderConfig(
    family="gpt2", vocab_size=32, valid_vocab_size=32, hidden_size=8, embed_size=8, num_layers=1, num_heads=1,
    num_kv_heads=1, head_dim=8, intermediate_size=16, max_positions=16, init_std=0.3,
)  # fmt: skip
EXAMPLES, BATCH = 12, 2
STAGES = single_stage(np.arange(EXAMPLES), EXAMPLES, beta=1.0)
POISONED = int(order_of_examples(0, STAGES[0].index, 0, np.arange(EXAMPLES))[5])  # in the third batch
OPTIMIZER = make_optimizer(OptimizerSettings())


def _placement(mapping: str) -> Placement:
    return Placement(mapping, tuple(jax.devices()[:2]))


@pytest.mark.parametrize("mapping", ["pmap", "fsdp"])
@pytest.mark.parametrize("where", ["gradient", "loss", "nowhere"])
def test_a_batch_is_skipped_on_all_devices_or_on_none(mapping, where):
    placement, params = _placement(mapping), models.init(CONFIG, jax.random.key(0))
    _, moments = OPTIMIZER.update(models.init(CONFIG, jax.random.key(1)), OPTIMIZER.init(params), params)
    state = TrainState(params, moments, models.init(CONFIG, jax.random.key(3)))
    gradients = jax.tree.map(np.array, models.init(CONFIG, jax.random.key(2)))
    loss = np.float32(3)
    if where == "gradient":
        gradients["embeddings"]["tokens"]["embedding"][5, 1] = np.nan
    if where == "loss":
        loss = np.float32(np.inf)
    sums = Sums(gradients, LossSums(loss, loss, loss, np.float32(2)))

    def updated(skip_nonfinite):
        placed = placement.place(state), placement.place(sums)
        new, zeros, values = placement.map(step.update)(
            OPTIMIZER, 0.75, skip_nonfinite, *placed, np.float32(1e-2)
        )
        for leaf in jax.tree.leaves(zeros):
            assert not np.asarray(leaf).any()
        for leaf in jax.tree.leaves(new) if mapping == "pmap" else ():
            first, second = (np.asarray(shard.data) for shard in leaf.addressable_shards)
            np.testing.assert_array_equal(first, second)
        return placement.to_host(new), placement.to_host(values)

    found, values = updated(True)
    expected = jax.tree.map(np.asarray, updated(False)[0] if where == "nowhere" else state)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    if where == "nowhere":
        averaged = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * p, state.average, found.params)
        jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5), found.average, averaged)
    assert (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])) == (where == "nowhere")


def _trainer(folder, *, skip: bool = False, validate=None) -> tuple[Trainer, Checkpoints]:
    """On teacher's hidden states of which one example's are NaN. Checkpoints after each step."""
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 32, 9).astype(np.int32) for _ in range(EXAMPLES)]
    rows = [rng.normal(size=(6, 8)).astype(np.float32) for _ in range(EXAMPLES)]
    rows[POISONED][2, 3] = np.nan
    objective = Objective(ForwardKL(), beta=1.0)
    task = Task(
        phase="test",
        settings=StepSettings(CONFIG, CONFIG, 32, chunk_size=16),
        stages=STAGES,
        shapes=(Shape(1, 16),),
        optimizer=OptimizerSettings(learning_rate=1e-2),
        batch_size=BATCH,
        seed=0,
        validations=0 if validate is None else EXAMPLES // BATCH,
        skip_nonfinite=skip,
        name=lambda i: f"row {i}",
    )
    placement = _placement("pmap")
    head = models.head(CONFIG, models.init(CONFIG, jax.random.key(1)))
    checkpoints = Checkpoints(folder / "checkpoints", placement, minutes=0)
    terms = (
        Term(
            objective,
            ListedExamples(tokens, np.full(EXAMPLES, 3, np.int32)),
            lambda i: {"teacher_hidden_TxE": rows[i]},
        ),
    )
    trainer = Trainer(
        task,
        placement,
        lambda *_: terms,
        Teacher(placement.place(head)),
        checkpoints,
        MetricsLog(folder / "metrics.jsonl"),
        validate,
    )
    return trainer, checkpoints


def _initial():
    return _placement("pmap").place(models.init(CONFIG, jax.random.key(0)))


def test_a_loss_that_is_not_finite_ends_the_training_before_anything_of_it_is_kept(tmp_path):
    validated = []

    def validate(params):
        validated.append(all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(params))))
        return {"validation_rouge_l": 0.1 * len(validated)}

    trainer, checkpoints = _trainer(tmp_path, validate=validate)
    with pytest.raises(InputError) as raised:
        trainer.run(_initial)
    said = str(raised.value)
    failed = int(said.partition("step ")[2].partition(":")[0])
    assert said.startswith(f"test, step {failed}: the loss is nan") and "check the teacher" in said
    assert f"row {POISONED}" in said and said.count("row ") == BATCH and "learning rate 0.00" in said
    checkpoints.close()
    kept = [int(place.name) for place in (tmp_path / "checkpoints").iterdir() if place.name.isdigit()]
    assert failed == 3 and max(kept) == 2
    steps = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, failed))
    assert validated == [True] * (failed - 1)
    found = Checkpoints(tmp_path / "checkpoints", _placement("pmap")).restore_latest(
        step.state_shapes(OPTIMIZER, CONFIG)
    )
    assert found is not None
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(found[0])))

    # The same checkpoints serve a run that skips such batches.
    trainer, checkpoints = _trainer(tmp_path, skip=True)
    last = trainer.run(_initial)
    checkpoints.close()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(last)))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if line.get("skipped")] == [failed]
    assert missing_steps(lines, "test", EXAMPLES // BATCH) == 0
    for line in lines:
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))


def test_updates_without_a_line_are_counted():
    lines = [{"phase": "a", "step": n, "loss": 1.0} for n in (1, 2, 4)] + [
        {"phase": "b", "step": 9, "loss": 1.0}
    ]
    assert missing_steps(lines, "a") == 1 and missing_steps(lines, "a", 6) == 3
    assert missing_steps([*lines, {"phase": "a", "step": 3, "skipped": 1}], "a") == 0
