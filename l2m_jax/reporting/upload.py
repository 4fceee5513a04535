"""Upload of a saved model and its card to the Hugging Face hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from l2m_jax import models
from l2m_jax.errors import InputError, reason

# What a model consists of. Checkpoints, logs and the record of a run's inputs are not among it.
_PATTERNS = ("README.md", "*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
_NOT_UPLOADED = ("inputs.json",)


@dataclass(frozen=True)
class Upload:
    """
    Attributes:
        repo: such as "me/student".
        files: bytes of each file, by name.
        card: the metadata of README.md.
    """

    folder: Path
    repo: str
    files: dict[str, int]
    card: ModelCardData


def prepare(folder: Path, repo: str) -> Upload:
    """What an upload would send. Needs no network.

    Raises:
        InputError: a wrong name, a folder that is no complete model, or a card that is missing or cannot be read.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"--repo {repo}: {reason(error)}; give a name such as me/student") from error
    if (folder / "student" / "config.json").is_file():
        raise InputError(f"--model {folder}: a run's workdir, not a model; give {folder / 'student'}")
    if not folder.is_dir():
        raise InputError(
            f"--model {folder}: no such folder; give one that a run has saved, such as runs/mine/student"
        )
    models.check(folder)
    readme = folder / "README.md"
    if not readme.is_file():
        raise InputError(f"{readme}: no such file; write a model card, or give a student, which has one")
    try:
        # Metadata that the hub would not understand raises here.
        card: Any = ModelCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=False).data
    except Exception as error:  # of YAML, of Unicode and of the hub's client
        raise InputError(
            f"{readme}: its metadata cannot be read ({reason(error)}); correct the YAML header"
        ) from error
    found = {file.name: file for pattern in _PATTERNS for file in folder.glob(pattern) if file.is_file()}
    sizes = {name: found[name].stat().st_size for name in sorted(found) if name not in _NOT_UPLOADED}
    return Upload(folder, repo, sizes, card)


def push(upload: Upload, *, private: bool) -> str:
    """Creates the repository if needed, and uploads in one commit. The token is that of `hf auth login` or HF_TOKEN.

    Args:
        private: create it as a private one.

    Returns:
        The address of the model.

    Raises:
        InputError: the hub refuses or does not answer, or `private` is asked for and the repository is public.
    """
    api = HfApi()
    try:
        address = api.create_repo(upload.repo, private=private or None, exist_ok=True)
        if private and not api.model_info(upload.repo).private:
            raise InputError(
                f"--private: {upload.repo} exists and is public; choose another name, or leave --private out"
            )
        api.upload_folder(
            repo_id=upload.repo,
            folder_path=upload.folder,
            allow_patterns=list(upload.files),
            commit_message="Upload the model and its card",
        )
    except InputError:
        raise
    except Exception as error:  # the hub client raises errors of several libraries
        raise InputError(
            f"--repo {upload.repo}: the hub did not take the upload ({reason(error)}); check the name, the network, and "
            "that `hf auth login` or HF_TOKEN gives a token with the right to write"
        ) from error
    return str(address)
