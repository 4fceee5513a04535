"""Models of which only the top layers are trained, with the final norm and projection.

Embeddings and head stay as they are. A gradient of the embeddings would need the backward pass through all layers, and a tied
head is the embeddings.
"""

import jax
import jax.numpy as jnp

from l2m_jax.types import Params

_TRAINED = ("blocks", "output")


def split(params: Params, layers: int) -> tuple[Params, Params]:
    """(trained, frozen): the top `layers` layers with final norm and projection, and everything else."""
    blocks = params["blocks"]
    first = jax.tree.leaves(blocks)[0].shape[0] - layers
    trained = {"blocks": jax.tree.map(lambda leaf: leaf[first:], blocks), "output": params["output"]}
    others = {name: group for name, group in params.items() if name not in _TRAINED}
    return trained, others | {"blocks": jax.tree.map(lambda leaf: leaf[:first], blocks)}


def join(trained: Params, frozen: Params) -> Params:
    """All parameters again."""
    blocks = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), frozen["blocks"], trained["blocks"])
    return frozen | trained | {"blocks": blocks}


def above(trained: Params, frozen: Params) -> Params:
    """The parameters as the decoder reads them to train a part: the lower layers are a stack of their own.

    So a backward pass with respect to `trained` ends above them.
    """
    return frozen | trained | {"lower_blocks": frozen["blocks"]}
