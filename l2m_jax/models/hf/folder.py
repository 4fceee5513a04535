"""Models from and to Hugging Face folders."""

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from l2m_jax import files
from l2m_jax.errors import InputError
from l2m_jax.models.architecture import DecoderConfig
from l2m_jax.models.hf import config_json, gpt2, llama, opt, safetensors_folder, weights
from l2m_jax.models.hf.gguf import GgufFile
from l2m_jax.models.hf.safetensors_folder import SafetensorsFolder
from l2m_jax.models.hf.weights import ShardingOf
from l2m_jax.reporting.card import ModelCard
from l2m_jax.types import Params

_FAMILIES = {"gpt2": gpt2, "opt": opt, "llama": llama}
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
# As transformers does: no reader has to hold more than this at once.
_SHARD_BYTES = 5_000_000_000


def load(
    folder_or_name: str | os.PathLike,
    *,
    dtype: str = "float32",
    param_dtype: str = "float32",
    sharding: ShardingOf | None = None,
) -> tuple[DecoderConfig, Params]:
    """A model from a folder (config.json and safetensors), a hub name, or a GGUF file of a Llama-family model.

    Host memory stays near the size of the parameters in `param_dtype`: tensors are read one at a time, and with
    `sharding` only the pieces that this process's devices hold.

    Args:
        folder_or_name: such as "gpt2-xl", "facebook/opt-2.7b", a local folder, or a .gguf file.
        dtype: of the computation.
        param_dtype: of the parameters.
        sharding: (path such as "blocks/mlp/up/kernel", shape) -> where that parameter goes. Default: the first
            device.

    Returns:
        (config, params). Entries of the vocabulary past the folder's tokenizer count as no token.

    Raises:
        InputError: no such model, an unsupported architecture or option, weights that are missing, cut off, left
            over or of another shape, or a tokenizer with more tokens than the embedding has rows.
    """
    path = Path(folder_or_name)
    if path.suffix == ".gguf" and path.is_file():
        file = GgufFile(path)
        config = dataclasses.replace(file.config(), dtype=dtype, param_dtype=param_dtype)
        return config, weights.fill(config, llama.weights(config), file, sharding=sharding)
    folder = _folder(folder_or_name, [*_SMALL_FILES, "*.safetensors"])
    config = dataclasses.replace(_read_config(folder), dtype=dtype, param_dtype=param_dtype)
    family = _FAMILIES[config.family]
    source = SafetensorsFolder(folder, family.PREFIX, family.IGNORED)
    if config.tie_embeddings:
        source.drop("lm_head.weight")  # some files hold the tied embedding twice
    return config, weights.fill(config, family.weights(config), source, sharding=sharding)


def read_config(folder_or_name: str | os.PathLike) -> DecoderConfig:
    """The architecture alone, without reading weights. Errors as in `load`."""
    path = Path(folder_or_name)
    if path.suffix == ".gguf" and path.is_file():
        return GgufFile(path).config()
    return _read_config(_folder(folder_or_name, _SMALL_FILES))


def save(
    folder: str | os.PathLike,
    config: DecoderConfig,
    params: Params,
    *,
    tokenizer: Any = None,
    card: ModelCard | None = None,
    dtype: str = "float32",
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Writes a folder that `transformers`, and what serves its models, loads.

    config.json, model.safetensors (shards with an index above `shard_bytes`), generation_config.json, the
    tokenizer's files and README.md. Every file is written under another name first, config.json last.

    Args:
        tokenizer: of `transformers`; its special tokens take the place of the config's.
        card: becomes README.md.
        dtype: of the stored weights.

    Raises:
        InputError: `params` do not belong to `config`, or the tokenizer has more tokens than the vocabulary.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        config = _with_special_tokens(config, tokenizer)
    family = _FAMILIES[config.family]
    stored = weights.tensors(config, family.weights(config), params)
    safetensors_folder.write(folder, stored, dtype, shard_bytes)
    if tokenizer is not None:
        _save_tokenizer(folder, tokenizer)
    special = {
        key: getattr(config, key) for key in config_json.SPECIAL_TOKENS if getattr(config, key) is not None
    }
    files.write_json(folder / "generation_config.json", special)
    if card is not None:
        files.write_text(folder / "README.md", card.render())
    described = {"architectures": [family.ARCHITECTURE], "model_type": config.family, "dtype": dtype}
    files.write_json(folder / "config.json", described | family.write_config(config))


def _with_special_tokens(config: DecoderConfig, tokenizer: Any) -> DecoderConfig:
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens but the model only {config.vocab_size} rows of embedding; "
            "save the model with the tokenizer it was trained with"
        )
    ids = {key: getattr(tokenizer, key) for key in config_json.SPECIAL_TOKENS}
    return dataclasses.replace(config, **{key: value for key, value in ids.items() if value is not None})


def _save_tokenizer(folder: Path, tokenizer: Any) -> None:
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tokenizer.") as temporary:
        tokenizer.save_pretrained(temporary)
        for file in Path(temporary).iterdir():
            os.replace(file, folder / file.name)


def _folder(folder_or_name: str | os.PathLike, patterns: list[str]) -> Path:
    path = Path(folder_or_name)
    if path.is_dir():
        return path
    name = str(folder_or_name)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.suffix:
        raise InputError(f"no such model folder {name!r} (it should hold config.json and model.safetensors)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises errors of several libraries
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{name!r} is no folder here and could not be fetched from the hub ({reason}); pass the path of a folder "
            "with config.json and model.safetensors, or fetch it first where there is a network"
        ) from error


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not JSON ({error}); fetch it again") from error


def _read_config(folder: Path) -> DecoderConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(f"{folder} has no config.json; pass a folder in Hugging Face's form")
    hf = _read_json(file)
    family = _FAMILIES.get(hf.get("model_type"))
    if family is None:
        raise InputError(
            f"{file}: model_type {hf.get('model_type')!r} is not supported; choose one of {', '.join(_FAMILIES)}"
        )
    if hf.get("quantization_config"):
        raise InputError(
            f"{file}: quantised weights are not supported; choose the checkpoint in full precision"
        )
    try:
        config = family.read_config(hf)
        tokens = _count_tokens(folder)
        return config if tokens is None else dataclasses.replace(config, valid_vocab_size=tokens)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error


def _count_tokens(folder: Path) -> int | None:
    """One more than the largest token id of the folder's tokenizer; None where there is none that can be counted."""
    ids: list[int] = []
    if (file := folder / "tokenizer.json").is_file():
        tokenizer = _read_json(file)
        vocab = tokenizer["model"]["vocab"]
        ids += range(len(vocab)) if isinstance(vocab, list) else vocab.values()
        ids += [token["id"] for token in tokenizer.get("added_tokens", [])]
    elif (file := folder / "vocab.json").is_file():
        ids += _read_json(file).values()
        if (added := folder / "added_tokens.json").is_file():
            ids += _read_json(added).values()
    return max(ids) + 1 if ids else None
