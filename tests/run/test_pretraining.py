"""Learning from plain text: what it changes, from a teacher, and after an interruption."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from l2m_jax import models
from l2m_jax.config import change, parse
from l2m_jax.errors import InputError
from l2m_jax.run import checks, data, tokenizers
from l2m_jax.run.context import start
from l2m_jax.run.models import load_frozen, make_model
from l2m_jax.run.pretraining import make_pretrained, text_examples
from l2m_jax.run.resolve import resolve
from l2m_jax.training.checkpoint import Checkpoints

TEXT = {"text": "synthetic", "tokens": 600, "sequence_length": 31, "batch_size": 4, "learning_rate": 1e-2}


def _config(tiny, **changes):
    settings = {
        f"{who}.pretrain.{name}": value for who in ("teacher", "student") for name, value in TEXT.items()
    }
    return change(
        parse(tiny),
        {**settings, "student.pretrain.from_teacher": True, "student.pretrain.epochs": 3, **changes},
    )


def _start(config, folder):
    context, artefacts = start(config, folder), resolve(config, folder, folder)
    tokenizers.make_tokenizer(artefacts.tokenizer)
    data.make_corpora(artefacts.corpora.values())
    return context, artefacts


def _make(config, context, artefacts):
    for role, artefact in artefacts.pretrained.items():
        make_pretrained(artefact, f"pretrained {role}", getattr(context, role), context)


def _weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    config = _config(tiny, checkpoint_minutes=10.0)
    context, artefacts = _start(config, folder)
    checks.check_models(config, artefacts)
    _make(config, context, artefacts)
    return folder, config, context, artefacts


def _divergence(teacher, student, examples, count=10) -> float:
    """Mean KL(p‖q) over the targets of the first `count` sequences, in float64."""
    tokens = np.stack([examples.example_tokens(i) for i in range(count)])
    logits = (models.logits(config, params, tokens)[:, :-1] for config, params in (teacher, student))
    p, q = (
        each - np.log(np.exp(each).sum(-1, keepdims=True))
        for each in (np.asarray(of_model, np.float64) for of_model in logits)
    )
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _one(placed):
    config, params = placed
    return config, jax.tree.map(lambda leaf: np.asarray(leaf)[0], params)


def test_a_student_comes_closer_to_its_teacher(made):
    _, config, context, artefacts = made
    inputs = artefacts.pretrained["student"].inputs
    assert inputs.teacher == artefacts.pretrained["teacher"]
    teacher, student = (
        _one(load_frozen(artefacts.pretrained[role], context.student, artefacts.tokenizer, context.placement))
        for role in ("teacher", "student")
    )
    initial = models.init(student[0], jax.random.key(config.seed + 1))
    examples = text_examples(inputs)
    assert _divergence(teacher, student, examples) < 0.5 * _divergence(
        teacher, (student[0], initial), examples
    )


def test_its_loss_is_kl(made, tmp_path):
    """One update on all sequences at once, from an initial student far from its teacher."""
    finished, config, _, _ = made
    for name in ("data", "pretrained_teacher"):
        shutil.copytree(finished / name, tmp_path / name)
    sequences = 10
    config = change(
        config,
        {
            "student.pretrain.tokens": 30 * sequences,
            "student.pretrain.batch_size": sequences,
            "student.pretrain.epochs": 1,
        },
    )
    context, artefacts = _start(config, tmp_path)
    _make(config, context, artefacts)
    [update] = [
        row
        for row in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
        if row["phase"] == "pretrained student"
    ]
    teacher, (student, _) = (
        _one(load_frozen(artefacts.pretrained[role], context.student, artefacts.tokenizer, context.placement))
        for role in ("teacher", "student")
    )
    initial = models.init(student, jax.random.key(config.seed + 1))
    examples = text_examples(artefacts.pretrained["student"].inputs)
    kl = _divergence(teacher, (student, initial), examples, sequences)
    assert update["loss"] == pytest.approx(kl, rel=1e-3)


def test_the_next_phase_continues_it(made):
    folder, config, context, artefacts = made
    unchanged = change(config, {"student.warmup.epochs": 0})
    artefacts = resolve(unchanged, folder / "copy", folder)
    student = dataclasses.replace(artefacts.initial_student, path=folder / "copy" / "initial_student")
    make_model(student, "initial student", context.student, context)
    assert _weights(student.path) == _weights(artefacts.pretrained["student"].path)


def test_an_interrupted_pretraining_ends_as_one_that_was_not(made, tmp_path, monkeypatch):
    finished, config, _, _ = made
    for name in ("data", "pretrained_teacher"):
        shutil.copytree(finished / name, tmp_path / name)
    config = change(config, {"checkpoint_minutes": 0.0})
    context, artefacts = _start(config, tmp_path)
    save = Checkpoints.save

    def save_and_end(self, state, position):
        save(self, state, position)
        if position.step == 7:
            self.close()
            raise KeyboardInterrupt

    student = artefacts.pretrained["student"]
    monkeypatch.setattr(Checkpoints, "save", save_and_end)
    with pytest.raises(KeyboardInterrupt):
        make_pretrained(student, "pretrained student", context.student, context)
    monkeypatch.undo()
    assert not student.path.exists()
    _make(config, context, artefacts)
    assert _weights(student.path) == _weights(finished / "pretrained_student")
    assert not student.progress.exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher.pretrain.text": ""}, "student.pretrain.from_teacher: the student is pretrained before"),
        ({"teacher.pretrain.from_teacher": True}, "config.teacher.pretrain.from_teacher: for students only"),
        ({"student.pretrain.tokens": 0}, "config.student.pretrain.tokens: 0 is for files"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tiny, changes, said):
    with pytest.raises(InputError, match=said):
        _config(tiny, **changes)


def test_texts_and_sequences_are_checked_first(tiny, made, tmp_path):
    with pytest.raises(InputError, match=r"config\.teacher\.pretrain\.text: no such file 'nowhere\.txt'"):
        checks.check_files(_config(tiny, **{"teacher.pretrain.text": "nowhere.txt"}))
    folder, config, _, _ = made
    (tmp_path / "data").symlink_to(folder / "data")
    longer = change(config, {"student.pretrain.sequence_length": 193})
    with pytest.raises(InputError, match=r"config\.student\.pretrain\.sequence_length: 193 exceeds the 192"):
        checks.check_models(longer, resolve(longer, tmp_path, tmp_path))
