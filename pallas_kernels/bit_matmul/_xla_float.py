"""Few float rows: the weight is made in registers, from the words of four bitlayers at a time, and never stored.

A dot needs the weight as an array, which for one row costs more than the product. Here a turn of a loop takes `width`
bitlayers of all k. The words of a block are shifted and masked into `fields` of `width` bits, one code each; a code is
shifted to the top of a mantissa, `1.code`, centred and multiplied with its activation, all in one element-wise
expression that XLA's CPU compiler vectorizes along n, as `_xla_serial` tells. Per weight and turn, that is one
operation to fill the fields, a shift, an AND with OR, a subtraction and a fused multiply-add: five for four bitlayers,
which one by one cost three each. Four cost 1.3 times as much as two, and half of four times one [measured].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _compat
from pallas_kernels.bit_matmul import _xla_serial, contract, epilogue

# Words unrolled in one expression. 2 run as fast as 1, 4 slower, and only take longer to compile: 1.2 and 2.0 s, not
# 0.8 for a loop of four bitlayers [measured, one row of 4096 x 4096].
_BLOCK_WORDS = 1
_WIDTH, _LAST_WIDTH = 4, 2  # bitlayers of a turn, and of the last one where no more are left
_SIGN, _ONE, _MANTISSA_BITS = 0x80000000, 0x3F800000, 23  # of a float32


def matmul(
    problem: contract.Problem, x: jax.Array, words: jax.Array, scale: jax.Array, bitlayers: jax.Array
) -> jax.Array:
    """The product of the contract, x padded to whole words."""
    blocks = _cut(problem, x)

    def add_turns(width, start, turns, carry):
        def add(turn, carry):
            total, half_steps = carry
            first = start + turn * width
            used = jnp.clip(bitlayers - first, 0, width)  # rows that are done add zero
            weight = jnp.where(used > 0, epilogue.power_of_two(-first), 0.0)
            weight, used = lax.optimization_barrier((weight, used))  # fused, it would be repeated for every channel
            sums = _code_sums(blocks, words, first, width, used)
            return total + sums * (2.0 * weight)[None, :, None], half_steps + weight * epilogue.power_of_two(-used)

        return lax.fori_loop(jnp.int32(0), turns, add, carry)

    most = jnp.max(bitlayers)
    turns = (most + (_WIDTH - _LAST_WIDTH - 1)) // _WIDTH
    last_turns = (most > turns * _WIDTH).astype(jnp.int32)
    carry = _zeros(problem, blocks), jnp.zeros((problem.m,), jnp.float32)
    carry = _compat.varying_like(carry, x, words, bitlayers)
    carry = add_turns(_WIDTH, jnp.int32(0), turns, carry)
    total, half_steps = add_turns(_LAST_WIDTH, turns * _WIDTH, last_turns, carry)
    total = total + half_steps[None, :, None] * blocks.packed.sum(axis=(0, 1))
    return _sum_blocks(problem, total, scale, bitlayers)


def prefixes(
    problem: contract.Problem, x: jax.Array, words: jax.Array, scale: jax.Array, limit: jax.Array
) -> jax.Array:
    """The product at every number of bitlayers: one at a time, and the value so far after each."""
    blocks = _cut(problem, x)

    def add_bitlayer(i, carry):
        total, out = carry
        total = total - _negated_sums(blocks, words, i) * epilogue.power_of_two(-(i + 1))
        y = _sum_blocks(problem, total, scale, (i + 1)[None])
        return total, lax.dynamic_update_index_in_dim(out, y, i, 0)

    out = jnp.zeros((problem.bits, problem.m, problem.n), jnp.float32)
    carry = _compat.varying_like((_zeros(problem, blocks), out), x, words, scale)
    return lax.fori_loop(jnp.int32(0), jnp.minimum(limit, problem.bits), add_bitlayer, carry)[1]


def _code_sums(
    blocks: _xla_serial.Blocks, words: jax.Array, first: jax.Array, width: int, used: jax.Array
) -> jax.Array:
    """sum_k x * (code / 2**width - 1/2) of each block, the code of bitlayers first..first + width.

    Bits of bitlayers at or beyond used[row] count as zero. f32[blocks, m, n].
    """
    keep = [jnp.where(i < used, jnp.uint32(0xFFFFFFFF), jnp.uint32(0))[None, :, None] for i in range(width)]
    last = words.shape[0] - 1
    ones = sum(1 << t for t in range(0, contract.WORD_BITS, width))  # bit 0 of every field
    terms = []
    for w in range(blocks.packed.shape[1]):
        block = [blocks.read(words, jnp.minimum(first + i, last), w) & keep[i] for i in range(width)]
        for p in range(width):  # the fields hold the positions p, p + width, ..
            fields = jnp.uint32(0)
            for i, word in enumerate(block):
                bit = width - 1 - i
                fields = fields | (_shift(word, bit - p) & jnp.uint32(ones << bit))
            values = [
                blocks.packed[t, w] * (_top_of_mantissa(fields, t - p, width) - 1.5)
                for t in range(p, contract.WORD_BITS, width)
            ]
            terms.append(sum(values[1:], start=values[0]))
    return _sum_pairs(terms)


def _negated_sums(blocks: _xla_serial.Blocks, words: jax.Array, i: jax.Array) -> jax.Array:
    """sum_k x * (1 - 2 * bit) of each block, of bitlayer i. f32[blocks, m, n]."""
    terms = []
    for w in range(blocks.packed.shape[1]):
        word = blocks.read(words, i, w)
        for part in range(0, contract.WORD_BITS, 8):  # short chains of additions, which run side by side
            values = [
                blocks.packed[t, w] * _as_float(_shift(word, 31 - t) & jnp.uint32(_SIGN) | jnp.uint32(_ONE))
                for t in range(part, part + 8)
            ]
            terms.append(sum(values[1:], start=values[0]))
    return _sum_pairs(terms)


def _top_of_mantissa(fields: jax.Array, low: int, width: int) -> jax.Array:
    """1 + code / 2**width, of the code in the bits low..low + width."""
    top = _MANTISSA_BITS - width
    code = _shift(fields, top - low) & jnp.uint32(((1 << width) - 1) << top)
    return _as_float(code | jnp.uint32(_ONE))


def _shift(words: jax.Array, left: int) -> jax.Array:
    if left == 0:
        return words
    return words << jnp.uint32(left) if left > 0 else words >> jnp.uint32(-left)


def _as_float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def _sum_pairs(terms: list[jax.Array]) -> jax.Array:
    """A tree: few roundings, and no chain for the processor to wait on."""
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)] + terms[len(terms) // 2 * 2 :]
    return terms[0]


def _cut(problem: contract.Problem, x: jax.Array) -> _xla_serial.Blocks:
    """The activations by position in the word: f32[32, words per block, blocks, m, 1]."""
    span = _xla_serial.Span(start=0, stop=problem.num_words, segment=problem.words_per_group)
    x = jnp.swapaxes(x.astype(jnp.float32).reshape(problem.m, -1, contract.WORD_BITS), 1, 2)
    return _xla_serial.cut(span, x, _BLOCK_WORDS)


def _zeros(problem: contract.Problem, blocks: _xla_serial.Blocks) -> jax.Array:
    return jnp.zeros((blocks.packed.shape[2], problem.m, problem.n), jnp.float32)


def _sum_blocks(problem: contract.Problem, total: jax.Array, scale: jax.Array, bitlayers: jax.Array) -> jax.Array:
    """sum_g scale_b[g] * total_g, of f32[blocks, m, n] and a count for each row, or one for all. f32[m, n]."""
    scales = [lax.dynamic_index_in_dim(scale, row, 0, keepdims=False) for row in jnp.clip(bitlayers, 1, len(scale)) - 1]
    scales = jnp.stack(scales, axis=1)  # [groups, m, n]
    if problem.groups == 1:
        return total.sum(axis=0) * scales[0]
    # Only a sum over the leading axis of an array is vectorized. Summing each group first made 32 groups cost 1.2 times
    # one, where this costs 1.0 [measured at 8 bitlayers].
    total = total.reshape(problem.groups, -1, *total.shape[1:]) * scales[:, None]
    return lax.optimization_barrier(total).reshape(-1, *total.shape[2:]).sum(axis=0)
