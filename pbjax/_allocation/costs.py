"""What layers cost at each number of bitlayers: bytes, seconds, or what the caller counts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from pbjax import _checks
from pbjax._allocation.layers import Layer, StoredLayer
from pbjax._allocation.seconds import product_seconds

Cost = str | Mapping[str, ArrayLike] | Callable[[str], ArrayLike]

_NAMES = {"bytes": "bytes", "time": "seconds"}  # of costs, and their units
_WHERE = "argument of allocate"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """Costs that add up over layers.

    Attributes:
      unit: of the numbers: "bytes", "seconds", or "cost" where only the caller knows.
      by_layer: for each layer float64[bits], its cost at 1..bits bitlayers.
    """

    unit: str
    by_layer: tuple[np.ndarray, ...]

    def of(self, place: int, bitlayers: int) -> float:
        """The cost of one layer, as a Python number: an int of bytes."""
        return self.by_layer[place][bitlayers - 1].item()

    def total(self, allocation: Sequence[int]) -> float:
        return sum(self.of(i, b) for i, b in enumerate(allocation))


def bytes_of(layers: Sequence[StoredLayer]) -> Costs:
    """Bytes of the bitlayers in use and of their scales."""
    return Costs(unit="bytes", by_layer=tuple(np.array([layer.bytes_of(b) for b in _all(layer)]) for layer in layers))


def shares_of(layers: Sequence[Layer]) -> Costs:
    """What each layer adds to the bitlayers per weight."""
    total = sum(layer.num_weights for layer in layers)
    by_layer = tuple(np.array(_all(layer)) * (layer.num_weights / total) for layer in layers)
    return Costs(unit="bitlayers", by_layer=by_layer)


def costs_of(cost: Cost, layers: Sequence[StoredLayer], fn: Callable[..., Any], qparams: Any, batch: Any) -> Costs:
    """The costs that `pbjax.allocate` is asked to count; "time" is measured here."""
    if isinstance(cost, str) and cost not in _NAMES:
        raise ValueError(
            f"`cost` must be one of {list(_NAMES)}, a mapping or a function, but got {cost!r} ({_WHERE}). "
            "A mapping has the costs at 1, 2, .. bitlayers for each path."
        )
    if cost == "bytes":
        return bytes_of(layers)
    if cost == "time":
        return _given(product_seconds(fn, qparams, batch).__getitem__, layers, "seconds")
    if isinstance(cost, Mapping):
        paths = dict.fromkeys(layer.path for layer in layers)
        missing = [path for path in paths if path not in cost]
        if missing:
            raise ValueError(f"`cost` must have all paths of BitTensors, but lacks {missing} ({_WHERE}).")
        return _given(cost.__getitem__, layers, "cost")
    if not callable(cost):
        raise TypeError(f"`cost` must be a name, a mapping or a function, but got {type(cost).__name__} ({_WHERE}).")
    return _given(cost, layers, "cost")


def _given(costs_at: Callable[[str], ArrayLike], layers: Sequence[Layer], unit: str) -> Costs:
    """Costs by path as costs by layer; those of a stack hold for each of its weights, or for each its own."""
    stacks: dict[str, tuple[int, ...]] = {}
    for layer in layers:  # the last of a stack tells its shape
        stacks[layer.path] = tuple(i + 1 for i in layer.index)
    by_path = {path: _numbers(costs_at(path)) for path in stacks}
    by_layer = []
    for layer in layers:
        costs, stack = by_path[layer.path], stacks[layer.path]
        if not isinstance(costs, np.ndarray) or costs.shape not in ((layer.bits,), (*stack, layer.bits)):
            got = f"float64{list(costs.shape)}" if isinstance(costs, np.ndarray) else repr(costs)
            raise ValueError(
                f"`cost` must be numbers of shape {(*stack, layer.bits)}, one for each number of bitlayers, but got "
                f"{got} ({layer.path}). Measure or count all of 1..{layer.bits}."
            )
        numbers = costs if costs.ndim == 1 else costs[layer.index]
        if not (np.isfinite(numbers).all() and (numbers >= 0).all()):
            raise ValueError(f"`cost` must be finite and not negative, but got {numbers.tolist()} ({layer.name}).")
        by_layer.append(numbers)
    if not math.isfinite(sum(float(numbers.max()) for numbers in by_layer)):
        raise ValueError(
            f"`cost` must add up to a finite number over all layers, but got costs of up to "
            f"{max(numbers.max() for numbers in by_layer):.3g} ({_WHERE}). Count in a larger unit."
        )
    return Costs(unit=unit, by_layer=tuple(by_layer))


def _numbers(given: Any) -> Any:
    """The numbers in an array, or in lists of numbers and scalar arrays, as float64; as they came if they are none."""
    given = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else given  # a range, too
    parts = jax.tree.map(_checks.as_float64, given, is_leaf=lambda leaf: leaf is None)
    if any(part is None for part in jax.tree.leaves(parts, is_leaf=lambda leaf: leaf is None)):
        return given
    try:
        return np.array(parts, np.float64)
    except (TypeError, ValueError):  # lists of different lengths, dicts
        return given


def _all(layer: Layer) -> list[int]:
    return list(range(1, layer.bits + 1))
