"""The one exception for everything that a user can put right, and checks of settings that raise it."""

import math
from collections.abc import Collection
from typing import Any


class InputError(ValueError):
    """Names the value, the place and the way out, in one sentence.

    The commands print its message without a traceback and exit with status 2.
    """


def require_choice(settings: Any, name: str, choices: Collection[str]) -> None:
    """Raises InputError unless `settings.name` is one of `choices`."""
    if getattr(settings, name) not in choices:
        raise InputError(f"{name}: {getattr(settings, name)!r} is not one of {', '.join(choices)}")


def require_positive(settings: Any, *names: str) -> None:
    """Raises InputError unless each named value is a finite number above 0."""
    for name in names:
        value = getattr(settings, name)
        if not 0 < value < math.inf:
            raise InputError(f"{name}: {value!r} must be greater than 0")


def require_at_least(settings: Any, minimum: int, *names: str) -> None:
    """Raises InputError unless each named value is a finite number, `minimum` or more."""
    for name in names:
        value = getattr(settings, name)
        if not minimum <= value < math.inf:
            raise InputError(f"{name}: {value!r} must be {minimum} or more")


def require_fraction(settings: Any, *names: str, below_one: bool = False) -> None:
    """Raises InputError unless each named value lies between 0 and 1."""
    for name in names:
        value = getattr(settings, name)
        if not 0 <= value <= 1 or (below_one and value == 1):
            bounds = "at least 0 and below 1" if below_one else "between 0 and 1"
            raise InputError(f"{name}: {value!r} must be {bounds}")
