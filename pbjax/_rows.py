"""What surrounds the integers of a product: rows are quantized before, and multiplied by their steps after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.bit_matmul import activations, limbs

_LARGE = 2.0**64


def on_codes(
    run: Callable[[Any], jax.Array],
    x: jax.Array,
    activation_bits: int | None,
    axes: tuple[str, ...] = (),
    quantize: Callable[[jax.Array], tuple[Any, jax.Array, jax.Array]] | None = None,
) -> jax.Array:
    """run(codes) of the codes of each row, times the step of the row, and NaN for rows that are not finite.

    Args:
      run: the product of the contract: int32[m, k] (or float[m, k] with float activations) to f32[.., m, n].
      x: float[m, k].
      activation_bits: width of the codes, or None for float activations.
      axes: mesh axes over which each device holds a part of k.
      quantize: codes in the form that `run` takes, unit and poison of each row; None is `activations.quantize_rows`.

    Returns:
      f32[.., m, n].
    """
    if activation_bits is None:
        x, magnitude, finite = activations.finite_rows(x, axes)
        # Sums on the way are up to 2 k times the result: rows of large values are scaled down, exactly.
        large = magnitude >= _LARGE
        y = run(x * jnp.where(large, 1 / _LARGE, 1.0).astype(x.dtype)[:, None])
        y, poison = y * _per_row(jnp.where(large, _LARGE, 1.0), y.ndim), activations.poison(finite)
    else:
        if quantize:
            codes, unit, poison = quantize(x)
            if isinstance(codes, limbs.Packed):  # for a kernel, which finishes its rows itself
                return run(codes._replace(steps=(unit, poison)))
        else:
            codes, unit, finite = activations.quantize_rows(x, activation_bits, axes)
            poison = activations.poison(finite)
        y = run(codes)
        # The barriers keep the sequence of roundings: behind them a compiler sees neither that the factor is a constant
        # (it would multiply it with the scale first) nor that zero is added. The addition takes the place of the one
        # that the compiler would fuse with this multiplication, rounding once: a bias of the caller's.
        y = y * _per_row(lax.optimization_barrier(unit), y.ndim)
    return y + _per_row(lax.optimization_barrier(poison), y.ndim)


def _per_row(value: jax.Array, rank: int) -> jax.Array:
    """One value per row, shaped to broadcast to an array of that rank whose last axes are (m, n)."""
    return value.reshape((1,) * (rank - 2) + (-1, 1))
