"""One update, however it is spread: over devices, micro-batches, packing, and kinds of mapping."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2m_jax import losses, models
from l2m_jax.data.batches import ListedExamples, micro_batches
from l2m_jax.data.packing import Shape
from l2m_jax.losses import Objective, SkewKL
from l2m_jax.models import DecoderConfig
from l2m_jax.parallel import Placement, over_devices
from l2m_jax.training import step
from l2m_jax.training.optimizer import OptimizerSettings, learning_rate_schedule, make_optimizer
from l2m_jax.training.step import StepSettings, Sums, Teacher, TrainState
from l2m_jax.types import TeacherRows

STUDENT = DecoderConfig(
    family="gpt2", vocab_size=61, valid_vocab_size=60, hidden_size=16, embed_size=16, num_layers=2, num_heads=2,
    num_kv_heads=2, head_dim=8, intermediate_size=32, max_positions=32, init_std=0.3,
)  # fmt: skip
TEACHER = dataclasses.replace(STUDENT, hidden_size=24, embed_size=24, head_dim=12, num_layers=1)
SETTINGS = StepSettings(STUDENT, TEACHER, 60, chunk_size=8)
OBJECTIVE = Objective(SkewKL(0.1), beta=0.7)
SHAPES = (Shape(2, 32), Shape(1, 32))


def _examples() -> ListedExamples:
    """Ten examples whose lengths and response lengths differ widely, so that shares of a batch are uneven."""
    rng = np.random.default_rng(0)
    lengths = [4, 25, 9, 31, 6, 14, 5, 22, 8, 11]
    prompts = [2, 3, 8, 5, 1, 12, 4, 20, 2, 6]
    tokens = [rng.integers(0, 60, size=n).astype(np.int32) for n in lengths]
    return ListedExamples(tokens, np.array(prompts, np.int32))


def _params():
    return models.init(STUDENT, jax.random.key(0)), models.init(TEACHER, jax.random.key(1))


def _at_targets(function, config, params, examples, i: int) -> np.ndarray:
    """`function` of the tokens of example i by itself, where its targets are predicted."""
    tokens = np.pad(examples.example_tokens(i), (0, 32 - examples.lengths[i]))[None]
    result = jax.jit(function, static_argnums=0)(config, params, tokens)[0]
    return np.asarray(result[examples.prompt_lengths[i] - 1 : examples.lengths[i] - 1])


def _updated(placement: Placement, batches, *, updates: int = 2, teacher_hidden: bool = False):
    """Parameters and metrics after training on the same batch `updates` times."""
    optimizer = make_optimizer(OptimizerSettings())
    accumulate, update = placement.map(step.accumulate), placement.map(step.update)
    student, teacher = _params()
    params = placement.place(student)
    state = TrainState(params, placement.map(step.init_optimizer)(optimizer, params))
    sums = placement.map(step.zero_sums)(params)
    head = placement.place(models.head(TEACHER, teacher))
    signal = Teacher(head, None if teacher_hidden else placement.place(teacher))
    metrics = None
    for _ in range(updates):
        for batch in batches:
            sums = accumulate(SETTINGS, OBJECTIVE, state.params, sums, placement.feed(batch), signal, None)
        state, sums, metrics = update(optimizer, 0.0, False, state, sums, np.float32(1e-2))
    return placement.to_host(state.params), placement.to_host(metrics)


def _placement(mapping: str, count: int) -> Placement:
    return Placement(mapping, tuple(jax.devices()[:count]))


def _one_by_one(count: int):
    """The reference: one device, and a micro-batch for each example."""
    batches = [micro_batches(_examples(), [i], (Shape(1, 32),))[0] for i in range(count)]
    return _updated(_placement("pmap", 1), batches)


@pytest.fixture(scope="module")
def alone():
    return _one_by_one(10)


def _assert_same(found, expected) -> None:
    def same(path, a, b):
        # A bias of the keys shifts all scores of a query alike: its gradient is 0, and Adam makes a step of the rounding.
        if [str(key.key) for key in path[-2:]] != ["key", "bias"]:
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4, err_msg=str(path))

    jax.tree_util.tree_map_with_path(same, found[0], expected[0])
    for name in ("loss", "cross_entropy", "divergence", "grad_norm", "weight"):
        np.testing.assert_allclose(found[1][name], expected[1][name], rtol=1e-4)


@pytest.mark.parametrize("mapping", ["pmap", "fsdp"])
@pytest.mark.parametrize("devices", [1, 3, 4, 8])
def test_devices_packing_and_accumulation_leave_the_update_alone(alone, mapping, devices):
    batches = micro_batches(_examples(), np.arange(10), SHAPES, devices)
    assert devices > 1 or len(batches) > 1  # on one device the batch takes several micro-batches
    _assert_same(_updated(_placement(mapping, devices), batches), alone)


@pytest.mark.parametrize("mapping", ["pmap", "fsdp"])
def test_a_batch_of_fewer_examples_than_devices_leaves_some_without(mapping):
    batches = micro_batches(_examples(), np.arange(2), SHAPES, 4)
    assert not batches[0].weights_T.any(axis=1).all()
    _assert_same(_updated(_placement(mapping, 4), batches), _one_by_one(2))


def test_the_division_is_by_all_targets_of_the_batch(alone):
    examples = _examples()
    count = int((examples.lengths - examples.prompt_lengths).sum())
    assert alone[1]["weight"] == count


def test_first_loss_is_that_of_the_dense_logits():
    """Independent of the step: logits of each example by itself, the loss of its response, one mean."""
    examples = _examples()
    student, teacher = _params()
    total = 0.0
    for i in range(10):
        q = _at_targets(models.logits, STUDENT, student, examples, i)[:, :60]
        p = _at_targets(models.logits, TEACHER, teacher, examples, i)[:, :60]
        labels = jnp.asarray(examples.example_tokens(i)[examples.prompt_lengths[i] :])
        total += float(losses.token_loss(q, p, labels, OBJECTIVE).sum())
    _, metrics = _updated(_placement("pmap", 2), micro_batches(examples, np.arange(10), SHAPES, 2), updates=1)
    np.testing.assert_allclose(metrics["loss"], total / metrics["weight"], rtol=1e-5)


def test_stored_hidden_states_of_the_teacher_equal_the_live_teacher(alone):
    examples = _examples()
    _, teacher = _params()

    def rows(i: int) -> TeacherRows:
        return {"teacher_hidden_TxE": _at_targets(models.hidden_states, TEACHER, teacher, examples, i)}

    batches = micro_batches(examples, np.arange(10), SHAPES, 2, rows)
    _assert_same(_updated(_placement("pmap", 2), batches, teacher_hidden=True), alone)


def test_a_stage_compiles_once_for_each_shape():
    traced = []

    @over_devices(
        static=("settings", "objective"),
        weights=("params", "sums", "teacher"),
        replicated=("key",),
        donate=("sums",),
        returns="weights",
    )
    def counted(settings, objective, params, sums, batch, teacher, key, *, axis_name):
        traced.append((objective, batch.tokens_RxL.shape))
        return step.accumulate(settings, objective, params, sums, batch, teacher, key, axis_name=axis_name)

    placement = _placement("pmap", 1)
    accumulate = placement.map(counted)
    student, teacher = _params()
    params, signal = (
        placement.place(student),
        Teacher(placement.place(models.head(TEACHER, teacher)), placement.place(teacher)),
    )
    sums: Sums = placement.map(step.zero_sums)(params)
    for alpha, beta in ((0.0, 0.7), (0.1, 1.0)):
        for chosen in (np.arange(10), np.arange(5), np.arange(3, 10)):
            for batch in micro_batches(_examples(), chosen, SHAPES, 1):
                objective = Objective(SkewKL(alpha), beta)  # equal, not identical
                sums = accumulate(SETTINGS, objective, params, sums, placement.feed(batch), signal, None)
    assert len(traced) == len(set(traced)) <= 2 * len(SHAPES)


def test_learning_rate_rises_over_the_warmup_and_falls_to_the_end():
    rate = learning_rate_schedule(OptimizerSettings(learning_rate=1.0, warmup_fraction=0.1), 100)
    rates = [rate(step) for step in range(100)]
    assert max(rates) == rates[10] == 1.0
    assert all(b > a for a, b in itertools.pairwise(rates[:11]))
    assert all(b < a for a, b in itertools.pairwise(rates[10:]))
    assert 0 < rates[-1] < 0.02


def test_learning_rates_of_the_other_schedules():
    def rates(schedule):
        settings = OptimizerSettings(1.0, schedule=schedule, decay_fraction=0.2, warmup_fraction=0.1)
        return np.array([learning_rate_schedule(settings, 110)(step) for step in range(110)])

    after = np.arange(99)  # updates after the warm-up of 11
    np.testing.assert_allclose(rates("constant")[11:], 1)
    np.testing.assert_allclose(rates("cosine")[11:], 0.5 * (1 + np.cos(np.pi * after / 99)), atol=1e-12)
    np.testing.assert_allclose(rates("wsd")[11:], np.minimum(1, (99 - after) / 99 / 0.2), rtol=1e-12)
    for schedule in ("constant", "cosine", "wsd"):
        np.testing.assert_allclose(rates(schedule)[:11], rates("linear")[:11])


def test_weight_decay_spares_biases_and_norms():
    from l2m_jax.training.optimizer import decayed

    flat = jax.tree_util.tree_flatten_with_path(decayed(_params()[0]))[0]
    spared = {str(path[-1].key) for path, decay in flat if not decay}
    assert spared == {"bias", "scale"}


def _equations(jaxpr):
    """All equations of a jaxpr, those within loops and called functions too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def _accumulate_jaxpr(student: DecoderConfig, teacher: DecoderConfig, head_dtype: str):
    params = models.init(student, jax.random.key(0))
    head = models.head(teacher, models.init(teacher, jax.random.key(1))).astype(head_dtype)
    examples = _examples()

    def rows(i: int) -> TeacherRows:
        shape = (examples.lengths[i] - examples.prompt_lengths[i], teacher.embed_size)
        return {"teacher_hidden_TxE": np.ones(shape, head_dtype)}

    batch = micro_batches(examples, np.arange(4), SHAPES, 1, rows)[0]
    one = jax.tree.map(lambda x: x[0], batch)
    settings = StepSettings(student, teacher, 60, chunk_size=8)

    def step_once(params, sums, batch, head):
        return step.accumulate(settings, OBJECTIVE, params, sums, batch, Teacher(head), None)

    return jax.make_jaxpr(step_once)(params, step.zero_sums(params), one, head).jaxpr


def test_targets_are_scattered_back_without_duplicates():
    """Padded targets would otherwise all add to one row, one after another, in the gather's backward pass."""
    student = dataclasses.replace(STUDENT, max_positions=40)  # unlike the 32 slots of the micro-batch
    scatters = [
        e
        for e in _equations(_accumulate_jaxpr(student, TEACHER, "float32"))
        if e.primitive.name.startswith("scatter") and e.outvars[0].aval.shape == (32, student.hidden_size)
    ]
    assert scatters and all(e.params["unique_indices"] for e in scatters)
    for batch in micro_batches(_examples(), np.arange(10), SHAPES, 2):
        for indices in batch.target_index_T:
            assert (np.diff(indices) > 0).all()


def test_a_teachers_head_multiplies_in_its_own_dtype():
    """A head in bfloat16 is multiplied at the rate of bfloat16, and accumulates in float32."""
    student = dataclasses.replace(STUDENT, dtype="bfloat16")
    teacher = dataclasses.replace(TEACHER, dtype="bfloat16")
    width = TEACHER.embed_size
    products = [
        e
        for e in _equations(_accumulate_jaxpr(student, teacher, "bfloat16"))
        if e.primitive.name == "dot_general" and e.invars[1].aval.shape == (61, width)
    ]
    assert products
    for product in products:
        assert {v.aval.dtype.name for v in product.invars} == {"bfloat16"}
        assert product.outvars[0].aval.dtype == jnp.float32
