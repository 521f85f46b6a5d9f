"""Flax Linen layers that take a float kernel or a BitTensor under the same name.

Each is Flax's own layer with one addition: where its parameters hold BitTensors, it runs through `pbjax.quantized`, so
its result is that of the unmodified layer under `quantized`, bit for bit. They serve models that are called without
`quantized`, or initialized and trained as they are and quantized later:

    >>> model = pbjax.linen.Dense(10)
    >>> variables = model.init(jax.random.key(0), jnp.ones((1, 64)))
    >>> model.apply(pbjax.quantize(variables, bits=8), jnp.ones((1, 64))).shape
    (1, 10)
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from pbjax._bit_tensor import is_bit_tensor
from pbjax._quantized import quantized


def _holds_bit_tensors(module: nn.Module) -> bool:
    return any(map(is_bit_tensor, jax.tree.leaves(module.variables, is_leaf=is_bit_tensor)))


def _apply_quantized(module: nn.Module, inputs: jax.Array) -> Any:
    """The layer on BitTensors: a copy of it, without a parent, applied to its variables under `quantized`."""
    return quantized(module.clone(parent=None, name=None).apply)(module.variables, inputs)


class Dense(nn.Dense):
    """`flax.linen.Dense` whose `kernel` may be a BitTensor. Arguments and parameters are Flax's."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """float[..., in] -> float[..., features]."""
        return _apply_quantized(self, inputs) if _holds_bit_tensors(self) else super().__call__(inputs)


class DenseGeneral(nn.DenseGeneral):
    """`flax.linen.DenseGeneral` whose `kernel` may be a BitTensor. Arguments and parameters are Flax's."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """float[..., *contracted axes] -> float[..., *features]."""
        return _apply_quantized(self, inputs) if _holds_bit_tensors(self) else super().__call__(inputs)
