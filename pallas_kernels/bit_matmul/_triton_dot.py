"""Float activations on a GPU: the words in use are unpacked in registers, for a dot on the tensor core.

The order of k inside a block is free. So a dot does not take 32 neighbours out of each word, which would have to be
spread over lanes, but one bit position of `block_words` words: x is arranged to match, once. What a bit position
needs of all bitlayers is gathered four positions at a time, in the bytes of one word.

The centres of cells of up to 8 bitlayers are exact in bfloat16, and so are the parts of activations: three for
float32, two for float16, one for bfloat16 (`split`), each multiplied on the bfloat16 tensor core. Only the sums round,
in float32. So bfloat16 activations take one dot for each limb of bitlayers, and float32 activations keep the accuracy
of float32, in three.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _compat
from pallas_kernels.bit_matmul import contract, epilogue

_BYTES = contract.WORD_BITS // 8
_LOW_BIT_OF_BYTES = 0x01010101
_PARTS = {"bfloat16": 1, "float16": 2, "float32": 3}  # of at most 8 significant bits each


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How a product is cut into programs. Sizes but `num_blocks` are powers of two, 16 or more."""

    block_n: int
    block_rows: int
    block_words: int  # the contraction of one dot
    num_blocks: int  # blocks of words of a program
    num_warps: int
    num_stages: int = 1


_MIN_DOT = 16  # the smallest side of a dot in Triton
_MIN_PROGRAMS = 264  # two to each of the 132 SMs of an H200


def config_for(problem: contract.Problem) -> Config:
    """The configuration for a shape."""
    block_n = 64
    block_rows = min(64, max(_MIN_DOT, pl.next_power_of_2(problem.m)))
    blocks_of_group = pl.cdiv(_group_words(problem), _MIN_DOT)
    programs = pl.cdiv(problem.n, block_n) * pl.cdiv(problem.m, block_rows) * problem.groups
    return Config(
        block_n=block_n,
        block_rows=block_rows,
        block_words=_MIN_DOT,
        num_blocks=pl.cdiv(blocks_of_group, pl.cdiv(_MIN_PROGRAMS, programs)),
        num_warps=4,
    )


def _group_words(problem: contract.Problem) -> int:
    return problem.num_words if problem.group_size is None else problem.group_size // contract.WORD_BITS


def group_sums(
    problem: contract.Problem,
    x: jax.Array,
    words: jax.Array,
    bitlayers: jax.Array,
    *,
    sweep: bool,
    config: Config,
    interpret: bool,
) -> jax.Array:
    """x_g . v_b for each group g.

    In a sweep a program takes one bitlayer, and each word is read for that one alone; XLA adds them up.

    Args:
      problem: the product.
      x: f32, bf16 or f16[m, 32 * num_words], 0 past k.
      words: uint32[bits, num_words, n].
      bitlayers: int32[m].
      sweep: at every number of bitlayers up to max(bitlayers); past it, anything.
      config: how to cut it.
      interpret: run on the CPU, as JAX operations.

    Returns:
      f32[groups, m, n], with `sweep` f32[bits, groups, m, n].
    """
    num_sums = problem.bits if sweep else 1
    part_words = config.block_words * config.num_blocks
    num_parts = pl.cdiv(_group_words(problem), part_words)  # of a group
    groups = range(0, problem.num_words, _group_words(problem))
    first_words = np.array([first + part * part_words for first in groups for part in range(num_parts)], np.int32)
    padding = -problem.m % config.block_rows
    x = jnp.pad(_arrange(problem, x, first_words, num_parts, config), ((0, 0), (0, 0), (0, 0), (0, padding), (0, 0)))
    parts = _compat.triton_call(
        functools.partial(_kernel, problem=problem, config=config, num_parts=len(first_words), sweep=sweep),
        name="bit_matmul_dot",
        grid=(pl.cdiv(problem.n, config.block_n), num_sums * len(first_words), x.shape[3] // config.block_rows),
        out_shape=jax.ShapeDtypeStruct((num_sums * len(first_words), x.shape[3], problem.n), jnp.float32),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )(jnp.asarray(first_words), x, jnp.pad(bitlayers, (0, padding), mode="edge"), words)
    parts = parts[:, : problem.m].reshape(num_sums, problem.groups, num_parts, problem.m, problem.n).sum(axis=2)
    return jnp.stack(list(itertools.accumulate(parts))) if sweep else parts[0]


def _arrange(
    problem: contract.Problem, x: jax.Array, first_words: np.ndarray, num_parts: int, config: Config
) -> jax.Array:
    """[m, 32 * num_words] -> bf16[parts of x, blocks, 32 bit positions, m, block_words], zero outside of the group."""
    index = first_words[:, None] + np.arange(config.block_words * config.num_blocks)
    stop = np.minimum((np.arange(problem.groups) + 1) * _group_words(problem), problem.num_words)
    inside = (index < np.repeat(stop, num_parts)[:, None]).reshape(-1, 1)
    x = x.reshape(problem.m, problem.num_words, contract.WORD_BITS)
    x = x[:, np.minimum(index, problem.num_words - 1).reshape(-1)]
    x = jnp.where(inside[None], x, jnp.zeros((), x.dtype))
    x = jnp.transpose(x.reshape(problem.m, -1, config.block_words, contract.WORD_BITS), (1, 3, 0, 2))
    return split(x)


def split(x: jax.Array) -> jax.Array:
    """Floats as sums of bfloat16: bf16[parts, ..] of 8 significant bits each, the largest first."""
    rest, parts = x.astype(jnp.float32), []
    for _ in range(_PARTS[x.dtype.name]):
        # Rounded by an operation that no compiler may drop, as it may a conversion there and back.
        part = lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        rest = rest - part
    return jnp.stack(parts)


def _kernel(
    first_words, x, counts, words, out, *, problem: contract.Problem, config: Config, num_parts: int, sweep: bool
):
    """One block of channels, one part of the words, one block of rows; of a sweep, one bitlayer.

    Args:
      first_words: [parts] int32, where each part begins
      x: [parts of x, blocks, 32, rows, block_words] bf16
      counts: [rows] int32
      words: [bits, num_words, n] uint32
      out: [parts, rows, n] f32, with `sweep` [bits * parts, rows, n]
      problem: the product.
      config: how it is cut.
      num_parts: of the words.
      sweep: the sums of each bitlayer.
    """
    index = pl.program_id(1)
    part = index % num_parts if sweep else index
    rows = pl.ds(pl.program_id(2) * config.block_rows, config.block_rows)
    first_channel = pl.program_id(0) * config.block_n
    channels = pl.ds(first_channel, config.block_n)
    channel = first_channel + jnp.arange(config.block_n, dtype=jnp.int32)
    row_counts = counts[rows]

    def load_words(layer, block):  # [block_words, block_n] uint32
        first = first_words[part] + block * config.block_words
        inside = (first + jnp.arange(config.block_words, dtype=jnp.int32) < problem.num_words)[:, None]
        inside = inside & (channel < problem.n)[None]
        ref = words.at[layer, pl.ds(first, config.block_words), channels]
        return _compat.triton_load(ref, mask=inside, other=jnp.uint32(0))

    def gather(first, stop, block, p):
        """In four bytes, the codes of bitlayers first..stop at bit positions p, p + 8, p + 16, p + 24."""

        def add_bitlayer(layer, field):
            bits = (load_words(layer, block) >> p.astype(jnp.uint32)) & jnp.uint32(_LOW_BIT_OF_BYTES)
            return (field << jnp.uint32(1)) | bits

        zero = jnp.zeros((config.block_words, config.block_n), jnp.uint32)
        return lax.fori_loop(first, stop, add_bitlayer, zero)

    def add_limb(total, first, stop, block):
        """total + x . (2 * c - (2**w - 1)) * 2**-stop for the w = stop - first bitlayers."""
        lowest = ((jnp.int32(1) << (stop - first)) - 1).astype(jnp.float32)
        unit = epilogue.power_of_two(-stop)

        def add_positions(p, total):
            field = gather(first, stop, block, p)
            for byte in range(_BYTES):
                code = ((field >> jnp.uint32(8 * byte)) & jnp.uint32(0xFF)).astype(jnp.int32).astype(jnp.float32)
                value = ((2.0 * code - lowest) * unit).astype(jnp.bfloat16)
                for x_part in reversed(range(x.shape[0])):  # the smallest first
                    x_block = x[jnp.int32(x_part), part * config.num_blocks + block, p + 8 * byte, rows]
                    total = total + jnp.dot(x_block, value, preferred_element_type=jnp.float32)
            return total

        # A loop, and the words loaded again at each turn, from the cache: unrolled, its registers spill.
        return lax.fori_loop(jnp.int32(0), jnp.minimum(8 * (stop - first), 8), add_positions, total)

    def multiply(count):
        """The product of all rows at one number of bitlayers. [block_rows, block_n] f32."""

        def add_block(block, total):
            for first, last in problem.code_limbs:
                total = add_limb(total, jnp.int32(first), jnp.clip(count, first, last), block)
            return total

        return lax.fori_loop(
            0, config.num_blocks, add_block, jnp.zeros((config.block_rows, config.block_n), jnp.float32)
        )

    def add_count(state):
        """The rows of one number of bitlayers; mostly all of them."""
        count, total = state
        total = jnp.where((row_counts == count)[:, None], multiply(count), total)
        return jnp.min(jnp.where(row_counts > count, row_counts, contract.MAX_BITS + 1)), total

    zero = jnp.zeros((config.block_rows, config.block_n), jnp.float32)
    if sweep:
        bitlayer = index // num_parts
        num_blocks = jnp.where(bitlayer < jnp.max(row_counts), jnp.int32(config.num_blocks), jnp.int32(0))
        total = lax.fori_loop(0, num_blocks, lambda block, total: add_limb(total, bitlayer, bitlayer + 1, block), zero)
    else:
        _, total = lax.while_loop(lambda state: state[0] <= contract.MAX_BITS, add_count, (jnp.min(row_counts), zero))
    inside = jnp.broadcast_to((channel < problem.n)[None], total.shape)
    _compat.triton_store(out.at[index, rows, channels], total, mask=inside)
