"""Many rows of float activations on a GPU: words become bfloat16 while the tensor core multiplies those before.

The arithmetic is that of `_triton_dot`, whose weights are unpacked again for every 64 rows: here for every 128. The
loop carries the operands of one dot and the words of the next, so that nothing between the start of a dot and its end
depends on it, or on memory, and there the compiler for NVIDIA's GPUs puts the unpacking: on Hopper, whose dots are
asynchronous. Both operands are in shared memory, and registers free for those of the next dot. Triton's own pipelines
do neither: they copy words into shared memory first, and start no dot before its operands have come from memory.

Activations of several parts (`_triton_dot.split`) take a pass over the words for each, the smallest first.

One scale for each output channel: sums of groups would take registers beside those of all.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _compat
from pallas_kernels.bit_matmul import _triton_codes, _triton_dot, _triton_order, contract


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How a product is cut into programs. Sizes but `num_blocks` are powers of two."""

    block_n: int
    block_rows: int  # at least 16
    block_words: int  # that are unpacked together: 32 times as many terms of one dot
    num_blocks: int  # blocks of words of a program
    num_warps: int
    num_stages: int = 1  # the loop carries what comes from memory, which Triton does not pipeline


_PROGRAMS_AT_ONCE = 132  # one to an SM of an H200, by registers
_MAX_PARTS = 4


def config_for(problem: contract.Problem) -> Config:
    """The configuration for a shape: blocks of 128 x 128, and parts of k so that the last of them fill a GPU."""
    block_n, block_rows, block_words = 128, 128, min(4, pl.next_power_of_2(problem.num_words))
    programs = pl.cdiv(problem.n, block_n) * pl.cdiv(problem.m, block_rows)
    blocks = pl.cdiv(problem.num_words, block_words)

    def time(parts):  # of a product whose parts come one after the other on each SM
        return pl.cdiv(programs * parts, _PROGRAMS_AT_ONCE) * pl.cdiv(blocks, parts)

    parts = min(range(1, 1 + min(_MAX_PARTS, blocks)), key=time)
    return Config(
        block_n=block_n,
        block_rows=block_rows,
        block_words=block_words,
        num_blocks=pl.cdiv(blocks, parts),
        num_warps=8,
    )


def matmul(
    problem: contract.Problem,
    x: jax.Array,
    words: jax.Array,
    scale: jax.Array,
    bitlayers: jax.Array,
    *,
    config: Config,
    interpret: bool,
    onto: jax.Array | None = None,
) -> jax.Array:
    """The product of the contract, f32[m, n].

    x: f32, bf16 or f16[m, 32 * num_words], 0 past k. Rows of no bitlayers are those of `onto`, f32[m, n].

    Rows of one count come together, so that all blocks of rows and counts are at most the blocks of rows and one less
    than the counts.
    """
    order, _ = _triton_order.by_count(bitlayers, interpret=interpret)
    parts = _triton_codes.arrange(_triton_dot.split(x[order]))
    num_parts = pl.cdiv(count_blocks(problem, config), config.num_blocks)
    assert onto is None or num_parts == 1, "parts are added to each other"
    out = _compat.triton_call(
        functools.partial(_kernel, problem=problem, config=config, interpret=interpret),
        name="bit_matmul_dot_rows",
        grid=(pl.cdiv(problem.m, config.block_rows), pl.cdiv(problem.n, config.block_n), num_parts),
        out_shape=jax.ShapeDtypeStruct((num_parts, problem.m, problem.n), jnp.float32),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
        input_output_aliases={} if onto is None else {0: 0},
    )(None if onto is None else onto[None], lax.bitcast_convert_type(parts, jnp.uint16), order, bitlayers, words, scale)
    return out.sum(axis=0)


def count_blocks(problem: contract.Problem, config: Config) -> int:
    """Of words."""
    return pl.cdiv(problem.num_words, config.block_words)


def _kernel(onto, x, order, counts, words, scale, out, *, problem: contract.Problem, config: Config, interpret: bool):
    """One block of rows, one block of channels, and one part of the words.

    Args:
      onto: what `out` holds before, or None
      x: [parts of x, m, 32 * num_words] bf16 as uint16, rows in order
      order: [m] int32, the row at each place
      counts: [m] int32
      words: [bits, num_words, n] uint32
      scale: [min(bits, 4), 1, n] f32
      out: [parts, m, n] f32
      problem: the product.
      config: how it is cut.
      interpret: not for Triton.
    """
    del onto
    first_row, first_channel = pl.program_id(0) * config.block_rows, pl.program_id(1) * config.block_n
    part = pl.program_id(2)
    rows, channels = pl.ds(first_row, config.block_rows), pl.ds(first_channel, config.block_n)
    row_inside = _triton_codes.inside(first_row, config.block_rows, problem.m)
    inside = _triton_codes.inside(first_channel, config.block_n, problem.n)
    first_block = part * config.num_blocks
    stop_block = jnp.minimum(first_block + config.num_blocks, count_blocks(problem, config))
    is_even = problem.num_words % config.block_words == 0
    k = config.block_words * contract.WORD_BITS
    zero = jnp.zeros((config.block_rows, config.block_n), jnp.float32)

    def load_rows(piece, block):
        masks = [] if row_inside is None else [row_inside[:, None]]
        if not is_even:
            masks.append((jnp.arange(k, dtype=jnp.int32) < problem.num_words * contract.WORD_BITS - block * k)[None, :])
        mask = _triton_codes.all_of((config.block_rows, k), masks)
        bits = _triton_codes.load(x.at[piece, rows, pl.ds(block * k, k)], mask, 0)
        # Of bfloat16 as such, which the loop carries, LLVM would take pairs apart and join them again.
        return lax.bitcast_convert_type(bits, jnp.bfloat16)

    def following(piece, block):
        """The next block, in the next part of the activations after the last; after all of them, any."""
        ends = block + 1 == stop_block
        if x.shape[0] == 1:
            return piece, jnp.where(ends, block, block + 1)
        return jnp.where(ends, jnp.maximum(piece - 1, 0), piece), jnp.where(ends, first_block, block + 1)

    num = min(problem.bits, contract.LIMB_BITS)

    def add_limb(limb, total, count):
        """`total` and x . v of 8 bitlayers, of those that are used, in units of `centre_unit`."""
        first = limb * contract.LIMB_BITS
        used = jnp.clip(count - first, 0, num)

        def load_words(block):
            return _triton_codes.load_words(
                words,
                block * config.block_words,
                jnp.int32(problem.num_words),
                first,
                num,
                used,
                channels=channels,
                inside=inside,
                num_words=config.block_words,
                is_even=is_even,
            )

        def unpack(bitlayers):
            return _triton_codes.centred(bitlayers, used, interpret=interpret)

        def step(_, state):
            total, left, values, bitlayers, here = state
            total = total + jnp.dot(left, values.T, preferred_element_type=jnp.float32)
            there = following(*here)
            return total, load_rows(*here), unpack(bitlayers), load_words(there[1]), there

        start = jnp.int32(x.shape[0] - 1), first_block
        here = following(*start)
        state = total, load_rows(*start), unpack(load_words(first_block)), load_words(here[1]), here
        turns = jnp.where(used > 0, x.shape[0] * (stop_block - first_block), 0)
        return lax.fori_loop(0, turns, step, state)[0]

    def product(count):
        num_limbs = len(problem.code_limbs)
        if num_limbs == 1:
            return add_limb(jnp.int32(0), zero, count)

        def add(i, total):  # the smallest first
            return add_limb(num_limbs - 1 - i, total * 2.0**-contract.LIMB_BITS, count)

        return lax.fori_loop(0, num_limbs, add, zero)

    def places(nothing):
        return _triton_codes.load(order.at[pl.ds(first_row + nothing, config.block_rows)], row_inside, problem.m)

    def next_count(count, nothing):  # 0, as rows past m count, is what no pass is for
        place = places(nothing)
        found = _triton_codes.load(counts.at[place], place < problem.m, 0)
        return jnp.min(jnp.where(found > count, found, contract.MAX_BITS + 1))

    def add_count(count):
        """Stores the rows of one number of bitlayers, mostly all of them; returns the next number."""
        scale_row = jnp.clip(count, 1, scale.shape[0]) - 1
        total = product(count)
        # 0, which the compiler does not know: if it did, it would compute these addresses before the loop over words,
        # and keep them in registers that this has no room for.
        nothing = jnp.minimum(count, 0)
        factor = _triton_codes.load(scale.at[scale_row, nothing, channels], inside, 0)
        place = places(nothing)
        here = _triton_codes.load(counts.at[place], place < problem.m, 0) == count
        masks = [here[:, None]] + ([] if inside is None else [inside[None, :]])
        mask = _triton_codes.all_of((config.block_rows, config.block_n), masks)
        channel = first_channel + nothing + jnp.arange(config.block_n, dtype=jnp.int32)
        index = (jnp.broadcast_to(i, zero.shape) for i in (part, place[:, None], channel[None, :]))
        value = total * (factor * _triton_codes.centre_unit(0, num))[None, :]
        _compat.triton_store(out.at[tuple(index)], value, mask=mask)
        return next_count(count, nothing)

    first_count = next_count(jnp.int32(0), jnp.int32(0))
    lax.while_loop(lambda count: count <= contract.MAX_BITS, add_count, first_count)
