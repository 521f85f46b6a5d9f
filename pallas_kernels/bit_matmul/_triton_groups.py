"""Float activations on a GPU, of groups shorter than what one dot of `_triton_dot` sums: a program adds groups up.

Words of one group become its weights in bfloat16, in registers (`_triton_codes`; exact, as are the parts into which
activations are cut, `_triton_dot.split`), for a dot on the tensor core. Its sums times the scale of the group are added
to those of the groups before, in float32, which is all that rounds. Were they written instead, for XLA to scale, groups
of 32 would take 4 bytes for each row and 32 weights of a channel, which is as much as 8 bitlayers for 8 rows.

A sweep has programs for each number of bitlayers, that read its words: the scales of fewer than 4 bitlayers differ, so
sums of single bitlayers would be needed with each of them.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _compat
from pallas_kernels.bit_matmul import _triton_codes, _triton_dot, contract, epilogue


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How a product is cut into programs. Sizes but `num_groups` are powers of two."""

    block_n: int
    block_rows: int  # at least 16
    block_words: int  # of one group, that are unpacked together: 32 times as many terms of one dot
    num_groups: int  # of a program, one after the other
    num_warps: int
    num_stages: int = 1  # the loop loads into registers, which Triton does not pipeline


_BLOCK_N = 128  # with 4 warps and 4 words, a lane loads 4 channels: 16 bytes
_BLOCK_WORDS = 4
_MIN_ROWS, _MAX_ROWS = 16, 32  # with 64 and 16 bitlayers, registers spill
_MIN_PROGRAMS = 264  # two to each of the 132 SMs of an H200


def config_for(problem: contract.Problem) -> Config:
    """The configuration for a shape: enough programs to fill a GPU."""
    block_rows = min(_MAX_ROWS, max(_MIN_ROWS, pl.next_power_of_2(problem.m)))
    programs = pl.cdiv(problem.n, _BLOCK_N) * pl.cdiv(problem.m, block_rows)
    return Config(
        block_n=_BLOCK_N,
        block_rows=block_rows,
        block_words=min(_BLOCK_WORDS, pl.next_power_of_2(problem.words_per_group)),
        num_groups=pl.cdiv(problem.groups, pl.cdiv(_MIN_PROGRAMS, programs)),
        num_warps=4,
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
    """The product of the contract, f32[m, n]; where `bitlayers` is a limit, int32[], all prefixes, f32[bits, m, n].

    x: f32, bf16 or f16[m, 32 * num_words], 0 past k. Rows of no bitlayers are those of `onto`, f32[m, n].
    """
    sweep = bitlayers.ndim == 0
    num_counts = problem.bits if sweep else 1
    num_parts = pl.cdiv(problem.groups, config.num_groups)
    assert onto is None or num_parts == 1, "parts are added to each other"
    out = _compat.triton_call(
        functools.partial(_kernel, problem=problem, config=config, num_parts=num_parts, sweep=sweep),
        name="bit_matmul_groups",
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
        _triton_codes.arrange(_triton_dot.split(x)),
        jnp.atleast_1d(bitlayers),
        words,
        scale,
    )
    y = out.sum(axis=1)
    return y if sweep else y[0]


def _kernel(
    onto, x, counts, words, scale, out, *, problem: contract.Problem, config: Config, num_parts: int, sweep: bool
):
    """One block of channels, one block of rows, and one part of the groups; of a sweep, one number of bitlayers.

    Args:
      onto: what `out` holds before, or None
      x: [parts of x, m, 32 * num_words] bf16
      counts: [m] int32, of a sweep [1], the limit
      words: [bits, num_words, n] uint32
      scale: [min(bits, 4), groups, n] f32
      out: [1, parts, m, n] f32, of a sweep [bits, parts, m, n]
      problem: the product.
      config: how it is cut.
      num_parts: of the groups.
      sweep: all prefixes.
    """
    del onto
    first_channel, first_row = pl.program_id(0) * config.block_n, pl.program_id(1) * config.block_rows
    part, index = pl.program_id(2) % num_parts, pl.program_id(2) // num_parts
    rows, channels = pl.ds(first_row, config.block_rows), pl.ds(first_channel, config.block_n)
    row_inside = _triton_codes.inside(first_row, config.block_rows, problem.m)
    inside = _triton_codes.inside(first_channel, config.block_n, problem.n)
    group_words, k = problem.words_per_group, config.block_words * contract.WORD_BITS
    is_even = group_words % config.block_words == 0 and problem.num_words % group_words == 0
    zero = jnp.zeros((config.block_rows, config.block_n), jnp.float32)

    def load_rows(x_part, start, stop):  # [block_rows, k] bf16, zero where the group has ended
        masks = [] if row_inside is None else [row_inside[:, None]]
        if not is_even:
            masks.append((jnp.arange(k, dtype=jnp.int32) < (stop - start) * contract.WORD_BITS)[None, :])
        ref = x.at[jnp.int32(x_part), rows, pl.ds(start * contract.WORD_BITS, k)]
        return _triton_codes.load(ref, _triton_codes.all_of((config.block_rows, k), masks), 0)

    def group_sum(group, first, last, used):
        """x_g . (c - (2**w - 1) / 2) * 2**(8 - w), of the codes c of the w = `used` bitlayers of one limb."""
        stop = jnp.minimum((group + 1) * group_words, problem.num_words)
        half_step = epilogue.power_of_two(contract.LIMB_BITS - 1 - used)

        def add_block(i, total):
            start = group * group_words + i * config.block_words
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
                is_even=is_even,
            )
            values = (_triton_codes.signed(bitlayers).astype(jnp.float32) + half_step).astype(jnp.bfloat16)
            for x_part in reversed(range(x.shape[0])):  # the smallest first
                block = load_rows(x_part, start, stop)
                total = total + jnp.dot(block, values, preferred_element_type=jnp.float32)
            return total

        num_blocks = pl.cdiv(group_words, config.block_words)
        return add_block(0, zero) if num_blocks == 1 else lax.fori_loop(0, num_blocks, add_block, zero)

    def product(count):
        """The rows at one number of bitlayers."""
        scale_row = jnp.clip(count, 1, scale.shape[0]) - 1
        first_group = part * config.num_groups
        stop_group = jnp.minimum(first_group + config.num_groups, problem.groups)
        total = zero
        for first, last in problem.code_limbs:
            used = jnp.clip(count - first, 0, last - first)

            def add_group(group, total, first=first, last=last, used=used):
                factor = _triton_codes.load(scale.at[scale_row, group, channels], inside, 0)
                unit = 2.0 ** -(contract.LIMB_BITS - 1 + first)
                return total + group_sum(group, first, last, used) * (factor * unit)[None, :]

            total = lax.fori_loop(first_group, jnp.where(used > 0, stop_group, first_group), add_group, total)
        return total

    def store(value, of_rows):
        masks = [] if of_rows is None else [of_rows[:, None]]
        masks += [] if inside is None else [inside[None, :]]
        mask = _triton_codes.all_of((config.block_rows, config.block_n), masks)
        _compat.triton_store(out.at[index, part, rows, channels], value, mask=mask)

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
