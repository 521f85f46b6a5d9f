"""Flax Linen layers that take float kernels or BitTensors under the same names.

Each is Flax's own layer with one addition: where its parameters hold BitTensors, it runs through `pbjax.quantized`, so
its result is that of the unmodified layer under `quantized`, bit for bit. Random numbers, interceptors, captured
intermediates and what a layer writes are those of Flax's layer too. They serve models that are called without
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
from flax.core import DenyList, lift

from pbjax import _quantized
from pbjax._bit_tensor import is_bit_tensor

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
        super().__init_subclass__(**kwargs)
        for name in ("__call__", "attend"):
            if hasattr(cls, name):
                setattr(cls, name, _on_bitlayers(getattr(cls, name)))


def _on_bitlayers(method: Callable[..., Any]) -> Callable[..., Any]:
    # `wraps` hands on Flax's mark of a method that is wrapped already, so interceptors see `method` and not `call` too.
    @functools.wraps(method)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not _holds_bit_tensors(self):
            return method(self, *args, **kwargs)
        return _call_quantized(method, self, args, kwargs)

    return call


def _holds_bit_tensors(module: nn.Module) -> bool:
    return module.scope is not None and any(
        map(is_bit_tensor, jax.tree.leaves(module.variables, is_leaf=is_bit_tensor))
    )


def _call_quantized(
    method: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """method(module, *args, **kwargs) under `quantized`, which is made a lifted transform of Flax by this.

    The method runs on a copy of the module in a scope that holds the same variables and draws the same random numbers.
    What it writes (caches, sown values) is put into the variables of the module.
    """
    path = module.path

    def lifted(scope_fn, repack_fn, groups, rngs):
        def run(tree, rngs, args, kwargs):
            scope = scope_fn((({collection: _below(path, tree[collection]) for collection in tree},),), rngs)
            return method(module.copy(parent=scope, name=module.name), *args, **kwargs), repack_fn(scope)

        ((variables,),) = groups  # those that one filter takes of one scope
        tree = {collection: _at(path, variables[collection]) for collection in variables}
        result, dequantized = _quantized.run(run, (tree, rngs, args, kwargs), {})
        _quantized.warn_of(type(module).__name__, dequantized)
        return result

    return lift.pack(lifted, (True,), (DenyList("params"),), (True,))(module.scope)


def _at(path: tuple[str, ...], variables: Any) -> Any:
    """A tree with the variables at a path, so that messages name them from the root."""
    return functools.reduce(lambda tree, name: {name: tree}, reversed(path), variables)


def _below(path: tuple[str, ...], tree: Any) -> Any:
    return functools.reduce(lambda tree, name: tree[name], path, tree)


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

    @nn.nowrap  # interceptors see Flax's own, once
    def setup(self) -> None:
        """Makes the parameter. A BitTensor is none that Linen could check: that is done under `quantized`."""
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
