"""The settings of a run, from a config file and the command line.

`--config FILE[:VARIANT]` names a Python file with a function `get_config(variant="")` that returns a ConfigDict, or a
YAML file with the same settings by the same names. A YAML file starts from `config.defaults(preset)`:

    preset: minillm        # optional: "paper" (the default), "minillm" or "pocl"
    method: l2m
    training:
      learning_rate: 1e-4
    evaluation:
      sets: [test, self_inst]

Values in YAML and on the command line are text, which is converted to the type of the setting.
"""

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import traceback
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from ml_collections import ConfigDict

from l2m_jax import config as settings
from l2m_jax.errors import InputError, reason, shown

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_BOOLEANS = {"true": True, "false": False}
_MOST_BRACKETS = 1000
_MOST_YAML = 1 << 18  # bytes; the reader takes a second for so much


def read(source: str, overrides: Iterable[tuple[str, str]] = ()) -> settings.Config:
    """The validated settings of a config file.

    Args:
        source: the file, with `:VARIANT` if it is a Python file that has variants.
        overrides: settings by name, such as ("curriculum.alpha", "0.3"). Of equal names the last one counts.

    Raises:
        InputError: no such file, a file that gives no settings, an unknown setting, or a wrong value; each is named.
    """
    file, variant = _split(source)
    if not file.is_file():
        near = _near(str(file), [str(other) for other in file.parent.glob("*.*")])
        raise InputError(f"--config {source}: no such file{near}")
    if file.suffix == ".py":
        values = _read_python(source, file, variant)
    elif file.suffix in (".yaml", ".yml"):
        if variant:
            raise InputError(f"--config {source}: a YAML file has no variants; name {file} alone")
        values = _read_yaml(source, file)
    else:
        raise InputError(f"--config {source}: expected a Python file (.py) or a YAML file (.yaml)")
    for name, value in overrides:
        change: Any = value
        for part in reversed(name.split(".")):
            change = {part: change}
        values = _merge(values, typed_fields(settings.Config, change, "config"))
    return settings.parse(values)


def _split(source: str) -> tuple[Path, str]:
    file, colon, variant = source.rpartition(":")
    return (Path(file), variant) if colon and not Path(source).is_file() else (Path(source), "")


def _near(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return f"; did you mean {near[0]!r}?" if near else ""


def _read_python(source: str, file: Path, variant: str) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("config_file", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if get_config is None:
            raise InputError('no function get_config(variant="")')
        if variant and not inspect.signature(get_config).parameters:
            raise InputError("get_config has no parameter, so there are no variants")
        found = get_config(variant) if variant else get_config()
        if not isinstance(found, ConfigDict):
            raise InputError(
                "get_config must return a ConfigDict, such as l2m_jax.config.defaults() with changes; "
                f"got {shown(found)}"
            )
        return found.to_dict()
    except (Exception, SystemExit) as error:
        raise InputError(f"--config {source}: {_describe(error, file)}") from error


def _describe(error: BaseException, file: Path) -> str:
    """One sentence. A ValueError is a message to the user (an unknown variant); any other error is a mistake in the file."""
    said = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: not valid Python ({error.msg})"
    if isinstance(error, ValueError) and said:
        return said
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)
    ]
    return f"line {lines[-1] if lines else '?'}: {type(error).__name__}: {said}"


class TextLoader(yaml.BaseLoader):
    """Builds nothing but mappings, lists and text, and refuses a name that occurs twice.

    YAML's own rules would read 1e-4 as text, and `on` as true.
    """

    def construct_mapping(self, node, deep=False):
        names = set()
        for name in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if name.value in names:
                raise InputError(
                    f"line {name.start_mark.line + 1}: {name.value!r} is set twice; keep one of them"
                )
            names.add(name.value)
        return super().construct_mapping(node, deep)


def _read_yaml(source: str, file: Path) -> dict[str, Any]:
    try:
        text = file.read_bytes()
        if len(text) > _MOST_YAML:
            raise InputError(f"{len(text):,} bytes; a file of settings has at most {_MOST_YAML:,}")
        if text.count(b"[") + text.count(b"{") > _MOST_BRACKETS:  # the reader's time grows with their square
            raise RecursionError
        values = yaml.load(text.decode("utf-8"), TextLoader)
        if not isinstance(values, dict):
            raise InputError(f"expected settings by name, such as 'method: l2m', got {shown(values)}")
        preset = values.pop("preset", "paper")
        if not isinstance(preset, str) or preset not in settings.PRESETS:
            near = _near(shown(preset), settings.PRESETS)
            raise InputError(
                f"preset: no preset {shown(preset)} (known: {', '.join(settings.PRESETS)}){near}"
            )
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise InputError(f"--config {source}: {line}not valid YAML ({error.problem})") from error
    except RecursionError as error:
        raise InputError(
            f"--config {source}: nested too deeply; settings have at most four levels"
        ) from error
    except (InputError, OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"--config {source}: {reason(error)}") from error
    defaults = settings.defaults(preset).to_dict()
    return _merge(defaults, typed_fields(settings.Config, values, "config"))


def _merge(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for name, value in changes.items():
        is_group = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merge(merged[name], value) if is_group else value
    return merged


def typed_fields(kind: type, values: Any, place: str) -> dict[str, Any]:
    """`values`, which are text, as the settings of the dataclass `kind` need them. Unknown names are left to `parse`."""
    hints = typing.get_type_hints(kind)
    if not isinstance(values, Mapping):
        example = f"{place}.{next(iter(hints))}"
        raise InputError(f"{place}: a group of settings, which has no value of its own; set {example}, say")
    typed = dict(values)
    for name in values.keys() & hints.keys():
        hint, value, where = hints[name], values[name], f"{place}.{name}"
        if dataclasses.is_dataclass(hint):
            typed[name] = typed_fields(typing.cast(type, hint), value, where)
        elif isinstance(value, Mapping):
            raise InputError(
                f"{where}.{next(iter(value), '')}: no such setting ({where} is a single setting)"
            )
        else:
            typed[name] = _convert(hint, value, where)
    return typed


def typed(name: str, value: Any, place: str) -> Any:
    """The value, which is text, of a setting by its name, such as "curriculum.alpha".

    Raises:
        InputError: no such setting, or another type than it needs; the message begins with `place`.
    """
    kind: Any = settings.Config
    for part in name.split("."):
        hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if part not in hints:
            raise InputError(f"{place}: no such setting {name!r}{_near(part, hints)}")
        kind = hints[part]
    if dataclasses.is_dataclass(kind):
        raise InputError(f"{place}: {name!r} is a group of settings; set one of them")
    return _convert(kind, value, place)


def _convert(hint: Any, value: Any, place: str) -> Any:
    if isinstance(hint, types.GenericAlias):  # tuple[X, ...]
        items = value if isinstance(value, list) else _items(value)
        return tuple(_convert(hint.__args__[0], item, place) for item in items)
    if not isinstance(value, str):
        raise InputError(f"{place}: expected {_KINDS[hint]}, got {shown(value)}")
    try:
        return _BOOLEANS[value.lower()] if hint is bool else hint(value)
    except (KeyError, ValueError):
        raise InputError(f"{place}: expected {_KINDS[hint]}, got {shown(value)}") from None


def _items(text: str) -> list[str]:
    """The items of `a,b`, or of a Python tuple or list such as `('a','b')`."""
    if text[:1] in ("(", "[", "'", '"'):
        try:
            found = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            text = text[1:-1] if text[-1] in ")]" else text  # as in (a,b)
        else:
            return [str(item) for item in (found if isinstance(found, tuple | list) else (found,))]
    return [item.strip() for item in text.split(",") if item.strip()]
