"""A store that is imported is the one that a run would have built: same key, same numbers, same student."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from l2m_jax import files, models
from l2m_jax.cli.main import main
from l2m_jax.data.tokenizer import train_tokenizer
from l2m_jax.models.hf.safetensors_folder import SafetensorsFolder

PAGE = Path(__file__).resolve().parents[2] / "docs" / "teacher_store.md"
WORDS = [f"{a}{b}" for a in ("sun", "rain", "thunder") for b in ("day", "light", "storm", "shine", "proof")]


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """A folder with rows, the teacher, and a config."""
    folder = tmp_path_factory.mktemp("given")
    rows = [{"instruction": f"say {word}", "output": f"it is {word}"} for word in WORDS * 2]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_tokenizer([f"say it is a {word} 1990s" for word in WORDS] * 3, 400)
    architecture = models.Architecture(
        family="llama", num_layers=2, hidden_size=16, num_heads=2, max_positions=96
    )
    config = models.random_config(architecture, tokenizer)
    models.save(folder / "teacher", config, models.init(config, jax.random.key(0)), tokenizer=tokenizer)
    settings = {
        "method": "kld",
        "data": {"train": str(folder / "rows.jsonl"), "validation_rows": 2, "test_rows": 2, "max_length": 60},
        "teacher": {
            "model": {"path": str(folder / "teacher")},
            "finetune": {"epochs": 0},
            "store_dtype": "float32",
        },
        "student": {"model": {"init": "teacher_layers", "layers": [1]}},
        "curriculum": {"epochs_per_stage": 1},
        "training": {"learning_rate": 0.001},
        "sampling": {"max_new_tokens": 2},
        "evaluation": {"seeds": [10], "validations": 1, "diagnostic_rows": 0},
        "devices": {"count": 1, "num_processes": 1},
        "max_shapes": 1,
    }
    files.write_json(folder / "config.yaml", settings)
    return folder


def run(given, command, workdir, *flags):
    main([*command.split(), f"--config={given / 'config.yaml'}", f"--workdir={workdir}", *map(str, flags)])


def write_outputs(given, rows, folder):
    """As another tool would: the whole model on one row after the other, by the page's function."""
    [block] = re.findall(
        r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    found = {}
    exec(block, found)
    config, params = models.load(given / "teacher")
    hidden_states = jax.jit(models.hidden_states, static_argnums=0)

    def run_teacher(token_ids):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(token_ids)] = token_ids
        return {"hidden_states": np.asarray(hidden_states(config, params, padded))[0, : len(token_ids)]}

    found["write"](rows, folder, run_teacher, rows_per_file=9)


def shard(workdir) -> dict[str, np.ndarray]:
    return load_file(workdir / "teacher_store" / "00000.safetensors")


def test_training_from_an_imported_store_ends_as_from_a_built_one(given, tmp_path, monkeypatch, capsys):
    ours, theirs = tmp_path / "built", tmp_path / "imported"
    run(given, "store rows", theirs)
    assert str(theirs / "data" / "train") in capsys.readouterr().out
    write_outputs(given, theirs / "data" / "train", tmp_path / "outputs")
    read, tensors = SafetensorsFolder.read, set()
    with monkeypatch.context() as patch:
        patch.setattr(
            SafetensorsFolder,
            "read",
            lambda self, name, index: (tensors.add(name), read(self, name, index))[1],
        )
        run(given, "store import", theirs, f"--from={tmp_path / 'outputs'}")
    assert not any("layers" in name for name in tensors) and not (theirs / "teacher").exists()
    said = capsys.readouterr().out

    run(given, "store build", ours)
    np.testing.assert_allclose(shard(theirs)["hidden_states"], shard(ours)["hidden_states"], atol=1e-5)
    keys = [files.read_json(w / "teacher_store" / "inputs.json")["key"] for w in (ours, theirs)]
    assert keys[0] == keys[1]

    tokens, offsets, prompts = (
        np.fromfile(theirs / "data" / "train" / name, dtype)
        for name, dtype in (
            ("tokens.int32", np.int32),
            ("offsets.int64", np.int64),
            ("prompt_lengths.int32", np.int32),
        )
    )
    targets = [tokens[a + p : b] for a, b, p in zip(offsets[:-1], offsets[1:], prompts, strict=True)]
    head = load_file(given / "teacher" / "model.safetensors")["model.embed_tokens.weight"]
    labels = np.concatenate(targets)
    counted = np.cumsum([0, *map(len, targets)])
    counted = counted[1:][counted[:-1] < 256][-1]
    expected = (shard(ours)["hidden_states"] @ head.T).argmax(axis=1)[:counted] == labels[:counted]
    assert f"{expected.mean():.1%} are the token that the teacher expects most" in said

    before = (theirs / "teacher_store" / "00000.safetensors").stat().st_mtime_ns
    students = []
    for workdir in (ours, theirs):
        run(given, "train", workdir)
        students.append(load_file(workdir / "student" / "model.safetensors"))
    assert (theirs / "teacher_store" / "00000.safetensors").stat().st_mtime_ns == before
    initial = load_file(ours / "initial_student" / "model.safetensors")
    for name, values in students[0].items():
        np.testing.assert_allclose(students[1][name], values, atol=1e-5, err_msg=name)
    assert max(abs(students[0][name] - initial[name]).max() for name in initial) > 1e-4


def test_a_trimmed_vocabulary_is_that_of_the_rows(given, tmp_path, capsys, monkeypatch):
    """The files have the teacher's own numbers of tokens. Log-probabilities of all of these are refused."""
    from l2m_jax.run import tokenizers

    monkeypatch.setattr(tokenizers, "EXTRA_TOKENS", 0)
    trimmed = "--config.data.trim_vocabulary=1"
    ours, theirs = tmp_path / "built", tmp_path / "imported"
    run(given, "store build", ours, trimmed)
    run(given, "store rows", tmp_path / "whole")
    write_outputs(given, tmp_path / "whole" / "data" / "train", tmp_path / "outputs")
    run(given, "store import", theirs, trimmed, f"--from={tmp_path / 'outputs'}")
    np.testing.assert_allclose(shard(theirs)["hidden_states"], shard(ours)["hidden_states"], atol=1e-5)
    whole, kept = (
        np.fromfile(folder / "data" / "train" / "tokens.int32", np.int32)
        for folder in (tmp_path / "whole", theirs)
    )
    assert (whole != kept).any()

    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(
            given, "store import", tmp_path / "top", trimmed, f"--from={tmp_path / 'outputs'}",
            "--config.teacher.store_top_k=4",
        )  # fmt: skip
    assert "share out the mass of the dropped tokens; import hidden states" in capsys.readouterr().err


def test_a_teacher_that_the_run_trains_cannot_have_run_elsewhere(given, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(given, "store import", tmp_path, f"--from={tmp_path}", "--config.teacher.finetune.epochs=1")
    assert "trains its teacher first" in capsys.readouterr().err


def test_what_an_import_has_begun_is_not_computed_to_its_end(given, tmp_path, capsys):
    """The teacher here may be another than the one that ran elsewhere. What is missing is imported again."""
    run(given, "store rows", tmp_path / "run")
    write_outputs(given, tmp_path / "run" / "data" / "train", tmp_path / "outputs")
    run(given, "store import", tmp_path / "run", f"--from={tmp_path / 'outputs'}")
    [file] = (tmp_path / "run" / "teacher_store").glob("*.safetensors")
    before = file.read_bytes()
    file.unlink()
    with pytest.raises(SystemExit):
        run(given, "store build", tmp_path / "run")
    assert "was imported, and is not complete; run the same" in capsys.readouterr().err
    run(given, "store import", tmp_path / "run", f"--from={tmp_path / 'outputs'}")
    assert file.read_bytes() == before
