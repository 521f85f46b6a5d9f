"""Many rows of fixed-point activations on a GPU: words become int8 codes in registers, for the int8 tensor core.

One limb of 8 bits of an activation times one code of up to 8 bitlayers, summed in int32: exact, like everything here,
so that how many rows come together never shows.

A tensor core takes signed operands, and both are made signed by moving them. Codes c of w bitlayers are held at the
top of a byte, c8 = c * 2**(8 - w), and become c8 - 128 = 2**(8 - w) * (c - 2**(w - 1)), what the product needs. A limb
below the top one, u in 0..255, becomes u - 128, and 128 times the sum of all codes of the channel puts that back:
    sum_k u * (c8 - 128) = sum_k (u - 128) * (c8 - 128) + 128 * sum_k (c8 - 128)
which holds for whatever is summed, past the end of k too, if u is 0 there.

`_triton_codes` makes c8 - 128 from words. A bitlayer that no row uses is not loaded: its words are zeros.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _compat
from pallas_kernels.bit_matmul import (
    _int8_operands,
    _triton_codes,
    _triton_epilogue,
    _triton_order,
    contract,
    epilogue,
    limbs,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How a product is cut into programs. Sizes are powers of two."""

    block_n: int
    block_rows: int  # at least 16; 64 are one warpgroup of Hopper's tensor core
    block_words: int  # words that are unpacked together
    limbs: int  # of activations, summed in one pass over the words
    parts: int | None  # programs that share the words of a segment; None: a program takes all of k, up to float32
    num_warps: int
    num_stages: int = 1  # the loop loads into registers, which Triton does not pipeline

    @property
    def program_sizes(self) -> tuple[int, int, int]:
        """Channels, rows and parts of one program: the axes of the grid."""
        return self.block_n, self.block_rows, 1


_BLOCK_N = 128  # with 4 warps and 4 words, a lane loads 4 channels: 16 bytes
_BLOCK_ROWS = 64
_BLOCK_WORDS = 4
_MAX_LIMBS = 2  # 64 registers each
MIN_PROGRAMS = 264  # two to each of the 132 SMs of an H200


def config_for(problem: contract.Problem) -> Config:
    """The configuration for a shape: what fits into registers, and enough programs to fill a GPU."""
    segment_words = max(stop - start for _, start, stop in problem.segments)
    block_words = min(_BLOCK_WORDS, pl.next_power_of_2(segment_words))
    num_sums = problem.activation_limbs * len(problem.code_limbs)
    block_n, parts = _BLOCK_N, None
    if problem.groups > 1:  # the sums of every group would have to be written, and read again
        few_sums = num_sums == 1 and len(problem.segments) == problem.groups  # beside those of the group, or of all
        block_n = _BLOCK_N if few_sums else _BLOCK_N // 2
    else:
        programs = pl.cdiv(problem.n, _BLOCK_N) * pl.cdiv(problem.m, _BLOCK_ROWS)
        parts = min(pl.cdiv(MIN_PROGRAMS, programs), pl.cdiv(segment_words, block_words))
        if parts == 1 and num_sums <= _MAX_LIMBS and len(problem.segments) == 1:
            parts = None
    return Config(
        block_n=block_n,
        block_rows=_BLOCK_ROWS,
        block_words=block_words,
        limbs=problem.activation_limbs if num_sums <= _MAX_LIMBS else 1,
        parts=parts,
        num_warps=4,
    )


def matmul(
    problem: contract.Problem,
    codes: jax.Array | limbs.Packed,
    words: jax.Array,
    scale: jax.Array,
    bitlayers: jax.Array,
    *,
    config: Config,
    interpret: bool,
) -> jax.Array:
    """The product of the contract. codes: int32[m, 32 * num_words], 0 past k, or what `quantize_rows` makes of rows."""
    packed = _int8_operands.prepare(problem, codes)
    out = _launch(problem, packed, words, scale, bitlayers, config, interpret)
    if config.parts is None:
        return out
    return _triton_epilogue.finish(
        problem,
        out,
        packed.row_sums,
        scale,
        bitlayers,
        steps=packed.steps,
        parts=config.parts,
        place=lambda c, part, a, row, channels: (part, c * problem.activation_limbs + a, row, channels),
        signed=True,
        interpret=interpret,
    )


def prefixes(
    problem: contract.Problem,
    codes: jax.Array | limbs.Packed,
    words: jax.Array,
    scale: jax.Array,
    limit: jax.Array,
    *,
    config: Config,
    interpret: bool,
) -> jax.Array:
    """The product at every number of bitlayers up to `limit`, int32[], in one launch: a program has one number.

    codes: as of `matmul`. f32[bits, m, n].
    """
    config = dataclasses.replace(config, parts=None)
    packed = _int8_operands.prepare(problem, codes)
    return _launch(problem, packed, words, scale, limit, config, interpret)


def limb_sums(
    problem: contract.Problem,
    codes: jax.Array,
    words: jax.Array,
    bitlayers: jax.Array,
    *,
    config: Config,
    interpret: bool,
) -> jax.Array:
    """The integers of the contract. codes: int32[m, 32 * num_words], 0 past k."""
    config = dataclasses.replace(config, parts=config.parts or 1)
    packed = _int8_operands.prepare(problem, codes)
    out = _launch(problem, packed, words, None, bitlayers, config, interpret)
    sums = out.reshape(len(problem.segments), config.parts, len(problem.code_limbs), -1, *out.shape[2:]).sum(axis=1)
    return epilogue.centre(problem, jnp.swapaxes(sums, 1, 2), packed.row_sums, bitlayers, signed=True)


def _launch(
    problem: contract.Problem,
    packed: limbs.Packed,
    words: jax.Array,
    scale: jax.Array | None,
    bitlayers: jax.Array,
    config: Config,
    interpret: bool,
) -> jax.Array:
    """What the kernel writes; all prefixes where `bitlayers` is their limit."""
    sweep, order = bitlayers.ndim == 0, None
    if not sweep and problem.m > config.block_rows:
        # Rows of one count come together, so that few blocks of rows have more than one.
        order, _ = _triton_order.by_count(bitlayers, interpret=interpret)
    # What its first and last words are, of each segment, and its first segment, of each group; one more ends the last.
    spans, first_segment = _int8_operands.segment_spans(problem), None
    if len(problem.segments) != problem.groups:
        first_segment = np.searchsorted([group for group, _, _ in problem.segments], np.arange(problem.groups + 1))
        first_segment = jnp.asarray(first_segment.astype(np.int32))
    if config.parts is not None:
        spans = _int8_operands.split_spans(spans, config.block_words, config.parts)
        num_sums = len(problem.code_limbs) * problem.activation_limbs
        out_shape = jax.ShapeDtypeStruct((len(spans), num_sums, problem.m, problem.n), jnp.int32)
        num = len(spans)
    else:
        num = problem.bits if sweep else 1
        out_shape = jax.ShapeDtypeStruct((problem.bits,) * sweep + (problem.m, problem.n), jnp.float32)
    return _compat.triton_call(
        functools.partial(_kernel, problem=problem, config=config, sweep=sweep, interpret=interpret),
        name="bit_matmul_int8",
        grid=(
            pl.cdiv(problem.n, config.block_n),
            pl.cdiv(problem.m, config.block_rows),
            num,
        ),
        out_shape=out_shape,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )(
        jnp.asarray(spans),
        first_segment,
        order,
        packed.bits,
        packed.row_sums,
        packed.steps,
        jnp.atleast_1d(bitlayers),
        words,
        scale,
    )


def num_sums(problem: contract.Problem, config: Config) -> int:
    """Integers that the programs write and `_triton_epilogue` adds."""
    num_parts = len(problem.segments) * (config.parts or 0)
    return num_parts * len(problem.code_limbs) * problem.activation_limbs * problem.m * problem.n


def _kernel(
    spans,
    first_segment,
    order,
    x,
    row_sums,
    steps,
    counts,
    words,
    scale,
    out,
    *,
    problem: contract.Problem,
    config: Config,
    sweep: bool,
    interpret: bool,
):
    """One block of channels, one block of rows, and all words or one part of them; of a sweep, one number of bitlayers.

    Args:
      spans: [segments or parts, 2] int32, the words of each
      first_segment: [groups + 1] int32; None where each group is a segment
      order: [m] int32, the row at each place, or None
      x: [activation limbs, m, 32 * num_words] int8
      row_sums: [segments, activation limbs, m] int32
      steps: [m] f32, unit and poison, or None
      counts: [m] int32, of a sweep [1], the limit
      words: [bits, num_words, n] uint32
      scale: [min(bits, 4), groups, n] f32; not looked at with parts, and may be None then
      out: [m, n] f32, of a sweep [bits, m, n], or with parts [parts, code limbs * activation limbs, m, n] int32
      problem: the product.
      config: how it is cut.
      sweep: all prefixes.
      interpret: not for Triton.
    """
    # Read here: inside of a loop interpret mode does not know them.
    channel_block, row_block, part = (pl.program_id(i) for i in range(3))
    first_channel, first_row = channel_block * config.block_n, row_block * config.block_rows
    channels = pl.ds(first_channel, config.block_n)
    row_inside = _triton_codes.inside(first_row, config.block_rows, problem.m)

    def rows_from(first):
        rows = pl.ds(first, config.block_rows)
        # Past the last, a place where nothing is.
        return rows if order is None else _triton_codes.load(order.at[rows], row_inside, problem.m)

    rows = rows_from(first_row)
    inside = _triton_codes.inside(first_channel, config.block_n, problem.n)
    load_words = functools.partial(
        _triton_codes.load_words,
        words,
        channels=channels,
        inside=inside,
        num_words=config.block_words,
        is_even=is_even(problem, config),
    )
    load_rows = functools.partial(load_activations, x, problem, config, rows, row_inside)
    zero = jnp.zeros((config.block_rows, config.block_n), jnp.float32)

    def limb_sums(first, last, count, span, group):
        """sum_k q_a * (c - 2**(w - 1)) for each limb a of the group, w = clip(count - first, 0, last - first)."""
        used = jnp.clip(count - first, 0, last - first)
        start, stop = spans[span, 0], spans[span, 1]
        num_blocks = jnp.where(used > 0, pl.cdiv(stop - start, config.block_words), 0)

        def add_block(i, state):
            sums, ones = state
            block = start + i * config.block_words
            bitlayers = load_words(block, stop, first, last - first, used)
            if any(group):
                for j, word in enumerate(bitlayers):
                    ones = ones + (_compat.triton_population_count(word) << (contract.LIMB_BITS - 1 - j))
            values = _triton_codes.signed(bitlayers, interpret=interpret)
            sums = tuple(
                total + jnp.dot(load_rows(a, block, stop), values, preferred_element_type=jnp.int32)
                for a, total in zip(group, sums, strict=True)
            )
            return sums, ones

        sums = (zero.astype(jnp.int32),) * len(group)
        ones = jnp.zeros((config.block_words, config.block_n), jnp.int32)
        sums, ones = lax.fori_loop(0, num_blocks, add_block, (sums, ones))
        # of c8 - 128, over the blocks as they were loaded
        code_sum = jnp.sum(ones, axis=0) - _int8_operands.HALF * contract.WORD_BITS * config.block_words * num_blocks
        sums = [
            total + _int8_operands.HALF * code_sum[None, :] if a else total
            for a, total in zip(group, sums, strict=True)
        ]
        return [total >> (contract.LIMB_BITS - used) for total in sums]

    groups_of_limbs = [
        range(a, min(a + config.limbs, problem.activation_limbs))
        for a in range(0, problem.activation_limbs, config.limbs)
    ]

    def product(count):
        """The rows at one number of bitlayers, finished."""

        def row_sum(segment, a):
            return _triton_codes.load(row_sums.at[segment, jnp.int32(a), rows_again()], row_inside, 0)[:, None]

        def segment_sum(segment):
            columns = []
            for first, last in problem.code_limbs:
                column = None
                for group in groups_of_limbs:
                    for a, total in zip(group, limb_sums(first, last, count, segment, group), strict=True):
                        column = epilogue.add_limb(column, 2 * total + row_sum(segment, a))
                columns.append(column)
            return epilogue.combine_columns(columns, jnp.clip(count - contract.LIMB_BITS, 0, contract.LIMB_BITS))

        def group_sum(group):
            if len(problem.segments) == problem.groups:
                return segment_sum(group)
            first, stop = first_segment[group], first_segment[group + 1]
            return lax.fori_loop(first, stop, lambda segment, total: total + segment_sum(segment), zero)

        def factor(group):
            row = jnp.minimum(count, scale.shape[0]) - 1
            place, exist = channels_again()
            return _triton_codes.load(scale.at[row, group, place], exist, 0)[None, :]

        unit = epilogue.unit(count, problem.fixed_point_bits)
        if problem.groups == 1:
            return group_sum(jnp.int32(0)) * unit * factor(jnp.int32(0))

        def add_group(group, total):
            return epilogue.add_scaled(total, group_sum(group), factor(group), unit)

        return lax.fori_loop(0, problem.groups, add_group, zero)

    def finished(total):
        if steps is None:
            return total
        unit, poison = (_triton_codes.load(step.at[rows_again()], row_inside, 0)[:, None] for step in steps)
        return total * unit + poison  # of which the latter is 0 or NaN: fused, it rounds as often

    def add_count(count):
        """Stores the rows of one number of bitlayers, mostly all of them; returns the next number."""

        def store(index, value):
            place, exist = channels_again()
            mask = jnp.broadcast_to((row_counts() == count)[:, None], zero.shape)
            mask = mask if exist is None else mask & exist[None, :]
            _compat.triton_store(_triton_codes.rows_at(out, index, rows_again(), place), value, mask=mask)

        if config.parts is None:
            store((), finished(product(count)))
            return next_count(count)
        for c, (first, last) in enumerate(problem.code_limbs):
            for group in groups_of_limbs:
                for a, total in zip(group, limb_sums(first, last, count, part, group), strict=True):
                    index = jnp.int32(c * problem.activation_limbs + a)
                    store((part, index), total)
        return next_count(count)

    def next_count(count):
        found = row_counts()
        return jnp.min(jnp.where(found > count, found, contract.MAX_BITS + 1))

    def row_counts():  # rows past m count as 0, which no pass is for
        return _triton_codes.load(counts.at[rows_again()], row_inside, 0)

    # Rows and channels once more, so that addresses are computed where they are used, behind the loops: the first word
    # is number 0, which the compiler does not know. If it did, it would compute them before the loops, and keep them in
    # registers that the loops need. It moves a part of a sum, but none of `or`.

    def rows_again():
        return rows_from(first_row + spans[0, 0])

    def channels_again():
        first = (channel_block | spans[0, 0]) * config.block_n
        return pl.ds(first, config.block_n), _triton_codes.inside(first, config.block_n, problem.n)

    if not sweep:
        lax.while_loop(lambda count: count <= contract.MAX_BITS, add_count, next_count(jnp.int32(0)))
        return

    @pl.when(part < counts[0])
    def _():
        masks = [] if row_inside is None else [row_inside[:, None]]
        place, exist = channels_again()
        masks += [] if exist is None else [exist[None, :]]
        mask = _triton_codes.all_of((config.block_rows, config.block_n), masks)
        _compat.triton_store(out.at[part, rows_again(), place], finished(product(part + 1)), mask=mask)


def load_activations(x, problem, config, rows, row_inside, a, start, stop) -> jax.Array:
    """int8[block_rows, 32 * block_words] of limb a; where there is no activation, what stands for zero."""
    k = config.block_words * contract.WORD_BITS
    masks = [] if row_inside is None else [row_inside[:, None]]
    if not is_even(problem, config):
        masks.append((jnp.arange(k, dtype=jnp.int32) < (stop - start) * contract.WORD_BITS)[None, :])
    ref = _triton_codes.rows_at(x, (jnp.int32(a),), rows, pl.ds(start * contract.WORD_BITS, k))
    return _triton_codes.load(
        ref, _triton_codes.all_of((config.block_rows, k), masks), 0 if a == 0 else -_int8_operands.HALF
    )


def is_even(problem: contract.Problem, config: Config) -> bool:
    """Every segment, or part of one, consists of whole blocks of words."""
    return all((stop - start) % config.block_words == 0 for _, start, stop in problem.segments)
