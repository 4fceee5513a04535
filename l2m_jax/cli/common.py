"""What the command lines have in common."""

import sys
from typing import NoReturn

from absl import app

from l2m_jax.errors import InputError


def refuse(message: str) -> NoReturn:
    """Ends with status 2, by which what restarts runs can tell that a restart would not help."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def parse_flags(arguments: list[str]) -> list[str]:
    """A config file that is not there, or a setting that is not in it, is said in a sentence."""
    try:
        return app.parse_flags_with_usage(arguments)
    except (LookupError, AttributeError) as error:
        name = str(error).strip("'\"").splitlines()[0]
        refuse(f"--config: no such setting {name!r} (l2m_jax/config.py lists them all)")
    except (OSError, TypeError, ValueError) as error:
        refuse(str(error).strip().splitlines()[0])


def whole_numbers(flag: str, values: list[str]) -> list[int]:
    """The numbers that a list flag holds.

    Raises:
        InputError: naming the flag.
    """
    try:
        return [int(value) for value in values]
    except ValueError:
        raise InputError(f"--{flag} {','.join(values)}: expected whole numbers, as in 0,1,2") from None
