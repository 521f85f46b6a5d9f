"""`pbjax.allocate`: how many bitlayers each layer gets, from a few batches and a limit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from pbjax import _checks, _front, _sweep
from pbjax._allocation import Allocation, AllocationRow, UniformRow
from pbjax._sensitivity import METRICS, Layer, Metric, Sensitivity, layers_of

_WHERE = "argument of allocate"


def allocate(
    fn: Callable[[Any, Any], Any],
    qparams: Any,
    batch: Any,
    *,
    tolerance: float | None = None,
    budget: float | None = None,
    average: float | None = None,
    metric: str | Metric = "mse",
    bitlayers: Iterable[int] | None = None,
    batch_size: int = 8,
    progress: bool | None = None,
) -> Allocation:
    """Chooses a number of bitlayers for each layer: the least error within a size, or the least size within an error.

    Codes are nested, so the precision of a layer is a run-time number, and its effect can be measured instead of
    modelled: no gradients, no Hessians, no labels. With r the outputs of `fn` at all bitlayers, and y(l, b) those with
    layer l at b bitlayers and all others at all of theirs,

        e(l, b) = metric(y(l, b), r),        E(b_1, .., b_L) ~ sum_l e(l, b_l),

    the sum being exact to first order where errors of layers are small and uncorrelated. All e(l, b) are measured in
    vmapped passes of one compiled function. Of all allocations those are found that no other beats in bytes and in E
    (a multiple-choice knapsack, solved for every budget at once). The sum only proposes; what decides is measured:

    - with `budget` or `average`, the proposal of least E within the limit, or a uniform number of bitlayers within it
      if that measures better;
    - with `tolerance`, the cheapest proposal whose measured error is within it, found by bisection along the front (as
      if errors never rose with bytes), or a uniform number if that is cheaper still.

    So the result is never worse than the best uniform number of bitlayers within the same limit, on these batches. Time
    is no limit one can give: it depends on the backend, on the rows and on what else runs; bytes are what products of
    few rows take their time for.

    Layers are BitTensors, and in stacks (layers under `jax.lax.scan`, an ensemble) each weight of the stack. A weight
    that is used twice is one layer.

    Args:
      fn: fn(qparams, batch) -> outputs, any pytree of float arrays, traceable: `pbjax.quantized(model.apply)`, or
        `lambda model, x: model(x)` for a module of `pbjax.nnx`. Give the same function object again to compile nothing
        again.
      qparams: any pytree with BitTensors; their numbers of bitlayers in use do not matter.
      batch: what `fn` takes: some inputs like those that are to come, without labels. A list, or another iterable that
        is no array (a generator, a data loader), is several batches, whose errors are averaged; write one batch that is
        a list as a tuple.
      tolerance: largest error allowed, in the unit of `metric`.
      budget: most bytes of all BitTensors, words and scales.
      average: most bitlayers per weight, averaged over all weights. Exactly one of the three has to be given.
      metric: the error of outputs y against r:
        - "mse": ||y - r||**2 / ||r||**2, over all outputs of a batch together: 1e-4 is a hundredth in the norm;
        - "kl": mean KL divergence of softmax(y) from softmax(r), in nats, where the last axis holds logits;
        - a function metric(y, r) -> float[]. With a `fn` that returns a loss, `lambda y, r: y - r` is its increase.
      bitlayers: numbers to choose from, for each weight those that it stores; None is all, 1..bits.
      batch_size: how many allocations are evaluated in one pass, which takes as many times the activations of one.
      progress: whether to show progress bars; None shows them on a terminal.

    Returns:
      An `Allocation`: its `bitlayers` go to `pbjax.with_bitlayers`; print it for a table.

    Raises:
      TypeError: an argument of the wrong type; outputs that are no floats, with a named metric.
      ValueError: none or several limits; a budget or average below the smallest choice; a tolerance that no choice
        reaches; no BitTensor, or none that `fn` uses; outputs or errors that are not finite; numbers of bitlayers that
        a weight does not store.

    Cost: one evaluation of `fn` for each layer and number of bitlayers, and some tens more, on each batch.

    References:
      Rate allocation among quantizers by measured errors: Y. Shoham, A. Gersho, Efficient Bit Allocation for an
      Arbitrary Set of Quantizers, IEEE Trans. ASSP 36(9), 1988. Sensitivities of layers for mixed precision: Dong, Yao,
      Gholami, Mahoney, Keutzer, HAWQ, arXiv 1905.03696 (from Hessians; here from outputs).

    Example:
      >>> params = {"a": jnp.eye(64), "b": 100 * jnp.eye(64)}
      >>> def model(params, x):
      ...     return x @ params["a"] + x @ params["b"]
      >>> x = jnp.ones((2, 64))
      >>> qparams = pbjax.quantize(params, bits=8, fn=model, args=(x,))
      >>> pbjax.allocate(pbjax.quantized(model), qparams, x, average=4.5, progress=False).bitlayers
      {'^a$': 1, '^b$': 8}
    """
    _checks.function("fn", fn, _WHERE)
    _sweep.hashable("fn", fn, _WHERE)
    _check_metric(metric)
    _check_limits(tolerance=tolerance, budget=budget, average=average)
    batch_size = _checks.integer("batch_size", batch_size, 1, None, _WHERE)
    layers = layers_of(qparams)
    _check_paths(layers)
    choices = _choices(layers, bitlayers)
    sensitivity = Sensitivity(fn, qparams, _batches(batch), metric, layers, batch_size=batch_size, progress=progress)
    candidates = _Candidates(layers, choices, sensitivity)
    if isinstance(metric, str):
        candidates.check_used()
    if tolerance is not None:
        chosen = candidates.cheapest_within(tolerance)
    elif budget is not None:
        chosen = candidates.best_within("budget", budget, _bytes(layers, choices))
    else:
        total = sum(layer.num_weights for layer in layers)
        costs = [
            np.array(numbers) * (layer.num_weights / total) for layer, numbers in zip(layers, choices, strict=True)
        ]
        chosen = candidates.best_within("average", average, costs)
    return candidates.allocation(chosen, metric if isinstance(metric, str) else getattr(metric, "__name__", "error"))


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """An allocation int[layers] and its measured error."""

    allocation: tuple[int, ...]
    error: float


class _Candidates:
    """What the measured errors of single layers, and of uniform numbers of bitlayers, propose."""

    def __init__(self, layers: list[Layer], choices: list[list[int]], sensitivity: Sensitivity) -> None:
        self._layers, self._choices, self._sensitivity = layers, choices, sensitivity
        full = tuple(layer.bits for layer in layers)
        singles = [(i, b) for i, numbers in enumerate(choices) for b in numbers if b < full[i]]
        uniform = {
            b: tuple(max(c for c in numbers if c <= b) for numbers in choices) for b in sorted(set().union(*choices))
        }
        allocations = [full, *((*full[:i], b, *full[i + 1 :]) for i, b in singles), *uniform.values()]
        self._base, *errors = sensitivity.errors(allocations, "sensitivities").tolist()
        self._singles = dict(zip(singles, errors, strict=False))
        self._uniform = {
            b: _Candidate(allocation, error)
            for (b, allocation), error in zip(uniform.items(), errors[len(singles) :], strict=True)
        }

    def check_used(self) -> None:
        """Raises ValueError if no number of bitlayers changes anything."""
        if self._singles and not any(self._singles.values()):
            raise ValueError(
                "`fn` must use BitTensors of `qparams`, but its outputs are the same at every number of bitlayers. "
                "Let it take its weights from its first argument."
            )

    def best_within(self, name: str, limit: float, costs: list[np.ndarray]) -> _Candidate:
        """The least measured error whose costs, for each layer float[choices], add up to no more than `limit`."""
        front = self._front(costs)
        limit *= 1 + 1e-12  # sums of costs round
        point = front.within(limit)
        if point is None:
            raise ValueError(
                f"`{name}` must be at least {front.costs[0]:,.10g}, what the smallest number of bitlayers of each weight "
                f"takes, but got {limit:,.10g} ({_WHERE}). Give more, or allow fewer bitlayers."
            )
        cost = {
            layer: dict(zip(*pair, strict=True)) for layer, pair in enumerate(zip(self._choices, costs, strict=True))
        }
        (proposal,) = self._measured([front.choices[point]])
        uniform = [
            one for one in self._uniform.values() if sum(cost[i][b] for i, b in enumerate(one.allocation)) <= limit
        ]
        return min([proposal, *uniform], key=lambda one: one.error)

    def cheapest_within(self, tolerance: float) -> _Candidate:
        """The fewest bytes whose measured error is at most `tolerance`."""
        front = self._front(_bytes(self._layers, self._choices))
        (last,) = self._measured(front.choices[-1:])
        found = [one for one in (last, *self._uniform.values()) if one.error <= tolerance]
        if not found:
            least = min(one.error for one in (last, *self._uniform.values()))
            raise ValueError(
                f"`tolerance` must be at least {least:.3g}, the least error that the numbers of bitlayers allowed reach, "
                f"but got {tolerance:.3g} ({_WHERE}). Allow more bitlayers, or quantize to more bits."
            )
        low, high = -1, len(front.choices) - 1  # too coarse, and good enough if `last` is
        while last in found and high - low > 1:
            points = np.unique(np.linspace(low, high, self._sensitivity.batch_size + 2)[1:-1].astype(int))
            points = points[(points > low) & (points < high)]
            measured = self._measured(front.choices[points])
            good = [i for i, one in enumerate(measured) if one.error <= tolerance]
            found += [measured[i] for i in good]
            first = good[0] if good else len(points)
            low, high = (points[first - 1] if first else low), (points[first] if good else high)
        return min(found, key=lambda one: (self._nbytes(one.allocation), one.error))

    def allocation(self, chosen: _Candidate, metric: str) -> Allocation:
        """The outcome as users see it."""
        rows = tuple(
            AllocationRow(
                path=layer.path,
                index=layer.index,
                shape=layer.shape,
                bits=layer.bits,
                bitlayers=b,
                nbytes=layer.nbytes(b),
                errors={b: self._error(i, b) for b in numbers},
            )
            for i, (layer, numbers, b) in enumerate(zip(self._layers, self._choices, chosen.allocation, strict=True))
        )
        return Allocation(
            rows=rows,
            nbytes=self._nbytes(chosen.allocation),
            average=self._average(chosen.allocation),
            predicted_error=self._base + sum(row.errors[row.bitlayers] - self._base for row in rows),
            measured_error=chosen.error,
            metric=metric,
            uniform=tuple(
                UniformRow(
                    bitlayers=b,
                    nbytes=self._nbytes(one.allocation),
                    average=self._average(one.allocation),
                    error=one.error,
                )
                for b, one in self._uniform.items()
            ),
        )

    def _error(self, layer: int, bitlayers: int) -> float:
        return self._singles.get((layer, bitlayers), self._base)

    def _front(self, costs: list[np.ndarray]) -> _front.Front:
        errors = [
            np.array([self._error(i, b) - self._base for b in numbers]) for i, numbers in enumerate(self._choices)
        ]
        return _front.pareto_front(costs, errors)

    def _measured(self, points: Sequence[np.ndarray] | np.ndarray) -> list[_Candidate]:
        """Candidates of points of a front, which say which of its choices each layer takes."""
        allocations = [tuple(numbers[i] for numbers, i in zip(self._choices, point, strict=True)) for point in points]
        errors = self._sensitivity.errors(allocations, "allocations")
        return [_Candidate(*pair) for pair in zip(allocations, errors.tolist(), strict=True)]

    def _nbytes(self, allocation: Sequence[int]) -> int:
        return sum(layer.nbytes(b) for layer, b in zip(self._layers, allocation, strict=True))

    def _average(self, allocation: Sequence[int]) -> float:
        weights = [layer.num_weights for layer in self._layers]
        return sum(w * b for w, b in zip(weights, allocation, strict=True)) / sum(weights)


def _bytes(layers: list[Layer], choices: list[list[int]]) -> list[np.ndarray]:
    return [np.array([layer.nbytes(b) for b in numbers]) for layer, numbers in zip(layers, choices, strict=True)]


def _choices(layers: list[Layer], bitlayers: Iterable[int] | None) -> list[list[int]]:
    """For each layer the numbers of bitlayers to choose from, in increasing order."""
    if bitlayers is None:
        return [list(range(1, layer.bits + 1)) for layer in layers]
    if not isinstance(bitlayers, Iterable):
        raise TypeError(f"`bitlayers` must be the numbers to choose from, but got {bitlayers!r} ({_WHERE}).")
    most = max(layer.bits for layer in layers)
    numbers = sorted({_checks.integer("bitlayers", b, 1, most, _WHERE) for b in bitlayers})
    choices = [[b for b in numbers if b <= layer.bits] for layer in layers]
    for layer, allowed in zip(layers, choices, strict=True):
        if not allowed:
            raise ValueError(
                f"`bitlayers` must hold a number in 1..{layer.bits}, the bitlayers stored, but got {numbers} "
                f"({layer.name}). Allow fewer, or quantize to more bits."
            )
    return choices


def _batches(batch: Any) -> list[Any]:
    """One or several batches as a list of them."""
    is_several = isinstance(batch, list) or (
        isinstance(batch, Iterable) and jax.tree_util.all_leaves([batch]) and not hasattr(batch, "dtype")
    )
    batches = list(batch) if is_several else [batch]
    if not batches:
        raise ValueError(f"`batch` must hold a batch, but got an empty {type(batch).__name__} ({_WHERE}).")
    return batches


def _check_metric(metric: Any) -> None:
    if isinstance(metric, str):
        if metric not in METRICS:
            raise ValueError(f"`metric` must be one of {list(METRICS)} or a function, but got {metric!r} ({_WHERE}).")
        return
    _checks.function("metric", metric, _WHERE)
    _sweep.hashable("metric", metric, _WHERE)


def _check_limits(**limits: Any) -> None:
    given = {name: value for name, value in limits.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"exactly one of `tolerance`, `budget` and `average` must be given, but got {list(given) or 'none'} "
            f"({_WHERE}). It says what the allocation has to keep to."
        )
    for name, value in given.items():
        _checks.number(name, value, _WHERE)


def _check_paths(layers: list[Layer]) -> None:
    """Raises ValueError where a path does not tell BitTensors apart, which the numbers are handed out by."""
    names = [layer.name for layer in layers]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"paths of BitTensors must differ, but `qparams` has two of {twice}. Rename one.")
