"""`pbjax.sweep`: a quantity at every number of bitlayers, and the vmapped passes that it shares with `allocate`."""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pbjax import _bit_tensor, _checks, _paths
from pbjax._bit_tensor import is_bit_tensor
from pbjax._quantize import with_bitlayers


def sweep(
    metric: Callable[[Any], Any],
    qparams: Any,
    bitlayers: Iterable[int] | ArrayLike = range(1, 9),
    *,
    batch_size: int | None = None,
) -> Any:
    """metric(with_bitlayers(qparams, b)) for every b, in vmapped passes.

    The same as a loop over `bitlayers`, and compiled once: products of few rows share the words that they read, so a
    sweep of one row costs little more than its largest number of bitlayers. The compiled function is kept for the
    metrics used last; a further call with the same `metric` (the same function object, not one more `lambda`) and the
    same shapes compiles nothing.

    Args:
      metric: a function of `qparams` that JAX can trace, to any pytree of arrays: an accuracy, a loss, the outputs
        themselves. Unmodified models go through `pbjax.quantized` in it.
      qparams: any pytree with BitTensors.
      bitlayers: int[num], the numbers of bitlayers to evaluate; each goes to every BitTensor. Python and NumPy integers
        must lie in 1..bits; JAX arrays, whose values may not be known, are clipped to it.
      batch_size: how many of them are evaluated in one pass; None takes all. Activations take this many times the
        memory of one evaluation; the weights are never copied.

    Returns:
      What `metric` returns, with a leading axis of length num.

    Raises:
      TypeError: `metric` is no function, or has no hash; `bitlayers` are no integers.
      ValueError: a number of bitlayers that a weight does not store (the message names the weight), no number at all,
        or no BitTensor in `qparams`.

    Example:
      >>> qparams = pbjax.quantize({"kernel": jnp.eye(64)}, bits=8)
      >>> def error(qparams):
      ...     return jnp.abs(pbjax.matmul(jnp.ones((1, 64)), qparams["kernel"]) - 1).max()
      >>> pbjax.sweep(error, qparams, [1, 4, 8]).shape
      (3,)
    """
    _checks.function("metric", metric, "argument of sweep")
    counts = _as_counts(bitlayers)
    names, leaves, _ = _paths.named_leaves(qparams)
    _bit_tensor.check_any(leaves)
    for name, leaf in zip(names, leaves, strict=True):
        if is_bit_tensor(leaf):
            _bit_tensor.check_bitlayers(counts, leaf.bits, name)
    if batch_size is not None:
        _checks.integer("batch_size", batch_size, 1, None, "argument of sweep")
    run = _compiled(hashable("metric", metric, "argument of sweep"))
    frozen = freeze(qparams)
    parts = [run(part, frozen) for part in in_chunks(counts, min(batch_size or len(counts), len(counts)))]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[: len(counts)], *parts)


def _as_counts(bitlayers: Any) -> np.ndarray | jax.Array:
    counts = bitlayers if isinstance(bitlayers, jax.Array) else np.asarray(_listed(bitlayers))
    if counts.ndim != 1 or not len(counts):
        raise ValueError(
            f"`bitlayers` must be one or more numbers in a row, but got {bitlayers!r} (argument of sweep). "
            "For one number, `pbjax.with_bitlayers` will do."
        )
    return counts


def _listed(values: Any) -> Any:
    return list(values) if isinstance(values, Iterable) and not hasattr(values, "dtype") else values


@functools.lru_cache(maxsize=16)
def _compiled(metric: Callable[[Any], Any]) -> Callable[..., Any]:
    @jax.jit
    def run(counts, frozen):
        # Thawed inside of the map: an NNX module that writes into itself is then one of the map's own.
        return jax.vmap(lambda count: metric(with_bitlayers(thaw(frozen), count)))(jnp.asarray(counts))

    return run


def hashable(name: str, function: Any, where: str) -> Any:
    """A function that can be the key of a cache; raises TypeError for others."""
    try:
        hash(function)
    except TypeError:
        raise TypeError(
            f"`{name}` must have a hash, but got {type(function).__name__} ({where}). Wrap it in a function."
        ) from None
    return function


def in_chunks(rows: Any, size: int) -> list[Any]:
    """The rows, `size` at a time; the last of them is repeated until the last chunk is full, so that one shape does."""
    index = np.minimum(np.arange(-(-len(rows) // size) * size), len(rows) - 1).reshape(-1, size)
    return [rows[i] for i in index]


# Trees with leaves that are no arrays (functions, flags) under `jax.jit`.


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """A leaf that is no array, as part of a tree's structure.

    Its type and its text tell apart what Python calls equal: 1, 1.0 and True, 0.0 and -0.0.
    """

    value: Any
    kind: type
    text: str


def freeze(tree: Any) -> Any:
    """The tree as `jax.jit` takes it: what is no array becomes part of the structure."""
    static = lambda leaf: _Static(leaf, type(leaf), repr(leaf) if isinstance(leaf, numbers.Number) else "")  # noqa: E731
    return jax.tree.map(lambda leaf: leaf if hasattr(leaf, "dtype") else static(leaf), tree)


def thaw(tree: Any) -> Any:
    """The tree that was frozen."""
    is_static = lambda leaf: isinstance(leaf, _Static)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.value if is_static(leaf) else leaf, tree, is_leaf=is_static)
