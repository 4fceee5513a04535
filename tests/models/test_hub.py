import dataclasses
import json
from pathlib import Path

import pytest

from l2m_jax import models
from l2m_jax.errors import InputError
from l2m_jax.generation import SamplingRules

CASES = json.loads((Path(__file__).parent / "golden" / "cases.json").read_text())


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
    ],
)
def test_rotary_positions_of_other_kinds(tmp_path, rope, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | rope))
    with pytest.raises(InputError, match=message):
        models.read_config(tmp_path)


def test_folders_without_a_model(tmp_path):
    with pytest.raises(InputError, match=r"no such model folder '\./nowhere'"):
        models.load("./nowhere")
    with pytest.raises(InputError, match=r"has no config\.json"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CASES["gpt2"]))
    with pytest.raises(InputError, match=r"has no model\.safetensors"):
        models.load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"only PyTorch weights \(pytorch_model\.bin\).*save_pretrained"):
        models.load(tmp_path)


def test_a_hub_name_without_a_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=r"'nobody/no-such-model' is not a local folder.*pass the path of a folder"
    ) as raised:
        models.load("nobody/no-such-model")
    assert "\n" not in str(raised.value)


def test_a_hub_name_is_fetched_once_and_read_as_a_folder(write_model, tmp_path, monkeypatch):
    write_model(tmp_path)
    asked = {}

    def snapshot_download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    config, _ = models.load("someone/tiny-gpt2")
    assert config == models.read_config(tmp_path)
    assert "*.safetensors" in asked["someone/tiny-gpt2"]
    models.read_config("someone/tiny-gpt2")
    assert "*.safetensors" not in asked["someone/tiny-gpt2"]


@pytest.mark.parametrize(
    "files",
    [
        {"vocab.json": {"a": 0, "b": 36}, "added_tokens.json": {"<pad>": 37}},
        {"tokenizer.json": {"model": {"vocab": {"a": 0, "b": 36}}, "added_tokens": [{"id": 37}]}},
        {"tokenizer.json": {"model": {"vocab": [["a", 0.0]] * 38}}},
    ],
)
def test_rows_past_the_tokenizer_are_no_tokens(write_model, tmp_path, files):
    write_model(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert models.read_config(tmp_path).valid_vocab_size == 38


def test_a_tokenizer_of_another_model_is_refused(write_model, tmp_path):
    write_model(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 50256}))
    with pytest.raises(
        InputError, match=r"valid_vocab_size: 50257 .* vocab_size 40; a tokenizer with more tokens"
    ):
        models.load(tmp_path)


def test_the_real_opt_vocabulary(tmp_path, shared):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    (tmp_path / "vocab.json").write_bytes((shared / "tokenizers" / "opt" / "vocab.json").read_bytes())
    config = models.read_config(tmp_path)
    assert (config.vocab_size, config.valid_vocab_size) == (50272, 50265)


class _Tokenizer:
    """As much of a `transformers` tokenizer as saving needs."""

    bos_token_id, eos_token_id, pad_token_id = 7, 8, None

    def __init__(self, size=40):
        self.size = size

    def __len__(self):
        return self.size

    def save_pretrained(self, folder):
        (Path(folder) / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": self.size - 1}}}))


def test_tokenizer_readme_and_generation_config_are_saved(write_model, tmp_path):
    write_model(tmp_path / "given")
    config, params = models.load(tmp_path / "given")
    rules = SamplingRules(temperature=0.7, top_k=0, no_repeat_ngram=6)
    models.save(
        tmp_path / "saved",
        config,
        params,
        tokenizer=_Tokenizer(39),
        readme="# tiny\n",
        generation=rules.generation_config(),
    )
    files = {file.name for file in (tmp_path / "saved").iterdir()}
    assert files == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
    }
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text()) == {
        "bos_token_id": 7,
        "eos_token_id": 8,
        "pad_token_id": 8,
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 0,
        "top_p": 1.0,
        "no_repeat_ngram_size": 6,
    }
    again, _ = models.load(tmp_path / "saved")
    assert again == dataclasses.replace(config, valid_vocab_size=39, bos_token_id=7, eos_token_id=8)
    assert (tmp_path / "saved" / "README.md").read_text() == "# tiny\n"


def test_saving_what_does_not_belong_together_is_refused(write_model, tmp_path):
    write_model(tmp_path / "given")
    config, params = models.load(tmp_path / "given")
    with pytest.raises(InputError, match="tokenizer has 41 tokens, but the model's embedding only 40 rows"):
        models.save(tmp_path / "saved", config, params, tokenizer=_Tokenizer(41))
    with pytest.raises(
        InputError,
        match=r"parameter blocks/attention/key/bias: its shape is \(2, 12\), but the config requires \(3, 12\)",
    ):
        models.save(tmp_path / "saved", dataclasses.replace(config, num_layers=3), params)
    assert not list((tmp_path / "saved").iterdir())
