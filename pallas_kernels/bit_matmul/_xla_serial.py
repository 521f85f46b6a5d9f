"""Few rows: AND and population count, bitlayer by bitlayer, written so that XLA's CPU compiler vectorizes it.

Three facts about that compiler give the code its form [measured, JAX 0.10.2]:
- A fusion is vectorized along the minor axis, n; a reduction over words inside it would not be. So the words of a
  block are unrolled by hand, into one long element-wise expression.
- The start of a dynamic slice that is used through several index maps (slice a block, then pick its words) is loaded
  inside the loop, which is then not vectorized: 6 to 8 times slower. So each word has a dynamic slice of its own.
- A turn of a loop costs microseconds. So a turn is a whole bitlayer: k is cut into blocks of words along a leading
  axis of the accumulator, which one kernel call covers with all threads, and the blocks are summed at the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _compat
from pallas_kernels.bit_matmul import contract, limbs

# Words unrolled in one element-wise expression: 8 to 32 run equally fast, 4 pay for the accumulators and more than 32
# only for compilation [measured, one row of 4096 x 4096].
_BLOCK_WORDS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """A run of words cut into segments of equal length, each of which is summed apart."""

    start: int
    stop: int
    segment: int  # words; the last segment may be short

    @property
    def num_segments(self) -> int:
        return -(-(self.stop - self.start) // self.segment)


def limb_sums(
    problem: contract.Problem, span: Span, codes: jax.Array, words: jax.Array, bitlayers: jax.Array, *, sweep: bool
) -> jax.Array:
    """sum_k q_a * (2 * c_c - (2**w_c - 1)) for each limb a of the activations and c of the weights.

    Args:
      problem: the product.
      span: the words to sum over.
      codes: int32[m, 32 * num_words], 0 past k.
      words: uint32[bits, num_words, n].
      bitlayers: int32[m].
      sweep: also after every number of bitlayers up to max(bitlayers), which is then the same for all rows.

    Returns:
      int32[activation limbs, code limbs, segments, m, n], or with `sweep` [.., segments, bits * m, n], in which a code
      limb that has not begun holds what it holds after its first bitlayer.
    """
    codes = codes[:, span.start * contract.WORD_BITS : span.stop * contract.WORD_BITS]
    blocks = cut(span, limbs.pack(codes, problem.fixed_point_bits), _BLOCK_WORDS)
    row_sums = _row_sums(problem, span, codes)
    parts = []
    for first, last in problem.code_limbs:
        part = _accumulate(problem, span, blocks, words, row_sums, bitlayers, first, last, sweep)
        if sweep:  # [bitlayers of the limb, limbs, segments, m, n]
            part = jnp.concatenate([part[:1]] * first + [part] + [part[-1:]] * (problem.bits - last))
            part = jnp.moveaxis(part, 0, 2).reshape(*part.shape[1:3], problem.bits * problem.m, problem.n)
        parts.append(part)
    return jnp.stack(parts, axis=1)


def _accumulate(
    problem: contract.Problem,
    span: Span,
    blocks: Blocks,
    words: jax.Array,
    row_sums: jax.Array,
    bitlayers: jax.Array,
    first: int,
    last: int,
    sweep: bool,
) -> jax.Array:
    """One code limb, bitlayers first..last. int32[activation limbs, segments, m, n], with `sweep` after each."""

    def finish(acc: tuple[jax.Array, ...], used: jax.Array) -> jax.Array:
        sums = [a.reshape(span.num_segments, -1, problem.m, problem.n).sum(axis=1) for a in acc]
        return 2 * jnp.stack(sums) - ((1 << used) - 1)[None, None, :, None] * row_sums

    def add_bitlayer(i, carry):
        acc, running = carry
        sums = _bitlayer_sums(problem, blocks, words, i)
        if problem.m == 1:  # the loop ends with its row
            acc = tuple(2 * a + s for a, s in zip(acc, sums, strict=True))
        else:
            active = (i < bitlayers)[None, :, None]
            acc = tuple(jnp.where(active, 2 * a + s, a) for a, s in zip(acc, sums, strict=True))
        if sweep:
            value = finish(acc, jnp.full((problem.m,), i + 1 - first, jnp.int32))
            running = lax.dynamic_update_index_in_dim(running, value, i - first, 0)
        return acc, running

    zero = jnp.zeros((blocks.packed.shape[2], problem.m, problem.n), jnp.int32)
    kept = (last - first if sweep else 0, problem.activation_limbs, span.num_segments, problem.m, problem.n)
    acc, running = lax.fori_loop(
        jnp.int32(first),
        jnp.clip(jnp.max(bitlayers), first, last),
        add_bitlayer,
        _compat.varying_like(((zero,) * problem.activation_limbs, jnp.zeros(kept, jnp.int32)), blocks.packed, words),
    )
    return running if sweep else finish(acc, jnp.clip(bitlayers - first, 0, last - first))


def _bitlayer_sums(problem: contract.Problem, blocks: Blocks, words: jax.Array, i: jax.Array) -> list[jax.Array]:
    """sum_k q_a * bit_i for each limb a, most significant first. int32[blocks, m, n] each."""
    block = [blocks.read(words, i, w) for w in range(blocks.packed.shape[1])]
    sums = []
    for low in range(contract.LIMB_BITS * (problem.activation_limbs - 1), -1, -contract.LIMB_BITS):
        total = None
        for bit in range(low, min(low + contract.LIMB_BITS, problem.fixed_point_bits)):
            counts = [lax.population_count(word & blocks.packed[bit, w]) for w, word in enumerate(block)]
            count = sum(counts[1:], start=counts[0]).astype(jnp.int32) << (bit - low)
            if bit == problem.fixed_point_bits - 1:  # the sign bit of two's complement
                count = -count
            total = count if total is None else total + count
        sums.append(total)
    return sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """A span cut into blocks of equal length, each inside one segment."""

    read: Callable[[jax.Array, jax.Array, int], jax.Array]  # (words, i, w): word w of each block, uint32[blocks, 1, n]
    packed: jax.Array  # the activations: number[.., words per block, blocks, m, 1], here uint32[activation bits, ..]


def cut(span: Span, packed: jax.Array, block_words: int) -> Blocks:
    """packed: number[m, .., words of the span]; block_words: about as many words to a block."""
    return (_cut_segment if span.num_segments == 1 else _cut_segments)(span, packed, block_words)


def _cut_segment(span: Span, packed: jax.Array, block_words: int) -> Blocks:
    """Block g holds the words g, g + blocks, ..: so any number of words is read in place.

    The last slice may reach back over words that are already counted, for which its activations are zero.
    """
    num_words = span.stop - span.start
    num_blocks = -(-num_words // block_words)
    block_words = -(-num_words // num_blocks)
    before_last = (block_words - 1) * num_blocks

    def read(words, i, w):
        start = span.start + min(w * num_blocks, num_words - num_blocks)
        return _slice(words, (i, start, 0), (1, num_blocks, words.shape[-1])).reshape(num_blocks, 1, -1)

    counted = ((0, 0), (0, 0), (block_words * num_blocks - num_words, 0))
    packed = jnp.concatenate([packed[..., :before_last], jnp.pad(packed[..., before_last:], counted)], axis=-1)
    packed = packed.reshape(*packed.shape[:2], block_words, num_blocks)
    return Blocks(read=read, packed=_keep(jnp.transpose(packed, (1, 2, 3, 0))[..., None]))


def _cut_segments(span: Span, packed: jax.Array, block_words: int) -> Blocks:
    """Blocks are runs of words, of a length that divides a segment and is at most twice what is asked for."""
    num_words = span.stop - span.start
    missing = -num_words % span.segment
    block_words = max(d for d in range(1, 2 * block_words + 1) if span.segment % d == 0)
    num_blocks = (num_words + missing) // block_words

    def read(words, i, w):
        n = words.shape[-1]
        if missing:  # a short last segment costs a copy, of one bitlayer at a time
            words = jnp.pad(_slice(words, (i, 0, 0), (1, num_words, n)), ((0, 0), (0, missing), (0, 0)))
            i = jnp.int32(0)
        words = words.reshape(-1, num_blocks, block_words, n)
        return _slice(words, (i, 0, w, 0), (1, num_blocks, 1, n)).reshape(num_blocks, 1, n)

    packed = jnp.pad(packed, ((0, 0), (0, 0), (0, missing))).reshape(*packed.shape[:2], num_blocks, block_words)
    return Blocks(read=read, packed=_keep(jnp.transpose(packed, (1, 3, 2, 0))[..., None]))


def _slice(array: jax.Array, start: tuple[jax.Array | int, ...], sizes: tuple[int, ...]) -> jax.Array:
    return lax.dynamic_slice(array, start, sizes, allow_negative_indices=False)


def _keep(array: jax.Array) -> jax.Array:
    """Computed once, before the loop: fused into it, packing would be repeated for every channel."""
    return lax.optimization_barrier(array)


def _row_sums(problem: contract.Problem, span: Span, codes: jax.Array) -> jax.Array:
    """sum_k q_a by segment. int32[activation limbs, segments, m, 1]."""
    parts = limbs.split(codes, problem.activation_limbs)
    segment = span.segment * contract.WORD_BITS
    parts = jnp.pad(parts, ((0, 0), (0, 0), (0, -codes.shape[1] % segment)))
    sums = parts.reshape(problem.activation_limbs, problem.m, span.num_segments, segment).sum(axis=-1)
    return jnp.moveaxis(sums, 1, 2)[..., None]
