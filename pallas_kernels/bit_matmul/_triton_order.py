"""Rows by their numbers of bitlayers, on a GPU: so few blocks of rows have more than one, and products for each.

A sort of XLA's is a kernel after the other. Here a row is counted past all that come before it, in one kernel.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _compat
from pallas_kernels.bit_matmul import _triton_codes, contract

_BLOCK = 64  # rows of a program, and rows that they are compared with at a time
_NUM_WARPS = 4
_MAX_COMPARED_ROWS = 2048  # for as many rows 4 million comparisons


def by_count(bitlayers: jax.Array, *, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """The rows of smaller numbers first, those of one number as they were.

    Args:
      bitlayers: int32[m].
      interpret: run on the CPU, as JAX operations.

    Returns:
      order: int32[m], the row at each place.
      rank: int32[m], the place of each row.
    """
    m = bitlayers.shape[0]
    if m > _MAX_COMPARED_ROWS:
        order = jnp.argsort(bitlayers).astype(jnp.int32)
        rank = jnp.zeros_like(order).at[order].set(jnp.arange(m, dtype=jnp.int32), unique_indices=True)
        return order, rank
    shape = jax.ShapeDtypeStruct((m,), jnp.int32)
    return _compat.triton_call(
        functools.partial(_kernel, m=m),
        name="bit_matmul_order",
        grid=(pl.cdiv(m, _BLOCK),),
        out_shape=(shape, shape),
        num_warps=_NUM_WARPS,
        num_stages=1,
        interpret=interpret,
    )(bitlayers)


def _kernel(counts, order, rank, *, m: int):
    """The places of a block of rows. counts, order, rank: [m] int32."""

    def load(start):
        inside = _triton_codes.inside(start, _BLOCK, m)
        # Rows past the last come last, where nothing is.
        count = _triton_codes.load(counts.at[pl.ds(start, _BLOCK)], inside, contract.MAX_BITS + 1)
        return count, start + jnp.arange(_BLOCK, dtype=jnp.int32), inside

    first = pl.program_id(0) * _BLOCK
    count, row, inside = load(first)

    def add_block(i, place):
        other_count, other, _ = load(i * _BLOCK)
        same, smaller = other_count[None, :] == count[:, None], other_count[None, :] < count[:, None]
        before = smaller | (same & (other[None, :] < row[:, None]))
        return place + jnp.sum(before.astype(jnp.int32), axis=1)

    place = lax.fori_loop(0, pl.cdiv(m, _BLOCK), add_block, jnp.zeros_like(row))
    _compat.triton_store(rank.at[pl.ds(first, _BLOCK)], place, mask=inside)
    _compat.triton_store(order.at[place], row, mask=inside)
