"""Flax NNX layers that take a float kernel or a BitTensor under the same name.

Each is Flax's own layer with one addition: where its parameters hold BitTensors, it runs through `pbjax.quantized`, so
its result is that of the unmodified layer under `quantized`, bit for bit:

    >>> model = pbjax.nnx.Linear(64, 10, rngs=flax.nnx.Rngs(0))
    >>> pbjax.quantize(model, bits=8)(jnp.ones((1, 64))).shape
    (1, 10)
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from pbjax._bit_tensor import is_bit_tensor
from pbjax._quantized import quantized


def _holds_bit_tensors(module: nnx.Module) -> bool:
    return any(map(is_bit_tensor, jax.tree.leaves(module, is_leaf=is_bit_tensor)))


class Linear(nnx.Linear):
    """`flax.nnx.Linear` whose `kernel` may hold a BitTensor. Arguments and parameters are Flax's."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """float[..., in_features] -> float[..., out_features]."""
        call = super().__call__ if not _holds_bit_tensors(self) else _on_bitlayers(nnx.Linear, self)
        return call(inputs, out_sharding)


class LinearGeneral(nnx.LinearGeneral):
    """`flax.nnx.LinearGeneral` whose `kernel` may hold a BitTensor. Arguments and parameters are Flax's."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """float[..., *in_features at axis] -> float[..., *out_features]."""
        call = super().__call__ if not _holds_bit_tensors(self) else _on_bitlayers(nnx.LinearGeneral, self)
        return call(inputs, out_sharding)


def _on_bitlayers(layer: type[nnx.Module], module: nnx.Module) -> Any:
    """Flax's own forward pass of a layer, under `quantized`."""
    return lambda *args: quantized(layer.__call__)(module, *args)
