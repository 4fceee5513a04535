"""Reading the keys of a Hugging Face config.json, and writing them back."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from l2m_jax.errors import InputError
from l2m_jax.models.architecture import DecoderConfig

Json = dict[str, Any]


class Key(NamedTuple):
    """One key of config.json: the field of `DecoderConfig` it sets, and its value if the file omits it."""

    field: str
    default: Any


SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read(hf: Json, table: Mapping[str, Key], required: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `DecoderConfig` from config.json.

    Args:
        table: key -> field and default.
        required: key -> the only supported value.

    Raises:
        InputError: a key of `required` has another value.
    """
    for key, value in required.items():
        if hf.get(key, value) != value:
            raise InputError(
                f"config.json: {key} = {hf[key]!r} is not supported for {hf['model_type']} models "
                f"(only {value!r}); choose another checkpoint"
            )
    fields = {key.field: hf.get(name, key.default) for name, key in table.items()}
    eos = fields.get("eos_token_id")
    if isinstance(eos, list):  # Llama 3 has several
        fields["eos_token_id"] = tuple(eos)
    return fields


def write(config: DecoderConfig, table: Mapping[str, Key]) -> Json:
    """The keys of `table` from `config`."""
    return {name: getattr(config, key.field) for name, key in table.items()}


def head_dim(width: int, heads: int) -> int:
    """Width of a head.

    Raises:
        InputError: the heads do not divide the width.
    """
    if width % heads:
        raise InputError(f"config.json: the width {width} is not a multiple of the {heads} attention heads")
    return width // heads
