"""How hard each training example is for a student: Rouge-L of its own answer, and cross-entropy of the reference."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from l2m_jax import losses, models, progress
from l2m_jax.data.batches import forward_batches, prefetch
from l2m_jax.data.corpus import Corpus
from l2m_jax.evaluation.rouge import rouge_l_many
from l2m_jax.evaluation.sets import PromptSet
from l2m_jax.generation import SamplingRules, generate
from l2m_jax.losses import Objective
from l2m_jax.losses.fused import DEFAULT_CHUNK_SIZE
from l2m_jax.models import DecoderConfig
from l2m_jax.models.sharding import rows_split_as
from l2m_jax.types import MicroBatch, Params

_CROSS_ENTROPY = Objective(beta=0.0)


def score(
    config: DecoderConfig,
    params: Params,
    corpus: Corpus,
    prompts: PromptSet,
    tokenizer: Any,
    rules: SamplingRules,
    seed: int,
    *,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
    mesh: Mesh | None = None,
    slots: int | None = None,
    output: Path | None = None,
    made_from: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Both measures of difficulty for every example of `corpus`.

    Args:
        params: one copy, or global arrays sharded over `mesh`.
        prompts: those of `corpus` that leave room for an answer. An example without one counts as
            answered wrongly: its Rouge-L is 0.
        seed: of the one answer to each prompt.
        devices, mesh, slots, output, made_from: see `generate`.

    Returns:
        (rouge_l_N in [0, 1], cross_entropy_N in nats a token), float64, in the order of the corpus.

    Raises:
        InputError: see `generate`.
    """
    answers = generate(
        config,
        params,
        prompts.prompts,
        rules,
        [seed],
        eos_token_id=tokenizer.eos_token_id,
        tokenizer=tokenizer,
        slots=slots,
        devices=devices,
        mesh=mesh,
        output=output,
        made_from=made_from,
        title="the student's own answers",
    )
    rouge_l_N = np.zeros(len(corpus))
    rouge_l_N[list(prompts.indices)] = rouge_l_many([a.text for a in answers], prompts.references)
    return rouge_l_N, cross_entropy_by_example(config, params, corpus, devices=devices, mesh=mesh)


def cross_entropy_by_example(
    config: DecoderConfig,
    params: Params,
    corpus: Corpus,
    *,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
    mesh: Mesh | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> np.ndarray:
    """Mean cross-entropy over the response and end of sequence of each example (Eq. 1 by its length), without dropout.

    Args:
        params: one copy, put on all `devices` (None: all there are); or global arrays sharded over `mesh`.
        chunk_size: tokens whose logits are held at once.

    Returns:
        cross_entropy_N: float64, nats a token, in the order of the corpus.
    """
    if mesh is None:
        devices = jax.devices() if devices is None else devices
        mesh = Mesh(np.array(devices), ("devices",), axis_types=(AxisType.Auto,))
        copies = NamedSharding(mesh, PartitionSpec())
        # Not device_put: between processes it would compare what each of them puts.
        params = jax.tree.map(
            lambda x: jax.make_array_from_callback(np.shape(x), copies, lambda index: x[index]), params
        )
    by_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    everywhere = NamedSharding(mesh, PartitionSpec())

    @functools.partial(jax.jit, static_argnums=(0, 1), out_shardings=everywhere)
    def token_losses(*arguments: Any) -> jax.Array:
        with rows_split_as(by_device):
            return _token_losses(*arguments)

    def feed(host: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(host.shape, by_device, lambda index: host[index])

    sums_N = np.zeros(len(corpus))
    with progress.bar("cross-entropy", len(corpus)) as bar:
        for batch in prefetch(forward_batches(corpus, np.arange(len(corpus)), mesh.size)):
            fed = jax.tree.map(feed, batch.micro_batch)
            losses_AxT = np.asarray(token_losses(config, chunk_size, params, fed), np.float64)
            real = batch.example_AxT >= 0
            np.add.at(sums_N, batch.example_AxT[real], losses_AxT[real])
            bar.advance(len(batch.indices))
    return sums_N / corpus.response_lengths


def _token_losses(config: DecoderConfig, chunk_size: int, params: Params, batch: MicroBatch) -> jax.Array:
    """Cross-entropy at each target, `[A, T]`."""
    A, R, L = batch.tokens_RxL.shape
    rows_first = functools.partial(jnp.reshape, shape=(A * R, L))
    hidden_BxLxE = models.hidden_states(
        config,
        params,
        rows_first(batch.tokens_RxL),
        segment_ids_BxL=rows_first(batch.segment_ids_RxL),
        positions_BxL=rows_first(batch.positions_RxL),
    )
    hidden = hidden_BxLxE.reshape(A, R * L, -1)
    cross_entropy, _ = losses.fused_token_losses(
        jnp.take_along_axis(hidden, batch.target_index_T[..., None], axis=1),
        models.head(config, params),
        None,
        None,
        batch.labels_T,
        batch.weights_T,
        _CROSS_ENTROPY,
        valid_vocab_size=config.valid_vocab_size,
        chunk_size=chunk_size,
    )
    return cross_entropy
