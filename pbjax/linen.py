"""Flax Linen layers that take float kernels or BitTensors under the same names.

Each is Flax's own layer with one addition: where its parameters hold BitTensors, it runs through `pbjax.quantized`, so
its result is that of the unmodified layer under `quantized`, bit for bit. They serve models that are called without
`quantized`, or initialized and trained as they are and quantized later. Cells run under `flax.linen.RNN` and
`flax.linen.Bidirectional`, and all of them under Flax's lifted transforms.

    >>> model = pbjax.linen.Dense(10)
    >>> variables = model.init(jax.random.key(0), jnp.ones((1, 64)))
    >>> model.apply(pbjax.quantize(variables, bits=8), jnp.ones((1, 64))).shape
    (1, 10)

Constructor, parameters, names and calls are Flax's. `pbjax.quantize` with `fn=model.apply` packs every kernel for the
way its layer uses it; without `fn` that holds for kernels whose last axis is the output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax.core import DenyList
from flax.core.scope import intersect_filters

from pbjax._bit_tensor import is_bit_tensor
from pbjax._quantized import quantized

__all__ = [
    "Conv",
    "ConvLSTMCell",
    "ConvLocal",
    "ConvTranspose",
    "Dense",
    "DenseGeneral",
    "Einsum",
    "Embed",
    "GRUCell",
    "LSTMCell",
    "MGUCell",
    "MultiHeadAttention",
    "MultiHeadDotProductAttention",
    "OptimizedLSTMCell",
    "SimpleCell",
]


class _OnBitlayers:
    """First base of each layer: sends its calls through `quantized` where its parameters hold BitTensors."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        for name in ("__call__", "attend"):
            if hasattr(cls, name):
                setattr(cls, name, _on_bitlayers(name, getattr(cls, name)))
        super().__init_subclass__(**kwargs)


def _on_bitlayers(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method, updated=())  # without the mark of a compact method: Flax's own method carries it
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not _holds_bit_tensors(self):
            return method(self, *args, **kwargs)
        return _apply_quantized(self, name, args, kwargs)

    return call


def _holds_bit_tensors(module: nn.Module) -> bool:
    return any(map(is_bit_tensor, jax.tree.leaves(module.variables, is_leaf=is_bit_tensor)))


def _apply_quantized(module: nn.Module, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The layer on BitTensors: a copy of it, without a parent, applied to its variables under `quantized`.

    What the copy writes (caches, sown values) is put into the layer's own variables.
    """
    assert module.scope is not None, "a module without variables holds no BitTensors"
    mutable = intersect_filters(module.scope.mutable, DenyList("params"))
    rngs = {name: module.make_rng(name) for name in module.scope.rngs}
    apply = quantized(module.clone(parent=None, name=None).apply)
    result, state = apply(module.variables, *args, rngs=rngs, mutable=mutable or [], method=method, **kwargs)
    for collection, variables in state.items():
        for name, value in variables.items():
            module.put_variable(collection, name, value)
    return result


class Dense(_OnBitlayers, nn.Dense):
    """`flax.linen.Dense` whose `kernel` may be a BitTensor."""


class DenseGeneral(_OnBitlayers, nn.DenseGeneral):
    """`flax.linen.DenseGeneral` whose `kernel` may be a BitTensor."""


class Einsum(_OnBitlayers, nn.Einsum):
    """`flax.linen.Einsum` whose `kernel` may be a BitTensor."""


class Conv(_OnBitlayers, nn.Conv):
    """`flax.linen.Conv` whose `kernel` may be a BitTensor: a product with patches of the input.

    With fixed-point activations each patch is a row with a step of its own. A `mask` needs the kernel as floats.
    """


class ConvLocal(_OnBitlayers, nn.ConvLocal):
    """`flax.linen.ConvLocal` whose `kernel` may be a BitTensor: one product for each place of the output."""


class ConvTranspose(_OnBitlayers, nn.ConvTranspose):
    """`flax.linen.ConvTranspose` whose `kernel` may be a BitTensor. A `mask` needs the kernel as floats."""


class Embed(_OnBitlayers, nn.Embed):
    """`flax.linen.Embed` whose `embedding` may be a BitTensor, which serves both look-ups and `attend`.

    A look-up unpacks the rows that it looks up and no others.
    """

    def setup(self) -> None:
        """Makes the parameter. A BitTensor is none that Linen could check: the copy under `quantized` does it then."""
        if not _holds_bit_tensors(self):
            super().setup()


class SimpleCell(_OnBitlayers, nn.SimpleCell):
    """`flax.linen.SimpleCell` whose kernels may be BitTensors."""


class LSTMCell(_OnBitlayers, nn.LSTMCell):
    """`flax.linen.LSTMCell` whose kernels may be BitTensors."""


class OptimizedLSTMCell(_OnBitlayers, nn.OptimizedLSTMCell):
    """`flax.linen.OptimizedLSTMCell` whose kernels may be BitTensors; they are used one by one, not concatenated."""


class GRUCell(_OnBitlayers, nn.GRUCell):
    """`flax.linen.GRUCell` whose kernels may be BitTensors."""


class MGUCell(_OnBitlayers, nn.MGUCell):
    """`flax.linen.MGUCell` whose kernels may be BitTensors."""


class ConvLSTMCell(_OnBitlayers, nn.ConvLSTMCell):
    """`flax.linen.ConvLSTMCell` whose kernels may be BitTensors."""


class MultiHeadDotProductAttention(_OnBitlayers, nn.MultiHeadDotProductAttention):
    """`flax.linen.MultiHeadDotProductAttention` whose four kernels may be BitTensors; also with `decode`."""


class MultiHeadAttention(_OnBitlayers, nn.MultiHeadAttention):
    """`flax.linen.MultiHeadAttention` whose four kernels may be BitTensors; also with `decode`."""
