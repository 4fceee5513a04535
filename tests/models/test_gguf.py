import dataclasses
import sys

import jax
import numpy as np
import pytest

from l2m_jax import models
from l2m_jax.errors import InputError
from l2m_jax.models.hf import llama, weights
from l2m_jax.models.hf.gguf import _BLOCK, _TOP, GgufFile

gguf = pytest.importorskip("gguf", reason="needs the gguf package (the extra of that name)")

CONFIG = models.DecoderConfig(
    family="llama",
    vocab_size=300,
    valid_vocab_size=300,
    hidden_size=64,
    embed_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    max_positions=32,
    rope=models.Rope(theta=500.0),
    norm="rms",
    gated_mlp=True,
    activation="silu",
    attention_bias=False,
    mlp_bias=False,
    init_std=0.2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
# Each field differs from its family's default in config.json, so that it must come from the file.
OTHERS = {
    "qwen2": {"attention_bias": True, "attention_out_bias": False},
    "qwen3": {"qk_norm": True, "head_dim": 12, "tie_embeddings": False},
}
CONTROL, NORMAL = 3, 1


def _permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k."""
    return (
        rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        .swapaxes(1, 2)
        .reshape(rows.shape)
    )


def _tokens() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<pad>", "<s>", "</s>", *sorted(ByteLevel.alphabet()), "Ġt", "he", "Ġthe", "12"]
    return tokens + [f"<unused{i}>" for i in range(300 - len(tokens))]


def write_gguf(file, params, *, config=CONFIG, architecture="llama", quantise=False, pre="smollm", **extra):
    writer = gguf.GGUFWriter(file, architecture)
    if config is not CONFIG:
        writer.add_key_length(config.head_dim)
    writer.add_block_count(CONFIG.num_layers)
    writer.add_context_length(CONFIG.max_positions)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_heads)
    writer.add_head_count_kv(CONFIG.num_kv_heads)
    writer.add_layer_norm_rms_eps(CONFIG.norm_eps)
    writer.add_rope_freq_base(500.0)
    for key, value in extra.items():
        writer.add_string(key.replace("__", "."), value)
    tokens = _tokens()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(
        [CONTROL if token.startswith("<") and len(token) > 1 else NORMAL for token in tokens]
    )
    writer.add_token_merges(["Ġ t", "h e", "Ġt he", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")

    names = {hf: stored for stored, hf in _TOP.items()} | {"lm_head.weight": "output.weight"}
    for layer in range(CONFIG.num_layers):
        names |= {
            f"model.layers.{layer}.{hf}.{kind}": f"blk.{layer}.{stored}.{kind}"
            for stored, hf in _BLOCK.items()
            for kind in ("weight", "bias")
        }
    for name, tensor in weights.tensors(config, llama.weights(config), params):
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            tensor = _permute(tensor, CONFIG.num_heads if ".q_proj." in name else CONFIG.num_kv_heads)
        tensor = np.ascontiguousarray(tensor)
        kind = gguf.GGMLQuantizationType.Q8_0 if quantise and tensor.ndim == 2 else None
        writer.add_tensor(names[name], gguf.quants.quantize(tensor, kind) if kind else tensor, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def params():
    return models.init(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def file(params, tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file, params)
    return file


def test_weights_and_config(file, params):
    config, loaded = models.load(file)
    assert np.isclose(config.norm_eps, CONFIG.norm_eps)
    assert config == models.read_config(file)
    for field in (
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "intermediate_size",
        "rope",
        "tie_embeddings",
        "eos_token_id",
    ):
        assert getattr(config, field) == getattr(CONFIG, field)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize("family", OTHERS)
def test_qwen(tmp_path, family):
    config = dataclasses.replace(CONFIG, family=family, **OTHERS[family])
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: models.init(config, jax.random.key(1)))
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), shapes)
    write_gguf(tmp_path / "qwen.gguf", params, config=config, architecture=family)
    read, loaded = models.load(tmp_path / "qwen.gguf")
    assert dataclasses.replace(read, norm_eps=config.norm_eps, init_std=config.init_std) == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_quantised_weights_are_dequantised_to_the_dtype_asked_for(tmp_path, params):
    write_gguf(tmp_path / "q8.gguf", params, quantise=True)
    config, loaded = models.load(tmp_path / "q8.gguf", param_dtype="bfloat16")
    assert config.param_dtype == "bfloat16"

    def close(ours, exact):
        assert ours.dtype == "bfloat16"
        np.testing.assert_allclose(ours.astype("float32"), exact, atol=0.02 * np.abs(exact).max())

    jax.tree.map(close, loaded, params)


def test_one_layer_and_the_head(file, params):
    config, student = models.load(file, layers=(1,))
    assert config.num_layers == 1
    jax.tree.map(
        lambda ours, whole: np.testing.assert_array_equal(ours[0], whole[1]),
        student["blocks"],
        params["blocks"],
    )
    np.testing.assert_array_equal(models.load_head(file, dtype="float32"), models.head(CONFIG, params))


def test_tokenizer(file):
    tokenizer = GgufFile(file).tokenizer()
    tokens = _tokens()
    text = " the t</s>12"
    # Digits stay apart for SmolLM, although the vocabulary has their merge.
    expected = ["Ġthe", "Ġt", "</s>", "1", "2"]
    assert [tokens[i] for i in tokenizer.encode(text)] == expected
    assert tokenizer.decode(tokenizer.encode("näïve the\n")) == "näïve the\n"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"


def test_what_is_not_supported(tmp_path, params, file):
    write_gguf(tmp_path / "gemma.gguf", params, architecture="gemma3")
    with pytest.raises(InputError, match=r"gemma\.gguf holds a 'gemma3' model; only llama, qwen2, qwen3"):
        models.load(tmp_path / "gemma.gguf")
    write_gguf(tmp_path / "yarn.gguf", params, llama__rope__scaling__type="yarn")
    with pytest.raises(InputError, match=r"yarn\.gguf scales its rotary positions"):
        models.load(tmp_path / "yarn.gguf")
    write_gguf(tmp_path / "tekken.gguf", params, pre="tekken")
    with pytest.raises(InputError, match="'gpt2' tokenizer with 'tekken' splitting"):
        GgufFile(tmp_path / "tekken.gguf").tokenizer()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"cut\.gguf is cut off or not a GGUF file"):
        models.load(cut)
    cut.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(InputError, match=r"cut\.gguf is cut off or not a GGUF file"):
        models.load(cut)


def test_without_the_package(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'l2m_jax\[gguf\]'"):
        models.load(file)
