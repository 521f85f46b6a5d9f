"""From the sums of a product's kernel to float32 on a GPU: parts of k, limbs, groups and steps of rows, in one kernel.

What `epilogue` is to XLA, which makes a kernel of it for the sums of the parts, one for the limbs, and with groups a
loop of kernels, which waits for the host and stays out of CUDA graphs; here the loop over groups runs inside of a
program. The operations and their order are those of `epilogue`, mostly by its own functions, and what is added are
integers or exact products: so the bits are the same, whether or not a compiler fuses them.

A program finishes some channels of one row, which is little work; most of its time it waits for sums. So those of
several parts, or of several groups, are requested together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _compat
from pallas_kernels.bit_matmul import _triton_codes, contract, epilogue

# Where a kernel left the sum of (slot, part, limb of the activations, row, channels).
Place = Callable[[Any, Any, Any, Any, Any], tuple[Any, ...]]

_BLOCK_N = 64
_NUM_WARPS = 2
_LOADS = 16  # of a lane, requested together


def finish(
    problem: contract.Problem,
    sums: jax.Array,
    row_sums: jax.Array,
    scale: jax.Array,
    bitlayers: jax.Array | None,
    *,
    steps: tuple[jax.Array, jax.Array] | None = None,
    parts: int,
    place: Place,
    signed: bool = False,
    interpret: bool,
) -> jax.Array:
    """The product of the contract, f32[m, n], or without `bitlayers` at every number of them, f32[bits, m, n].

    Args:
      problem: the product.
      sums: int32, sum_k q_a * c_c of part p of a segment s for each limb a of the activations and c of the weights, at
        place(c, s * parts + p, a, ..). Without `bitlayers` the first number is that of a bitlayer, and what lies there
        is the sum after it, of the limb that it belongs to.
      row_sums: int32[segments, activation limbs, m], sum_k q_a.
      scale: f32[min(bits, 4), groups, n].
      bitlayers: int32[m].
      steps: as of `limbs.Packed`.
      parts: of each segment.
      place: where in `sums` each of them is.
      signed: sums are of c - 2**(w - 1), of w bitlayers, in place of c.
      interpret: run on the CPU, as JAX operations.
    """
    num_counts = problem.bits if bitlayers is None else 1
    out = _compat.triton_call(
        functools.partial(_kernel, problem=problem, parts=parts, place=place, signed=signed),
        name="bit_matmul_epilogue",
        grid=(problem.m, pl.cdiv(problem.n, _BLOCK_N), num_counts),
        out_shape=jax.ShapeDtypeStruct((num_counts, problem.m, problem.n), jnp.float32),
        num_warps=_NUM_WARPS,
        num_stages=1,
        interpret=interpret,
    )(bitlayers, row_sums, steps, scale, sums)
    return out if bitlayers is None else out[0]


def scale_groups(
    problem: contract.Problem, sums: jax.Array, scale: jax.Array, bitlayers: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """`epilogue.scale_groups` of f32[groups, m, n] in one kernel: what devices that share k have added up."""
    m, n = sums.shape[1:]
    if 0 in (m, n):
        return jnp.zeros((m, n), jnp.float32)
    return _compat.triton_call(
        functools.partial(_scale_groups_kernel, problem=problem),
        name="bit_matmul_groups",
        grid=(m, pl.cdiv(n, _BLOCK_N)),
        out_shape=jax.ShapeDtypeStruct((m, n), jnp.float32),
        num_warps=_NUM_WARPS,
        num_stages=1,
        interpret=interpret,
    )(bitlayers, scale, sums)


def _scale_groups_kernel(counts, scale, sums, out, *, problem: contract.Problem):
    """One row and a block of channels; operands as of `_kernel`, but sums are [groups, m, n] f32 and out is [m, n]."""
    row, first_channel = pl.program_id(0), pl.program_id(1) * _BLOCK_N
    channels = pl.ds(first_channel, _BLOCK_N)
    inside = _triton_codes.inside(first_channel, _BLOCK_N, sums.shape[2])
    total = _add_groups(
        problem,
        lambda group: _triton_codes.load(sums.at[group, row, channels], inside, 0),
        lambda group: _triton_codes.load(scale.at[_scale_row(scale, counts[row]), group, channels], inside, 0),
        epilogue.unit(counts[row], problem.fixed_point_bits),
        at_once=_LOADS,
    )
    _compat.triton_store(out.at[row, channels], total, mask=inside)


def _kernel(
    counts, row_sums, steps, scale, sums, out, *, problem: contract.Problem, parts: int, place: Place, signed: bool
):
    """One row, a block of channels, and one number of bitlayers.

    Args:
      counts: [m] int32, or None
      row_sums: [segments, activation limbs, m] int32
      steps: [m] f32, unit and poison, or None
      scale: [min(bits, 4), groups, n] f32
      sums: int32, as `place` says
      out: [1, m, n] f32, without counts [bits, m, n]
      problem: the product.
      parts: of each segment.
      place: of each sum.
      signed: as of `finish`.
    """
    row, first_channel, index = pl.program_id(0), pl.program_id(1) * _BLOCK_N, pl.program_id(2)
    channels = pl.ds(first_channel, _BLOCK_N)
    inside = _triton_codes.inside(first_channel, _BLOCK_N, problem.n)
    count = index + 1 if counts is None else counts[row]
    block_parts = min(_LOADS, pl.next_power_of_2(parts))
    zero = jnp.zeros((_BLOCK_N,), jnp.float32)

    def load_parts(slot, limb, segment, first):  # int32[_BLOCK_N], added up
        part = first + jnp.arange(block_parts, dtype=jnp.int32)
        masks = [] if inside is None else [inside[None, :]]
        masks += [] if parts % block_parts == 0 else [(part < parts)[:, None]]
        ref = sums.at[place(slot, pl.ds(segment * parts + first, block_parts), limb, row, channels)]
        return jnp.sum(_triton_codes.load(ref, _triton_codes.all_of((block_parts, _BLOCK_N), masks), 0), axis=0)

    def limb_sum(slot, limb, segment):
        if parts <= block_parts:
            return load_parts(slot, limb, segment, 0)

        def add(i, total):
            return total + load_parts(slot, limb, segment, i * block_parts)

        return lax.fori_loop(0, pl.cdiv(parts, block_parts), add, zero.astype(jnp.int32))

    def segment_sum(segment):
        columns = []
        for c, (first, last) in enumerate(problem.code_limbs):
            used = jnp.clip(count - first, 0, last - first)
            # Of a sweep, the last sum of this limb up to the count; before its first bitlayer, anything.
            slot = jnp.clip(count - 1, first, last - 1) if counts is None else jnp.int32(c)
            weight = 1 if signed else 1 - (jnp.int32(1) << used)
            column = None
            for a in range(problem.activation_limbs):
                limb = jnp.int32(a)
                centred = 2 * limb_sum(slot, limb, segment) + weight * row_sums[segment, limb, row]
                column = epilogue.add_limb(column, centred)
            columns.append(column)
        return epilogue.combine_columns(columns, jnp.clip(count - contract.LIMB_BITS, 0, contract.LIMB_BITS))

    def group_sum(group):
        if len(problem.segments) == problem.groups:
            return segment_sum(group)
        per_group = len(problem.segments) if problem.groups == 1 else _segments_per_group(problem)
        first = group * per_group
        stop = jnp.minimum(first + per_group, len(problem.segments))
        return lax.fori_loop(first, stop, lambda segment, total: total + segment_sum(segment), zero)

    def factor(group):
        return _triton_codes.load(scale.at[_scale_row(scale, count), group, channels], inside, 0)

    unit = epilogue.unit(count, problem.fixed_point_bits)
    if problem.groups == 1:
        total = group_sum(jnp.int32(0)) * unit * factor(jnp.int32(0))
    else:
        at_once = max(1, _LOADS // (block_parts * problem.activation_limbs * len(problem.code_limbs)))
        total = _add_groups(problem, group_sum, factor, unit, at_once=at_once)
    if steps is not None:
        of_row, poison = steps
        total = total * of_row[row] + poison[row]  # of which the latter is 0 or NaN: fused, it rounds as often
    _compat.triton_store(out.at[index, row, channels], total, mask=inside)


def _scale_row(scale: Any, count: jax.Array) -> jax.Array:
    """Where the scales of a number of bitlayers are."""
    return jnp.clip(count, 1, scale.shape[0]) - 1


def _add_groups(
    problem: contract.Problem,
    group_sum: Callable[[jax.Array], jax.Array],
    factor: Callable[[jax.Array], jax.Array],
    unit: jax.Array,
    *,
    at_once: int,
) -> jax.Array:
    """The sum over groups, in their order, of which some are loaded together."""

    def add(i, total):
        for group in [i * at_once + j for j in range(at_once)]:
            exists = group < problem.groups  # past the last, it once more, times zero
            group = jnp.minimum(group, problem.groups - 1)
            total = epilogue.add_scaled(total, group_sum(group), jnp.where(exists, factor(group), 0.0), unit)
        return total

    return lax.fori_loop(0, pl.cdiv(problem.groups, at_once), add, jnp.zeros((_BLOCK_N,), jnp.float32))


def _segments_per_group(problem: contract.Problem) -> int:
    """Of all groups but the last, which may have fewer."""
    return sum(group == 0 for group, _, _ in problem.segments)
