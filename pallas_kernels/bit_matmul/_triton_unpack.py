"""Very many rows of float activations on a GPU: the bitlayers in use are unpacked once, for a dot of XLA's.

A kernel writes the centre of each weight's cell, v, in bfloat16, where it is exact for each limb of 8 bitlayers; what
it writes is 2 bytes per weight and limb, and is read again once for each block of rows. Activations are cut into parts
of 8 significant bits (`split`), one for bfloat16, two for float16, three for float32, of which the dot takes all at
once, as rows. So only sums round, in float32, as in `_triton_dot`.

One scale for each output channel: with groups, their sums would have to be kept apart.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _compat
from pallas_kernels.bit_matmul import _triton_codes, _triton_dot, _triton_dot_rows, contract, epilogue


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the unpacking is cut into programs. Sizes are powers of two."""

    block_n: int
    block_words: int
    num_warps: int
    num_stages: int = 1  # there is no loop


def config_for(problem: contract.Problem) -> Config:
    """The configuration for a shape: 4 words of 128 channels give each lane a load of 16 bytes per bitlayer."""
    return Config(block_n=128, block_words=min(4, pl.next_power_of_2(problem.num_words)), num_warps=4)


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
    """The product of the contract, of one group. x: f32, bf16 or f16[m, 32 * num_words], 0 past k.

    All rows are multiplied at the largest number of bitlayers. Those of smaller ones `_triton_dot_rows` does again, in
    programs that end at once where there are none: XLA would wait for the host to learn which numbers there are.
    """
    parts = _triton_codes.arrange(_triton_dot.split(x))
    rows = parts.reshape(-1, parts.shape[-1])
    largest = jnp.max(bitlayers)
    total = jnp.zeros((problem.m, problem.n), jnp.float32)
    for values in _values(problem, words, largest, config, interpret)[::-1]:  # the smallest first
        sums = jnp.dot(rows, values, preferred_element_type=jnp.float32)
        for part in sums.reshape(-1, problem.m, problem.n)[::-1]:
            total = total + part
    others = _triton_dot_rows.config_for(problem)
    return _triton_dot_rows.matmul(
        problem,
        x,
        words,
        scale,
        jnp.where(bitlayers == largest, 0, bitlayers),
        config=dataclasses.replace(others, num_blocks=_triton_dot_rows.count_blocks(problem, others)),
        interpret=interpret,
        onto=total * epilogue.scale_rows(scale[:, 0], bitlayers),
    )


def _values(
    problem: contract.Problem, words: jax.Array, count: jax.Array, config: Config, interpret: bool
) -> jax.Array:
    """bf16[code limbs, 32 * num_words, n], k within each word in the order of `_triton_codes`; their sum is v."""
    return _compat.triton_call(
        functools.partial(_kernel, problem=problem, config=config, interpret=interpret),
        name="bit_matmul_unpack",
        grid=(pl.cdiv(problem.n, config.block_n), pl.cdiv(problem.num_words, config.block_words)),
        out_shape=jax.ShapeDtypeStruct(
            (len(problem.code_limbs), problem.num_words * contract.WORD_BITS, problem.n), jnp.bfloat16
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )(count[None], words)


def _kernel(count, words, out, *, problem: contract.Problem, config: Config, interpret: bool):
    """One block of channels and words.

    Args:
      count: [1] int32
      words: [bits, num_words, n] uint32
      out: [code limbs, 32 * num_words, n] bf16
      problem: the product.
      config: how it is cut.
      interpret: not for Triton.
    """
    first_channel, start = pl.program_id(0) * config.block_n, pl.program_id(1) * config.block_words
    channels = pl.ds(first_channel, config.block_n)
    inside = _triton_codes.inside(first_channel, config.block_n, problem.n)
    k_block = config.block_words * contract.WORD_BITS
    k_inside = _triton_codes.inside(start * contract.WORD_BITS, k_block, problem.num_words * contract.WORD_BITS)
    masks = [] if inside is None else [inside[None, :]]
    masks += [] if k_inside is None else [k_inside[:, None]]
    for limb, (first, last) in enumerate(problem.code_limbs):
        stop = jnp.clip(count[0], first, last)
        bitlayers = _triton_codes.load_words(
            words,
            start,
            jnp.int32(problem.num_words),
            first,
            last - first,
            stop - first,
            channels=channels,
            inside=inside,
            num_words=config.block_words,
            is_even=k_inside is None,
        )
        codes = _triton_codes.signed(bitlayers, interpret=interpret).astype(jnp.float32)
        # (2 * c - (2**w - 1)) * 2**-stop, which is 0 for a limb that is not used.
        values = codes * 2.0 ** -(contract.LIMB_BITS - 1 + first) + epilogue.power_of_two(-stop)
        ref = out.at[jnp.int32(limb), pl.ds(start * contract.WORD_BITS, k_block), channels]
        mask = _triton_codes.all_of((k_block, config.block_n), masks)
        _compat.triton_store(ref, values.astype(jnp.bfloat16), mask=mask)
