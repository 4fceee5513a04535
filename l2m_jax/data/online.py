"""A quick check that the hub can be reached: the clients themselves retry for most of a minute."""

import urllib.error
import urllib.request

from l2m_jax.errors import InputError

_SECONDS = 5.0


def require_hub(name: str, instead: str) -> None:
    """Checks that the hub can be reached before a download.

    Args:
        name: what is about to be downloaded, for the message.
        instead: what the user can pass instead, for the message.

    Raises:
        InputError: there is no network, or HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants

    reason = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        try:
            urllib.request.urlopen(
                urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=_SECONDS
            )
            return
        except urllib.error.HTTPError:
            return  # an error status is still an answer
        except OSError:
            reason = "the hub cannot be reached"
    raise InputError(f"cannot download '{name}' ({reason}): pass {instead}")
