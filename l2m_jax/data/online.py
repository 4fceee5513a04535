"""Whether the hub can be reached, asked once and quickly: the clients themselves retry for most of a minute."""

import urllib.error
import urllib.request

from l2m_jax.errors import InputError

_SECONDS = 5.0


def require_hub(name: str, instead: str) -> None:
    """Returns if `name` can be asked for.

    Args:
        name: what is about to be downloaded.
        instead: what to pass when it cannot be.

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
            return  # an answer, if not a friendly one
        except OSError:
            reason = "the hub cannot be reached"
    raise InputError(f"cannot download '{name}' ({reason}): pass {instead}")
