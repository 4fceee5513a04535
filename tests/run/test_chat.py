"""A whole run on conversations: which tokens are learnt, where answers end, and that its student can be scored."""

import json

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from l2m_jax import models
from l2m_jax.cli.main import main
from l2m_jax.config import parse
from l2m_jax.data.corpus import Corpus
from l2m_jax.run import pipeline, tokenizers
from l2m_jax.run.models import read_config
from l2m_jax.run.resolve import resolve
from l2m_jax.training.store import TeacherStore
from l2m_jax.training.store_format import HiddenStates

COUNT = 24


def _rows(first: int, count: int) -> list[dict]:
    """Conversations of one, two and three turns each in turn."""
    rows = []
    for i in range(first, first + count):
        messages = [{"role": "system", "content": "be brief"}] if i % 2 else []
        for turn in range(1 + i % 3):
            messages.append({"role": "user", "content": f"name {i} {turn}"})
            messages.append({"role": "assistant", "content": f"an apple {turn} and a pear"})
        rows.append({"messages": messages})
    return rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny, chat_tokenizer):
    """The folder of the run, and its config."""
    folder = tmp_path_factory.mktemp("chat")
    chat_tokenizer("chatml").save_pretrained(folder / "tokenizer")
    for part, first, count in (("train", 0, COUNT), ("validation", 100, 3), ("test", 200, 3)):
        lines = (json.dumps(row) + "\n" for row in _rows(first, count))
        (folder / f"{part}.jsonl").write_text("".join(lines))
    config = tiny.copy_and_resolve_references()
    config.data.update(
        source="files",
        prompt="chat",
        tokenizer=str(folder / "tokenizer"),
        **{part: str(folder / f"{part}.jsonl") for part in ("train", "validation", "test")},
    )
    config.curriculum.update(stages=2, epochs_per_stage=1)
    config.evaluation.update(validations=1, seeds=(10,))
    parsed = parse(config)
    pipeline.run(parsed, folder / "run", None)
    return folder, parsed


@pytest.fixture(scope="module")
def masks(chat_tokenizer) -> list[np.ndarray]:
    """The assistant's tokens of each training row, by transformers."""
    tokenizer = chat_tokenizer("chatml_marked")
    found = [
        tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        for row in _rows(0, COUNT)
    ]
    # Without what follows the end of the last turn.
    return [np.array(one["assistant_masks"])[:-1] for one in found]


def test_the_ranking_measures_all_of_the_assistants_tokens(finished, masks):
    """Dense logits of each conversation by itself, in float64."""
    folder, _ = finished
    corpus = Corpus.open(folder / "run" / "data" / "train")
    config, params = models.load(str(folder / "run" / "initial_student"))
    found = pq.read_table(folder / "run" / "difficulty.parquet")["cross_entropy"].to_numpy()
    tokens_BxL = np.zeros((COUNT, corpus.lengths.max()), np.int32)
    for i, n in enumerate(corpus.lengths):
        tokens_BxL[i, :n] = corpus.example_tokens(i)
    logits = np.asarray(jax.jit(models.logits, static_argnums=0)(config, params, tokens_BxL), np.float64)
    logits = logits[..., : config.valid_vocab_size]
    log_q = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for i, mask in enumerate(masks):
        at = np.flatnonzero(mask)
        assert found[i] == pytest.approx(-log_q[i, at - 1, corpus.example_tokens(i)[at]].mean(), rel=1e-4)


def test_the_store_has_a_state_for_each_of_these_tokens(finished, masks):
    folder, config = finished
    artefact = resolve(config, folder / "run", folder / "run").store
    assert artefact is not None
    teacher, params = models.load(str(folder / "run" / "teacher"))
    corpus = Corpus.open(folder / "run" / "data" / "train")
    form = HiddenStates(teacher.embed_size, "bfloat16")
    store = TeacherStore(artefact.path, corpus, key=artefact.key, form=form)
    assert store.is_complete and store.offsets[-1] == sum(map(np.sum, masks))
    tokens = corpus.example_tokens(2)[None]
    hidden = models.hidden_states(teacher, params, tokens)[0]
    expected = np.asarray(hidden)[np.flatnonzero(masks[2]) - 1]
    found = store.read(2)["teacher_hidden_TxE"].astype(np.float32)
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.02)


def test_answers_end_with_the_assistants_turn(finished):
    folder, config = finished
    tokenizer = tokenizers.load(resolve(config, folder / "run", folder / "run").tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end != tokenizer.eos_token_id
    for model in ("teacher", "student"):
        described = json.loads((folder / "run" / model / "config.json").read_text())
        assert described["eos_token_id"] == [end, tokenizer.eos_token_id]
        generation = json.loads((folder / "run" / model / "generation_config.json").read_text())
        assert generation["eos_token_id"] == [end, tokenizer.eos_token_id]
        assert generation["pad_token_id"] is not None
        # Only the student says how it was sampled.
        assert (generation.get("do_sample"), generation.get("top_k")) == (
            (True, 50) if model == "student" else (None, None)
        )
    artefacts = resolve(config, folder / "run", folder / "run")
    assert tokenizers.end_of_response(artefacts.tokenizer) == end
    student = read_config(artefacts.initial_student, config.student.compute, artefacts.tokenizer)
    assert student.eos_token_ids == (end, tokenizer.eos_token_id)


def test_the_student_is_scored_by_command(finished, monkeypatch, capsys):
    folder, _ = finished
    monkeypatch.setattr("l2m_jax.multihost.start", lambda devices: None)
    rows, output = folder / "test.jsonl", folder / "scores"
    flags = ["--prompt=chat", "--seeds=1", "--max-new-tokens=4", "--devices=1", f"--sets=mine={rows}"]
    main(["eval", f"--model={folder / 'run' / 'student'}", f"--output={output}", *flags])
    lines = [json.loads(line) for line in (output / "responses.jsonl").read_text().splitlines()]
    assert [line["references"] for line in lines] == [
        ["an apple 2 and a pear"],
        ["an apple 0 and a pear"],
        ["an apple 1 and a pear"],
    ]
    assert lines[1]["prompt"] == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nname 201 0<|im_end|>\n<|im_start|>assistant\n"
    )
    capsys.readouterr()
    with pytest.raises(SystemExit):  # the same folder with another prompt
        main(["eval", f"--model={folder / 'run' / 'student'}", f"--output={output}", *flags[1:]])
    assert "other content of --tokenizer or --prompt" in capsys.readouterr().err


def test_rows_are_shown_as_they_are_trained_on(finished, capsys):
    folder, config = finished
    written = folder / "config.yaml"
    names = ("train", "validation", "test", "tokenizer", "prompt", "source")
    lines = (f"  {name}: {getattr(config.data, name)}\n" for name in names)
    written.write_text("data:\n" + "".join(lines))
    main(["data", f"--config={written}", "--show=2", "--config.data.max_prompt_length=60"])
    shown = capsys.readouterr().out
    assert "train: " in shown and " long prompt)" in shown and "responses end with '<|im_end|>'" in shown
    assert "⟦an apple 0 and a pear<|im_end|>⟧\n<|im_start|>user\nname 1 1<|im_end|>\n" in shown
    assert shown.count("⟦") == shown.count("⟧") == 1 + 2
