"""Reading the keys of a Hugging Face config.json, and writing them back."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from l2m_jax.errors import InputError, field_types, require_type, shown
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
        InputError: a key of `required` has another value, or a key of `table` a value of another type.
    """
    for key, value in required.items():
        if hf.get(key, value) != value:
            raise InputError(
                f"config.json: {key} = {shown(hf[key])} is not supported for {hf['model_type']} models "
                f"(only {value!r}); choose another checkpoint"
            )
    hints, fields = field_types(DecoderConfig), {}
    for name, key in table.items():
        value = hf.get(name, key.default)
        if isinstance(value, list):  # Llama 3 has several ends of sequence
            value = tuple(value)
        if value is not None or key.default is not None:
            require_type(f"config.json: {name}", value, hints[key.field])
        fields[key.field] = value
    return fields


def write(config: DecoderConfig, table: Mapping[str, Key]) -> Json:
    """The keys of `table` from `config`."""
    return {name: getattr(config, key.field) for name, key in table.items()}


def head_dim(width: int, heads: int) -> int:
    """Width of a head.

    Raises:
        InputError: the heads do not divide the width.
    """
    if width < 1 or heads < 1:
        raise InputError(
            f"config.json: {heads} attention heads of a width of {width}; both must be 1 or more"
        )
    if width % heads:
        raise InputError(f"config.json: the width {width} is not a multiple of the {heads} attention heads")
    return width // heads
