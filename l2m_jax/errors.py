"""The one exception for everything that a user can put right."""


class InputError(ValueError):
    """Names the value, the place and the way out, in one sentence.

    The scripts print its message without a traceback and exit with status 2.
    """
