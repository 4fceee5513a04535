"""What a run is given: files, folders and hub names, by their content."""

from pathlib import Path

from l2m_jax import files
from l2m_jax.data.mixtures import is_mixture, parse_mixture
from l2m_jax.multihost import first
from l2m_jax.run.artefacts import Source


def given(path: str, patterns: tuple[str, ...] | None = None) -> Source:
    """A file, a folder (of files that match `patterns`), a hub name or a mixture of them, by its content."""

    def content() -> str:
        if is_mixture(path):
            shares = parse_mixture(path)
            return files.fingerprint([(share.weight, content_of(share.source)) for share in shares])
        return content_of(path)

    def content_of(path: str) -> str:
        there = Path(path)
        return files.content_hash(there, patterns=patterns) if there.exists() else f"hub:{path}"

    return Source(path, first(content))


def given_model(path: str) -> Source:
    """A model's folder, GGUF file or hub name, by its config and weights."""
    return given(path, ("config.json", "*.safetensors", "*.safetensors.index.json"))
