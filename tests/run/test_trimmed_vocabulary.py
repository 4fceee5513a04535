"""`data.trim_vocabulary`: tokenizer, rows and models with the tokens that occur in what a run reads."""

import importlib.util
import json
import shutil

import jax
import numpy as np
import pytest

from l2m_jax import models
from l2m_jax.config import change, defaults, parse
from l2m_jax.data.tokenizer import load_tokenizer, train_tokenizer
from l2m_jax.errors import InputError
from l2m_jax.run import checks, data, tokenizers
from l2m_jax.run.context import start
from l2m_jax.run.models import make_model
from l2m_jax.run.preview import preview
from l2m_jax.run.resolve import resolve

_logits = jax.jit(models.logits, static_argnums=0)
WORDS = [f"{a}{b}" for a in ("sun", "rain", "thunder") for b in ("day", "light", "storm", "shine", "proof")]


def _write_rows(file, words, count):
    rows = [{"instruction": f"say {word}", "output": f"it is {word}"} for word in (words * count)[:count]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A teacher with a tokenizer of many words, and files that use some of them."""
    folder = tmp_path_factory.mktemp("given")
    _write_rows(folder / "rows.jsonl", WORDS[:4], 40)
    _write_rows(folder / "set.jsonl", WORDS[4:6], 4)
    (folder / "text.txt").write_text(f"a {WORDS[6]}\n\nbeyond the tokens that are read: {WORDS[7]}\n")
    tokenizer = train_tokenizer([f"say it is a {word} 1990s" for word in WORDS] * 3, 400)
    architecture = models.Architecture(
        family="llama", num_layers=2, hidden_size=16, num_heads=2, max_positions=160
    )
    config = models.random_config(architecture, tokenizer)
    models.save(folder / "teacher", config, models.init(config, jax.random.key(0)), tokenizer=tokenizer)
    return folder


def _config(given, **changes):
    values = defaults()
    values.data.update(
        train=str(given / "rows.jsonl"), validation_rows=4, test_rows=4, max_length=60, trim_vocabulary=1
    )
    values.teacher.model.path = str(given / "teacher")
    values.teacher.finetune.epochs = 0
    values.student.model.update(init="teacher_layers", layers=(1,))
    values.sampling.max_new_tokens = 8
    values.evaluation.sets = ("test", f"mine={given / 'set.jsonl'}")
    return change(parse(values), changes)


@pytest.fixture(scope="module", autouse=True)
def no_extra_tokens():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "EXTRA_TOKENS", 0)
        yield


@pytest.fixture(scope="module")
def made(given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = _config(
        given, **{"teacher.pretrain.text": str(given / "text.txt"), "teacher.pretrain.tokens": 4}
    )
    artefacts = resolve(config, folder, folder)
    tokenizers.make_tokenizer(artefacts.tokenizer)
    return config, artefacts


def test_what_is_read_keeps_its_tokens(given, made):
    _, artefacts = made
    whole, trimmed = load_tokenizer(given / "teacher"), tokenizers.load(artefacts.tokenizer)
    assert len(trimmed) < len(whole) - 10
    kept = tokenizers.kept(artefacts.pretrained["teacher"].inputs.start.weights, artefacts.tokenizer)
    assert tokenizers.kept(artefacts.teacher, artefacts.tokenizer) is None
    for word in WORDS[:7]:
        text = f"say {word}\nit is {word}"
        assert kept[trimmed.encode(text)].tolist() == whole.encode(text)
    assert any(len(trimmed.encode(word)) > len(whole.encode(word)) for word in WORDS[8:])


def test_a_preview_has_the_rows_that_a_run_trains_on(made):
    config, artefacts = made
    with preview(config) as found:
        assert found.tokenizer.key == artefacts.tokenizer.key
        (run,) = data.make_corpora([artefacts.corpora["train"]])
        np.testing.assert_array_equal(found.corpora["train"].tokens, run.tokens)


def test_the_initial_student_is_a_folder_with_the_logits_of_the_kept_tokens(given, tmp_path):
    config = _config(given)
    artefacts = resolve(config, tmp_path, tmp_path)
    tokenizers.make_tokenizer(artefacts.tokenizer)
    checks.check_models(config, artefacts)
    context = start(config, tmp_path)
    make_model(artefacts.teacher, "teacher", context.teacher, context)
    make_model(artefacts.initial_student, "initial student", context.student, context)
    folder = artefacts.initial_student.path
    kept = np.array(json.loads((artefacts.tokenizer.path / "kept_tokens.json").read_text()))
    whole_config, whole = models.load(given / "teacher", layers=(1,))
    tokens = np.array(load_tokenizer(folder).encode("say thunderstorm, it is a sunny day"))[None]
    expected = np.asarray(_logits(whole_config, whole, kept[tokens]))[..., kept]
    small_config, small = models.load(folder)
    assert small_config.vocab_size == len(kept) == len(load_tokenizer(folder))
    np.testing.assert_allclose(_logits(small_config, small, tokens), expected, rtol=1e-5, atol=1e-6)
    described = json.loads((folder / "generation_config.json").read_text())
    assert kept[described["eos_token_id"]] == load_tokenizer(given / "teacher").eos_token_id
    if importlib.util.find_spec("torch") is not None:
        import torch
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            np.testing.assert_allclose(theirs(torch.tensor(tokens)).logits, expected, rtol=1e-4, atol=1e-5)


def test_other_files_make_another_tokenizer(given, made, tmp_path):
    config, artefacts = made
    _write_rows(tmp_path / "other.jsonl", WORDS[:5], 40)
    (tmp_path / "other.txt").write_text("other\n")
    for setting, value in (
        ("data.train", str(tmp_path / "other.jsonl")),
        ("data.test", str(tmp_path / "other.jsonl")),
        ("evaluation.sets", ("test",)),
        ("teacher.pretrain.text", str(tmp_path / "other.txt")),
        ("teacher.pretrain.tokens", 5),
        ("data.max_length", 50),
        ("data.trim_vocabulary", 2),
    ):
        other = resolve(change(config, {setting: value}), tmp_path, tmp_path)
        assert other.tokenizer.key != artefacts.tokenizer.key, setting
    for setting, value in (("world", 1), ("data.train_rows", 7), ("evaluation.rows", 3)):
        changed = change(config, {"data.train_rows": 8, setting: value})
        assert resolve(changed, tmp_path, tmp_path).tokenizer.key == artefacts.tokenizer.key, setting


def test_a_student_with_another_vocabulary_is_refused(given, tmp_path):
    shutil.copytree(given / "teacher", tmp_path / "other")
    train_tokenizer(["other words"] * 3, 300).save_pretrained(tmp_path / "other")
    student = {"init": "pretrained", "layers": (), "path": str(tmp_path / "other")}
    config = _config(given, **{f"student.model.{name}": value for name, value in student.items()})
    artefacts = resolve(config, tmp_path, tmp_path)
    tokenizers.make_tokenizer(artefacts.tokenizer)
    with pytest.raises(InputError, match=r"config\.student\.model\.path: .*other ids"):
        checks.check_models(config, artefacts)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.source": "synthetic"}, r"config\.data\.trim_vocabulary: 1 is for rows from files"),
        ({"student.pretrain.text": "synthetic"}, r"config\.data\.trim_vocabulary: 1 is for texts from files"),
    ],
)
def test_synthetic_data_is_refused(given, changes, said):
    with pytest.raises(InputError, match=said):
        _config(given, **changes)
