"""How far the outputs of a function move when layers use fewer bitlayers: what `pbjax.allocate` decides by."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress

from pbjax import _paths, _sweep
from pbjax._allocation.layers import Layer
from pbjax._bit_tensor import is_bit_tensor

Metric = Callable[[Any, Any], jax.Array]

_MANY_PASSES = 16  # a bar appears, on a terminal, from here on


class Sensitivity:
    """Measures errors of allocations on some batches.

    The error of an allocation is metric(fn(qparams at the allocation, batch), fn(qparams at all bitlayers, batch)),
    averaged over the batches. Allocations are evaluated several at a time, by one function that is compiled once for
    each shape of a batch: how many there are, and which, compiles nothing.
    """

    def __init__(
        self,
        fn: Callable[[Any, Any], Any],
        qparams: Any,
        batches: Sequence[Any],
        metric: str | Metric,
        layers: Sequence[Layer],
        *,
        batch_size: int,
        progress: bool | None,
    ) -> None:
        self._qparams = _sweep.freeze(qparams)
        self._layers = layers
        self.batch_size = batch_size
        self._progress = progress
        self._outputs, self._errors = _compiled(fn, METRICS.get(metric, metric) if isinstance(metric, str) else metric)
        self._full = np.array([layer.bits for layer in layers], np.int32)
        self._is_named = isinstance(metric, str)
        self._batches = []
        for i, batch in enumerate(batches):
            frozen = _sweep.freeze(batch)
            reference = self._outputs(self._qparams, self._full, frozen)
            if isinstance(metric, str):
                _check_outputs(reference, metric, i)
            self._batches.append((frozen, reference))

    def check_depends(self, allocation: Sequence[int]) -> None:
        """Raises ValueError if the outputs are those of all bitlayers, to the last bit, at a lower allocation."""
        lower = np.array(allocation, np.int32)
        if (lower == self._full).all():
            return
        for batch, reference in self._batches:
            outputs = self._outputs(self._qparams, lower, batch)
            if not jax.tree.all(jax.tree.map(np.array_equal, outputs, reference)):
                return
        raise ValueError(
            "`fn` must use the BitTensors of `qparams`, but its outputs are the same at every number of bitlayers. "
            "Let it take its weights from its first argument."
        )

    def errors(self, allocations: Sequence[Sequence[int]]) -> np.ndarray:
        """float64[num], the errors of allocations int[num, layers]."""
        rows = np.asarray(allocations, np.int32)
        chunks = _sweep.in_chunks(rows, self.batch_size)
        passes = [(chunk, *batch) for chunk in chunks for batch in self._batches]
        errors = np.array([self._pass(*one) for one in self._tracked(passes)], np.float64)
        errors = errors.reshape(len(chunks), len(self._batches), -1).mean(1).ravel()[: len(rows)]
        if self._is_named:  # of outputs from themselves: two compiled programs may round them differently
            errors[(rows == self._full).all(1)] = 0.0
        if not np.isfinite(errors).all():
            raise ValueError(self._describe(rows[~np.isfinite(errors)][0], errors[~np.isfinite(errors)][0]))
        return errors

    def _pass(self, chunk: np.ndarray, batch: Any, reference: Any) -> np.ndarray:
        errors = self._errors(self._qparams, chunk, batch, reference)
        if getattr(errors, "shape", None) != chunk.shape[:1] or jnp.issubdtype(errors.dtype, jnp.complexfloating):
            shape = jax.tree.map(lambda leaf: leaf.shape[1:], errors)
            raise ValueError(f"`metric` must return one real number, but got {shape} (argument of allocate).")
        return np.asarray(errors)

    def _tracked(self, passes: list[Any]) -> Iterable[Any]:
        progress = self._progress
        if progress is None:
            progress = len(passes) >= _MANY_PASSES and sys.stderr.isatty()
        if not progress:
            return passes
        return rich.progress.track(passes, "allocate", console=rich.console.Console(stderr=True))

    def _describe(self, allocation: np.ndarray, error: float) -> str:
        used = [f"{count} at {layer.name}" for count, layer in zip(allocation, self._layers, strict=True)]
        reduced = [
            text for text, count, layer in zip(used, allocation, self._layers, strict=True) if count < layer.bits
        ]
        listing = ", ".join(reduced[:3]) + ", .." * (len(reduced) > 3) if reduced else "all"
        return (
            f"errors of `fn` must be finite, but got {error} with these numbers of bitlayers: {listing}. Look at the "
            "outputs of `fn` there, or leave such numbers out with `bitlayers`."
        )


@functools.lru_cache(maxsize=16)
def _compiled(fn: Callable[[Any, Any], Any], metric: Metric) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The outputs of one allocation int32[layers], and the errors of several int32[num, layers]."""

    def outputs(frozen, allocation, batch):
        return fn(_allocated(_sweep.thaw(frozen), allocation), _sweep.thaw(batch))

    def errors(frozen, allocations, batch, reference):
        return jax.vmap(lambda allocation: metric(outputs(frozen, allocation, batch), reference))(allocations)

    return jax.jit(outputs), jax.jit(errors)


def _allocated(tree: Any, allocation: jax.Array) -> Any:
    """The tree with a number of bitlayers for each of its layers."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_bit_tensor)
    start = 0
    for i, leaf in enumerate(leaves):
        if is_bit_tensor(leaf):
            num = math.prod(leaf.stack_shape)
            leaves[i] = leaf.replace(bitlayers=allocation[start : start + num].reshape(leaf.stack_shape))
            start += num
    return jax.tree.unflatten(treedef, leaves)


def _check_outputs(outputs: Any, metric: str, batch: int) -> None:
    """Raises unless errors by one of METRICS are defined for the outputs of one batch."""
    names, leaves, _ = _paths.named_leaves(outputs)
    is_zero = True
    for name, leaf in zip(names, leaves, strict=True):
        where = f"{name or 'output'}, batch {batch}"
        if not jnp.issubdtype(getattr(leaf, "dtype", np.dtype(object)), jnp.floating):
            found = getattr(leaf, "dtype", type(leaf).__name__)
            raise TypeError(
                f"`fn` must return arrays of floats, but got {found} ({where}). Return what they are computed from, as "
                "logits, or give a function as `metric`."
            )
        if not jnp.isfinite(leaf).all():
            raise ValueError(
                f"`fn` must return finite numbers at all bitlayers, but got a NaN or an infinity ({where}). "
                "Look at the batch and at the weights; mask logits with a large negative number."
            )
        if not leaf.size:
            raise ValueError(
                f"`batch` must give outputs with elements, but got shape {leaf.shape} ({where}). Give some inputs."
            )
        if metric == "kl" and not leaf.ndim:
            raise ValueError(
                f"`fn` must return logits along a last axis for metric 'kl', but got a scalar ({where}). "
                "Give another `metric`."
            )
        is_zero = is_zero and not jnp.any(leaf)
    if not leaves or (metric == "mse" and is_zero):
        raise ValueError(
            f"`fn` must return outputs that are not all zero, but got {'zeros' if leaves else 'no arrays'} for batch "
            f"{batch}. Errors are relative to them."
        )


def relative_squared_error(outputs: Any, reference: Any) -> jax.Array:
    """||y - r||**2 / ||r||**2 over all leaves together; in units of the largest |r|, whose square may be no float32."""
    ys, rs = ([leaf.astype(jnp.float32) for leaf in jax.tree.leaves(tree)] for tree in (outputs, reference))
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(r), initial=0) for r in rs]))
    largest = jnp.where(largest > 0, largest, 1)
    square = lambda value: jnp.sum(jnp.square(value / largest))  # noqa: E731
    error = sum(square(y - r) for y, r in zip(ys, rs, strict=True))
    return jnp.asarray(error / sum(map(square, rs)))


def kl_divergence(outputs: Any, reference: Any) -> jax.Array:
    """Mean over rows of KL(softmax(r) || softmax(y)) in nats, where the last axis of every leaf holds logits."""
    total, rows = jnp.float32(0), 0
    for y, r in zip(jax.tree.leaves(outputs), jax.tree.leaves(reference), strict=True):
        log_q, log_p = (jax.nn.log_softmax(value.astype(jnp.float32), -1) for value in (y, r))
        total += jnp.sum(jnp.exp(log_p) * (log_p - log_q))
        rows += math.prod(r.shape[:-1])
    return total / rows


METRICS: dict[str, Metric] = {"mse": relative_squared_error, "kl": kl_divergence}
