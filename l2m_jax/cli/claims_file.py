"""Claims files: the arms of a sweep and the contrasts between them, in YAML.

    title: Does easy-first help?
    arms:
      l2m: {method: l2m}
      kld_beta09: {method: kld, overrides.beta: 0.9}
    contrasts:
      - id: staged_against_mixed
        statement: Stages are better than one loss throughout.
        left: l2m
        right: kld_beta09
        sign: positive

The fields of a contrast are those of `l2m_jax.sweep.claims.Contrast`.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from l2m_jax.cli import config_file
from l2m_jax.errors import InputError
from l2m_jax.sweep.claims import Claims, Contrast
from l2m_jax.sweep.presets import Row


def read(file: Path) -> Claims:
    """The claims of a file.

    Raises:
        InputError: no such file, or something in it that is unknown or missing; names the place.
    """
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), config_file.TextLoader)
        if not isinstance(values, Mapping) or set(values) != {"title", "arms", "contrasts"}:
            raise InputError("expected title, arms and contrasts, and nothing else")
        if not isinstance(values["arms"], Mapping) or not isinstance(values["contrasts"], list):
            raise InputError("arms: expected arms by name, and contrasts: a list")
        arms = {str(name): _arm(arm, f"arms.{name}") for name, arm in values["arms"].items()}
        contrasts = tuple(_contrast(given, i) for i, given in enumerate(values["contrasts"]))
        return Claims(str(values["title"]), arms, contrasts)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise InputError(f"--claims {file}: {line}not valid YAML ({error.problem})") from error
    except OSError as error:
        raise InputError(f"--claims {file}: {error.strerror}") from error
    except (InputError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--claims {file}: {str(error).splitlines()[0]}") from error


def grid(given: Iterable[str]) -> dict[str, list[Any]]:
    """The values of settings, from texts such as "training.learning_rate=1e-3,3e-3".

    Raises:
        InputError: not of this form, an unknown setting, or a value of the wrong type.
    """
    found = {}
    for text in given:
        name, equals, values = text.partition("=")
        if not equals or not values:
            raise InputError(f"--grid {text}: expected a setting and its values, as in NAME=1e-3,3e-3")
        found[name] = [
            config_file.typed(name, value.strip(), f"--grid {name}") for value in values.split(",")
        ]
    return found


def _arm(values: Any, place: str) -> Row:
    if not isinstance(values, Mapping) or not isinstance(values.get("method"), str):
        raise InputError(
            f"{place}: expected a method and settings, as in {{method: kld, overrides.beta: 0.9}}"
        )
    changes = {
        name: config_file.typed(name, value, place) for name, value in values.items() if name != "method"
    }
    return Row(values["method"], changes)


def _contrast(values: Any, number: int) -> Contrast:
    if not isinstance(values, Mapping) or not isinstance(values.get("id"), str):
        raise InputError(f"contrasts[{number}]: expected an id and the contrast's fields")
    place = f"contrasts.{values['id']}"
    known = {field.name: field for field in dataclasses.fields(Contrast)}
    if unknown := [name for name in values if name not in known]:
        raise InputError(f"{place}.{unknown[0]}: no such field (known: {', '.join(known)})")
    required = [name for name, field in known.items() if field.default is dataclasses.MISSING]
    if absent := [name for name in required if name not in values]:
        raise InputError(f"{place}.{absent[0]}: missing")
    try:
        return Contrast(**config_file.typed_fields(Contrast, values, place))
    except InputError as error:
        raise InputError(f"{place}.{error}" if not str(error).startswith(place) else str(error)) from error
