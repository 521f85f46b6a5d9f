"""Rows of floats on a GPU: largest magnitude, rounding to fixed point, and bits or limbs of the codes, in one kernel.

What `activations.quantize_rows` and the packing after it are for XLA, which needs a kernel for each reduction; the bits
are the same. A program packs some words of one row; the more rows, the more words. First it looks for the largest
magnitude of the whole row, which all programs of the row do for themselves: what they read again comes from the cache,
and another kernel would be launched, and would wait for the last of them. A few more programs sum the codes of a row,
one for each segment of k.

Rounding half to even is spelled out, since Triton has no such operation: the fraction is exact, and taken from an
absolute value, so that no compiler makes one operation of this subtraction and the multiplication before.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _compat
from pallas_kernels.bit_matmul import _int8_operands, _triton_codes, activations, contract, limbs

_MAGNITUDE = 0x7FFFFFFF  # all of a float32 but its sign; as an integer, it is ordered like the float
_INFINITY = 0x7F800000
_NAN = 0x7FC00000
_NUM_WARPS = 4
_ROW_BLOCK = 4096  # of a row that is read at once: 8 loads of 16 bytes to a lane
_SUM_BLOCK = 1024
_MIN_WORDS, _MAX_WORDS = 8, 32  # of a block
_BLOCKS_OF_ROW = 16
_PROGRAMS = 264  # two to each of the 132 SMs of an H200: with more, which all read the whole row, less is gained


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a product wants the bits of the codes.

    Attributes:
      shape: of the uint32 array of words.
      rows: of activations in it; those past m are zeros.
      num_words: of a row.
      source: int32[num_words], which word of k each of them is, -1 for zeros; None if they are those of k in order.
      offset: of (row, bit, word), 8 bits of a limb from the least significant of the code on, in the flat array.
      bits: of each code; past `activation_bits` they repeat the sign.
    """

    shape: tuple[int, ...]
    rows: int
    num_words: int
    source: np.ndarray | None
    offset: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    bits: int


def quantize_rows(
    problem: contract.Problem, x: jax.Array, layout: Layout | None, *, interpret: bool
) -> tuple[limbs.Packed, jax.Array, jax.Array]:
    """The codes of `activations.quantize_rows` as a product takes them.

    Args:
      problem: the product.
      x: float[m, k].
      layout: of the bits; None for limbs as the int8 tensor core takes them, int8[limbs, m, 32 * num_words], all but
        the first less 128, k within each word in the order of `_triton_codes`.
      interpret: run on the CPU, as JAX operations.

    Returns:
      packed: bits or limbs of the codes, and their sums.
      unit: f32[m], as there.
      poison: f32[m], NaN for rows that are not finite, 0 for others.
    """
    num_words, rows = (problem.num_words, problem.m) if layout is None else (layout.num_words, layout.rows)
    spans = np.array([(start, stop) for _, start, stop in problem.segments], np.int32) * contract.WORD_BITS
    shape = (problem.activation_limbs, problem.m, num_words * contract.WORD_BITS)
    codes = jax.ShapeDtypeStruct(shape, jnp.int8)
    if layout is not None:
        codes = jax.ShapeDtypeStruct((int(np.prod(layout.shape)),), jnp.uint32)
    row_sums = jax.ShapeDtypeStruct((len(spans), problem.activation_limbs, problem.m), jnp.int32)
    row = jax.ShapeDtypeStruct((problem.m,), jnp.float32)
    if problem.m == 0:
        bits, none, unit = (jnp.zeros(of.shape, of.dtype) for of in (codes, row_sums, row))
        return limbs.Packed(bits=bits if layout is None else bits.reshape(layout.shape), row_sums=none), unit, unit
    block_words = min(_MAX_WORDS, max(_MIN_WORDS, pl.next_power_of_2(pl.cdiv(num_words, _BLOCKS_OF_ROW))))
    num_blocks = pl.cdiv(pl.cdiv(num_words, block_words), pl.cdiv(_PROGRAMS, rows))
    num_programs = pl.cdiv(num_words, num_blocks * block_words)
    source = None if layout is None else layout.source
    if source is not None:
        padding = num_programs * num_blocks * block_words - source.size
        source = jnp.asarray(np.pad(source, (0, padding), constant_values=-1))
    kernel = functools.partial(
        _kernel,
        problem=problem,
        layout=layout,
        num_words=num_words,
        block_words=block_words,
        num_blocks=num_blocks,
        num_programs=num_programs,
    )
    bits, sums, unit, poison = _compat.triton_call(
        kernel,
        name="bit_matmul_pack",
        grid=(rows, num_programs + len(spans)),
        out_shape=(codes, row_sums, row, row),
        num_warps=_NUM_WARPS,
        num_stages=1,
        interpret=interpret,
    )(source, jnp.asarray(spans), x)
    return limbs.Packed(bits=bits if layout is None else bits.reshape(layout.shape), row_sums=sums), unit, poison


def _kernel(
    source,
    spans,
    x,
    bits,
    row_sums,
    unit,
    poison,
    *,
    problem: contract.Problem,
    layout: Layout | None,
    num_words: int,
    block_words: int,
    num_blocks: int,
    num_programs: int,
):
    """One row, and some blocks of words or one segment of k.

    Args:
      source: [words] int32, or None
      spans: [segments, 2] int32, where each segment begins and ends in k
      x: [m, k] float
      bits: [size of the layout] uint32, or [activation limbs, m, 32 * num_words] int8
      row_sums: [segments, activation limbs, m] int32
      unit: [m] f32
      poison: [m] f32
      problem: the product.
      layout: of the bits, or None.
      num_words: of a row.
      block_words: words of a block.
      num_blocks: of a program.
      num_programs: of a row.
    """
    row, program = pl.program_id(0), pl.program_id(1)
    inside = row < problem.m

    def load(index, mask):  # f32, zero where there is nothing
        value = _compat.triton_load(x.at[row, index], mask=mask & inside, other=jnp.zeros((), x.dtype))
        return value.astype(jnp.float32)

    def add_magnitude(i, largest):
        size = largest.shape[0]
        index = i * size + jnp.arange(size, dtype=jnp.int32)
        pattern = lax.bitcast_convert_type(load(index, index < problem.k), jnp.int32)
        return jnp.maximum(largest, pattern & _MAGNITUDE)

    size = min(_ROW_BLOCK, pl.next_power_of_2(problem.k))
    largest = lax.fori_loop(0, pl.cdiv(problem.k, size), add_magnitude, jnp.zeros((size,), jnp.int32))
    pattern = jnp.max(largest)
    finite = pattern < _INFINITY
    magnitude = lax.bitcast_convert_type(jnp.where(finite, pattern, 0), jnp.float32)
    power, inverse = activations.scaling(magnitude, problem.fixed_point_bits)

    def codes(index, mask):
        value = (jnp.where(finite, load(index, mask), 0.0) * power) * inverse
        pattern = lax.bitcast_convert_type(value, jnp.int32)
        size = lax.bitcast_convert_type(pattern & _MAGNITUDE, jnp.float32)
        whole = size.astype(jnp.int32)  # towards zero
        fraction = size - whole.astype(jnp.float32)
        up = (fraction > 0.5) | ((fraction == 0.5) & ((whole & 1) == 1))
        rounded = jnp.minimum(whole + up.astype(jnp.int32), activations.largest_code(problem.fixed_point_bits))
        return jnp.where(pattern < 0, -rounded, rounded)

    position = jnp.arange(contract.WORD_BITS, dtype=jnp.int32)

    def words_of(block):
        """Their number in the row, the number of k in each bit of them, and the codes there. [words], [words, 32]."""
        word = block * block_words + jnp.arange(block_words, dtype=jnp.int32)
        first = word if source is None else source[pl.ds(block * block_words, block_words)]
        place = position if layout is not None else _triton_codes.position_of(position)
        index = first[:, None] * contract.WORD_BITS + place[None, :]
        return word, codes(index, (first >= 0)[:, None] & (index < problem.k))

    def pack(block, layout: Layout):
        word, values = words_of(block)
        column = jnp.arange(contract.LIMB_BITS, dtype=jnp.int32)
        for low in range(0, layout.bits, contract.LIMB_BITS):
            each = (values[:, None, :] >> (low + column)[None, :, None]) & 1
            packed = jnp.sum(each << position[None, None, :], axis=2)
            mask = (word < num_words)[:, None] & (low + column < layout.bits)[None, :]
            # What is not stored has a place of its own: interpret mode writes back what it finds at every offset.
            offset = jnp.where(mask, layout.offset(row, (low + column)[None, :], word[:, None]), bits.shape[0])
            _compat.triton_store(bits.at[offset], packed.astype(jnp.uint32), mask=mask)

    def split(block):
        word, values = words_of(block)
        for a, limb in enumerate(limbs_of(values)):
            limb = limb - _int8_operands.HALF if a else limb
            index = (word[:, None] * contract.WORD_BITS + position[None, :]).reshape(-1)
            mask = jnp.broadcast_to((word < num_words)[:, None], values.shape).reshape(-1)
            ref = bits.at[jnp.full_like(index, a), jnp.full_like(index, row), index]
            _compat.triton_store(ref, limb.astype(jnp.int8).reshape(-1), mask=mask)

    def limbs_of(values):  # the most significant first, of which alone the sign is
        top = contract.LIMB_BITS * (problem.activation_limbs - 1)
        return values >> top, *(
            (values >> low) & 0xFF for low in range(top - contract.LIMB_BITS, -1, -contract.LIMB_BITS)
        )

    @pl.when(program < num_programs)
    def _():
        def write(i, nothing):
            block = program * num_blocks + i
            split(block) if layout is None else pack(block, layout)
            return nothing

        lax.fori_loop(0, num_blocks, write, jnp.int32(0))

    @pl.when((program >= num_programs) & inside)
    def _():
        segment = program - num_programs
        start, stop = spans[segment, 0], jnp.minimum(spans[segment, 1], problem.k)

        def add(i, sums):
            index = start + i * _SUM_BLOCK + jnp.arange(_SUM_BLOCK, dtype=jnp.int32)
            parts = limbs_of(codes(index, index < stop))
            return tuple(total + limb for total, limb in zip(sums, parts, strict=True))

        zero = (jnp.zeros((_SUM_BLOCK,), jnp.int32),) * problem.activation_limbs
        for a, total in enumerate(lax.fori_loop(0, pl.cdiv(stop - start, _SUM_BLOCK), add, zero)):
            row_sums[segment, a, row] = jnp.sum(total)

        @pl.when(segment == 0)
        def _():
            unit[row] = activations.unit(magnitude, problem.fixed_point_bits)
            # As integers of a stated type: Pallas-Triton takes others from the condition, and lowers no NaN.
            poison[row] = lax.bitcast_convert_type(jnp.where(finite, jnp.int32(0), jnp.int32(_NAN)), jnp.float32)
