"""Many rows: unpack a block of words that stays in cache, multiply it with an ordinary dot, in a loop over k.

The unpacking makes all 32 positions of a word at once. The words of several bitlayers, masked to every F-th bit, shift
into `fields`, of which each word holds 32 / F codes of F bits; a second pass shifts each code down and converts it.
Both passes are element-wise with n minor, so they vectorize: about 2 ms for 4096 x 4096 at 8 bitlayers, beside 10 ms of
dot at 32 rows [measured, JAX 0.10.2].

Rows may use different numbers of bitlayers, and a dot has one weight. Rows are sorted by their count, and a window of
rows slides over them: all rows of one count share dots, however they were mixed, and one count costs no extra. The
window is long where a count has many rows, which spares unpacking, and short for the few that are left of a count.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import _compat
from pallas_kernels.bit_matmul import contract, epilogue, limbs

# 256 values of k times 4096 channels of float32 are 4 MB: 128 to 512 run within 10 % of each other at 4096 channels,
# and 512 are 5 % faster at 1024 [measured]. 512 is also the most that is exact: a limb of an activation is below 2**8
# in magnitude, a centred code at most 2**7, and float32 holds every integer up to 2**24.
_BLOCK_WORDS = 8
_LONG_BLOCK_WORDS, _LONG_BLOCK_MAX_N = 16, 2048
# 8 runs of 297 rows then cost 1.1 to 1.3 times one run of 2376 (1024 x 1024), and 8 runs of 16 half of what they cost
# in windows of 128 rows (4096 x 4096) [measured].
_WINDOW_ROWS = 256
_SHORT_WINDOW_ROWS = 32
_TURN_BITLAYERS = 4  # bitlayers per pass over the fields; the last pass may hold fewer, and reads no others

# (first row, rows, number of bitlayers) -> f32[rows, n], or int32[rows, sums]
_Product = Callable[[jax.Array, int, jax.Array], jax.Array]


def matmul(
    problem: contract.Problem, x: jax.Array, words: jax.Array, scale: jax.Array, bitlayers: jax.Array
) -> jax.Array:
    """The product of the contract, x padded to whole words."""
    if problem.m == 1:
        return _product(problem, x, words, scale)(jnp.int32(0), 1, bitlayers[0])
    order = jnp.argsort(bitlayers)
    zero = _compat.varying_like(jnp.zeros((problem.m, problem.n), jnp.float32), x, words, scale)
    y = _slide(problem, _product(problem, x[order], words, scale), bitlayers[order], zero)
    return y[jnp.argsort(order)]


def limb_sums(problem: contract.Problem, x: jax.Array, words: jax.Array, bitlayers: jax.Array) -> jax.Array:
    """The integers of the contract, x padded to whole words. int32[segments, activation limbs, code limbs, m, n]."""
    order = jnp.argsort(bitlayers)
    parts = limbs.split(x[order], problem.activation_limbs)
    blocks = _cut(problem)
    segment_sums = _segment_sums(problem, blocks, _in_blocks(blocks, parts), parts, words)
    shape = len(problem.segments), problem.activation_limbs, len(problem.code_limbs), problem.n

    def product(start, rows, count):
        sums = lax.map(lambda i: segment_sums(i, start, rows, count), jnp.arange(shape[0], dtype=jnp.int32))
        return jnp.moveaxis(sums, 3, 0).reshape(rows, -1)

    zero = _compat.varying_like(jnp.zeros((problem.m, math.prod(shape)), jnp.int32), x, words)
    sums = _slide(problem, product, bitlayers[order], zero)
    return jnp.moveaxis(sums[jnp.argsort(order)].reshape(problem.m, *shape), 0, 3)


def prefixes(
    problem: contract.Problem, x: jax.Array, words: jax.Array, scale: jax.Array, limit: jax.Array
) -> jax.Array:
    """The product at every number of bitlayers: a dot each, as the sums of bitlayers one by one would be."""
    product = _product(problem, x, words, scale)

    def fill(i, out):
        y = _slide(problem, product, jnp.full((problem.m,), i + 1, jnp.int32), out[0])
        return lax.dynamic_update_index_in_dim(out, y, i, 0)

    out = _compat.varying_like(jnp.zeros((problem.bits, problem.m, problem.n), jnp.float32), x, words, scale)
    return lax.fori_loop(jnp.int32(0), jnp.minimum(limit, problem.bits), fill, out)


def _slide(problem: contract.Problem, product: _Product, counts: jax.Array, out: jax.Array) -> jax.Array:
    """The product of all rows, whose counts ascend, written over `out`.

    A window may hold rows that are done, or of a later count. Only those of its own count that are new are kept:
    the others are left as they are, or written again by the next window.
    """
    long, short = min(problem.m, _WINDOW_ROWS), min(problem.m, _SHORT_WINDOW_ROWS)

    def multiply(size, row, count, out):
        start = jnp.minimum(row, problem.m - size)
        kept = lax.dynamic_slice(out, (start, 0), (size, out.shape[1]))
        new = (start + jnp.arange(size, dtype=jnp.int32) >= row)[:, None]
        out = lax.dynamic_update_slice(out, jnp.where(new, product(start, size, count), kept), (start, 0))
        return out, start + size

    def step(state):
        row, out = state
        count = counts[row]
        stop = jnp.sum(counts <= count, dtype=jnp.int32)
        branches = (functools.partial(multiply, long), functools.partial(multiply, short))
        if long == short:
            out, end = branches[0](row, count, out)
        else:
            out, end = lax.cond(stop - row > 2 * short, *branches, row, count, out)
        return jnp.minimum(stop, end), out

    start = _compat.varying_like(jnp.int32(0), counts), out
    return lax.while_loop(lambda state: state[0] < problem.m, step, start)[1]


def _product(problem: contract.Problem, x: jax.Array, words: jax.Array, scale: jax.Array) -> _Product:
    blocks = _cut(problem)
    if problem.activation_bits is None:
        return _float_product(problem, blocks, _in_blocks(blocks, x[None]), words, scale)
    parts = limbs.split(x, problem.activation_limbs)
    return _fixed_product(problem, blocks, _in_blocks(blocks, parts), parts, words, scale)


def _float_product(
    problem: contract.Problem, blocks: _Blocks, x: jax.Array, words: jax.Array, scale: jax.Array
) -> _Product:
    """x: f32[1, m, k], in blocks."""
    group_of_block = jnp.asarray(blocks.group)

    def product(start, rows, count):
        scales = scale[jnp.minimum(count, scale.shape[0]) - 1]  # [groups, n]
        step = epilogue.power_of_two(1 - count)

        def add_block(j, total):
            code = _codes(blocks, words, j, first=0, last=problem.bits, count=count)
            value = code * step + (0.5 * step - 1.0)  # the centre of the cell, exact
            if problem.groups > 1:
                value = value * scales[group_of_block[j]][None, :]
            return total + _dot(_rows(blocks, x, j, start, rows), value)

        zero = _compat.varying_like(jnp.zeros((rows, problem.n), jnp.float32), x, words, scale)
        total = lax.fori_loop(0, len(blocks.start), add_block, zero)
        return total if problem.groups > 1 else total * scales

    return product


def _fixed_product(
    problem: contract.Problem, blocks: _Blocks, x: jax.Array, parts: jax.Array, words: jax.Array, scale: jax.Array
) -> _Product:
    """x: f32[activation limbs, m, k], in blocks; parts: int32[activation limbs, m, k], as they came."""
    group_of_segment = [group for group, _, _ in problem.segments]
    first_segment = jnp.array(np.searchsorted(group_of_segment, np.arange(problem.groups + 1)), jnp.int32)
    segment_sums = _segment_sums(problem, blocks, x, parts, words)

    def product(start, rows, count):
        counts = jnp.full((rows,), count, jnp.int32)
        zero = _compat.varying_like(jnp.zeros((rows, problem.n), jnp.float32), x, words, scale)

        def add_segment(segment, total):
            return total + epilogue.combine_limbs(segment_sums(segment, start, rows, count), counts)

        def add_group(group, total):
            total_of_group = lax.fori_loop(first_segment[group], first_segment[group + 1], add_segment, zero)
            return epilogue.add_group(total, total_of_group, scale, group, counts, problem.fixed_point_bits)

        if problem.groups > 1:
            return lax.fori_loop(0, problem.groups, add_group, zero)
        total = lax.fori_loop(0, len(problem.segments), add_segment, zero)
        return epilogue.scale_groups(total[None], scale, counts, problem.fixed_point_bits)

    return product


def _segment_sums(
    problem: contract.Problem, blocks: _Blocks, x: jax.Array, parts: jax.Array, words: jax.Array
) -> Callable[[jax.Array, jax.Array, int, jax.Array], jax.Array]:
    """(segment, first row, rows, number of bitlayers) -> int32[activation limbs, code limbs, rows, n]."""
    first_block = jnp.asarray(blocks.first_of_segment)
    row_sums = jnp.stack(
        [
            parts[..., start * contract.WORD_BITS : stop * contract.WORD_BITS].sum(axis=-1)
            for _, start, stop in problem.segments
        ]
    )  # [segments, activation limbs, m]
    num_limbs = problem.activation_limbs

    def limb_sum(segment, start, rows, count, first, last):
        """sum_k q_a * (2 * c - (2**count - 1)) = 2 * sum_k q_a * (c - 2**(count - 1)) + sum_k q_a."""
        centre = epilogue.power_of_two(count - 1)

        def add_block(j, total):
            code = _codes(blocks, words, j, first=first, last=last, count=count)
            return total + _dot(_rows(blocks, x, j, start, rows), code - centre).astype(jnp.int32)

        # No work for a limb that is not used; its value is not looked at.
        stop = jnp.where(count > 0, first_block[segment + 1], 0)
        zero = _compat.varying_like(jnp.zeros((num_limbs * rows, problem.n), jnp.int32), x, words)
        total = lax.fori_loop(first_block[segment], stop, add_block, zero)
        row_sum = lax.dynamic_slice(row_sums, (segment, 0, start), (1, num_limbs, rows))[0]
        return 2 * total.reshape(num_limbs, rows, problem.n) + row_sum[..., None]

    def segment_sums(segment, start, rows, count):
        limb_counts = [(first, last, jnp.clip(count - first, 0, last - first)) for first, last in problem.code_limbs]
        return jnp.stack([limb_sum(segment, start, rows, used, first, last) for first, last, used in limb_counts], 1)

    return segment_sums


def _codes(blocks: _Blocks, words: jax.Array, j: jax.Array, *, first: int, last: int, count: jax.Array) -> jax.Array:
    """The codes that the first `count` of bitlayers first..last make, of one block. f32[k of the block, n]."""
    n = words.shape[-1]
    width = 1 << (last - first - 1).bit_length()  # bits of a field: a power of two that holds a code
    mask = jnp.uint32(sum(1 << t for t in range(0, contract.WORD_BITS, width)))
    position = jnp.arange(width, dtype=jnp.uint32)[None, :, None]
    start = jnp.asarray(blocks.start)[j]

    def add_bitlayers(turn, fields):
        for i in range(min(_TURN_BITLAYERS, last - first)):
            layer = turn * _TURN_BITLAYERS + i
            used = layer < count
            layer = first + jnp.minimum(layer, jnp.maximum(count, 1) - 1)
            word = lax.dynamic_slice(words, (layer, start, 0), (1, blocks.words, n), allow_negative_indices=False)
            word = word.reshape(blocks.words, 1, n)
            fields = fields << jnp.where(used, jnp.uint32(1), jnp.uint32(0))
            fields = fields | ((word >> position) & jnp.where(used, mask, jnp.uint32(0)))
        return fields

    fields = _compat.varying_like(jnp.zeros((blocks.words, width, n), jnp.uint32), words)
    fields = add_bitlayers(jnp.int32(0), fields)
    if last - first > _TURN_BITLAYERS:
        turns = (count + _TURN_BITLAYERS - 1) // _TURN_BITLAYERS
        fields = lax.fori_loop(jnp.int32(1), turns, add_bitlayers, fields)
    shift = jnp.arange(0, contract.WORD_BITS, width, dtype=jnp.uint32)[None, :, None, None]
    codes = (fields[:, None] >> shift) & jnp.uint32((1 << width) - 1)
    return codes.astype(jnp.int32).astype(jnp.float32).reshape(-1, n)


def _dot(rows: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.matmul(rows, values, precision=lax.Precision.HIGHEST)


def _rows(blocks: _Blocks, x: jax.Array, j: jax.Array, start: jax.Array, rows: int) -> jax.Array:
    """The activations of one block: f32[limbs * rows, k of the block]."""
    k = blocks.words * contract.WORD_BITS
    return lax.dynamic_slice(x, (0, start, j * k), (x.shape[0], rows, k)).reshape(-1, k)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Blocks:
    """k in blocks of `words` words, each inside one segment."""

    words: int
    start: np.ndarray  # int32[blocks], the first word read
    group: np.ndarray  # int32[blocks]
    first_of_segment: np.ndarray  # int32[segments + 1]
    inside: np.ndarray  # bool[blocks, words], false for a word that is read, but belongs to another block


def _cut(problem: contract.Problem) -> _Blocks:
    """Every block reads the same number of words: the last of a segment may reach over others, times zero."""
    words = _LONG_BLOCK_WORDS if problem.n <= _LONG_BLOCK_MAX_N else _BLOCK_WORDS
    words = min(words, max(stop - start for _, start, stop in problem.segments))
    starts, groups, inside, first_of_segment = [], [], [], [0]
    for group, segment_start, segment_stop in problem.segments:
        for first in range(segment_start, segment_stop, words):
            start = min(first, problem.num_words - words)
            index = start + np.arange(words)
            starts.append(start)
            groups.append(group)
            inside.append((index >= first) & (index < segment_stop))
        first_of_segment.append(len(starts))
    return _Blocks(
        words=words,
        start=np.array(starts, np.int32),
        group=np.array(groups, np.int32),
        first_of_segment=np.array(first_of_segment, np.int32),
        inside=np.array(inside),
    )


def _in_blocks(blocks: _Blocks, x: jax.Array) -> jax.Array:
    """number[limbs, m, k] -> f32[limbs, m, blocks * k of a block]."""
    x = x.astype(jnp.float32)
    if np.all(blocks.inside):
        return x
    index = (blocks.start[:, None] + np.arange(blocks.words)).reshape(-1)
    x = x.reshape(*x.shape[:2], -1, contract.WORD_BITS)[:, :, index]
    return jnp.where(blocks.inside.reshape(1, 1, -1, 1), x, 0.0).reshape(*x.shape[:2], -1)
