"""Float activations on a GPU: words become bfloat16 in registers, for a dot on the tensor core.

The centres of cells of up to 8 bitlayers are exact in bfloat16 (`_triton_codes.centred`), and so are the parts of
activations: three for float32, two for float16, one for bfloat16 (`split`), each multiplied on the bfloat16 tensor
core. Only the sums round, in float32. So bfloat16 activations take one dot for each limb of bitlayers, and float32
activations keep the accuracy of float32, in three.

A program takes some blocks of words, each of one group, and scales what comes out before it adds it up. Were the sums
of groups written instead, for XLA to scale, groups of 32 would take 4 bytes for each row and 32 weights of a channel,
which is as much as 8 bitlayers for 8 rows. Weights are the left operand, so that channels, not rows, fill the 64 of a
warpgroup. While a block is multiplied, the next one is loaded and unpacked.

Its sweep has programs for each number of bitlayers, that read its words: the scales of fewer than 4 bitlayers differ,
so sums of single bitlayers would be needed with each of them. Where groups are long that is `_triton_dot_sweep`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _compat
from pallas_kernels.bit_matmul import _triton_codes, _triton_order, contract

_PARTS = {"bfloat16": 1, "float16": 2, "float32": 3}  # of at most 8 significant bits each


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How a product is cut into programs. Sizes but `num_blocks` are powers of two."""

    block_n: int
    block_rows: int  # at least 16
    block_words: int  # of one group, that are unpacked together: 32 times as many terms of one dot
    num_blocks: int  # blocks of words of a program
    num_warps: int
    num_stages: int = 1  # the loop loads into registers, which Triton does not pipeline


_MIN_ROWS = 16
# With more, registers spill on an A100, but with one part of activations, up to 8 bitlayers, and no sums of groups.
_MAX_ROWS, _MAX_ROWS_OF_ONE_SUM = 32, 64
_MAX_UNSORTED_BLOCKS = 2  # of rows, whose numbers of bitlayers are too few to be worth two more launches
MIN_PROGRAMS = 264  # two to each of the 132 SMs of an H200


def config_for(problem: contract.Problem, dtype: jnp.dtype) -> Config:
    """The configuration for a shape, and the dtype of the activations: enough programs to fill a GPU.

    Few rows take small programs, of which more fit on an SM; more rows large ones, which read rows less often. Either
    way a lane loads 4 channels, 16 bytes.
    """
    one_sum = problem.groups == 1 and problem.bits <= contract.LIMB_BITS and _PARTS[dtype.name] == 1
    largest = _MAX_ROWS_OF_ONE_SUM if one_sum else _MAX_ROWS
    block_rows = min(largest, max(_MIN_ROWS, pl.next_power_of_2(problem.m)))
    block_n, block_words, num_warps = (128, 2, 2) if block_rows == _MIN_ROWS else (256, 4, 8)
    if problem.words_per_group < block_words:  # with as many lanes, fewer channels would be left for each
        num_warps = num_warps * pl.next_power_of_2(problem.words_per_group) // block_words
        block_words = pl.next_power_of_2(problem.words_per_group)
    programs = pl.cdiv(problem.n, block_n) * pl.cdiv(problem.m, block_rows)
    blocks = problem.groups * pl.cdiv(problem.words_per_group, block_words)
    return Config(
        block_n=block_n,
        block_rows=block_rows,
        block_words=block_words,
        num_blocks=pl.cdiv(blocks, pl.cdiv(MIN_PROGRAMS, programs)),
        num_warps=num_warps,
    )


def split(x: jax.Array) -> jax.Array:
    """Floats as sums of bfloat16: bf16[parts, ..] of 8 significant bits each, the largest first."""
    rest, parts = x.astype(jnp.float32), []
    for _ in range(_PARTS[x.dtype.name]):
        # Rounded by an operation that no compiler may drop, as it may a conversion there and back.
        part = lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        rest = rest - part
    return jnp.stack(parts)


def matmul(
    problem: contract.Problem,
    x: jax.Array,
    words: jax.Array,
    scale: jax.Array,
    bitlayers: jax.Array,
    *,
    config: Config,
    interpret: bool,
) -> jax.Array:
    """The product of the contract, f32[m, n]; where `bitlayers` is a limit, int32[], all prefixes, f32[bits, m, n].

    x: f32, bf16 or f16[m, 32 * num_words], 0 past k.
    """
    sweep = bitlayers.ndim == 0
    rank = None
    if not sweep and problem.m > _MAX_UNSORTED_BLOCKS * config.block_rows:  # rows of one count come together
        order, rank = _triton_order.by_count(bitlayers, interpret=interpret)
        x, bitlayers = x[order], bitlayers[order]
    num_counts = problem.bits if sweep else 1
    num_parts = pl.cdiv(count_blocks(problem, config), config.num_blocks)
    out = _compat.triton_call(
        functools.partial(_kernel, problem=problem, config=config, sweep=sweep, interpret=interpret),
        name="bit_matmul_dot",
        grid=(
            pl.cdiv(problem.n, config.block_n),
            pl.cdiv(problem.m, config.block_rows),
            num_counts * num_parts,
        ),
        out_shape=jax.ShapeDtypeStruct((num_counts, num_parts, problem.m, problem.n), jnp.float32),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )(
        _triton_codes.arrange(split(x)),
        jnp.atleast_1d(bitlayers),
        words,
        scale,
    )
    y = out.sum(axis=1)
    return y if sweep else y[0] if rank is None else y[0, rank]


def _kernel(x, counts, words, scale, out, *, problem: contract.Problem, config: Config, sweep: bool, interpret: bool):
    """One block of channels, one block of rows, and one part of the words; of a sweep, one number of bitlayers.

    Args:
      x: [parts of x, m, 32 * num_words] bf16
      counts: [m] int32, of a sweep [1], the limit
      words: [bits, num_words, n] uint32
      scale: [min(bits, 4), groups, n] f32
      out: [1, parts, m, n] f32, of a sweep [bits, parts, m, n]
      problem: the product.
      config: how it is cut.
      sweep: all prefixes.
      interpret: not for Triton.
    """
    first_channel, first_row = pl.program_id(0) * config.block_n, pl.program_id(1) * config.block_rows
    num_parts = out.shape[1]
    part, index = pl.program_id(2) % num_parts, pl.program_id(2) // num_parts
    rows, channels = pl.ds(first_row, config.block_rows), pl.ds(first_channel, config.block_n)
    row_inside = _triton_codes.inside(first_row, config.block_rows, problem.m)
    inside = _triton_codes.inside(first_channel, config.block_n, problem.n)
    blocks_per_group = pl.cdiv(problem.words_per_group, config.block_words)
    first_block = part * config.num_blocks
    stop_block = jnp.minimum(first_block + config.num_blocks, count_blocks(problem, config))
    zero = jnp.zeros((config.block_n, config.block_rows), jnp.float32)
    load_words = functools.partial(
        _triton_codes.load_words,
        words,
        channels=channels,
        inside=inside,
        num_words=config.block_words,
        is_even=is_even(problem, config),
    )

    def span(block):
        """Its first word, and where its group ends."""
        group = block // blocks_per_group
        start = group * problem.words_per_group + block % blocks_per_group * config.block_words
        return start, jnp.minimum((group + 1) * problem.words_per_group, problem.num_words)

    def product(count):
        """The rows at one number of bitlayers, [block_n, block_rows]."""
        scale_row = jnp.clip(count, 1, scale.shape[0]) - 1

        def factor(group):
            return _triton_codes.load(scale.at[scale_row, group, channels], inside, 0)

        total = zero
        for first, last in problem.code_limbs:
            used = jnp.clip(count - first, 0, last - first)
            unit = _triton_codes.centre_unit(first, last - first)

            def values_of(block, first=first, last=last, used=used):
                bitlayers = load_words(*span(block), first, last - first, used)
                return _triton_codes.centred(bitlayers, used, interpret=interpret)

            def add_block(block, total, values, unit=unit):
                add = functools.partial(add_dots, values, x, problem, config, rows, row_inside, *span(block))
                if problem.groups == 1:
                    return add(total)
                return total + add(None) * (factor(block // blocks_per_group) * unit)[:, None]

            stop = jnp.where(used > 0, stop_block, first_block)
            if problem.groups > 1:
                total = add_blocks(first_block, stop, values_of, add_block, total)
            else:
                total = total + add_blocks(first_block, stop, values_of, add_block, zero) * unit
        return total * factor(jnp.int32(0))[:, None] if problem.groups == 1 else total

    def store(value, of_rows):
        masks = [] if of_rows is None else [of_rows[:, None]]
        masks += [] if inside is None else [inside[None, :]]
        mask = _triton_codes.all_of((config.block_rows, config.block_n), masks)
        _compat.triton_store(out.at[index, part, rows, channels], value.T, mask=mask)

    if sweep:

        @pl.when(index < counts[0])
        def _():
            store(product(index + 1), row_inside)

        return

    def next_count(count):  # 0, as rows past m count, is what no pass is for
        found = _triton_codes.load(counts.at[rows], row_inside, 0)
        return jnp.min(jnp.where(found > count, found, contract.MAX_BITS + 1))

    def add_count(count):
        """Stores the rows of one number of bitlayers, mostly all of them; returns the next number."""
        store(product(count), _triton_codes.load(counts.at[rows], row_inside, 0) == count)
        return next_count(count)

    lax.while_loop(lambda count: count <= contract.MAX_BITS, add_count, next_count(jnp.int32(0)))


def add_blocks(
    first: jax.Array,
    stop: jax.Array,
    values_of: Callable[[jax.Array], jax.Array],
    add_block: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    total: jax.Array,
) -> jax.Array:
    """`total` after all blocks, of which one is multiplied while the next is unpacked.

    Values that a loop carries reach the tensor core of an A100 by one instruction for each 4 registers; of those that
    it makes itself, by joining, Triton would have lanes load 8 bytes, and move every operand.
    """

    def step(block, state):
        total, values = state
        return add_block(block, total, values), values_of(jnp.minimum(block + 1, stop - 1))

    return lax.fori_loop(first, stop, step, (total, values_of(first)))[0]


def add_dots(
    values: jax.Array,
    x: Any,
    problem: contract.Problem,
    config: Config,
    rows: Any,
    row_inside: jax.Array | None,
    start: jax.Array,
    stop: jax.Array,
    total: jax.Array | None,
) -> jax.Array:
    """total + bf16[channels, k] . x for each part of the activations, zero from word `stop` on, the smallest first."""
    k = config.block_words * contract.WORD_BITS
    masks = [] if row_inside is None else [row_inside[:, None]]
    if not is_even(problem, config):
        masks.append((jnp.arange(k, dtype=jnp.int32) < (stop - start) * contract.WORD_BITS)[None, :])
    mask = _triton_codes.all_of((config.block_rows, k), masks)
    for part in reversed(range(x.shape[0])):
        ref = x.at[jnp.int32(part), rows, pl.ds(start * contract.WORD_BITS, k)]
        product = jnp.dot(values, _triton_codes.load(ref, mask, 0).T, preferred_element_type=jnp.float32)
        total = product if total is None else total + product
    assert total is not None
    return total


def count_blocks(problem: contract.Problem, config: Config) -> int:
    """Of words, each of one group."""
    return problem.groups * pl.cdiv(problem.words_per_group, config.block_words)


def is_even(problem: contract.Problem, config: Config) -> bool:
    """Every group consists of whole blocks of words."""
    group_words = problem.words_per_group
    return group_words % config.block_words == 0 and problem.num_words % group_words == 0
