"""Against `transformers` on PyTorch, through the files that make_golden.py wrote: every family, odd settings.

Also what the family files (gpt2, opt, llama, ...) promise: each case is loaded through its family's table.
"""

import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from safetensors.numpy import load_file

from l2m_jax import models
from l2m_jax.models import layers
from l2m_jax.models.activations import ACTIVATIONS
from l2m_jax.models.attention import causal, rope_angles
from l2m_jax.models.hf import weights
from l2m_jax.models.hf.families import FAMILIES

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())


class Case(NamedTuple):
    config: models.DecoderConfig
    params: dict
    golden: dict[str, np.ndarray]

    def tree(self, kind: str) -> dict:
        """Golden tensors "kind/<Hugging Face name>" as a parameter tree."""
        prefix = f"{kind}/"
        named = {k.removeprefix(prefix): v for k, v in self.golden.items() if k.startswith(prefix)}
        return weights.fill(self.config, FAMILIES[self.config.family].weights(self.config), _Tensors(named))


class _Tensors:
    def __init__(self, tensors: dict[str, np.ndarray]):
        self.tensors, self.shapes = tensors, {name: tensor.shape for name, tensor in tensors.items()}

    def read(self, name, index):
        return self.tensors[name][index]

    def place(self, name):
        return "golden file"


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory, write_model) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    write_model(folder, request.param)
    return Case(*models.load(folder), load_file(GOLDEN / f"{request.param}.safetensors"))


def assert_close(ours, golden, tolerance=1e-4, what=""):
    """The largest difference, relative to the largest number."""
    ours, golden = np.asarray(ours), np.asarray(golden)
    assert np.abs(ours.reshape(golden.shape) - golden).max() <= tolerance * np.abs(golden).max(), what


def test_each_submodule(case: Case):
    config, golden = case.config, case.golden
    tokens = jnp.asarray(golden["tokens"])
    positions = jnp.asarray(np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape))

    @jax.jit
    def run(params, given):
        layer = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
        window, rope = config.layer_kinds[0]
        rope = rope and rope_angles(rope, config.head_dim, positions)
        attend = partial(causal(config, None), window=window)

        def part(module, params, *inputs):
            return module.apply({"params": params}, *inputs)

        return {
            "in/block": part(layers.Embeddings(config), params["embeddings"], tokens, positions),
            "out/attention_norm": part(
                layers.Norm(config), layer.get("attention_norm", {}), given["in/attention_norm"]
            ),
            "out/attention": part(
                layers.Attention(config),
                layer["attention"],
                given["in/attention"],
                rope,
                attend,
            )[0],
            "out/mlp_out": part(layers.MLP(config), layer["mlp"], given["in/mlp_in"]),
            "out/block": part(layers.Block(config), layer, given["in/block"], rope, attend)[0],
            "out/output": models.hidden_states(config, params, tokens),
        }

    for name, ours in run(case.params, golden).items():
        assert_close(ours, golden[name], 1e-5, name)


def _logits(case: Case, tokens, segment_ids=None):
    logits = jax.jit(models.logits, static_argnums=0)
    return logits(case.config, case.params, jnp.asarray(tokens), segment_ids_BxL=segment_ids)


def test_logits(case: Case):
    assert_close(_logits(case, case.golden["tokens"]), case.golden["logits"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_padded_rows(case: Case, side):
    tokens, mask = case.golden[f"{side}/tokens"], case.golden[f"{side}/mask"]
    ours = _logits(case, tokens, jnp.asarray(mask))
    real = mask.astype(bool)
    assert_close(np.asarray(ours)[real], case.golden[f"{side}/logits"][real])


def test_gradients_and_one_adamw_step(case: Case):
    tokens = jnp.asarray(case.golden["tokens"])

    def mean_cross_entropy(params):
        logits = models.logits(case.config, params, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    loss, gradients = jax.jit(jax.value_and_grad(mean_cross_entropy))(case.params)
    assert_close(loss, case.golden["loss"])
    gradients, _ = ravel_pytree(gradients)
    # Relative to the largest of all: the gradient of a key's bias is zero but for rounding.
    assert_close(gradients, ravel_pytree(case.tree("gradient"))[0], 5e-5)

    params, _ = ravel_pytree(case.params)
    optimizer = optax.adamw(1e-2, b1=0.9, b2=0.999, eps=1e-4, weight_decay=0.01)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    assert_close(params + updates, ravel_pytree(case.tree("adamw"))[0])


def test_greedy_tokens_with_cache(case: Case):
    config, expected = case.config, case.golden["greedy"]
    L = 4
    tokens_BxL = jnp.asarray(expected[:, :L], jnp.int32)
    B, length = expected.shape
    prefill = jax.jit(models.prefill, static_argnums=(0, 4))
    hidden, cache = prefill(config, case.params, tokens_BxL, jnp.full(B, L), length)
    step = jax.jit(models.decode_step, static_argnums=0)
    generated = []
    for position in range(L, length):
        token_B = models.apply_head(config, case.params, hidden).argmax(-1).astype(jnp.int32)
        generated.append(token_B)
        hidden, cache = step(config, case.params, token_B, jnp.full(B, position, jnp.int32), cache)
    np.testing.assert_array_equal(np.stack(generated, axis=1), expected[:, L:])


def test_activations():
    golden = load_file(GOLDEN / "activations.safetensors")
    x = jnp.asarray(golden.pop("x"))
    assert golden.keys() == ACTIVATIONS.keys()
    for name, expected in golden.items():
        np.testing.assert_allclose(ACTIVATIONS[name](x), expected, rtol=1e-6, atol=1e-6, err_msg=name)
