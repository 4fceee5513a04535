"""The training step as pure functions of one device's share of a batch.

A batch is one or more micro-batches. `accumulate` adds the gradient and loss *sums* of one micro-batch. `update` adds
the sums over devices, divides once by the global weight, and applies the optimiser. A mean of means per device or
micro-batch would weight tokens by how they were packed.

Both run under `jax.pmap`, where `axis_name` is the device axis and arrays are those of one device, and under `jax.jit`
over a mesh, where `axis_name` is None and the micro-batch keeps its leading device axis (see `parallel.py`).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from l2m_jax import losses, models
from l2m_jax.losses import Coefficients, LossSums, Objective, TopK
from l2m_jax.models import DecoderConfig, freezing
from l2m_jax.models.freezing import Part
from l2m_jax.parallel import over_devices
from l2m_jax.types import MicroBatch, Params


@dataclass(frozen=True)
class StepSettings:
    """What a compiled step depends on besides the objective. Hashable, hence a static argument.

    Attributes:
        valid_vocab_size: vocabulary entries that teacher and student share; the logits of others count as -inf.
        chunk_size: the number of target tokens whose logits are held at once.
        part: of the student, which is trained; None: all of it.
    """

    student: DecoderConfig
    teacher: DecoderConfig | None
    valid_vocab_size: int
    chunk_size: int = 512
    part: Part | None = None


class Teacher(NamedTuple):
    """The part of the teacher that the step needs: its head, and all parameters if it runs live."""

    head_VxE: jax.Array
    params: Params | None = None


class TrainState(NamedTuple):
    """
    Attributes:
        params: those that are trained.
        average: an exponential moving average of the parameters; None without one.
    """

    params: Params
    optimizer: optax.OptState
    average: Params | None = None

    @property
    def result(self) -> Params:
        """The parameters to validate and to keep."""
        return self.params if self.average is None else self.average


class Sums(NamedTuple):
    gradients: Params
    losses: LossSums


@over_devices(static=("optimizer",), weights=("params",), returns="weights")
def init_optimizer(optimizer: optax.GradientTransformation, params: Params) -> optax.OptState:
    return optimizer.init(params)


@over_devices(weights=("params",), returns="weights")
def init_average(params: Params) -> Params:
    """A copy of the parameters in buffers of its own."""
    return jax.tree.map(jnp.copy, params)


@over_devices(weights=("params",), returns="weights")
def zero_sums(params: Params) -> Sums:
    zero = jnp.zeros((), jnp.float32)
    return Sums(
        jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params), LossSums(zero, zero, zero, zero)
    )


@over_devices(static=("layers",), weights=("params",), returns="weights")
def split(layers: int, params: Params) -> tuple[Params, Params]:
    """(trained, frozen) of a model whose top `layers` layers are trained."""
    return freezing.split(params, layers)


@over_devices(weights=("trained", "frozen"), returns="weights")
def join(trained: Params, frozen: Params) -> Params:
    return freezing.join(trained, frozen)


def state_shapes(
    optimizer: optax.GradientTransformation,
    config: DecoderConfig,
    *,
    averaged: bool = False,
    part: Part | None = None,
) -> TrainState:
    """The shapes of the state in which a model, or a part of it, is trained, without computing it."""
    params = freezing.trained_shapes(part, config)
    return TrainState(params, jax.eval_shape(optimizer.init, params), params if averaged else None)


def target_hidden(
    config: DecoderConfig, params: Params, batch: MicroBatch, dropout_key: jax.Array | None = None
):
    """Final hidden states at the positions that carry loss, `[..., T, E]`. Only these reach the vocabulary."""
    lead, (rows, length) = batch.tokens_RxL.shape[:-2], batch.tokens_RxL.shape[-2:]
    hidden_BxLxE = models.hidden_states(
        config,
        params,
        batch.tokens_RxL.reshape(-1, length),
        segment_ids_BxL=batch.segment_ids_RxL.reshape(-1, length),
        positions_BxL=batch.positions_RxL.reshape(-1, length),
        dropout_key=dropout_key,
    )
    take = _take_targets
    for _ in lead:
        take = jax.vmap(take)
    return take(hidden_BxLxE.reshape(*lead, rows * length, -1), batch.target_index_T)


def _take_targets(hidden_SxE: jax.Array, target_index_T: jax.Array) -> jax.Array:
    """Rows by index; 0 for padding targets, whose indices are out of range.

    Indices are unique and ascending, so the backward pass writes each row once, without atomic additions.
    """
    return hidden_SxE.at[target_index_T].get(
        mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True
    )


@over_devices(static=("config",), weights=("params",))
def hidden_pass(config: DecoderConfig, params: Params, batch: MicroBatch) -> jax.Array:
    """`target_hidden` without dropout, as in the teacher store, `[T, E]`."""
    return target_hidden(config, params, batch)


@over_devices(static=("config", "k", "chunk_size"), weights=("params",))
def top_k_pass(config: DecoderConfig, k: int, chunk_size: int, params: Params, batch: MicroBatch) -> TopK:
    """The model's k most probable tokens at each target, with the tail, as in the teacher store."""
    return losses.fused_top_k(
        target_hidden(config, params, batch),
        models.head(config, params),
        batch.weights_T,
        k,
        valid_vocab_size=config.valid_vocab_size,
        chunk_size=chunk_size,
    )


@over_devices(static=("config", "chunk_size"), weights=("params",))
def cross_entropy_pass(
    config: DecoderConfig, chunk_size: int, params: Params, batch: MicroBatch
) -> jax.Array:
    """Cross-entropy at each target in nats, float32 `[T]`; meaningless for padding targets."""
    cross_entropy, _ = losses.fused_token_losses(
        target_hidden(config, params, batch),
        models.head(config, params),
        None,
        None,
        batch.labels_T,
        batch.weights_T,
        Objective(beta=0.0),
        valid_vocab_size=config.valid_vocab_size,
        chunk_size=chunk_size,
    )
    return cross_entropy


def _coefficients(batch: MicroBatch) -> Coefficients:
    return Coefficients(batch.alpha_T, batch.beta_T, batch.temperature_T)


def _teacher_hidden(settings: StepSettings, objective: Objective, batch: MicroBatch, teacher: Teacher | None):
    if not _coefficients(batch).needs_teacher(objective) or teacher is None:
        return None
    if batch.teacher_hidden_TxE is not None:
        return batch.teacher_hidden_TxE
    assert settings.teacher is not None and teacher.params is not None
    return jax.lax.stop_gradient(target_hidden(settings.teacher, teacher.params, batch))


def _teacher_top_k(batch: MicroBatch) -> TopK | None:
    if batch.teacher_ids_TxK is None or batch.teacher_log_probs_TxK is None:
        return None
    return TopK(batch.teacher_ids_TxK, batch.teacher_log_probs_TxK, batch.teacher_log_tail_T)


def loss_sums(
    settings: StepSettings,
    objective: Objective,
    params: Params,
    batch: MicroBatch,
    teacher: Teacher | None,
    dropout_key: jax.Array | None = None,
) -> LossSums:
    """Sums over the micro-batch's target tokens of the weight times loss, cross-entropy, divergence and 1."""
    teacher_hidden = _teacher_hidden(settings, objective, batch, teacher)
    return losses.fused_distillation_sums(
        target_hidden(settings.student, params, batch, dropout_key),
        models.head(settings.student, params),
        teacher_hidden,
        None if teacher_hidden is None or teacher is None else teacher.head_VxE,
        batch.labels_T,
        batch.weights_T,
        objective,
        teacher_top_k=_teacher_top_k(batch),
        coefficients=_coefficients(batch),
        valid_vocab_size=settings.valid_vocab_size,
        chunk_size=settings.chunk_size,
    )


@over_devices(
    static=("settings", "objective"),
    weights=("params", "sums", "teacher"),
    replicated=("dropout_key",),
    donate=("sums",),
    returns="weights",
)
def accumulate(
    settings: StepSettings,
    objective: Objective,
    params: Params,
    sums: Sums,
    batch: MicroBatch,
    teacher: Teacher | None,
    dropout_key: jax.Array | None,
    *,
    axis_name: str | None = None,
) -> Sums:
    """`sums` plus the gradient and loss sums of one micro-batch, without communication between devices.

    Args:
        params: the trained ones, and with `settings.part` the others under "frozen".
    """
    if dropout_key is not None and axis_name is not None:
        dropout_key = jax.random.fold_in(dropout_key, jax.lax.axis_index(axis_name))

    trained = {name: group for name, group in params.items() if name != "frozen"}

    def loss(trained: Params) -> tuple[jax.Array, LossSums]:
        params_read = trained
        if settings.part is not None:
            params_read = freezing.above(settings.part, trained, params["frozen"])
        new = loss_sums(settings, objective, params_read, batch, teacher, dropout_key)
        return new.loss, new

    gradients, new = jax.grad(loss, has_aux=True)(trained)
    return jax.tree.map(lambda old, add: old + add.astype(old.dtype), sums, Sums(gradients, new))


@over_devices(
    static=("optimizer", "ema", "skip_nonfinite"),
    weights=("state", "sums"),
    replicated=("learning_rate",),
    donate=("state", "sums"),
    returns="weights",
)
def update(
    optimizer: optax.GradientTransformation,
    ema: float,
    skip_nonfinite: bool,
    state: TrainState,
    sums: Sums,
    learning_rate: jax.Array,
    *,
    axis_name: str | None = None,
) -> tuple[TrainState, Sums, dict[str, Any]]:
    """One optimiser step on the sums of a whole batch.

    Args:
        ema: the new average is ema·average + (1 - ema)·params, if the state has one.
        skip_nonfinite: keep the state as it is if the loss or the gradient's norm is not finite.

    Returns:
        The new state, the sums reset to zero (in the same buffers), and the batch's metrics.
    """
    if axis_name is not None:
        sums = jax.lax.psum(sums, axis_name)
    weight = jnp.maximum(sums.losses.weight, 1e-9)
    gradients = jax.tree.map(lambda g: g / weight, sums.gradients)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
    params = jax.tree.map(lambda p, u: (p - learning_rate * u).astype(p.dtype), state.params, updates)
    average = state.average
    if average is not None:
        average = jax.tree.map(lambda a, p: a + (1 - ema) * (p - a), average, params)
    metrics = {
        "loss": sums.losses.loss / weight,
        "cross_entropy": sums.losses.cross_entropy / weight,
        "divergence": sums.losses.divergence / weight,
        "weight": sums.losses.weight,
        "grad_norm": optax.global_norm(gradients),
    }
    new = TrainState(params, optimizer_state, average)
    if skip_nonfinite:
        # Both come from sums over all devices, so these decide alike.
        finite = jnp.isfinite(metrics["grad_norm"]) & jnp.isfinite(metrics["loss"])
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
    return new, jax.tree.map(jnp.zeros_like, sums), metrics
