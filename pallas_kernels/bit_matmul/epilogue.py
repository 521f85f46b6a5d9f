"""From exact integers to float32, by a fixed sequence of operations that every backend shares.

Compilers may fuse a multiplication and an addition into one operation with one rounding, or not. Here every
product that is added to something is exact (by a power of two, or of two 12-bit halves), so both give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _compat
from pallas_kernels.bit_matmul import contract

_HIGH_HALF = 0xFFFFF000  # sign, exponent and the upper 12 significant bits of a float32


def power_of_two(exponent: jax.Array) -> jax.Array:
    """2.0**exponent exactly, for int32 exponents in -126..127: the bit pattern itself, no transcendental."""
    return lax.bitcast_convert_type((exponent.astype(jnp.int32) + 127) << 23, jnp.float32)


def combine_limbs(limbs: jax.Array, bitlayers: jax.Array) -> jax.Array:
    """Limb sums of one segment as one float32 per output.

    L[a, c] = sum_k q_a * (2 * c_c - (2**w_c - 1)), an exact int32, where q_a is limb a of the activation code (most
    significant first) and c_c is the code of the bitlayers used of code limb c, w_c of them.

    Args:
      limbs: int32[activation limbs, code limbs, m, n].
      bitlayers: int32[m], the number of bitlayers used by each row.

    Returns:
      f32[m, n].
    """
    columns = []
    for c in range(limbs.shape[1]):
        value = None
        for a in range(limbs.shape[0]):
            value = add_limb(value, limbs[a, c])
        columns.append(value)
    return combine_columns(columns, jnp.clip(bitlayers - contract.LIMB_BITS, 0, contract.LIMB_BITS)[:, None])


def centre(
    problem: contract.Problem, sums: jax.Array, row_sums: jax.Array, bitlayers: jax.Array, *, signed: bool = False
) -> jax.Array:
    """The limb sums of all segments, as `combine_limbs` takes them, from what a kernel of unsigned codes returns.

    Args:
      problem: the product.
      sums: int32[segments, activation limbs, code limbs, m, n], sum_k q_a * c_c.
      row_sums: int32[segments, activation limbs, m], sum_k q_a.
      bitlayers: int32[m].
      signed: the sums are of c_c - 2**(w_c - 1), in place of c_c.

    Returns:
      int32[segments, activation limbs, code limbs, m, n].
    """
    rows = jnp.expand_dims(row_sums, (2, 4))
    if signed:
        return 2 * sums + rows
    used = jnp.stack([jnp.clip(bitlayers - first, 0, last - first) for first, last in problem.code_limbs])
    return 2 * sums + (1 - (jnp.int32(1) << used))[None, None, :, :, None] * rows


def add_limb(value: jax.Array | None, limb: jax.Array) -> jax.Array:
    """2**8 * value + limb, the step from one limb of the activations to the next. f32[m, n], int32[m, n]."""
    limb = limb.astype(jnp.float32)
    return limb if value is None else value * 2.0**contract.LIMB_BITS + limb


def combine_columns(columns: Sequence[jax.Array], shift: jax.Array) -> jax.Array:
    """The values of the code limbs as one: f32[m, n] each; `shift` bitlayers of the second are used."""
    if len(columns) == 1:
        return columns[0]
    return jnp.where(shift > 0, columns[0] * power_of_two(shift) + columns[1], columns[0])


def unit(bitlayers: jax.Array, activation_bits: int) -> jax.Array:
    """2**-(b + activation_bits - 2): what an integer of a product with b bitlayers stands for."""
    return power_of_two(2 - activation_bits - bitlayers)


def sum_segments(problem: contract.Problem, values: jax.Array) -> jax.Array:
    """The sums of each group, of its segments in their order: f32[segments, m, n] -> f32[groups, m, n]."""
    if len(problem.segments) == problem.groups:
        return values
    sums: list[jax.Array | None] = [None] * problem.groups
    for (group, _, _), value in zip(problem.segments, values, strict=True):
        total = sums[group]
        sums[group] = value if total is None else total + value
    zero = jnp.zeros(values.shape[1:], jnp.float32)  # without any k
    return jnp.stack([zero if total is None else total for total in sums])


def scale_segments(problem: contract.Problem, limbs: jax.Array, scale: jax.Array, bitlayers: jax.Array) -> jax.Array:
    """Limb sums of all segments, int32[segments, activation limbs, code limbs, m, n], as the product. f32[m, n]."""
    values = sum_segments(problem, jax.vmap(combine_limbs, in_axes=(0, None))(limbs, bitlayers))
    return scale_groups(values, scale, bitlayers, problem.fixed_point_bits)


def scale_prefixes(problem: contract.Problem, running: jax.Array, scale: jax.Array) -> jax.Array:
    """The product at every number of bitlayers, f32[bits, m, n].

    Args:
      problem: the product.
      running: int32[segments, bits, activation limbs, m, n], limb sums after each bitlayer, of the code limb that it
        belongs to.
      scale: f32[min(bits, 4), groups, n].
    """
    columns = []
    for first, last in problem.code_limbs:  # as far as each limb has come; before its first bitlayer, anything
        ends = (running[:, first:last], *[running[:, last - 1 : last]] * (problem.bits - last))
        columns.append(jnp.concatenate((*[running[:, first : first + 1]] * first, *ends), axis=1))
    sums = jnp.transpose(jnp.stack(columns, axis=3), (0, 2, 3, 1, 4, 5))  # [segments, limbs, code limbs, bits, m, n]
    counts = jnp.repeat(jnp.arange(1, problem.bits + 1, dtype=jnp.int32), problem.m)
    y = scale_segments(problem, sums.reshape(*sums.shape[:3], -1, problem.n), scale, counts)
    return y.reshape(problem.bits, problem.m, problem.n)


def scale_groups(sums: jax.Array, scale: jax.Array, bitlayers: jax.Array, activation_bits: int) -> jax.Array:
    """sum_g scale_b[g] * 2**-(b + activation_bits - 2) * sums[g], in the order of the groups.

    Args:
      sums: f32[groups, m, n], the integers of each group as float32.
      scale: f32[min(bits, 4), groups, n].
      bitlayers: int32[m].
      activation_bits: width of the activation codes.

    Returns:
      f32[m, n].
    """
    if sums.shape[0] == 1:
        return sums[0] * unit(bitlayers, activation_bits)[:, None] * scale_rows(scale[:, 0], bitlayers)

    def add(group, total):
        group_sum = lax.dynamic_slice(sums, (group, 0, 0), (1, *sums.shape[1:]), allow_negative_indices=False)[0]
        return add_group(total, group_sum, scale, group, bitlayers, activation_bits)

    zero = _compat.varying_like(jnp.zeros(sums.shape[1:], jnp.float32), sums, scale, bitlayers)
    return lax.fori_loop(0, sums.shape[0], add, zero)


def add_group(
    total: jax.Array,
    group_sum: jax.Array,
    scale: jax.Array,
    group: jax.Array,
    bitlayers: jax.Array,
    activation_bits: int,
) -> jax.Array:
    """total + scale_b[group] * 2**-(b + activation_bits - 2) * group_sum, the step of `scale_groups`. f32[m, n]."""
    # One slice for each row of the scale: XLA's CPU compiler does not vectorize a fusion in which one dynamic slice is
    # read through several index maps (7 times slower for one row of 32 groups by 4096 channels, measured).
    size = (1, 1, scale.shape[2])
    scales = [
        lax.dynamic_slice(scale, (row, group, 0), size, allow_negative_indices=False)[0] for row in range(len(scale))
    ]
    return add_scaled(total, group_sum, _select_row(scales, bitlayers), unit(bitlayers, activation_bits)[:, None])


def add_scaled(total: jax.Array, group_sum: jax.Array, factor: jax.Array, unit: jax.Array) -> jax.Array:
    """total + factor * unit * group_sum, where the unit is a power of two. f32[m, n]; the others broadcast to it."""
    factor_high, factor_low = _halves(factor)
    sum_high, sum_low = _halves(group_sum * unit)
    total = total + factor_low * sum_low
    total = total + factor_low * sum_high
    total = total + factor_high * sum_low
    return total + factor_high * sum_high


def scale_rows(scale: jax.Array, bitlayers: jax.Array) -> jax.Array:
    """The scale that serves each row: f32[min(bits, 4), n], int32[m] -> f32[m, n]."""
    return _select_row([scale[i : i + 1] for i in range(scale.shape[0])], bitlayers)


def _select_row(scales: list[jax.Array], bitlayers: jax.Array) -> jax.Array:
    """f32[1, n] for each count, int32[m] -> f32[m, n]."""
    row = jnp.clip(bitlayers, 1, len(scales)) - 1
    out = jnp.broadcast_to(scales[0], (bitlayers.shape[0], scales[0].shape[1]))
    for i in range(1, len(scales)):  # selects, not a gather: they fuse
        out = jnp.where((row == i)[:, None], scales[i], out)
    return out


def _halves(value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits float32 into two parts of at most 12 significant bits whose sum is exact."""
    bits = lax.bitcast_convert_type(value, jnp.uint32) & jnp.uint32(_HIGH_HALF)
    high = lax.bitcast_convert_type(bits, jnp.float32)
    return high, value - high
