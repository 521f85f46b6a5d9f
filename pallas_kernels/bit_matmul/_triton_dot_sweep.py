"""Sweeps of float activations on a GPU: each word is read once, for all numbers of bitlayers.

A program multiplies by the bits of one bitlayer alone, 1 or -1 in bfloat16; XLA weights, adds and scales what comes
out, the sums of each group: which is little where groups are long. Short ones take programs of `_triton_dot`.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _compat
from pallas_kernels.bit_matmul import _triton_codes, _triton_dot, contract, epilogue
from pallas_kernels.bit_matmul._triton_dot import Config

MIN_WORDS = 16  # of a group: with fewer, sums take as many bytes as words do for 8 rows


def prefixes(
    problem: contract.Problem,
    x: jax.Array,
    words: jax.Array,
    scale: jax.Array,
    limit: jax.Array,
    *,
    config: Config,
    interpret: bool,
) -> jax.Array:
    """The product at every number of bitlayers, f32[bits, m, n].

    Args:
      problem: the product.
      x: f32, bf16 or f16[m, 32 * num_words], 0 past k.
      words: uint32[bits, num_words, n].
      scale: f32[min(bits, 4), groups, n].
      limit: int32[], bitlayers from here on are not read, and counts past it hold anything.
      config: how it is cut, but for the parts, of which fewer are needed.
      interpret: run on the CPU, as JAX operations.
    """
    programs = pl.cdiv(problem.n, config.block_n) * pl.cdiv(problem.m, config.block_rows) * problem.bits
    blocks = pl.cdiv(problem.words_per_group, config.block_words)
    part_blocks = pl.cdiv(blocks, pl.cdiv(_triton_dot.MIN_PROGRAMS, programs * problem.groups))
    num_parts = pl.cdiv(blocks, part_blocks)  # none of them empty: a part loads its first words before it counts them
    sums = _compat.triton_call(
        functools.partial(_kernel, problem=problem, config=config, num_parts=num_parts, interpret=interpret),
        name="bit_matmul_dot_sweep",
        grid=(
            pl.cdiv(problem.n, config.block_n),
            pl.cdiv(problem.m, config.block_rows),
            problem.bits * problem.groups * num_parts,
        ),
        out_shape=jax.ShapeDtypeStruct((problem.bits, problem.groups * num_parts, problem.m, problem.n), jnp.float32),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )(_triton_codes.arrange(_triton_dot.split(x)), limit[None], words)
    sums = sums.reshape(problem.bits, problem.groups, num_parts, problem.m, problem.n).sum(axis=2)
    running = jnp.stack(list(itertools.accumulate(sums[i] * 2.0 ** -(i + 1) for i in range(problem.bits))))
    counts = jnp.arange(1, problem.bits + 1, dtype=jnp.int32)
    scales = jax.vmap(epilogue.scale_rows, in_axes=(1, None), out_axes=1)(scale, counts)  # [bits, groups, n]
    return jnp.sum(running * scales[:, :, None], axis=1)


def _kernel(x, limit, words, out, *, problem: contract.Problem, config: Config, num_parts: int, interpret: bool):
    """One block of channels, one block of rows, and one bitlayer of one part of the words of a group.

    Args:
      x: [parts of x, m, 32 * num_words] bf16
      limit: [1] int32
      words: [bits, num_words, n] uint32
      out: [bits, groups * parts, m, n] f32
      problem: the product.
      config: how it is cut.
      num_parts: of each group.
      interpret: not for Triton.
    """
    first_channel, first_row = pl.program_id(0) * config.block_n, pl.program_id(1) * config.block_rows
    rows, channels = pl.ds(first_row, config.block_rows), pl.ds(first_channel, config.block_n)
    row_inside = _triton_codes.inside(first_row, config.block_rows, problem.m)
    inside = _triton_codes.inside(first_channel, config.block_n, problem.n)
    num_spans = problem.groups * num_parts
    span, bitlayer = pl.program_id(2) % num_spans, pl.program_id(2) // num_spans
    part_words = config.block_words * pl.cdiv(pl.cdiv(problem.words_per_group, config.block_words), num_parts)
    group = span // num_parts
    first_word = group * problem.words_per_group + span % num_parts * part_words
    stop = jnp.minimum((group + 1) * problem.words_per_group, problem.num_words)
    stop = jnp.minimum(first_word + part_words, stop)
    is_used = bitlayer < limit[0]
    num_blocks = jnp.where(is_used, pl.cdiv(jnp.maximum(stop - first_word, 0), config.block_words), 0)

    def values_of(block):
        bits = _triton_codes.load_words(
            words,
            first_word + block * config.block_words,
            stop,
            bitlayer,
            1,
            is_used.astype(jnp.int32),
            channels=channels,
            inside=inside,
            num_words=config.block_words,
            is_even=_triton_dot.is_even(problem, config),
        )
        return _triton_codes.centred(bits, jnp.int32(1), interpret=interpret)

    def add_block(block, total, values):
        start = first_word + block * config.block_words
        return _triton_dot.add_dots(values, x, problem, config, rows, row_inside, start, stop, total)

    zero = jnp.zeros((config.block_n, config.block_rows), jnp.float32)
    total = _triton_dot.add_blocks(jnp.int32(0), num_blocks, values_of, add_block, zero)
    masks = [] if row_inside is None else [row_inside[:, None]]
    masks += [] if inside is None else [inside[None, :]]
    mask = _triton_codes.all_of((config.block_rows, config.block_n), masks)
    _compat.triton_store(out.at[bitlayer, span, rows, channels], total.T, mask=mask)
