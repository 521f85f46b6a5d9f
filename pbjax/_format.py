"""The number format: mid-rise codes of a weight, their bitlayers packed 32 to a word, and scales per group.

A weight w of a group with scale s has the code c = clip(floor((w / s + 1) * 2**(bits - 1)), 0, 2**bits - 1), and
bitlayer i is bit bits - 1 - i of c. The first b bitlayers stand for

    v_b = sum_{i<b} (2 * bit_i - 1) * 2**-(i + 1),      w_b = scale_b * v_b,

the centre of the cell of width 2**(1 - b) that w / s lies in. The code nests: the first b bitlayers of a code are the
b-bit code. Arrays in, arrays out; a weight is f32[k, n] here, and `groups` cut k.

References:
  PrecisionBatching: Lam, Yedidia, Banbury, Reddi, arXiv 2003.00822 (bitlayers and their accumulation).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._compat import varying_like
from pallas_kernels.bit_matmul.contract import NUM_SCALES, WORD_BITS, num_groups, num_words
from pallas_kernels.bit_matmul.epilogue import power_of_two

# Inputs to a scale. It is exact for weights in fixed point, each of which may be off by 2**-27 of the largest.
MAX_GROUP = 2**20

# Bits behind the point of w / s in these sums: |w / s| < 4 even where it is clipped, |odd| <= 7, products below 2**31.
_POINT = 26

# Elements of a weight that are quantized at a time: few, so that intermediates, some 80 bytes each, stay in the cache.
# But blocks of fewer than 64 channels are read in runs that are too short, so that a long k takes more.
_BLOCK_ELEMENTS, _MAX_BLOCK_ELEMENTS = 2**18, 2**20
_BLOCK_CHANNELS = 64

# Candidate clipping points of `clip_bits`, as fractions of max|w|. At 4 bits the best one for a Gaussian is near 0.75.
_CLIP_FRACTIONS = tuple(1 - 0.02 * i for i in range(36))


def quantize(
    weight: jax.Array, bits: int, group_size: int | None = None, clip_bits: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of one weight.

    Args:
      weight: float[k, n].
      bits: width of the codes, 1..16.
      group_size: consecutive k that share a scale, a multiple of 32; None is all of k.
      clip_bits: if given, each group is clipped at the fraction of max|w| that is best at this many bitlayers.

    Returns:
      words: uint32[bits, ceil(k / 32), n].
      scale: f32[min(bits, 4), groups, n]; row b - 1 serves b bitlayers, the last all b >= 4. NaN, at every number of
        bitlayers, for a group that holds a NaN or an infinity.
    """
    weight = weight.astype(jnp.float32)
    # Some of XLA's CPU code for a maximum passes over NaNs, so they go through it as infinities.
    magnitude = _group_reduce(jnp.max, jnp.where(jnp.isnan(weight), jnp.inf, jnp.abs(weight)), group_size)
    magnitude = jnp.where(jnp.isfinite(magnitude), magnitude, jnp.nan)
    if clip_bits is not None:
        magnitude = magnitude * _best_clip(weight, magnitude, clip_bits, group_size)
    codes = encode(weight, magnitude, bits, group_size)
    return pack(codes, bits), _scales(weight, magnitude, codes, bits, group_size)


def quantize_in_blocks(
    weight: jax.Array, bits: int, group_size: int | None = None, clip_bits: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """`quantize`, some output channels after the others, so that intermediates stay small: the same bits.

    For weights on one device: slicing an axis that is sharded would gather it.
    """
    k, n = weight.shape
    block_n = max(1, min(_BLOCK_CHANNELS, _MAX_BLOCK_ELEMENTS // k), _BLOCK_ELEMENTS // k // 16 * 16)
    num_blocks = n // block_n
    if num_blocks < 2:
        return quantize(weight, bits, group_size, clip_bits)

    def one(i):
        return quantize(lax.dynamic_slice_in_dim(weight, i * block_n, block_n, 1), bits, group_size, clip_bits)

    blocks = lax.map(one, jnp.arange(num_blocks))
    parts = [jnp.moveaxis(leaf, 0, 2).reshape(*leaf.shape[1:3], -1) for leaf in blocks]
    rest = quantize(weight[:, num_blocks * block_n :], bits, group_size, clip_bits)
    words, scale = (jnp.concatenate(pair, axis=2) for pair in zip(parts, rest, strict=True))
    return words, scale


def encode(weight: jax.Array, magnitude: jax.Array, bits: int, group_size: int | None) -> jax.Array:
    """Codes of a weight: f32[k, n], f32[groups, n] -> uint32[k, n]."""
    ratio = _ratio(weight, magnitude, group_size)
    # In float32 the sum rounds to multiples of 2**-23 at the coarsest: finer than any code.
    return jnp.clip(jnp.floor((ratio + 1) * 2.0 ** (bits - 1)), 0, 2**bits - 1).astype(jnp.uint32)


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Bitlayers of codes, 32 of k to a word: uint32[k, n] -> uint32[bits, ceil(k / 32), n]; bits past k are 0."""
    k, n = codes.shape
    codes = jnp.pad(codes, ((0, num_words(k) * WORD_BITS - k), (0, 0))).reshape(num_words(k), WORD_BITS, n)
    shifts = jnp.arange(bits - 1, -1, -1, dtype=jnp.uint32)[:, None, None]

    def add_position(t, words):
        code = lax.dynamic_index_in_dim(codes, t, axis=1, keepdims=False)
        return words | (((code[None] >> shifts) & 1) << jnp.asarray(t).astype(jnp.uint32))

    words = varying_like(jnp.zeros((bits, num_words(k), n), jnp.uint32), codes)
    return lax.fori_loop(0, WORD_BITS, add_position, words)


def unpack(words: jax.Array, k: int) -> jax.Array:
    """Codes of packed bitlayers: uint32[bits, ceil(k / 32), n] -> uint32[k, n]."""
    bits, num, n = words.shape
    codes = jnp.zeros((num, WORD_BITS, n), jnp.uint32)
    positions = jnp.arange(WORD_BITS, dtype=jnp.uint32)[None, :, None]
    for i in range(bits):
        codes = (codes << 1) | ((words[i, :, None, :] >> positions) & 1)
    return codes.reshape(num * WORD_BITS, n)[:k]


def prefix_values(codes: jax.Array, bits: int, bitlayers: int | jax.Array) -> jax.Array:
    """v_b of the first b bitlayers of codes: uint32[k, n] -> f32[k, n], exact."""
    bitlayers = jnp.asarray(bitlayers, jnp.uint32)
    prefix = (codes >> (jnp.uint32(bits) - bitlayers)).astype(jnp.int32)
    odd = 2 * prefix + 1 - (1 << bitlayers.astype(jnp.int32))
    return odd.astype(jnp.float32) * power_of_two(-bitlayers.astype(jnp.int32))


def dequantize(
    words: jax.Array, scale: jax.Array, bitlayers: int | jax.Array, k: int, group_size: int | None
) -> jax.Array:
    """w_b after the first `bitlayers` bitlayers: f32[k, n]."""
    bits = words.shape[0]
    row = jnp.clip(bitlayers, 1, scale.shape[0]) - 1
    values = prefix_values(unpack(words, k), bits, bitlayers)
    return values * _spread(lax.dynamic_index_in_dim(scale, row, keepdims=False), k, group_size)


def _scales(weight: jax.Array, magnitude: jax.Array, codes: jax.Array, bits: int, group_size: int | None) -> jax.Array:
    """min(<w, w> / <w, v_b>, 2 <w, v_b> / <v_b, v_b>) for b = 1, 2, 3, max|w| from 4 on: f32[min(bits, 4), groups, n].

    With the first <w, w_b> = <w, w>: the error is orthogonal to the weight, and no part of an output. Least squares,
    <w, v_b> / <v_b, v_b>, have less error in the weights, but shrink every product by <w_b, w_b> / <w, w>, which layer
    upon layer adds up as no other error does. For one bitlayer this is the scale of DRIVE (arXiv 2105.08339). The
    second is smaller where v_b has little to do with w, as in a group with outliers or many zeros: twice the least
    squares is as far as a scale goes before w_b is farther from w than 0 is. No scale passes the largest float32.

    The sums run over integers, with w / s in fixed point, and are exact: they do not depend on their order, so scales
    are the same to the last bit however many bitlayers are stored, jitted or not, mapped, in blocks or sharded. Many
    small weights count beside an outlier: each is off by 2**-27 of it at most, and a scale by k * 2**-27 of itself.
    """
    ratio = jnp.rint(_ratio(weight, magnitude, group_size) * 2.0**_POINT).astype(jnp.int32)
    square = _sum_of_squares(ratio, group_size)
    # All b together: compiling takes as long as there are reductions.
    b = jnp.arange(1, min(bits, NUM_SCALES - 1) + 1, dtype=jnp.int32)[:, None, None]
    odd = 2 * (codes[None] >> (bits - b).astype(jnp.uint32)).astype(jnp.int32) + 1 - (1 << b)  # v_b * 2**b
    product = ratio[None] * odd
    # Negative, and then -14 or more, where w is: next to 0, where `encode` rounds w / s + 1 to 1.
    wrong_sign = group_sum(jnp.minimum(product, 0), group_size).astype(jnp.float32)
    projection = _sum_of_products(jnp.maximum(product, 0), group_size) + wrong_sign
    energy = group_sum(odd * odd, group_size).astype(jnp.float32)
    unbiased = square[None] / jnp.maximum(projection, 1) * power_of_two(b - _POINT)
    scale = jnp.minimum(unbiased, projection / energy * power_of_two(b + 1 - _POINT)) * magnitude[None]
    scale = jnp.minimum(scale, jnp.finfo(jnp.float32).max)
    return scale if bits < NUM_SCALES else jnp.concatenate([scale, magnitude[None]])


def _sum_of_products(value: jax.Array, group_size: int | None) -> jax.Array:
    """Sums within each group, exact but for the last additions: int32[..., k, n] -> f32[..., groups, n].

    Numbers, 0..2**31 - 1, are taken apart so that sums of their parts fit into 32 bits. Products with powers of two are
    exact, so that no way of compiling the additions rounds another time.
    """
    width = 32 - _group_length(value, group_size).bit_length()
    shifts = jnp.arange(0, 31, width, dtype=jnp.uint32).reshape(-1, *[1] * value.ndim)
    parts = group_sum((value[None].astype(jnp.uint32) >> shifts) & (2**width - 1), group_size).astype(jnp.float32)
    total = parts[-1]
    for part in reversed(parts[:-1]):
        total = total * 2.0**width + part
    return total


def _sum_of_squares(value: jax.Array, group_size: int | None) -> jax.Array:
    """Sums of squares of numbers below 2**29 within each group: int32[k, n] -> f32[groups, n]; as above."""
    high, low = jnp.abs(value) >> 14, jnp.abs(value) & (2**14 - 1)
    squares = _sum_of_products(jnp.stack([high * high, high * low, low * low]), group_size)
    return (squares[0] * 2.0**14 + squares[1] * 2.0) * 2.0**14 + squares[2]


def _ratio(weight: jax.Array, magnitude: jax.Array, group_size: int | None) -> jax.Array:
    """w / s, or 0 where s is 0: f32[k, n]."""
    magnitude = jnp.broadcast_to(_spread(magnitude, weight.shape[0], group_size), weight.shape)
    # Behind the barrier the compiler does not see that a whole column has one divisor, of which it would take the
    # reciprocal: another rounding, and 0 for the largest magnitudes.
    return jnp.where(magnitude > 0, weight / lax.optimization_barrier(jnp.where(magnitude > 0, magnitude, 1)), 0)


def _best_clip(weight: jax.Array, magnitude: jax.Array, bits: int, group_size: int | None) -> jax.Array:
    """The fraction of max|w| that gives the least squared error at `bits` bitlayers: f32[groups, n].

    Of fractions that are as good but for roundings it is the largest. So nothing is clipped for 1 bitlayer, for which
    only the scale matters.
    """

    def error_of(fraction):
        clipped = magnitude * fraction
        codes = encode(weight, clipped, bits, group_size)
        scale = _scales(weight, clipped, codes, bits, group_size)[-1]
        error = weight - prefix_values(codes, bits, bits) * _spread(scale, weight.shape[0], group_size)
        # Below 2**5 of max|w|, since no scale passes 2**4 of it. Integers, so that the choice depends on no order.
        return _sum_of_squares(jnp.rint(_ratio(error, magnitude, group_size) * 2.0**23).astype(jnp.int32), group_size)

    fractions = jnp.array(_CLIP_FRACTIONS, jnp.float32)
    errors = lax.map(error_of, fractions)
    # Roundings move an error by some 2**-12 of it, or by (2**-19 max|w|)**2 for each weight.
    as_good = jnp.min(errors, axis=0, keepdims=True) * (1 + 2.0**-12) + 2.0**8 * _group_length(weight, group_size)
    return fractions[jnp.argmax(errors <= as_good, axis=0)]


def _group_length(value: jax.Array, group_size: int | None) -> int:
    """The k that share a scale, the last group's padding included."""
    return value.shape[-2] if group_size is None else group_size


def group_sum(value: jax.Array, group_size: int | None) -> jax.Array:
    """Sums k within each group: [..., k, n] -> [..., groups, n]."""
    return _group_reduce(jnp.sum, value, group_size)


def _group_reduce(reduce, value: jax.Array, group_size: int | None) -> jax.Array:
    """Reduces k within each group: [..., k, n] -> [..., groups, n]. The last group may be short."""
    if group_size is None:
        return reduce(value, axis=-2, keepdims=True, initial=0)
    *batch, k, n = value.shape
    groups = num_groups(k, group_size)
    value = jnp.pad(value, [(0, 0)] * len(batch) + [(0, groups * group_size - k), (0, 0)])
    return reduce(value.reshape(*batch, groups, group_size, n), axis=-2, initial=0)


def _spread(value: jax.Array, k: int, group_size: int | None) -> jax.Array:
    """Repeats a value per group over its k: [groups, n] -> [k, n], or [1, n] for one group of all k."""
    if group_size is None:
        return value
    groups, n = value.shape
    spread = jnp.broadcast_to(value[:, None], (groups, group_size, n))  # not `repeat`, which asks for a sharding
    return spread.reshape(groups * group_size, n)[:k]
