"""`pbjax.allocate`: how many bitlayers each layer gets, from a few batches and a limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pallas_kernels.bit_matmul import contract
from pbjax import _checks, _sweep
from pbjax._allocation.costs import Cost, costs_of, shares_of
from pbjax._allocation.layers import Layer, check_known, check_paths, layers_of
from pbjax._allocation.outcome import Allocation
from pbjax._allocation.search import Search
from pbjax._allocation.sensitivity import METRICS, Metric, Sensitivity

_WHERE = "argument of allocate"


def allocate(
    fn: Callable[[Any, Any], Any],
    qparams: Any,
    batch: Any,
    *,
    tolerance: float | None = None,
    budget: float | None = None,
    average: float | None = None,
    cost: Cost = "bytes",
    metric: str | Metric = "mse",
    bitlayers: Iterable[int] | None = None,
    rounds: int = 4,
    batch_size: int = 8,
    progress: bool | None = None,
) -> Allocation:
    """Chooses a number of bitlayers for each layer: the least error within a cost, or the least cost within an error.

    Codes are nested, so the precision of a layer is a run-time number, and its effect can be measured instead of
    modelled: no gradients, no Hessians, no labels. With r the outputs of `fn` at all bitlayers, and y(l, b) those with
    layer l at b bitlayers and all others at all of theirs,

        e(l, b) = metric(y(l, b), r),        E(b_1, .., b_L) ~ sum_l e(l, b_l),

    which holds where errors of layers are small and uncorrelated. All e(l, b) are measured in vmapped passes of one
    compiled function, and for each cost C = sum_l cost(l, b_l) the allocation of least E is found (a multiple-choice
    knapsack, for all costs at once). The sum only proposes; what decides is measured:

    - with `budget` or `average`, the proposal within the limit, or a uniform number of bitlayers if that measures
      better;
    - with `tolerance`, the cheapest proposal whose measured error is within it, found by bisection (as if errors never
      rose with costs), or a uniform number if that is cheaper.

    In further rounds all of it is repeated around the outcome so far, to take into account how errors interact; within
    a limit, exchanges are measured too, in which one layer gets bitlayers that another gives up. The result is never
    worse than the best uniform number of bitlayers within the same limit, on these batches.

    Costs are bytes, unless `cost` says otherwise. With "time" this runs every product of `fn` by itself, on the devices
    that hold the weights, and counts the seconds of `pbjax.product_seconds(fn, qparams, batch)`: those of one call of
    `fn` that products of BitTensors take, on this machine, at the number of rows of the (first) batch. A call that is
    to be fast often has fewer rows than `batch`; give its times then:
    `cost=pbjax.product_seconds(fn, qparams, request)`. Times that were measured elsewhere serve as well.

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
      budget: largest cost allowed: by default, bytes of all BitTensors, words and scales; with "time", seconds.
      average: most bitlayers per weight, averaged over all weights. Exactly one of the three has to be given.
      cost: what `budget` limits and the cheapest has least of, added up over layers:
        - "bytes", of the bitlayers in use and their scales;
        - "time", seconds of products, measured now;
        - for each path of a BitTensor its costs at 1, 2, .., bits bitlayers, float[bits], or float[*stack, bits] for
          each weight of a stack by itself: a mapping from paths, or a function of a path.
      metric: the error of outputs y against r:
        - "mse": ||y - r||**2 / ||r||**2, over all outputs of a batch together: 1e-4 is a hundredth in the norm;
        - "kl": mean KL divergence of softmax(y) from softmax(r), in nats, where the last axis holds logits;
        - a function metric(y, r) -> float[]. With a `fn` that returns a loss, `lambda y, r: y - r` is its increase.
      bitlayers: numbers to choose from, for each weight those that it stores; None is all, 1..bits.
      rounds: how often sensitivities are measured, at most: first around all bitlayers, then around the best so far,
        until that gains nothing.
      batch_size: how many allocations are evaluated in one pass, which takes as many times the activations of one.
      progress: whether to show progress bars; None shows them on a terminal.

    Returns:
      An `Allocation`: its `bitlayers` go to `pbjax.with_bitlayers`; print it for a table.

    Raises:
      TypeError: an argument of the wrong type; called in a trace (of `jax.jit`, ..); outputs that
        are no floats, with a named metric.
      ValueError: none or several limits; a budget or average below the smallest choice; a tolerance that no choice
        reaches; costs that are missing, negative, not finite (or not so in sum), or given with `average`; no BitTensor,
        or none that `fn` uses; outputs or errors that are not finite; bitlayers that a weight does not store.

    Cost: on each batch and in each round one evaluation of `fn` for each layer and number of bitlayers, and some tens;
    with "time" that of `pbjax.product_seconds` before.

    References:
      Rate allocation among quantizers by measured errors: Y. Shoham, A. Gersho, Efficient Bit Allocation for an
      Arbitrary Set of Quantizers, IEEE Trans. ASSP 36(9), 1988. Measured times of layers as what is limited: Cai, Zhu,
      Han, ProxylessNAS, arXiv 1812.00332. Sensitivities of layers for mixed precision: Dong, Yao,
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
    name, limit = _check_limits(tolerance=tolerance, budget=budget, average=average)
    if name == "average" and not (isinstance(cost, str) and cost == "bytes"):
        raise ValueError(f"`cost` must be left out with `average`, which counts bitlayers ({_WHERE}). Give a `budget`.")
    rounds = _checks.integer("rounds", rounds, 1, None, _WHERE)
    batch_size = _checks.integer("batch_size", batch_size, 1, None, _WHERE)
    layers = layers_of(qparams)
    check_paths(layers)
    choices = _choices(layers, bitlayers)
    batches = _batches(batch)
    check_known(qparams, batches, _WHERE)
    costs = costs_of(cost, layers, fn, qparams, batches[0])
    sensitivity = Sensitivity(fn, qparams, batches, metric, layers, batch_size=batch_size, progress=progress)
    sensitivity.check_depends([min(allowed) for allowed in choices])
    search = Search(layers, choices, sensitivity, costs)
    if name == "tolerance":
        chosen = search.cheapest_within(limit, rounds)
    elif name == "budget":
        chosen = search.best_within(name, limit, rounds)
    else:
        chosen = search.best_within(name, limit, rounds, shares_of(layers))
    return search.outcome(chosen, metric if isinstance(metric, str) else getattr(metric, "__name__", "error"))


def _choices(layers: Sequence[Layer], bitlayers: Iterable[int] | None) -> list[list[int]]:
    """For each layer the numbers of bitlayers to choose from, in increasing order."""
    if bitlayers is None:
        return [list(range(1, layer.bits + 1)) for layer in layers]
    if not isinstance(bitlayers, Iterable):
        raise TypeError(f"`bitlayers` must be the numbers to choose from, but got {bitlayers!r} ({_WHERE}).")
    numbers = sorted(
        {_checks.integer("bitlayers", b, 1, contract.MAX_BITS, _WHERE) for b in np.asarray(list(bitlayers))}
    )
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
    if isinstance(batch, Mapping) and jax.tree_util.all_leaves([batch]):
        raise TypeError(f"`batch` must be a pytree, but got {type(batch).__name__} ({_WHERE}). Make a dict of it.")
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


def _check_limits(**limits: Any) -> tuple[str, float]:
    """The one that is given."""
    given = {name: value for name, value in limits.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"exactly one of `tolerance`, `budget` and `average` must be given, but got {list(given) or 'none'} "
            f"({_WHERE}). It says what the allocation has to keep to."
        )
    ((name, value),) = given.items()
    return name, _checks.number(name, value, _WHERE)
