"""Cross-entropy of each reference response under a model, without dropout."""

import numpy as np

from l2m_jax import progress
from l2m_jax.data.batches import FORWARD_SLOTS, forward_batches, prefetch
from l2m_jax.data.corpus import Corpus
from l2m_jax.losses.fused import DEFAULT_CHUNK_SIZE
from l2m_jax.models import DecoderConfig
from l2m_jax.parallel import Placement
from l2m_jax.training.step import cross_entropy_pass
from l2m_jax.types import Params


def cross_entropy_by_example(
    config: DecoderConfig,
    params: Params,
    corpus: Corpus,
    placement: Placement,
    *,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    indices: np.ndarray | None = None,
    slots: int = FORWARD_SLOTS,
) -> np.ndarray:
    """Mean cross-entropy over the response and end of sequence of each example: Eq. 1, divided by their length.

    Args:
        params: placed by `placement`.
        chunk_size: target tokens whose logits are held at once.
        indices: the examples to measure; None: all.
        slots: tokens of a device's micro-batch.

    Returns:
        cross_entropy_N: float64, nats a token, in the order of the corpus; 0 for examples that are not measured.
    """
    indices = np.arange(len(corpus)) if indices is None else indices
    token_losses = placement.map(cross_entropy_pass)
    sums_N = np.zeros(len(corpus))
    with progress.bar("cross-entropy", len(indices)) as bar:
        for batch in prefetch(forward_batches(corpus, indices, placement.num_devices, slots=slots)):
            fed = placement.feed(batch.micro_batch)
            losses_AxT = placement.gather(token_losses(config, chunk_size, params, fed))
            real = batch.example_AxT >= 0
            np.add.at(sums_N, batch.example_AxT[real], losses_AxT[real].astype(np.float64))
            bar.advance(len(batch.indices))
    return sums_N / corpus.response_lengths
