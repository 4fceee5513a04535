"""Frozen models with int8 kernels: half the memory of bfloat16, for the teacher's forward passes.

Each output of a dense layer has a scale: the largest of its weights over 127 (symmetric, no zero point). Products are computed
in the compute dtype. Embeddings, head, norms and biases stay as they are.
"""

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from l2m_jax.parallel import over_devices
from l2m_jax.types import Params


def is_quantised(path: str) -> bool:
    """Whether a parameter such as "blocks/mlp/up/kernel" is int8 in a quantised model."""
    return path.startswith("blocks/") and path.endswith("/kernel")


@over_devices(weights=("params",), returns="weights")
def quantise(params: Params) -> Params:
    """int8 kernels [N, inputs, outputs], and beside each "kernel_scale" [N, outputs] in float32; other leaves as they are."""
    found = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        if not is_quantised(path):
            found[path] = leaf
            continue
        kernel = jnp.asarray(leaf, jnp.float32)
        largest = jnp.abs(kernel).max(axis=-2, keepdims=True)
        scale = jnp.where(largest > 0, largest, 1.0) / 127
        found[path] = jnp.round(kernel / scale).astype(jnp.int8)
        found[f"{path}_scale"] = scale[..., 0, :]
    return unflatten_dict(found, sep="/")
