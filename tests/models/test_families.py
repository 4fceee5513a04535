"""What the files of the families read from config.json, and refuse. test_parity.py has their numbers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2m_jax import models
from l2m_jax.errors import InputError
from l2m_jax.losses import ForwardKL, Objective
from l2m_jax.models import Rope
from l2m_jax.models.hf.families import FAMILIES
from l2m_jax.training import step
from l2m_jax.types import MicroBatch

# As the hub has them, without what does not concern the architecture.
QWEN3 = {
    "model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "num_attention_heads": 16,
    "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
SMOLLM3 = {
    "model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008, "max_position_embeddings": 65536,
    "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 2, "num_attention_heads": 16,
    "num_hidden_layers": 8, "num_key_value_heads": 4, "rope_scaling": None, "rope_theta": 5000000.0,
    "sliding_window": None, "use_sliding_window": False, "vocab_size": 128256,
}  # fmt: skip
GEMMA3 = {
    "model_type": "gemma3_text", "attn_logit_softcapping": None, "eos_token_id": [1, 106],
    "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
    "intermediate_size": 6912, "num_attention_heads": 4, "num_hidden_layers": 8, "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000, "rope_theta": 1000000,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 512, "sliding_window_pattern": 6,
    "vocab_size": 262144,
}  # fmt: skip


def _read(folder, hf):
    (folder / "config.json").write_text(json.dumps(hf))
    return models.read_config(folder)


def test_a_head_size_of_its_own(tmp_path):
    config = _read(tmp_path, QWEN3)
    assert (config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim) == (1024, 16, 8, 128)
    assert config.rope == Rope(theta=1e6) and config.qk_norm and config.tie_embeddings
    assert not (config.attention_bias or config.mlp_bias)


def test_layers_without_rotary_positions(tmp_path):
    expected = ("full", "full", "full", "no_rope") * 2
    assert _read(tmp_path, SMOLLM3).layer_types == expected
    assert _read(tmp_path, SMOLLM3 | {"no_rope_layers": None}).layer_types == expected
    kinds = _read(tmp_path, SMOLLM3).layer_kinds
    assert [rope for _, rope in kinds] == [*[Rope(theta=5e6)] * 3, None] * 2


def test_local_and_global_layers(tmp_path):
    config = _read(tmp_path, GEMMA3)
    local, everything = (512, Rope()), (None, Rope(theta=1e6, scaling="linear", factor=8.0))
    assert config.layer_kinds == (*[local] * 5, everything, *[local] * 2)
    assert config.eos_token_ids == (1, 106) and config.query_scalar is None
    # A student of some of the layers keeps what each of them is.
    student = config.keep_layers((0, 5))
    assert student.layer_kinds == (local, everything)
    assert (
        _read(tmp_path, {"model_type": "gemma3_text"} | FAMILIES["gemma3_text"].write_config(student))
        == student
    )


@pytest.mark.parametrize(
    ("hf", "change", "message"),
    [
        (QWEN3, {"use_sliding_window": True}, "use_sliding_window = True is not supported for qwen3 models"),
        (QWEN3, {"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window = True is not supported"),
        (QWEN3, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not supported"),
        (SMOLLM3, {"no_rope_layers": [1, 0]}, "layer_types: 2 entries, but num_layers is 8"),
        (SMOLLM3, {"no_rope_layers": "all"}, "no_rope_layers: expected list or null, got 'all'"),
        (SMOLLM3, {"num_hidden_layers": 10**9}, "num_layers: 1000000000 must be at most"),
        (GEMMA3, {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is not supported"),
        (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not supported"),
        (GEMMA3, {"layer_types": ["chunked_attention"] * 8}, "layer_types: 'chunked_attention' is not one of"),
        (GEMMA3, {"sliding_window": None}, "layer_types: 'sliding' needs a sliding_window"),
        (GEMMA3, {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}}, "scaled rotary"),
        (GEMMA3, {"rope_parameters": []}, "rope_parameters: expected an object with names or null"),
    ],
)  # fmt: skip
def test_what_is_not_supported(tmp_path, hf, change, message):
    with pytest.raises(InputError, match=message) as raised:
        _read(tmp_path, hf | change)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(("teacher_rows", "student_rows"), [(48, 40), (40, 48), (48, 44)])
def test_vocabularies_of_one_tokenizer_padded_differently(tmp_path, teacher_rows, student_rows):
    """Qwen's smaller and larger models pad one vocabulary to different sizes: only its own entries count."""
    tokens, valid = np.random.default_rng(0).integers(0, 40, (2, 6)), 40
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    hf = QWEN3 | sizes | {"intermediate_size": 8, "num_hidden_layers": 1, "initializer_range": 0.5}
    configs, params = [], []
    for rows in (teacher_rows, student_rows):
        config = dataclasses.replace(_read(tmp_path, hf | {"vocab_size": rows}), valid_vocab_size=valid)
        configs.append(config)
        params.append(models.init(config, jax.random.key(rows)))
    (teacher, student), (teacher_params, student_params) = configs, params
    log_p, log_q = (
        _log_softmax(models.logits(config, leaves, jnp.asarray(tokens, jnp.int32))[:, :-1, :valid])
        for config, leaves in zip(configs, params, strict=True)
    )
    kl = (np.exp(log_p) * (log_p - log_q)).sum()
    cross_entropy = -np.take_along_axis(log_q, tokens[:, 1:, None], -1).sum()

    rows_BxL = tokens.astype(np.int32)
    positions = np.broadcast_to(np.arange(6, dtype=np.int32), (2, 6))
    targets = np.array([row * 6 + i for row in range(2) for i in range(5)], np.int32)
    labels, ones = rows_BxL[:, 1:].reshape(-1), np.ones(10, np.float32)
    batch = jax.tree.map(
        jnp.asarray, MicroBatch(rows_BxL, np.ones((2, 6), np.int32), positions, targets, labels, ones)
    )
    settings = step.StepSettings(student, teacher, min(student.valid_vocab_size, teacher.valid_vocab_size), 8)
    signal = step.Teacher(models.head(teacher, teacher_params), teacher_params)
    sums = step.loss_sums(settings, Objective(ForwardKL(), beta=0.5), student_params, batch, signal)
    np.testing.assert_allclose(sums.divergence, kl, rtol=1e-4)
    np.testing.assert_allclose(sums.cross_entropy, cross_entropy, rtol=1e-4)


def _log_softmax(logits):
    exact = np.asarray(logits, np.float64)
    return exact - np.log(np.exp(exact).sum(-1, keepdims=True))
