"""Fixed-point activations: a dynamic scale per row, and codes that are the same on every device.

A device may divide approximately (XLA compiles float32 division on NVIDIA GPUs to an instruction that errs by up to
2 ulp), so the only division here is one of integers, and everything else is a single rounded multiplication.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.bit_matmul.epilogue import power_of_two

_MIN_EXPONENT = -100  # rows whose largest magnitude is below 2**-100 keep the step of 2**-100


def quantize_rows(
    x: jax.Array, activation_bits: int, axes: tuple[str, ...] = ()
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Symmetric, saturating, dynamic quantization of each row: q = round_half_even(x / t), t = max|x| / (2**(A-1) - 1).

    Args:
      x: float[m, k].
      activation_bits: A, in 2..24.
      axes: mesh axes over which each device holds a part of k, and max|x| is that of the whole row.

    Returns:
      codes: int32[m, k] in -(2**(A-1) - 1)..2**(A-1) - 1; 0 in rows that are not finite.
      unit: f32[m], t * 2**(A-2): a row's product is its integers times 2**-(A-2) times this (never overflows).
      finite: bool[m], false where a row holds a NaN or an infinity.
    """
    x, magnitude, finite = finite_rows(x.astype(jnp.float32), axes)
    power, inverse = scaling(magnitude, activation_bits)
    top = largest_code(activation_bits)
    codes = jnp.rint((x * power[:, None]) * inverse[:, None])
    return jnp.clip(codes, -top, top).astype(jnp.int32), unit(magnitude, activation_bits), finite


def largest_code(activation_bits: int) -> int:
    """2**(A-1) - 1; codes are symmetric around zero."""
    return 2 ** (activation_bits - 1) - 1


def scaling(magnitude: jax.Array, activation_bits: int) -> tuple[jax.Array, jax.Array]:
    """What takes x to codes, as two factors: x * power is exact, times inverse it is rounded once, then to integers.

    Two, because 2**-127 is no normal float32. magnitude: f32, max|x| of finite rows.
    """
    magnitude = jnp.maximum(magnitude, 2.0**_MIN_EXPONENT)
    pattern = lax.bitcast_convert_type(magnitude, jnp.int32)
    exponent = (pattern >> 23) - 127
    significand = ((pattern & 0x7FFFFF) | 0x800000).astype(jnp.uint32)
    exponent_limited = jnp.minimum(exponent, 126)
    inverse = _reciprocal(significand).astype(jnp.float32) * (2.0**-24 * largest_code(activation_bits))
    return power_of_two(-exponent_limited), inverse * power_of_two(exponent_limited - exponent)


def unit(magnitude: jax.Array, activation_bits: int) -> jax.Array:
    """t * 2**(A-2) of rows whose largest magnitude is this. f32."""
    top = largest_code(activation_bits)
    return jnp.maximum(magnitude, 2.0**_MIN_EXPONENT) * ((top + 1) / (2 * top))


def poison(finite: jax.Array) -> jax.Array:
    """What is added to rows: NaN to those that are not finite, 0 to others. f32[m]."""
    return jnp.where(finite, 0.0, jnp.nan)


def finite_rows(x: jax.Array, axes: tuple[str, ...] = ()) -> tuple[jax.Array, jax.Array, jax.Array]:
    """float[m, k] -> (x with rows that hold a NaN or infinity zeroed, max|x| f32[m], finite bool[m])."""
    # Some of XLA's CPU code for a maximum passes over NaNs: 40 rows of 512, JAX 0.10.2.
    magnitude = jnp.max(jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x)), axis=1, initial=0.0).astype(jnp.float32)
    if axes:
        magnitude = lax.pmax(magnitude, axes)
    finite = jnp.isfinite(magnitude)
    return jnp.where(finite[:, None], x, 0), jnp.where(finite, magnitude, 0.0), finite


def _reciprocal(significand: jax.Array) -> jax.Array:
    """floor(2**47 / significand) for 2**23 <= significand < 2**24, by long division in digits of 8 bits. uint32."""
    remainder = jnp.full_like(significand, 1 << 23)
    quotient = remainder // significand
    remainder = remainder % significand
    for _ in range(3):
        remainder = remainder << 8
        quotient = (quotient << 8) | (remainder // significand)
        remainder = remainder % significand
    return quotient
