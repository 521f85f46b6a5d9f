"""Flax NNX on bitlayers: `quantize` for whole models, and the layers that it puts into them.

    >>> model = flax.nnx.Sequential(
    ...     flax.nnx.Linear(64, 32, rngs=flax.nnx.Rngs(0)), jnp.tanh, flax.nnx.Linear(32, 10, rngs=flax.nnx.Rngs(1))
    ... )
    >>> qmodel = pbjax.nnx.quantize(model, bits=8)
    >>> qmodel(jnp.ones((1, 64))).shape
    (1, 10)

`quantize` is the way for a module that is called as it stands. `pbjax.quantize` works on trees of weights, an
`nnx.State` among them, for functions that run under `pbjax.quantized`; it is also the way for a module that uses
weights of its own outside of these layers.

Each layer is Flax's own with one addition: where its parameters hold BitTensors, it runs through `pbjax.quantized`, so
its result is that of the unmodified layer under `quantized`, bit for bit. Constructor, parameters, names and calls are
Flax's.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

from pbjax import _paths, _quantize, _quantized
from pbjax._bit_tensor import is_bit_tensor
from pbjax._specs import Spec

__all__ = [
    "Conv",
    "ConvTranspose",
    "Einsum",
    "Embed",
    "GRUCell",
    "LSTMCell",
    "Linear",
    "LinearGeneral",
    "MultiHeadAttention",
    "OptimizedLSTMCell",
    "PackedParam",
    "SimpleCell",
    "quantize",
]

M = TypeVar("M", bound=nnx.Module)


class PackedParam(nnx.Variable):
    """The Variable of a weight stored as bitlayers: its value is a `pbjax.BitTensor`.

    It is no `nnx.Param`, so optimizers and `nnx.grad` leave it alone.
    """


def quantize(
    model: M,
    bits: int,
    *,
    group_size: int | None = None,
    activation_bits: int | None = 16,
    clip_bits: int | None = None,
    rules: Mapping[str, int | Spec | None] | None = None,
    progress: bool | None = None,
) -> M:
    """The same model on bitlayers: each layer that pbjax knows is replaced by its counterpart in `pbjax.nnx`.

    A layer knows how it uses its weights, so nothing has to be traced: kernels are packed with their contracted axes
    as k, kernels with more leading axes than the layer has by itself (made under `nnx.vmap`) as stacks. Subclasses of
    Flax's layers, layers with a `mask` and weights outside of layers stay as they are.

    Args:
      model: any NNX module. It is not changed; everything but the weights packed is shared with the result.
      bits: bitlayers to store, 1..16.
      group_size: consecutive k that share a scale, a multiple of 32; None for one scale per output channel.
      activation_bits: width of fixed-point activations in products, 2..24, or None for float ones.
      clip_bits: if given, each group is clipped to what gives the least error at this many bitlayers; see
        `pbjax.quantize`.
      rules: patterns (regular expressions, searched for) of the paths of weights, as `blocks/0/attention/query/kernel`,
        to a number of bits, a `pbjax.Spec`, or None for "leave as it is". The first that matches decides.
      progress: whether to show a progress bar; None shows one on a terminal for large models.

    Returns:
      A module of the same class, whose packed weights are `PackedParam`s. `nnx.jit`, `nnx.split`, `nnx.merge`,
      `nnx.vmap` and `nnx.scan` take it as they take the original. `pbjax.with_bitlayers` sets the precision of the
      module, or of its `nnx.state`; of the latter where modules share submodules, which no pytree can express.

    Raises:
      TypeError: `model` is no NNX module.
      ValueError: no layer to replace, or what `pbjax.quantize` raises, with the path of the weight.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"`model` must be an NNX module, but got {type(model).__name__}. `pbjax.quantize` takes trees of weights."
        )
    model = nnx.clone(model)
    variables: dict[str, nnx.Variable] = {}
    axes: dict[str, Spec] = {}
    owners: list[tuple[nnx.Module, str, nnx.Variable]] = []
    for path, layer in list(nnx.iter_graph(model, graph=True)):
        if type(layer) not in _COUNTERPARTS:
            continue
        for name, contract, rank in _weights(layer):
            variable = getattr(layer, name)
            owners.append((layer, name, variable))
            if any(variable is other for other in variables.values()):  # shared by two layers: packed for the first
                continue
            full_name = "/".join(map(str, (*path, name)))
            variables[full_name] = variable
            axes[full_name] = Spec(contract=contract, stack=tuple(range(variable.ndim - rank)))
    if not variables:
        raise ValueError(
            "`model` must have a layer to put on bitlayers, but got none of "
            f"{', '.join(sorted({layer.__name__ for layer in _COUNTERPARTS}))}, of Flax or pbjax. For subclasses of "
            "them, and weights outside of layers, use `pbjax.quantize` and `pbjax.quantized`."
        )
    patterns = _paths.compile_patterns("rules", rules or {})
    _paths.check_matches("rules", patterns, variables, "weights")
    specs = {
        f"^{re.escape(name)}$": _with_axes(_paths.first_match(patterns, name, bits), spec)
        for name, spec in axes.items()
    }
    if all(spec is None for spec in specs.values()):
        raise ValueError(f"`rules` must leave a weight to quantize, but leave out all of {', '.join(axes)}.")
    packed = _quantize.quantize(
        {name: variable.get_raw_value() for name, variable in variables.items()},
        bits,
        group_size=group_size,
        activation_bits=activation_bits,
        clip_bits=clip_bits,
        rules=specs,
        progress=progress,
    )
    replaced = {
        id(variable): PackedParam.from_metadata(packed[name], variable.get_metadata())
        for name, variable in variables.items()
        if is_bit_tensor(packed[name])
    }
    for layer, name, variable in owners:
        setattr(layer, name, replaced.get(id(variable), variable))
    for _, layer in list(nnx.iter_graph(model, graph=True)):
        if type(layer) in _COUNTERPARTS:
            object.__setattr__(layer, "__class__", _COUNTERPARTS[type(layer)])  # the attributes are the same
    return model


def _with_axes(rule: Any, axes: Spec) -> Any:
    """A rule with the axes that a layer knows, where the rule names none."""
    if isinstance(rule, Spec):
        return dataclasses.replace(
            rule,
            contract=axes.contract if rule.contract is None else rule.contract,
            stack=axes.stack if rule.stack is None else rule.stack,
        )
    return None if rule is None else dataclasses.replace(axes, bits=rule)


def _weights(layer: Any) -> list[tuple[str, tuple[int, ...], int]]:
    """The weights that a layer multiplies with: name, contracted axes (negative), rank of one layer's without stack."""
    match layer:
        case nnx.Linear():
            return [("kernel", (-2,), 2)]
        case nnx.LinearGeneral():
            num_in, num_out = len(layer.in_features), len(layer.out_features)
            return [("kernel", tuple(range(-num_in - num_out, -num_out)), num_in + num_out)]
        case nnx.Einsum():
            return _einsum_weight(layer)
        case nnx.Conv() if layer.mask is None:
            rank = len(layer.kernel_shape)
            return [("kernel", tuple(range(-rank, -1)), rank)]
        case nnx.ConvTranspose() if layer.mask is None:
            rank = len(layer.kernel_shape)
            output = -2 if layer.transpose_kernel else -1
            return [("kernel", tuple(a for a in range(-rank, 0) if a != output), rank)]
        case nnx.Embed():
            return [("embedding", (-1,), 2)]
    return []  # a layer of layers


def _einsum_weight(layer: nnx.Einsum) -> list[tuple[str, tuple[int, ...], int]]:
    if not layer.einsum_str or "." in layer.einsum_str:  # which axes are summed over is known in each call only
        return []
    operands, output = layer.einsum_str.replace(" ", "").split("->")
    inputs, letters = operands.split(",")
    contract = tuple(i - len(letters) for i, letter in enumerate(letters) if letter not in output)
    leading = next((i for i, letter in enumerate(letters) if letter not in inputs or letter not in output), 0)
    return [("kernel", contract, len(letters) - leading)] if contract else []


_COUNTERPARTS: dict[type[nnx.Module], type[nnx.Module]] = {}


def _layer(cls: type[M]) -> type[M]:
    """Sends a layer's calls through `quantized` where its parameters hold BitTensors; enters it as a counterpart."""
    for name in ("__call__", "attend"):
        if hasattr(cls, name):
            setattr(cls, name, _on_bitlayers(getattr(cls, name)))
    # A model that was built of these layers stays built of them.
    _COUNTERPARTS.update({cls: cls, cls.__mro__[1]: cls})
    return cls


def _on_bitlayers(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        if not _holds_bit_tensors(self):
            return method(self, *args, **kwargs)
        result, dequantized = _quantized.run(method, (self, *args), kwargs)
        _quantized.warn_of(type(self).__name__, dequantized)  # a layer of NNX does not know where it stands
        return result

    return call


def _holds_bit_tensors(module: nnx.Module) -> bool:
    return any(map(is_bit_tensor, jax.tree.leaves(module, is_leaf=is_bit_tensor)))


@_layer
class Linear(nnx.Linear):
    """`flax.nnx.Linear` whose `kernel` may hold a BitTensor."""


@_layer
class LinearGeneral(nnx.LinearGeneral):
    """`flax.nnx.LinearGeneral` whose `kernel` may hold a BitTensor."""


@_layer
class Einsum(nnx.Einsum):
    """`flax.nnx.Einsum` whose `kernel` may hold a BitTensor."""


@_layer
class Conv(nnx.Conv):
    """`flax.nnx.Conv` whose `kernel` may hold a BitTensor: a product with patches of the input.

    With fixed-point activations each patch is a row with a step of its own. A `mask` needs the kernel as floats.
    """


@_layer
class ConvTranspose(nnx.ConvTranspose):
    """`flax.nnx.ConvTranspose` whose `kernel` may hold a BitTensor. A `mask` needs the kernel as floats."""


@_layer
class Embed(nnx.Embed):
    """`flax.nnx.Embed` whose `embedding` may hold a BitTensor, which serves both look-ups and `attend`.

    A look-up unpacks the rows that it looks up and no others.
    """


@_layer
class SimpleCell(nnx.SimpleCell):
    """`flax.nnx.SimpleCell` whose kernels may hold BitTensors."""


@_layer
class LSTMCell(nnx.LSTMCell):
    """`flax.nnx.LSTMCell` whose kernels may hold BitTensors."""


@_layer
class OptimizedLSTMCell(nnx.OptimizedLSTMCell):
    """`flax.nnx.OptimizedLSTMCell` whose kernels may hold BitTensors."""


@_layer
class GRUCell(nnx.GRUCell):
    """`flax.nnx.GRUCell` whose kernels may hold BitTensors."""


@_layer
class MultiHeadAttention(nnx.MultiHeadAttention):
    """`flax.nnx.MultiHeadAttention` whose four kernels may hold BitTensors; also with `decode`."""
