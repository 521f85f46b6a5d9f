"""Checks of arguments that several functions take: each returns what the rest of the code may rely on, or raises."""

from __future__ import annotations

import math
import numbers
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pallas_kernels.bit_matmul import contract

MIN_ACTIVATION_BITS = 2


def integer(name: str, value: Any, low: int, high: int | None, where: str) -> int:
    """A static integer in low..high as Python's own, whichever kind of integer came.

    Args:
      name: of the argument.
      value: what the user gave.
      low: smallest value allowed.
      high: largest value allowed; None for no limit.
      where: the argument, rule or pytree path, for the message.

    Raises:
      TypeError: not an integer; a traced one is none, because shapes depend on it.
      ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"`{name}` must be an int, but got {value!r} ({where}).")
    if value < low or (high is not None and value > high):
        limits = f"lie in {low}..{high}" if high is not None else f"be at least {low}"
        raise ValueError(f"`{name}` must {limits}, but got {value} ({where}).")
    return int(value)


def number(name: str, value: Any, where: str) -> float:
    """A static, finite number that is not negative, as Python's own, whichever kind of number or scalar array came.

    Raises:
      TypeError: not a real number.
      ValueError: negative, infinite or a NaN.
    """
    found = as_float64(value)
    if found is None or found.ndim:
        raise TypeError(f"`{name}` must be a number, but got {value!r} ({where}).")
    if not 0 <= found < math.inf:
        raise ValueError(f"`{name}` must be finite and not negative, but got {value} ({where}).")
    return found.item()


def as_float64(value: Any) -> np.ndarray | None:
    """A real number, or an array of known ones of any dtype, as float64[..]; None for anything else."""
    if isinstance(value, numbers.Real) and not isinstance(value, (bool, np.generic)):
        try:
            return np.array(float(value))
        except OverflowError:  # an integer or a fraction beyond float64
            return np.array(math.copysign(math.inf, value))
    if not hasattr(value, "dtype") or isinstance(value, Tracer):
        return None
    array = np.asarray(value)
    is_real = jnp.issubdtype(array.dtype, jnp.integer) or jnp.issubdtype(array.dtype, jnp.floating)
    return array.astype(np.float64) if is_real else None


def activation_bits(value: Any, where: str) -> int | None:
    """The width of fixed-point activations, 2..24, or None for float ones."""
    if value is None:
        return None
    try:
        return integer("activation_bits", value, MIN_ACTIVATION_BITS, contract.MAX_ACTIVATION_BITS, where)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error} Use None for float activations.") from None


def group_size(value: Any, where: str) -> int | None:
    """Consecutive k that share a scale, a multiple of 32, or None for all of k."""
    if value is None:
        return None
    value = integer("group_size", value, 1, None, where)
    if value % contract.WORD_BITS:
        raise ValueError(
            f"`group_size` must be a multiple of {contract.WORD_BITS}, but got {value} ({where}). "
            "Use None for one scale per output channel."
        )
    return value


def native(name: str, value: Any, where: str) -> None:
    """Raises TypeError for a NumPy array in another machine's byte order: JAX may take its bytes for this one's."""
    if isinstance(value, np.ndarray) and not value.dtype.isnative:
        raise TypeError(
            f"`{name}` must be in the byte order of this machine, but got {value.dtype} ({where}). Cast it first."
        )


def function(name: str, value: Any, where: str) -> None:
    """Raises TypeError unless a value can be called."""
    if not callable(value):
        raise TypeError(f"`{name}` must be a function, but got {value!r} ({where}).")
