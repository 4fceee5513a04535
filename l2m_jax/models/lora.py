"""Low-rank adapters (LoRA, Hu et al., 2021, arXiv 2106.09685): a frozen base, and two thin matrices beside its kernels.

A dense layer computes x·W + scale·(x·A)·B with scale = alpha / rank; W + scale·A·B is never made. The adapters are leaves
beside their kernel, "lora_a", "lora_b" and "lora_scale", and `layers.Dense` reads them where they are.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from l2m_jax.errors import InputError, require_at_least, require_positive, shown
from l2m_jax.models.architecture import DecoderConfig
from l2m_jax.models.decoder import init
from l2m_jax.types import Params

TARGETS = ("query", "key", "value", "out", "gate", "up", "down")


@dataclass(frozen=True)
class Lora:
    """Adapters beside the dense layers of all blocks.

    Raises:
        InputError: a value out of range, or a target that no model has.
    """

    rank: int = 0  # of the adapters, which are trained instead of the model's own weights (0: none)
    alpha: float = 16.0  # their product is multiplied by alpha / rank
    targets: tuple[str, ...] = ()  # dense layers that get one, of `TARGETS`; empty: all that the model has

    def __post_init__(self):
        require_at_least(self, 0, "rank")
        require_positive(self, "alpha")
        if unknown := [name for name in self.targets if name not in TARGETS]:
            raise InputError(f"targets: {shown(unknown[0])} is not one of {', '.join(TARGETS)}")
        if len(set(self.targets)) < len(self.targets):
            raise InputError(f"targets: {self.targets} names a layer twice; keep one")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def init(self, config: DecoderConfig, key: jax.Array) -> Params:
        """Float32 adapters as PEFT initialises them: A uniform within ±1/√inputs, and B = 0, so that nothing changes yet.

        Raises:
            InputError: a target that this model does not have.
        """
        kernels = self._kernels(config)
        found = {}
        for path, own in zip(kernels, jax.random.split(key, len(kernels)), strict=True):
            N, inputs, outputs = kernels[path]
            bound = 1 / math.sqrt(inputs)
            a_shape = (N, inputs, self.rank)
            found[f"{path}/lora_a"] = jax.random.uniform(own, a_shape, jnp.float32, -bound, bound)
            found[f"{path}/lora_b"] = jnp.zeros((N, self.rank, outputs), jnp.float32)
        return unflatten_dict(found, sep="/")

    def scales(self, config: DecoderConfig) -> Params:
        """The "lora_scale" of each target, which is not trained: float32, one for each layer."""
        layers = jnp.full(config.num_layers, self.scale, jnp.float32)
        found = {f"{path}/lora_scale": layers for path in self._kernels(config)}
        return unflatten_dict(found, sep="/")

    def _kernels(self, config: DecoderConfig) -> dict[str, tuple[int, int, int]]:
        """The shapes [layers, inputs, outputs] of the kernels with adapters, by the path of their dense layer."""
        leaves = _flat({"blocks": jax.eval_shape(lambda: init(config, jax.random.key(0)))["blocks"]})
        found = {p.removesuffix("/kernel"): leaf.shape for p, leaf in leaves.items() if p.endswith("/kernel")}
        names = {_name(path) for path in found}
        if absent := [name for name in self.targets if name not in names]:
            there = [name for name in TARGETS if name in names]
            raise InputError(
                f"targets: the model has no dense layer {absent[0]!r}; choose from {', '.join(there)}, or leave it empty "
                "for all"
            )
        return {
            path: shape for path, shape in found.items() if not self.targets or _name(path) in self.targets
        }

    def merged(self, adapters: Params, base: Params) -> Params:
        """W + scale·A·B for each target, on the host in float32, and the other leaves of `base` as they are.

        Args:
            adapters: host arrays as from `init`.
            base: host arrays; kernels with adapters are changed in place where they can be.
        """
        leaves, of_adapters = _flat(base), _flat(adapters)
        for path in (path.removesuffix("/lora_a") for path in of_adapters if path.endswith("/lora_a")):
            kernel = np.require(leaves[f"{path}/kernel"], np.float32, "W")
            a, b = of_adapters[f"{path}/lora_a"], of_adapters[f"{path}/lora_b"]
            for layer in range(len(kernel)):
                kernel[layer] += np.float32(self.scale) * (a[layer] @ b[layer])
            leaves[f"{path}/kernel"] = kernel
        # A model without final norm and projection has an "output" group all the same, which is empty.
        return {"output": {}} | unflatten_dict(leaves, sep="/")


def attach(adapters: Params, base: Params) -> Params:
    """`base` with the leaves of `adapters` beside its own. Copies no array."""
    both = {name: attach(adapters[name], base[name]) for name in base if name in adapters}
    return base | adapters | both


def _flat(tree: Params) -> dict[str, Any]:
    return flatten_dict(tree, sep="/")


def _name(path: str) -> str:
    return path.rpartition("/")[2]
