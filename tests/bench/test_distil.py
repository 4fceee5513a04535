import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2m_jax import models
from l2m_jax.bench import distil


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_losses_are_those_of_plain_padded_training(work, monkeypatch, dtype, tolerance):
    request, _ = work
    monkeypatch.setattr(distil, "matmul_rate", lambda: 1e9)
    result = distil.run(dataclasses.replace(request, dtype=dtype))
    assert result["losses"] == pytest.approx(_plain_losses(request), rel=tolerance)
    assert len(result["step_seconds"]) == 2 and min(result["step_seconds"]) > 0
    parts = {part["part"]: part for part in result["parts"]}
    assert parts["step"]["gflop_a_batch"] == pytest.approx(
        parts["student"]["gflop_a_batch"] + parts["loss, both heads"]["gflop_a_batch"]
    )
    for part in parts.values():
        assert part["of_matmul_rate"] == pytest.approx(part["gflop_a_batch"] / part["seconds_a_batch"])
    json.dumps(result)


def _plain_losses(request):
    """One example a row, every logit, the teacher live, optax's own AdamW."""
    config, params = models.load(request.student)
    teacher_config, teacher = models.load(request.teacher)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            request.learning_rate,
            weight_decay=0.01,
            mask=lambda p: jax.tree.map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), p),
        ),
    )
    length = max(map(len, request.tokens))

    @jax.jit
    def update(params, state, tokens, mask):
        def loss(params):
            log_p = jax.nn.log_softmax(models.logits(teacher_config, teacher, tokens))[:, :-1]
            log_q = jax.nn.log_softmax(models.logits(config, params, tokens))[:, :-1]
            return jnp.sum(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1) * mask[:, 1:]) / mask.sum()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for indices in request.batches:
        tokens, mask = np.zeros((2, len(indices), length), np.int32)
        for row, i in enumerate(indices):
            tokens[row, : len(request.tokens[i])] = request.tokens[i]
            mask[row, request.prompt_lengths[i] : len(request.tokens[i])] = 1
        params, state, value = update(params, state, tokens, mask)
        losses.append(float(value))
    return losses
