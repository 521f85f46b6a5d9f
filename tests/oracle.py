"""The number format and the product from their definitions, in Python integers and NumPy. Shares no code with pbjax.

Arrays of Python integers have dtype object, so no sum can overflow. Rounding is float32's, one operation at a time.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

U32 = 2.0**-24  # unit roundoff of float32
ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def gamma(operations: int, unit: float = U32) -> float:
    """Relative error of that many roundings one after the other."""
    return operations * unit / (1 - operations * unit)


def group_slices(k: int, group_size: int | None) -> list[slice]:
    size = group_size or max(k, 1)
    return [slice(start, min(start + size, k)) for start in range(0, k, size)]


# Weights.


def exact_codes(weight: np.ndarray, bits: int, group_size: int | None) -> np.ndarray:
    """c = clip(floor((w / s + 1) * 2**(bits - 1)), 0, 2**bits - 1) with s = max|w| of the group; object[k, n]."""
    codes = np.zeros(weight.shape, object)
    for rows in group_slices(weight.shape[0], group_size):
        for j in range(weight.shape[1]):
            column = [Fraction(float(w)) for w in weight[rows, j]]
            s = max(map(abs, column))
            ratio = [w / s if s else Fraction(0) for w in column]
            codes[rows, j] = [min(int((r + 1) * 2 ** (bits - 1)), 2**bits - 1) for r in ratio]
    return codes


def prefix_values(codes: np.ndarray, bits: int, bitlayers: int) -> np.ndarray:
    """v_b = sum_{i<b} (2 * bit_i - 1) * 2**-(i + 1); float64, exact."""
    codes = codes.astype(np.int64)
    return sum((2.0 * (codes >> (bits - 1 - i) & 1) - 1) * 2.0 ** -(i + 1) for i in range(bitlayers))


def exact_scale(weight: np.ndarray, codes: np.ndarray, bits: int, b: int, group_size: int | None) -> np.ndarray:
    """<w, w> / <w, v_b>, at most 2 <w, v_b> / <v_b, v_b>, for b < 4, and max|w| from there on; float64[groups, n]."""
    weight, values = weight.astype(np.float64), prefix_values(codes, bits, b)
    out = []
    for rows in group_slices(weight.shape[0], group_size):
        w, v = weight[rows], values[rows]
        out.append(
            np.abs(w).max(0)
            if b >= 4
            else np.minimum((w * w).sum(0) / (w * v).sum(0), 2 * (w * v).sum(0) / (v * v).sum(0))
        )
    return np.array(out)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Bit t of word j of bitlayer i is bit bits - 1 - i of the code at k = 32 * j + t; uint32[bits, words, n]."""
    k, n = codes.shape
    words = [[[0] * n for _ in range(-(-k // 32))] for _ in range(bits)]
    for position in range(k):
        for channel in range(n):
            for i in range(bits):
                bit = int(codes[position, channel]) >> (bits - 1 - i) & 1
                words[i][position // 32][channel] |= bit << (position % 32)
    return np.array(words, np.uint32).reshape(bits, -1, n)


def pack_at_once(codes: np.ndarray, bits: int) -> np.ndarray:
    """`pack`, which takes seconds for a million codes."""
    codes = np.pad(codes.astype(np.int64), ((0, -len(codes) % 32), (0, 0))).reshape(-1, 32, codes.shape[1])
    shifts = np.arange(bits - 1, -1, -1)[:, None, None, None]
    return (((codes[None] >> shifts) & 1) << np.arange(32)[None, None, :, None]).sum(2).astype(np.uint32)


# Activations.


def exact_step(row: np.ndarray, activation_bits: int) -> Fraction:
    """t = max|x| / (2**(A-1) - 1)."""
    return max((abs(Fraction(float(x))) for x in row), default=Fraction(0)) / (2 ** (activation_bits - 1) - 1)


def limbs(q: np.ndarray, activation_bits: int) -> list[np.ndarray]:
    """Two's complement in digits of 8 bits, most significant (signed) first."""
    count = -(-activation_bits // 8)
    lower = [(q >> 8 * a) & 255 for a in range(count - 1)]
    return [q >> 8 * (count - 1), *lower[::-1]]


# The product.


def integers(q: np.ndarray, codes: np.ndarray, bits: int, counts: np.ndarray, group_size: int | None) -> np.ndarray:
    """I = sum_k q * (2 * c_b - (2**b - 1)) of each group; object[groups, m, n]."""
    q, codes = q.astype(object), codes.astype(object)
    out = np.zeros((len(group_slices(q.shape[1], group_size)), q.shape[0], codes.shape[1]), object)
    for row, b in enumerate(map(int, counts)):
        odd = 2 * (codes >> (bits - b)) - (2**b - 1)
        for g, ks in enumerate(group_slices(q.shape[1], group_size)):
            out[g, row] = q[row, ks] @ odd[ks]
    return out


def product(q, codes, scale, bits, counts, group_size, activation_bits) -> tuple[np.ndarray, np.ndarray]:
    """sum_g scale_b * 2**-(b + A - 2) * I_g and the sum of the magnitudes that are rounded on the way; float64[m, n].

    A magnitude is that of the limbs: each is converted and added by itself.
    """
    value, magnitude = np.zeros((2, q.shape[0], codes.shape[1]))
    absolute = sum(np.abs(limb) * 256**a for a, limb in enumerate(limbs(q.astype(np.int64), activation_bits)[::-1]))
    # |2 c - (2**b - 1)| <= 2**b - 1 in each of the two limbs of a code together
    ints = integers(q, codes, bits, counts, group_size)
    for row, b in enumerate(map(int, counts)):
        for g, ks in enumerate(group_slices(q.shape[1], group_size)):
            factor = scale[min(b, 4) - 1, g].astype(np.float64) * 2.0 ** -(b + activation_bits - 2)
            value[row] += factor * ints[g, row].astype(np.float64)
            magnitude[row] += np.abs(factor) * float(absolute[row, ks].sum()) * 2**b
    return value, magnitude


def product_bits(q, codes, scale, bits, counts, activation_bits) -> np.ndarray:
    """The one-group product to the last bit: the integers of limbs of 8 activation bits by 8 bitlayers, converted by
    f <- 2**8 * f + float32(limb), most significant first, then code limb after code limb; float32[m, n]."""
    out = np.zeros((q.shape[0], codes.shape[1]), np.float32)
    codes = codes.astype(object)
    for row, b in enumerate(map(int, counts)):
        columns = []
        for first in range(0, b, 8):
            width = min(b - first, 8)
            digit = codes >> (bits - first - width) & (2**width - 1)
            value = np.float32(0)
            for limb in limbs(q[row].astype(object), activation_bits):
                total = limb @ (2 * digit - (2**width - 1))
                value = np.float32(256) * value + total.astype(np.int32).astype(np.float32)
            columns.append((width, value))
        value = columns[0][1]
        for width, lower in columns[1:]:
            value = np.float32(2**width) * value + lower
        out[row] = value * np.float32(2.0 ** -(b + activation_bits - 2)) * scale[min(b, 4) - 1, 0]
    return out


# Inputs.


def every_code(rng: np.random.Generator, bits: int, k: int, n: int) -> np.ndarray:
    """Random codes; the lowest, the top, those with one bit set, then all others, as far as k * n goes; int64[k, n]."""
    codes = rng.integers(0, 2**bits, k * n)
    special = [0, 2**bits - 1, *(1 << i for i in range(bits)), *range(2**bits)]
    codes[: len(special)] = special[: k * n]
    return rng.permutation(codes).reshape(k, n)


def activation_codes(rng: np.random.Generator, activation_bits: int, m: int, k: int) -> np.ndarray:
    """Random codes -top..top with the extremes in every row that has room for them; int32[m, k]."""
    top = 2 ** (activation_bits - 1) - 1
    q = rng.integers(-top, top + 1, (m, k))
    q[:, :1] = top
    q[:, 1:2] = -top
    return rng.permuted(q, axis=1).astype(np.int32)


def garbage_past_k(rng: np.random.Generator, words: np.ndarray, k: int) -> np.ndarray:
    """The same words with random bits where no k is: nothing may depend on them."""
    if k % 32 == 0:
        return words
    words = words.copy()
    words[:, -1] |= rng.integers(0, 2**32, words[:, -1].shape, dtype=np.uint32) << np.uint32(k % 32)
    return words
