"""Models of which only a part is trained: the top layers, or adapters beside frozen layers.

What is trained (`trained`) has gradients, optimiser state and checkpoints. The rest (`frozen`) is read beside it.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from l2m_jax.models.architecture import DecoderConfig
from l2m_jax.models.decoder import init
from l2m_jax.models.lora import Lora, attach
from l2m_jax.types import Params

_TRAINED = ("blocks", "output")


@dataclass(frozen=True)
class TopLayers:
    """The top layers are trained, with the final norm and projection.

    Embeddings and head stay as they are. A gradient of the embeddings would need the backward pass through all layers, and a
    tied head is the embeddings.
    """

    layers: int


Part = TopLayers | Lora
"""What is trained of a model."""


def split(params: Params, layers: int) -> tuple[Params, Params]:
    """(trained, frozen): the top `layers` layers with final norm and projection, and everything else."""
    blocks = params["blocks"]
    first = jax.tree.leaves(blocks)[0].shape[0] - layers
    trained = {"blocks": jax.tree.map(lambda leaf: leaf[first:], blocks), "output": params["output"]}
    others = {name: group for name, group in params.items() if name not in _TRAINED}
    return trained, others | {"blocks": jax.tree.map(lambda leaf: leaf[:first], blocks)}


def join(trained: Params, frozen: Params) -> Params:
    """All parameters again, after `split`."""
    blocks = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), frozen["blocks"], trained["blocks"])
    return frozen | trained | {"blocks": blocks}


def above(part: Part, trained: Params, frozen: Params) -> Params:
    """The parameters as the decoder reads them to train a part.

    With `TopLayers`, the lower layers are a stack of their own, so that a backward pass with respect to `trained` ends above
    them.
    """
    if isinstance(part, Lora):
        return attach(trained, frozen)
    return frozen | trained | {"lower_blocks": frozen["blocks"]}


def trained_shapes(part: Part | None, config: DecoderConfig) -> Params:
    """The shapes of what is trained. None: everything."""
    if isinstance(part, Lora):
        return jax.eval_shape(lambda: part.init(config, jax.random.key(0)))
    whole = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    if part is None:
        return whole
    return jax.eval_shape(lambda whole: split(whole, part.layers)[0], whole)
