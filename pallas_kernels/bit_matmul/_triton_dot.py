"""Float activations on a GPU: words become bfloat16 in registers, for a dot on the tensor core.

The centres of cells of up to 8 bitlayers are exact in bfloat16 (`_triton_codes.centred`), and so are the parts of
activations: three for float32, two for float16, one for bfloat16 (`split`), each multiplied on the bfloat16 tensor
core. Only the sums round, in float32. So bfloat16 activations take one dot for each limb of bitlayers, and float32
activations keep the accuracy of float32, in three.

A program takes some groups, or a part of one. The sums of each are scaled in the program, and added up. Were they
written instead, for XLA to scale, groups of 32 would take 4 bytes for each row and 32 weights of a channel, which is as
much as 8 bitlayers for 8 rows. Weights are the left operand, so that channels, not rows, fill the 64 of a warpgroup.

Its sweep has programs for each number of bitlayers, that read its words: the scales of fewer than 4 bitlayers differ,
so sums of single bitlayers would be needed with each of them. Where groups are long that is `_triton_dot_sweep`.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _compat
from pallas_kernels.bit_matmul import _triton_codes, contract

_PARTS = {"bfloat16": 1, "float16": 2, "float32": 3}  # of at most 8 significant bits each


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How a product is cut into programs. Sizes of blocks are powers of two."""

    block_n: int
    block_rows: int  # at least 16
    block_words: int  # of one group, that are unpacked together: 32 times as many terms of one dot
    num_groups: int  # of a program, one after the other
    num_parts: int  # programs that share a group; 1 where a program has several
    num_warps: int
    num_stages: int = 1  # the loop loads into registers, which Triton does not pipeline


_BLOCK_N = 128  # with 4 warps and 4 words, a lane loads 4 channels: 16 bytes
_BLOCK_WORDS = 4
_MIN_ROWS = 16
_MAX_ROWS = 64
_MAX_ROWS_OF_GROUPS = 32  # whose sums are beside those of all
MIN_PROGRAMS = 264  # two to each of the 132 SMs of an H200


def config_for(problem: contract.Problem) -> Config:
    """The configuration for a shape: enough programs to fill a GPU."""
    largest = _MAX_ROWS if problem.groups == 1 else _MAX_ROWS_OF_GROUPS
    block_rows = min(largest, max(_MIN_ROWS, pl.next_power_of_2(problem.m)))
    block_words = min(_BLOCK_WORDS, pl.next_power_of_2(problem.words_per_group))
    programs = pl.cdiv(problem.n, _BLOCK_N) * pl.cdiv(problem.m, block_rows)
    wanted = pl.cdiv(MIN_PROGRAMS, programs)
    blocks = pl.cdiv(problem.words_per_group, block_words)
    num_parts = min(pl.cdiv(wanted, problem.groups), blocks)
    return Config(
        block_n=_BLOCK_N,
        block_rows=block_rows,
        block_words=block_words,
        num_groups=max(1, pl.cdiv(problem.groups, wanted)),
        num_parts=pl.cdiv(blocks, pl.cdiv(blocks, num_parts)),  # none is empty
        num_warps=4,
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
    onto: jax.Array | None = None,
) -> jax.Array:
    """The product of the contract, f32[m, n]; where `bitlayers` is a limit, int32[], all prefixes, f32[bits, m, n].

    x: f32, bf16 or f16[m, 32 * num_words], 0 past k. Rows of no bitlayers are those of `onto`, f32[m, n].
    """
    sweep = bitlayers.ndim == 0
    num_counts = problem.bits if sweep else 1
    num_parts = pl.cdiv(problem.groups, config.num_groups) * config.num_parts
    assert onto is None or num_parts == 1, "parts are added to each other"
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
        input_output_aliases={} if onto is None else {0: 0},
    )(
        None if onto is None else onto[None, None],
        _triton_codes.arrange(split(x)),
        jnp.atleast_1d(bitlayers),
        words,
        scale,
    )
    y = out.sum(axis=1)
    return y if sweep else y[0]


def _kernel(
    onto, x, counts, words, scale, out, *, problem: contract.Problem, config: Config, sweep: bool, interpret: bool
):
    """One block of channels, one block of rows, and one part of the words; of a sweep, one number of bitlayers.

    Args:
      onto: what `out` holds before, or None
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
    del onto
    first_channel, first_row = pl.program_id(0) * config.block_n, pl.program_id(1) * config.block_rows
    num_parts = out.shape[1]
    part, index = pl.program_id(2) % num_parts, pl.program_id(2) // num_parts
    rows, channels = pl.ds(first_row, config.block_rows), pl.ds(first_channel, config.block_n)
    row_inside = _triton_codes.inside(first_row, config.block_rows, problem.m)
    inside = _triton_codes.inside(first_channel, config.block_n, problem.n)
    num_blocks = pl.cdiv(pl.cdiv(problem.words_per_group, config.block_words), config.num_parts)
    part_words = num_blocks * config.block_words
    first_group = part // config.num_parts * config.num_groups
    stop_group = jnp.minimum(first_group + config.num_groups, problem.groups)
    always_full = is_even(problem, config) and problem.words_per_group == config.num_parts * part_words
    load_block = functools.partial(blocks_of, x, problem, config, rows, row_inside)

    def group_sum(group, first, last, used):
        """(c - (2**w - 1) / 2) * 2**(8 - w) . x_g, of the codes c of the w = `used` bitlayers of one limb."""
        group_stop = jnp.minimum((group + 1) * problem.words_per_group, problem.num_words)
        first_word = group * problem.words_per_group + part % config.num_parts * part_words
        stop = jnp.minimum(first_word + part_words, group_stop)

        def add_block(i, total):
            start = first_word + i * config.block_words
            bitlayers = _triton_codes.load_words(
                words,
                start,
                stop,
                first,
                last - first,
                used,
                channels=channels,
                inside=inside,
                num_words=config.block_words,
                is_even=is_even(problem, config),
            )
            return add_dots(total, _triton_codes.centred(bitlayers, used, interpret=interpret), load_block(start, stop))

        if always_full and num_blocks == 1:
            return add_block(0, None)
        count = num_blocks if always_full else pl.cdiv(jnp.maximum(stop - first_word, 0), config.block_words)
        return lax.fori_loop(0, count, add_block, jnp.zeros((config.block_n, config.block_rows), jnp.float32))

    def product(count):
        """The rows at one number of bitlayers, [block_n, block_rows]."""
        scale_row = jnp.clip(count, 1, scale.shape[0]) - 1
        total = jnp.zeros((config.block_n, config.block_rows), jnp.float32)
        for first, last in problem.code_limbs:
            used = jnp.clip(count - first, 0, last - first)

            def add_group(group, total, first=first, last=last, used=used):
                factor = _triton_codes.load(scale.at[scale_row, group, channels], inside, 0)
                unit = 2.0 ** -(contract.LIMB_BITS - 1 + first)
                return total + group_sum(group, first, last, used) * (factor * unit)[:, None]

            total = lax.fori_loop(first_group, jnp.where(used > 0, stop_group, first_group), add_group, total)
        return total

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


def blocks_of(x, problem: contract.Problem, config: Config, rows, row_inside, start, stop) -> list[jax.Array]:
    """bf16[block_rows, 32 * block_words] of each part of the activations, zero from word `stop` on."""
    k = config.block_words * contract.WORD_BITS
    masks = [] if row_inside is None else [row_inside[:, None]]
    if not is_even(problem, config):
        masks.append((jnp.arange(k, dtype=jnp.int32) < (stop - start) * contract.WORD_BITS)[None, :])
    mask = _triton_codes.all_of((config.block_rows, k), masks)
    columns = pl.ds(start * contract.WORD_BITS, k)
    return [_triton_codes.load(x.at[jnp.int32(part), rows, columns], mask, 0) for part in range(x.shape[0])]


def add_dots(total: jax.Array | None, values: jax.Array, blocks: list[jax.Array]) -> jax.Array:
    """total + the products of bf16[channels, k] by each bf16[rows, k], the last and smallest first."""
    for block in reversed(blocks):
        product = jnp.dot(values, block.T, preferred_element_type=jnp.float32)
        total = product if total is None else total + product
    assert total is not None
    return total


def is_even(problem: contract.Problem, config: Config) -> bool:
    """Every group consists of whole blocks of words."""
    group_words = problem.words_per_group
    return group_words % config.block_words == 0 and problem.num_words % group_words == 0
