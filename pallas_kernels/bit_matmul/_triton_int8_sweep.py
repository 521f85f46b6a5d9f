"""Sweeps of many rows of fixed-point activations on a GPU: each word is read once, for all numbers of bitlayers.

A program multiplies by the bits of one bitlayer alone, on the int8 tensor core; XLA weights and adds what comes out:
the product after bitlayer i is twice that before it, plus its sums. What `_triton_int8` unpacks, codes of 8 bitlayers,
would take as many accumulators as there are counts. How operands become signed is told there; with one bit, c8 - 128
is 0 or -128.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _compat
from pallas_kernels.bit_matmul import _int8_operands, _triton_codes, _triton_int8, contract, epilogue, limbs
from pallas_kernels.bit_matmul._triton_int8 import Config


def num_sums(problem: contract.Problem, config: Config) -> int:
    """Integers that the programs write and XLA adds."""
    num_parts = len(problem.segments) * _parts(problem, config)
    return num_parts * problem.bits * problem.activation_limbs * problem.m * problem.n


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
    """The product at every number of bitlayers.

    Args:
      problem: the product.
      codes: int32[m, 32 * num_words], 0 past k, or what `quantize_rows` makes of rows.
      words: uint32[bits, num_words, n].
      scale: f32[min(bits, 4), groups, n].
      limit: int32[], bitlayers from here on are not read, and counts past it hold anything.
      config: how it is cut.
      interpret: run on the CPU, as JAX operations.

    Returns:
      f32[bits, m, n].
    """
    packed = _int8_operands.prepare(problem, codes)
    parts = _parts(problem, config)
    spans = _int8_operands.split_spans(_int8_operands.segment_spans(problem), config.block_words, parts)
    sums = _compat.triton_call(
        functools.partial(_kernel, problem=problem, config=config, num_spans=len(spans), interpret=interpret),
        name="bit_matmul_int8_sweep",
        grid=(
            pl.cdiv(problem.n, config.block_n),
            pl.cdiv(problem.m, config.block_rows),
            len(spans) * problem.bits,
        ),
        out_shape=jax.ShapeDtypeStruct(
            (problem.bits, len(spans), problem.activation_limbs, problem.m, problem.n), jnp.int32
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )(jnp.asarray(spans), packed.bits, limit[None], words)
    sums = sums.reshape(problem.bits, len(problem.segments), parts, *sums.shape[2:]).sum(axis=2)
    centred = 2 * sums + packed.row_sums[None, ..., None]  # of q . (2 * bit - 1)
    running = []
    for i in range(problem.bits):
        begins = i % contract.LIMB_BITS == 0
        running.append(centred[i] if begins else 2 * running[-1] + centred[i])
    y = epilogue.scale_prefixes(problem, jnp.stack(running, axis=1), scale)
    if packed.steps is None:
        return y
    unit, poison = packed.steps
    return y * unit[None, :, None] + poison[None, :, None]


def _parts(problem: contract.Problem, config: Config) -> int:
    """Programs that share the words of one bitlayer and segment."""
    programs = pl.cdiv(problem.n, config.block_n) * pl.cdiv(problem.m, config.block_rows) * problem.bits
    segment_words = max(stop - start for _, start, stop in problem.segments)
    return min(pl.cdiv(_triton_int8.MIN_PROGRAMS, programs), pl.cdiv(segment_words, config.block_words))


def _kernel(spans, x, limit, words, out, *, problem: contract.Problem, config: Config, num_spans: int, interpret: bool):
    """One block of channels, one block of rows, and one bitlayer of one part of the words.

    Args:
      spans: [parts, 2] int32
      x: [activation limbs, m, 32 * num_words] int8
      limit: [1] int32
      words: [bits, num_words, n] uint32
      out: [bits, parts, activation limbs, m, n] int32
      problem: the product.
      config: how it is cut.
      num_spans: parts of all segments.
      interpret: not for Triton.
    """
    first_channel, first_row, _ = (pl.program_id(i) * size for i, size in enumerate(config.program_sizes))
    rows, channels = pl.ds(first_row, config.block_rows), pl.ds(first_channel, config.block_n)
    row_inside = _triton_codes.inside(first_row, config.block_rows, problem.m)
    inside = _triton_codes.inside(first_channel, config.block_n, problem.n)
    part, bitlayer = pl.program_id(2) % num_spans, pl.program_id(2) // num_spans
    start, stop = spans[part, 0], spans[part, 1]
    num_blocks = jnp.where(bitlayer < limit[0], pl.cdiv(stop - start, config.block_words), 0)
    limbs_at_once = range(0, problem.activation_limbs, config.limbs)
    masks = [] if row_inside is None else [row_inside[:, None]]
    masks += [] if inside is None else [inside[None, :]]
    mask = _triton_codes.all_of((config.block_rows, config.block_n), masks)

    for first_limb in limbs_at_once:
        group = range(first_limb, min(first_limb + config.limbs, problem.activation_limbs))

        def add_block(i, state, group=group):
            sums, ones = state
            block = start + i * config.block_words
            (word,) = _triton_codes.load_words(
                words,
                block,
                stop,
                bitlayer,
                1,
                1,
                channels=channels,
                inside=inside,
                num_words=config.block_words,
                is_even=_triton_int8.is_even(problem, config),
            )
            if any(group):
                ones = ones + _compat.triton_population_count(word)
            values = _triton_codes.signed([word], interpret=interpret)  # 0, or -128 where the bit is 0
            sums = tuple(
                total
                + jnp.dot(
                    _triton_int8.load_activations(x, problem, config, rows, row_inside, a, block, stop),
                    values,
                    preferred_element_type=jnp.int32,
                )
                for a, total in zip(group, sums, strict=True)
            )
            return sums, ones

        zero = jnp.zeros((config.block_rows, config.block_n), jnp.int32)
        ones = jnp.zeros((config.block_words, config.block_n), jnp.int32)
        sums, ones = lax.fori_loop(0, num_blocks, add_block, ((zero,) * len(group), ones))
        # of bit - 1, over the blocks as they were loaded
        bit_sum = jnp.sum(ones, axis=0) - contract.WORD_BITS * config.block_words * num_blocks
        for a, total in zip(group, sums, strict=True):
            total = total >> (contract.LIMB_BITS - 1)
            if a:
                total = total + _int8_operands.HALF * bit_sum[None, :]
            _compat.triton_store(out.at[bitlayer, part, jnp.int32(a), rows, channels], total, mask=mask)
