"""Activation codes in parts that a product sums exactly in int32: limbs of 8 bits, or single bits packed to words."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.bit_matmul import contract


class Packed(NamedTuple):
    """Codes of a product's rows as its kernel takes them, in place of int32[m, k].

    Attributes:
      bits: uint32, packed in the order of that kernel, or int8 limbs.
      row_sums: int32[segments, activation limbs, m], the sums of each limb of the codes.
      steps: unit and poison of each row, f32[m] each, for a product that is finished: multiplied by the one, the other
        added. None for that of the contract.
    """

    bits: jax.Array
    row_sums: jax.Array
    steps: tuple[jax.Array, jax.Array] | None = None


def split(codes: jax.Array, num: int) -> jax.Array:
    """Two's complement codes in 8-bit limbs, most significant (signed) first. int32[m, k] -> int32[num, m, k]."""
    top = contract.LIMB_BITS * (num - 1)
    lower = [(codes >> shift) & 0xFF for shift in range(top - contract.LIMB_BITS, -1, -contract.LIMB_BITS)]
    return jnp.stack([codes >> top, *lower])


def pack(codes: jax.Array, activation_bits: int) -> jax.Array:
    """int32[m, 32 * words] -> uint32[m, activation_bits, words], bit t of word j from column 32 * j + t."""
    codes = codes.astype(jnp.uint32).reshape(codes.shape[0], 1, -1, contract.WORD_BITS)
    bit = jnp.arange(activation_bits, dtype=jnp.uint32)[None, :, None, None]
    position = jnp.arange(contract.WORD_BITS, dtype=jnp.uint32)[None, None, None, :]
    return jnp.sum(((codes >> bit) & jnp.uint32(1)) << position, axis=-1, dtype=jnp.uint32)
