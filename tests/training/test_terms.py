"""A loss of two terms in one update: DistiLLM-2's, against its equation on the dense logits of each response."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2m_jax import methods, models
from l2m_jax.curriculum import single_stage
from l2m_jax.data.batches import AnsweredExamples, ListedExamples, micro_batches
from l2m_jax.data.packing import Shape
from l2m_jax.models import DecoderConfig
from l2m_jax.parallel import Placement
from l2m_jax.training import step
from l2m_jax.training.step import StepSettings, Teacher, TrainState

STUDENT = DecoderConfig(
    family="gpt2", vocab_size=61, valid_vocab_size=60, hidden_size=16, embed_size=16, num_layers=1, num_heads=2,
    num_kv_heads=2, head_dim=8, intermediate_size=32, max_positions=32, init_std=0.3,
)  # fmt: skip
TEACHER = dataclasses.replace(STUDENT, hidden_size=24, embed_size=24, head_dim=12)
METHOD = methods.METHODS["distillm2"]
SETTINGS = StepSettings(STUDENT, TEACHER, 60, chunk_size=8)
COUNT, ALPHA = 7, 0.1


def _responses() -> tuple[ListedExamples, AnsweredExamples]:
    """Two responses to each of seven prompts, from one token to most of a row: a token mean is another loss."""
    rng = np.random.default_rng(0)
    prompts = np.array([2, 3, 8, 5, 1, 12, 4], np.int32)

    def answered(lengths):
        return [rng.integers(0, 60, size=n) for n in lengths]

    asked = answered(prompts)
    first, second = (answered(lengths) for lengths in ([1, 20, 3, 9, 2, 16, 5], [24, 2, 11, 1, 6, 3, 18]))
    of_teacher = ListedExamples([np.append(p, r) for p, r in zip(asked, first, strict=True)], prompts)
    of_student = {i: np.append(asked[i], second[i]) for i in range(COUNT)}
    return of_teacher, AnsweredExamples(of_teacher, of_student)


def _params():
    return models.init(STUDENT, jax.random.key(0)), models.init(TEACHER, jax.random.key(1))


def _equation(xp, logits, held=lambda q: q):
    """mean KL(p‖αp+(1-α)q) + mean KL(q‖(1-α)p+αq̄), of [(p's, q's logits) of each response] by term."""

    def softmax(x):
        exponents = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
        return exponents / xp.sum(exponents, axis=-1, keepdims=True)

    def kl(a, c):
        return xp.mean(xp.sum(a * (xp.log(a) - xp.log(c)), axis=-1))

    first = second = 0.0
    for (p1, q1), (p2, q2) in zip(*logits, strict=True):
        p1, q1, p2, q2 = (softmax(x) for x in (p1, q1, p2, q2))
        first += kl(p1, ALPHA * p1 + (1 - ALPHA) * q1)
        second += kl(q2, (1 - ALPHA) * p2 + ALPHA * held(q2))
    return (first + second) / COUNT


def _logits(student, teacher):
    """[(the teacher's, the student's) at the targets of each response] by term, from unpacked rows."""

    def of(config, params, examples):
        rows = [np.pad(examples.example_tokens(i), (0, 32 - examples.lengths[i])) for i in range(COUNT)]
        everywhere = models.logits(config, params, jnp.asarray(rows))
        ends = zip(everywhere, examples.prompt_lengths, examples.lengths, strict=True)
        return [logits[prompt - 1 : length - 1, :60] for logits, prompt, length in ends]

    return [
        list(zip(of(TEACHER, teacher, examples), of(STUDENT, student, examples), strict=True))
        for examples in _responses()
    ]


@functools.cache
def _expected():
    """The equation's loss in float64, and its gradient in float32."""
    student, teacher = _params()
    logits = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.jit(_logits)(student, teacher))
    gradient = jax.jit(jax.grad(lambda q: _equation(jnp, _logits(q, teacher), jax.lax.stop_gradient)))
    return _equation(np, logits), gradient(student)


def _found(placement: Placement, shapes):
    """The loss and the gradient of one update, packed and spread over devices."""

    accumulate = placement.map(step.accumulate)
    student, teacher = _params()
    placed = placement.place(student)
    sums = placement.map(step.zero_sums)(placed)
    signal = Teacher(placement.place(models.head(TEACHER, teacher)), placement.place(teacher))
    (stage,) = single_stage(np.arange(COUNT), COUNT, alpha=ALPHA)
    for objective, examples in zip(methods.objectives(METHOD, stage), _responses(), strict=True):
        for batch in micro_batches(
            examples, np.arange(COUNT), shapes, placement.num_devices, equal_examples=True
        ):
            sums = accumulate(SETTINGS, objective, placed, sums, placement.feed(batch), signal, None)
    # Without an optimiser, a learning rate of 1 takes the gradient off the parameters.
    state, _, values = placement.map(step.update)(
        optax.identity(), 0.0, False, TrainState(placed, optax.EmptyState()), sums, np.float32(1)
    )
    after = placement.to_host(state.params)
    gradient = jax.tree.map(lambda old, new: np.asarray(old) - new, student, after)
    return float(placement.to_host(values)["loss"]), gradient


@pytest.mark.parametrize(
    ("mapping", "devices", "shapes"),
    [
        ("pmap", 1, (Shape(1, 32),)),
        ("pmap", 3, (Shape(2, 32), Shape(1, 32))),
        ("pmap", 4, (Shape(1, 64),)),
        ("fsdp", 3, (Shape(1, 32),)),
    ],
)
def test_two_terms_make_the_loss_and_the_gradient_of_the_equation(mapping, devices, shapes):
    loss, gradient = _found(Placement(mapping, tuple(jax.devices()[:devices])), shapes)
    expected_loss, expected_gradient = _expected()
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    jax.tree_util.tree_map_with_path(
        lambda path, a, e: np.testing.assert_allclose(a, e, rtol=1e-3, atol=2e-6, err_msg=str(path)),
        gradient,
        expected_gradient,
    )


def test_a_token_mean_would_be_another_loss():
    """The lengths of this test tell the two reductions apart."""
    (stage,) = single_stage(np.arange(COUNT), COUNT, alpha=ALPHA)
    objective = methods.objectives(METHOD, stage)[0]
    student, teacher = _params()
    signal = Teacher(models.head(TEACHER, teacher), teacher)

    def mean(equal_examples):
        (batch,) = micro_batches(
            _responses()[0], np.arange(COUNT), (Shape(4, 64),), equal_examples=equal_examples
        )
        one = jax.tree.map(lambda x: x[0], batch)
        sums = step.loss_sums(SETTINGS, objective, student, one, signal)
        return float(sums.loss / sums.weight)

    assert abs(mean(True) - mean(False)) > 0.01
