"""What every backend of the bitlayer product takes, returns and may assume.

Terms: m rows of activations, n output channels, k the contraction; `bits` bitlayers are stored,
number 0 the most significant; `bitlayers[row]` of them are used.

Operands
    x:         int32[m, k]   fixed-point activation codes, or f32/bf16/f16[m, k] (`activation_bits=None`); or what
               `quantize_rows` of the backend, if it has one, makes of floats in place of codes
    words:     uint32[bits, ceil(k / 32), n]   bit t of word j holds contraction index 32 * j + t;
               bits past k are arbitrary, so a backend pads x with zeros, never trusts the words
    scale:     f32[min(bits, 4), groups, n]    row b - 1 serves b bitlayers, the last row all b >= 4
    bitlayers: int32[m]   in 1..bits, one per row; a row's result depends on that row alone

Result: f32[m, n]
    float activations: sum_g scale_b[g] * (x_g . v_b), any order of summation, f32 accumulation.
    fixed point:       sum_g scale_b[g] * 2**-(b + activation_bits - 2) * I_g, the caller multiplying by
               2**(activation_bits - 2) * step of the row afterwards. I_g = sum_k q * (2 * c_b - (2**b - 1)) is an
               exact integer and its conversion to float32 is fixed (see `epilogue`), so that every
               backend returns the same bits.

`prefixes` returns f32[bits, m, n]: the result after each number of bitlayers 1..limit; what lies at
or beyond `limit` is arbitrary and must never be read.

`limb_sums`, which a backend may have, returns the integers of a fixed-point product before `epilogue`:
int32[segments, activation limbs, code limbs, m, n], as `epilogue.combine_limbs` describes them. They are what devices
that each hold a part of k add up; `scale_groups`, which a backend may have too, is that of `epilogue`, of the whole
problem and with its width of activations.
"""

from __future__ import annotations

import dataclasses

WORD_BITS = 32
MAX_BITS = 16
MAX_ACTIVATION_BITS = 24
NUM_SCALES = 4  # scales are refitted for 1, 2, 3 bitlayers; the fourth serves all larger counts
LIMB_BITS = 8

# One limb product adds k terms of at most (2**8 - 1) * (2**8 - 1): int32 holds 33025 of them.
MAX_EXACT_K = 32768


class Unsupported(ValueError):
    """A backend cannot run a problem; the only error that automatic dispatch may answer by another backend."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """The static facts of one product, all a backend may base its choices on."""

    m: int
    k: int
    n: int
    bits: int
    group_size: int | None
    activation_bits: int | None

    @property
    def num_words(self) -> int:
        """Words along the contraction."""
        return num_words(self.k)

    @property
    def groups(self) -> int:
        """Groups along the contraction."""
        return num_groups(self.k, self.group_size)

    @property
    def words_per_group(self) -> int:
        """Words along the contraction of one group."""
        return self.num_words if self.group_size is None else self.group_size // WORD_BITS

    @property
    def fixed_point_bits(self) -> int:
        """`activation_bits` of a fixed-point product."""
        assert self.activation_bits is not None, "float activations have no fixed-point width"
        return self.activation_bits

    @property
    def activation_limbs(self) -> int:
        """Number of 8-bit limbs of an activation code: the top one signed, the others unsigned."""
        return -(-self.fixed_point_bits // LIMB_BITS)

    @property
    def code_limbs(self) -> tuple[tuple[int, int], ...]:
        """Ranges [first, last) of bitlayers that one int32 accumulator takes."""
        return tuple((i, min(i + LIMB_BITS, self.bits)) for i in range(0, self.bits, LIMB_BITS))

    @property
    def segments(self) -> tuple[tuple[int, int, int], ...]:
        """(group, first word, last word): k in runs of one group that int32 sums exactly, in order."""
        step = MAX_EXACT_K // WORD_BITS
        return tuple(
            (group, start, min(start + step, self._end_of_group(group)))
            for group in range(self.groups)
            for start in range(group * self.words_per_group, self._end_of_group(group), step)
        )

    def _end_of_group(self, group: int) -> int:
        return min((group + 1) * self.words_per_group, self.num_words)


def num_words(k: int) -> int:
    """Words along the contraction."""
    return -(-k // WORD_BITS)


def num_groups(k: int, group_size: int | None) -> int:
    """Groups along the contraction; the last may be short. None is one group of all k."""
    return 1 if group_size is None else -(-k // group_size)
