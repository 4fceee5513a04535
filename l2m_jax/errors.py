"""The one exception for everything that a user can correct, and checks of settings that raise it."""

import functools
import math
import reprlib
import types
import typing
from collections.abc import Collection
from typing import Any

# Larger numbers overflow indices and seeds somewhere; no setting needs them.
_LARGEST = 2**32
_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    dict: "an object with names",
    type(None): "null",
}


class InputError(ValueError):
    """Names the value, the place and the way out, in one sentence.

    The commands print its message without a traceback and exit with status 2.
    """


def shown(value: Any) -> str:
    """A value as in Python, shortened: what is wrong may be a whole file."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 120
    short.maxlevel = 3
    try:
        return short.repr(value)
    except ValueError:  # Python refuses to write integers of more than 4,300 digits
        return f"a very large {type(value).__name__}"


def reason(error: BaseException) -> str:
    """An error's message on one line, without the path that an OSError repeats."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)


def require_choice(settings: Any, name: str, choices: Collection[str]) -> None:
    """Raises InputError unless `settings.name` is one of `choices`."""
    if getattr(settings, name) not in choices:
        raise InputError(f"{name}: {shown(getattr(settings, name))} is not one of {', '.join(choices)}")


def require_positive(settings: Any, *names: str) -> None:
    """Raises InputError unless each named value is a finite number above 0."""
    for name in names:
        value = getattr(settings, name)
        if not 0 < value < _LARGEST:
            raise InputError(f"{name}: {shown(value)} must be greater than 0{_bound(value)}")


def require_at_least(settings: Any, minimum: int, *names: str) -> None:
    """Raises InputError unless each named value is a finite number, `minimum` or more."""
    for name in names:
        value = getattr(settings, name)
        if not minimum <= value < _LARGEST:
            raise InputError(f"{name}: {shown(value)} must be {minimum} or more{_bound(value)}")


def _bound(value: float) -> str:
    return " and below 2**32" if value >= _LARGEST else ""


def require_fraction(settings: Any, *names: str, below_one: bool = False) -> None:
    """Raises InputError unless each named value lies between 0 and 1."""
    for name in names:
        value = getattr(settings, name)
        if not 0 <= value <= 1 or (below_one and value == 1):
            bounds = "at least 0 and below 1" if below_one else "between 0 and 1"
            raise InputError(f"{name}: {value!r} must be {bounds}")


def require_types(settings: Any) -> None:
    """Raises InputError unless each field of a dataclass has the type of its annotation."""
    for name, hint in field_types(type(settings)).items():
        require_type(name, getattr(settings, name), hint)


@functools.cache
def field_types(kind: type) -> dict[str, Any]:
    """The annotations of a dataclass, by field."""
    return typing.get_type_hints(kind)


def require_type(name: str, value: Any, hint: Any) -> None:
    """Raises InputError unless `value` is of the type `hint`; true and false are not numbers."""
    if not _is_a(value, hint):
        raise InputError(f"{name}: expected {_described(hint)}, got {shown(value)}")


def _is_a(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_is_a(value, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return any(value == choice for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is_a(item, typing.get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _described(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(map(_described, typing.get_args(hint)))
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"a list, each {_described(typing.get_args(hint)[0])}"
    return _KINDS.get(hint, getattr(hint, "__name__", str(hint)))
