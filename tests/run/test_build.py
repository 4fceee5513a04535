"""From settings to data and models."""

import json

import jax
import pytest
from ml_collections import ConfigDict

from l2m_jax import config
from l2m_jax.data.prompts import format_prompt
from l2m_jax.run import build


@pytest.mark.parametrize(
    ("backend", "asked", "computes_in"),
    [
        ("cpu", "auto", "float32"),
        ("gpu", "auto", "bfloat16"),
        ("tpu", "auto", "bfloat16"),
        ("gpu", "float32", "float32"),
        ("cpu", "bfloat16", "bfloat16"),
    ],
)
def test_mixed_precision_is_the_default_on_accelerators(monkeypatch, backend, asked, computes_in):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    architecture = config.Architecture(hidden_size=16, num_heads=2, max_positions=8)
    settings = config.Model(architecture=architecture, dtype=asked, remat="block")

    class Tokenizer:
        bos_token_id = eos_token_id = pad_token_id = 0

        def __len__(self) -> int:
            return 20

    found, params = build.build_model(settings, Tokenizer(), seed=0)
    assert (found.dtype, found.param_dtype, found.remat) == (computes_in, "float32", "block")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}


@pytest.mark.parametrize("bos", ["none", "training", "evaluation", "both"])
def test_bos_begins_the_rows_of_its_use_alone(tiny: ConfigDict, tmp_path, bos):
    data = config.change(config.parse(tiny), {"data.bos": bos})
    tokenizer = build.build_tokenizer(data, tmp_path / "tokenizer")
    splits = build.build_splits(data.data, tokenizer, tmp_path / "data")

    def begins(corpus) -> set[bool]:
        return {corpus.prompt_tokens(i)[0] == tokenizer.bos_token_id for i in range(len(corpus))}

    assert begins(splits.train) == {bos in ("training", "both")}
    assert begins(splits.validation) == begins(splits.test) == {bos in ("evaluation", "both")}


def test_parts_have_their_sizes_whichever_of_them_gets_a_bos(tiny: ConfigDict, tmp_path):
    """Rows are filtered before they are split: one that fits without the token alone goes into no part."""
    synthetic = config.parse(tiny)
    tokenizer = build.build_tokenizer(synthetic, tmp_path / "tokenizer")
    rows = tmp_path / "rows.jsonl"
    lines = [{"instruction": "say", "context": "", "response": "it " * n} for n in range(1, 21)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    longest = len(tokenizer(format_prompt("say", "") + "it " * 20)["input_ids"]) + 1
    changes = {
        "source": "files",
        "train": str(rows),
        "max_length": longest,
        "validation_rows": 3,
        "test_rows": 3,
    }
    for bos, kept in (("none", 20), ("training", 19), ("evaluation", 19)):
        settings = {**changes, "bos": bos, "tokenizer": str(tmp_path / "tokenizer")}
        data = config.change(synthetic, {f"data.{name}": value for name, value in settings.items()}).data
        splits = build.build_splits(data, tokenizer, tmp_path / bos)
        assert [len(part) for part in splits] == [kept - 6, 3, 3]
