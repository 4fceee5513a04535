"""What an upload would send, and what it asks of the hub."""

import jax
import pytest

from l2m_jax import models
from l2m_jax.cli.main import main
from l2m_jax.data.tokenizer import train_tokenizer
from l2m_jax.reporting import upload
from l2m_jax.reporting.card import ModelCard


@pytest.fixture
def student(tmp_path):
    """A student as a run leaves it, and what must stay here."""
    tokenizer = train_tokenizer(["say it"] * 3, 300)
    config = models.random_config(models.Architecture(num_layers=1, hidden_size=16, num_heads=2), tokenizer)
    card = ModelCard("l2m student", "gpt2", "openai-community/gpt2-xl", "l2m", rouge_l={"dolly": 25.2})
    folder = tmp_path / "run" / "student"
    params = models.init(config, jax.random.key(0))
    models.save(folder, config, params, tokenizer=tokenizer, readme=card.render())
    (folder / "inputs.json").write_text("{}")
    (folder / "optimizer.bin").write_text("moments")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "state.json").write_text("{}")
    return folder


SENT = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}  # fmt: skip


def test_a_dry_run_shows_files_and_metadata_and_needs_no_hub(student, monkeypatch, capsys):
    monkeypatch.setattr(upload, "HfApi", None)
    main(["push", f"--model={student}", "--repo=me/tiny", "--dry-run"])
    said = capsys.readouterr().out
    listed, metadata = said.split("bytes in total")
    assert {line.split()[1] for line in listed.splitlines()[1:-1]} == SENT
    size = (student / "model.safetensors").stat().st_size
    assert f"{size:,}  model.safetensors" in listed
    for part in (
        "base_model:\n- gpt2\n- openai-community/gpt2-xl",
        "library_name: transformers",
        "value: 25.2",
    ):
        assert part in metadata
    assert metadata.endswith("nothing was sent (--dry-run)\n")


class _Hub:
    """As much of `HfApi` as an upload uses."""

    def __init__(self, is_private=True, error=None):
        self.is_private, self.error, self.uploaded = is_private, error, None

    def create_repo(self, repo, *, private, exist_ok):
        self.asked = private
        if self.error:
            raise self.error
        return f"the hub's {repo}"

    def model_info(self, repo):
        return self

    @property
    def private(self):
        return self.is_private

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        self.uploaded = set(allow_patterns)


@pytest.mark.parametrize("flags", [[], ["--private"]])
def test_only_the_model_and_its_card_are_sent(student, monkeypatch, capsys, flags):
    hub = _Hub()
    monkeypatch.setattr(upload, "HfApi", lambda: hub)
    main(["push", f"--model={student}", "--repo=me/tiny", *flags])
    assert hub.uploaded == SENT and hub.asked is (True if flags else None)
    assert "uploaded: the hub's me/tiny" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("hub", "said"),
    [
        (
            _Hub(error=OSError("401 Unauthorized\nmore")),
            "did not take the upload (401 Unauthorized); check the name",
        ),
        (_Hub(is_private=False), "--private: me/tiny exists and is public; choose another name"),
    ],
)
def test_a_hub_that_refuses(student, monkeypatch, capsys, hub, said):
    monkeypatch.setattr(upload, "HfApi", lambda: hub)
    with pytest.raises(SystemExit) as ended:
        main(["push", f"--model={student}", "--repo=me/tiny", "--private"])
    assert ended.value.code == 2 and hub.uploaded is None and said in capsys.readouterr().err


def _without_card(folder):
    (folder / "README.md").unlink()


def _wrong_card(folder):
    (folder / "README.md").write_text("---\nmodel-index: 3\n---\n")


def _without_weights(folder):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("change", "repo", "model", "said"),
    [
        (None, "a b", "student", "--repo a b: "),
        (None, "me/tiny", "", "a run's workdir, not a model; give "),
        (None, "me/tiny", "nothing", "no such folder; give one that a run has saved"),
        (_without_card, "me/tiny", "student", "README.md: no such file; write a model card"),
        (_wrong_card, "me/tiny", "student", "README.md: its metadata cannot be read ("),
        (_without_weights, "me/tiny", "student", "has only PyTorch weights"),
    ],
)
def test_what_is_refused(student, capsys, change, repo, model, said):
    if change:
        change(student)
    with pytest.raises(SystemExit) as ended:
        main(["push", f"--model={student.parent / model}", f"--repo={repo}", "--dry-run"])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and said in err and err.count("\n") == 1
