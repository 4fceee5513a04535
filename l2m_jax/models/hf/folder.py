"""Models from and to Hugging Face folders."""

import dataclasses
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from l2m_jax import files
from l2m_jax.errors import InputError, reason, require_type, shown
from l2m_jax.models.architecture import DecoderConfig
from l2m_jax.models.hf import config_json, safetensors_folder, weights
from l2m_jax.models.hf.families import FAMILIES
from l2m_jax.models.hf.gguf import GgufFile
from l2m_jax.models.hf.safetensors_folder import SafetensorsFolder
from l2m_jax.models.hf.vocabulary import RestrictedSource, restricted_config
from l2m_jax.models.hf.weights import Put, Source, Weight
from l2m_jax.types import Params

_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
# As in transformers: no reader has to hold more than this at once.
SHARD_BYTES = 5_000_000_000


class _Stored(NamedTuple):
    config: DecoderConfig
    table: list[Weight]
    source: Source


def load(
    folder_or_name: str | os.PathLike,
    *,
    dtype: str = "float32",
    param_dtype: str = "float32",
    put: Put | None = None,
    layers: Sequence[int] = (),
    tokens: np.ndarray | None = None,
    frozen: bool = False,
    quantise: Callable[[Params], Params] | None = None,
) -> tuple[DecoderConfig, Params]:
    """A model from a folder (config.json and safetensors), a hub name, or a GGUF file (Llama, Qwen2, Qwen3).

    Parameters are read and placed one at a time, so host memory stays near their size, or near the size of the pieces
    that `put` reads. No device holds anything but its placed parameters.

    Args:
        folder_or_name: such as "gpt2-xl", "facebook/opt-2.7b", a local folder, or a .gguf file.
        dtype: of the computation.
        param_dtype: of the parameters.
        put: places a parameter, as `Placement.put` does; under "pmap" parameters then have a leading device axis.
            None: on the first local device.
        layers: keeps only these layers, in this order, and reads no others: a shallower student made of its teacher's
            layers, as in DistilBERT (Sanh et al., 2019). Empty: all layers.
        tokens: keeps only these entries of the vocabulary, ascending, and numbers them from 0. None: all.
        frozen: for a model that is not trained: parameters in `dtype`, norms in float32. `param_dtype` is ignored.
        quantise: `quantised.quantise`, mapped as `put` places; kernels are then int8. At most one of them is in memory in
            `dtype` at a time.

    Returns:
        (config, params). Entries of the vocabulary beyond the folder's tokenizer do not count as tokens.

    Raises:
        InputError: no such model; an unsupported architecture or option; weights that are missing, cut off, left over
            or of another shape; a tokenizer with more tokens than the embedding has rows; a layer that the model
            does not have.
    """
    config, table, source = _open(folder_or_name)
    if tokens is not None:
        weights.check(table, weights.parameter_shapes(config), source)
        config, source = restricted_config(config, tokens), RestrictedSource(source, table, tokens)
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype if frozen else param_dtype)
    if absent := [layer for layer in layers if not 0 <= layer < config.num_layers]:
        raise InputError(
            f"layers: {absent[0]} must be between 0 and {config.num_layers - 1}, the layers of '{folder_or_name}'"
        )
    params = weights.fill(config, table, source, put=put, layers=layers, frozen=frozen, quantise=quantise)
    return config.keep_layers(layers) if layers else config, params


def load_head(folder_or_name: str | os.PathLike, *, dtype: str, put: Put | None = None) -> jax.Array:
    """head_VxE of a model in `dtype`, without reading its other weights. Arguments and errors as in `load`."""
    stored = _open(folder_or_name)
    path = "embeddings/tokens/embedding" if stored.config.tie_embeddings else "head/embedding"
    return _parameters(stored, path, dtype, put)[path]


def load_output(folder_or_name: str | os.PathLike) -> Params:
    """The float32 final norm and projection of a model, `params["output"]`, without reading its other weights.

    Arguments and errors as in `load`.
    """
    found = _parameters(_open(folder_or_name), "output/", "float32")
    return unflatten_dict({path.removeprefix("output/"): leaf for path, leaf in found.items()}, sep="/")


def _parameters(stored: _Stored, prefix: str, dtype: str, put: Put | None = None) -> dict[str, jax.Array]:
    """The parameters whose paths start with `prefix`, by these."""
    config, table, source = stored
    shapes = weights.parameter_shapes(config)
    weights.check(table, shapes, source)
    return {
        weight.path: weights.load_parameter(weight, shapes[weight.path], source, dtype, put=put)
        for weight in table
        if weight.path.startswith(prefix)
    }


def check(folder_or_name: str | os.PathLike) -> None:
    """Checks the names, dtypes and shapes of all weights without reading them. Errors as in `load`."""
    config, table, source = _open(folder_or_name)
    weights.check(table, weights.parameter_shapes(config), source)


def read_config(folder_or_name: str | os.PathLike, *, tokens: np.ndarray | None = None) -> DecoderConfig:
    """Only the architecture, without reading weights. `tokens` and errors as in `load`."""
    path = Path(folder_or_name)
    gguf = _is_gguf(path)
    config = GgufFile(path).config() if gguf else _read_config(_folder(folder_or_name, _SMALL_FILES))
    return config if tokens is None else restricted_config(config, tokens)


def _is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and path.is_file()


def _open(folder_or_name: str | os.PathLike) -> _Stored:
    path = Path(folder_or_name)
    if _is_gguf(path):
        file = GgufFile(path)
        config = file.config()
        return _Stored(config, FAMILIES[config.family].weights(config), file)
    folder = _folder(folder_or_name, [*_SMALL_FILES, "*.safetensors"])
    config = _read_config(folder)
    family = FAMILIES[config.family]
    source = SafetensorsFolder(folder, family.PREFIX, family.IGNORED)
    if config.tie_embeddings:
        source.drop("lm_head.weight")  # some files store the tied embedding twice
    return _Stored(config, family.weights(config), source)


def save(
    folder: str | os.PathLike,
    config: DecoderConfig,
    params: Params,
    *,
    tokenizer: Any = None,
    end_of_turn: int | None = None,
    readme: str | None = None,
    generation: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a folder that `transformers`, and servers that read its format, can load.

    It contains config.json, model.safetensors (shards with an index above `shard_bytes`), generation_config.json,
    the tokenizer's files and README.md. Each file is written under a temporary name first, config.json last.

    Args:
        params: host or device arrays. Fetched from devices one tensor at a time, at most `shard_bytes` in total.
        tokenizer: of `transformers`; its special tokens replace those of the config.
        end_of_turn: the token of a chat that ends an answer, besides the tokenizer's end of sequence.
        readme: the text of README.md.
        generation: sampling rules for generation_config.json, beside the special tokens. Without a padding token, the
            end of sequence pads.
        dtype: of the stored weights.
        shard_bytes: the most bytes per file.

    Raises:
        InputError: `params` do not match `config`, or the tokenizer has more tokens than the vocabulary.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        config = _with_special_tokens(config, tokenizer)
    if end_of_turn is not None and end_of_turn not in config.eos_token_ids:
        config = dataclasses.replace(config, eos_token_id=(end_of_turn, *config.eos_token_ids))
    family = FAMILIES[config.family]
    stored = weights.tensors(config, family.weights(config), params)
    safetensors_folder.write(folder, stored, dtype, shard_bytes)
    if tokenizer is not None:
        _save_tokenizer(folder, tokenizer)
    special = {
        key: getattr(config, key) for key in config_json.SPECIAL_TOKENS if getattr(config, key) is not None
    }
    if config.eos_token_ids:
        special.setdefault("pad_token_id", config.eos_token_ids[-1])
    files.write_json(folder / "generation_config.json", {**special, **(generation or {})})
    if readme is not None:
        files.write_text(folder / "README.md", readme)
    described = {"architectures": [family.ARCHITECTURE], "model_type": config.family, "dtype": dtype}
    files.write_json(folder / "config.json", described | family.write_config(config))


def _with_special_tokens(config: DecoderConfig, tokenizer: Any) -> DecoderConfig:
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model's embedding only {config.vocab_size} rows; "
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
    except Exception as error:  # the hub client raises errors of several libraries
        raise InputError(
            f"{name!r} is not a local folder and could not be downloaded from the hub ({reason(error)}); pass the path of a "
            "folder with config.json and model.safetensors, or download it first on a machine with a network"
        ) from error


def _read_config(folder: Path) -> DecoderConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(f"{folder} has no config.json; pass a folder in Hugging Face's format")
    hf = files.read_json(file)
    require_type(str(file), hf, dict)
    model_type = hf.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise InputError(
            f"{file}: model_type {shown(model_type)} is not supported; choose one of {', '.join(FAMILIES)}"
        )
    if hf.get("quantization_config"):
        raise InputError(
            f"{file}: quantised weights are not supported; choose a checkpoint in full precision"
        )
    try:
        config = family.read_config(hf)
        tokens = _count_tokens(folder)
        return config if tokens is None else dataclasses.replace(config, valid_vocab_size=tokens)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error


def _count_tokens(folder: Path) -> int | None:
    """One more than the largest token id of the folder's tokenizer; None if it has no tokenizer that can be counted."""
    ids: list[int] = []
    file = folder / "tokenizer.json"
    try:
        if file.is_file():
            tokenizer = files.read_json(file)
            vocab = tokenizer["model"]["vocab"]
            ids += range(len(vocab)) if isinstance(vocab, list) else vocab.values()
            ids += [token["id"] for token in tokenizer.get("added_tokens", [])]
        elif (file := folder / "vocab.json").is_file():
            ids += files.read_json(file).values()
            if (file := folder / "added_tokens.json").is_file():
                ids += files.read_json(file).values()
        for id in ids:
            require_type("the id of a token", id, int)
    except (KeyError, TypeError, AttributeError, InputError) as error:
        if str(file) in str(error):
            raise
        raise InputError(f"{file.name}: not a tokenizer ({reason(error)}); fetch it again") from error
    return max(ids) + 1 if ids else None
