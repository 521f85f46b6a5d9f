"""Activation codes in limbs: integers that a product with 8 bitlayers sums exactly in int32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.bit_matmul import contract


def split(codes: jax.Array, num: int) -> jax.Array:
    """Two's complement codes in 8-bit limbs, most significant (signed) first. int32[m, k] -> int32[num, m, k]."""
    top = contract.LIMB_BITS * (num - 1)
    lower = [(codes >> shift) & 0xFF for shift in range(top - contract.LIMB_BITS, -1, -contract.LIMB_BITS)]
    return jnp.stack([codes >> top, *lower])
