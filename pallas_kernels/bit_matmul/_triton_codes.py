"""From words to what a tensor core takes, in the registers of a Triton kernel: int8 codes, or centres in bfloat16.

The 8 words of 8 bitlayers of one channel are 8 rows of 32 bits; what a tensor core takes are 32 codes of 8 bits. Three
exchanges of half of the bits between pairs of words (H. S. Warren, Hacker's Delight, "Transposing a Bit Matrix") turn
one into the other, at 1.5 instructions for each code, however many bitlayers are in use. Word p of the outcome has in
its bytes the codes of k = p, p + 8, p + 16, p + 24, so activations are laid out in that order (`arrange`).

As int8, codes are at the top of their byte and less 128: c8 - 128 with c8 = c * 2**(8 - w), for the w bitlayers in use.

As bfloat16, they are the centres of their cells: c8 - 128 + 2**(7 - w), which is sign * (m + 2**(7 - w)) with a
magnitude m of 7 bits: those below the top bit of the code, inverted where the sign is negative, which is done to whole
words. Two bytes at a time become pairs of bfloat16: m is or-ed into the significand of 128, and 128 - 2**(7 - w) is
subtracted again, 4 instructions for both, all of them exact.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _compat
from pallas_kernels.bit_matmul import _ptx, contract, epilogue

_BYTES = contract.WORD_BITS // 8
_POSITIONS = 8  # bit positions of a byte
_TOP_BITS = 0x80808080  # of each byte
_EXCHANGES = ((4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555))  # distance of rows, bits that stay
# Of each half of a word, as bfloat16: the sign; sign and lowest 7 bits; 1.0; 128.0, whose lowest bit is worth 1.
_SIGN, _SIGN_AND_MAGNITUDE, _ONE, _MAGIC = 0x80008000, 0x807F807F, 0x3F803F80, 0x43004300
_BYTE_PAIRS = ((1, 1, 0, 0), (3, 3, 2, 2))  # each byte in both halves of 16 bits


def arrange(x: jax.Array) -> jax.Array:
    """[.., m, k], k a multiple of 32, with k within each word in the order of the codes."""
    by_word = x.reshape(*x.shape[:-1], -1, _BYTES, _POSITIONS)
    return jnp.swapaxes(by_word, -1, -2).reshape(x.shape)


def position_of(place: jax.Array) -> jax.Array:
    """Which k of its word lies at each of 32 places after `arrange`. int32."""
    return place % _BYTES * _POSITIONS + place // _BYTES


def rows_at(ref: Any, leading: tuple[Any, ...], rows: Any, columns: Any) -> Any:
    """ref.at[*leading, rows, columns] of a range of columns, and a range of rows or int32 numbers of them."""
    if not isinstance(rows, jax.Array):
        return ref.at[*leading, rows, columns]
    shape = rows.size, columns.size
    column = columns.start + jnp.arange(columns.size, dtype=jnp.int32)
    # Interpret mode takes ranges or numbers, not both.
    return ref.at[tuple(jnp.broadcast_to(i, shape) for i in (*leading, rows[:, None], column[None, :]))]


def load_words(
    words: Any,
    start: jax.Array,
    stop: jax.Array,
    first: int | jax.Array,
    num: int,
    used: jax.Array | int,
    *,
    channels: Any,
    inside: jax.Array | None,
    num_words: int,
    is_even: bool,
) -> list[jax.Array]:
    """Words from `start` on, of each of `num` bitlayers.

    Args:
      words: [bits, num_words, n] uint32, in memory
      start: the first word.
      stop: words from here on are zeros; not looked at with `is_even`.
      first: the first bitlayer.
      num: of bitlayers.
      used: bitlayers from first + used on are not loaded: zeros.
      channels: a block of them.
      inside: which of them exist; None for all.
      num_words: how many words.
      is_even: `stop` is not before the end of the block.

    Returns:
      uint32[num_words, channels] for each bitlayer.
    """
    shape = num_words, channels.size
    masks = [] if inside is None else [inside[None, :]]
    if not is_even:
        masks.append((start + jnp.arange(num_words, dtype=jnp.int32) < stop)[:, None])
    return [
        load(
            words.at[jnp.asarray(first + i, jnp.int32), pl.ds(start, num_words), channels],
            all_of(shape, [jnp.broadcast_to(i < used, shape), *masks]),
            0,
        )
        for i in range(num)
    ]


def signed(bitlayers: list[jax.Array], *, interpret: bool) -> jax.Array:
    """uint32[words, channels] of each of up to 8 bitlayers -> int8[32 * words, channels], c8 - 128."""
    num_words, num_channels = bitlayers[0].shape
    fields = _codes([~bitlayers[0], *bitlayers[1:]], interpret)  # the top bit of a byte, inverted, is 128 less
    # Selected, not joined: the position is one of a lane's own, so that nothing is done.
    position = jnp.arange(_POSITIONS, dtype=jnp.int32)[None, :, None]
    shape = num_words, _POSITIONS, num_channels
    field = jnp.broadcast_to(fields[0][:, None, :], shape)
    for p in range(1, _POSITIONS):
        field = jnp.where(jnp.broadcast_to(position == p, shape), fields[p][:, None, :], field)
    shift = 8 * jnp.arange(_BYTES, dtype=jnp.uint32)[None, None, :, None]
    values = (field[:, :, None, :] >> shift).astype(jnp.int32).astype(jnp.int8)
    return values.reshape(num_words * contract.WORD_BITS, num_channels)


def centred(bitlayers: list[jax.Array], used: jax.Array, *, interpret: bool) -> jax.Array:
    """uint32[words, channels] of each of up to 8 bitlayers -> bf16[channels, 32 * words], c8 - 128 + 2**(7 - used).

    Of one bitlayer, which is used, 1 or -1. `centre_unit` is what 1 stands for.
    """
    top, *lower = bitlayers
    if lower:
        negative = ~top
        masks = [jnp.where(i < used, jnp.uint32(0xFFFFFFFF), jnp.uint32(0)) for i in range(1, len(bitlayers))]
        words = [word ^ (negative & mask) for word, mask in zip(lower, masks, strict=True)]
        fields = _codes([negative, *words], interpret)
        excess = 128.0 - epilogue.power_of_two(contract.LIMB_BITS - 1 - used)  # exact in bfloat16
        half = lax.bitcast_convert_type(excess, jnp.uint32) >> 16
        excess = jnp.broadcast_to(((half << 16) | half) ^ jnp.uint32(_SIGN), top.shape)  # to be subtracted
    else:
        fields, excess = [~top << (_POSITIONS - 1 - p) for p in range(_POSITIONS)], None

    def pair(field, selector):
        field = _ptx.permute_bytes(field, selector, interpret=interpret)
        if excess is None:
            return _ptx.and_or(field, _SIGN, _ONE, interpret=interpret)
        magnitude = _ptx.and_or(field, _SIGN_AND_MAGNITUDE, _MAGIC, interpret=interpret)
        return _ptx.add_bfloat16_pairs(
            magnitude, _ptx.and_xor(field, _SIGN, excess, interpret=interpret), interpret=interpret
        )

    pairs = [pair(field, selector) for field in fields for selector in _BYTE_PAIRS]
    values = _join([half.T for word in pairs for half in _ptx.unpack_bfloat16(word)])
    return values.reshape(top.shape[1], contract.WORD_BITS * top.shape[0])


def centre_unit(first: int, num: int) -> float:
    """What takes `centred` of `num` bitlayers, of which number `first` is the first, to the centres of their cells."""
    return 2.0 ** -(first + (contract.LIMB_BITS - 1 if num > 1 else 1))


def _codes(fields: list[jax.Array], interpret: bool) -> list[jax.Array]:
    """The codes of up to 8 rows of 32 bits, the most significant first: a word for each position of a byte."""
    if len(fields) == 1:
        return [(fields[0] << (_POSITIONS - 1 - p)) & jnp.uint32(_TOP_BITS) for p in range(_POSITIONS)]
    fields = [*fields, *[jnp.zeros_like(fields[0])] * (contract.LIMB_BITS - len(fields))]
    for distance, kept in _EXCHANGES:
        fields = _exchange(fields, distance, kept, interpret)
    return fields[::-1]


def _exchange(fields: list[jax.Array], distance: int, kept: int, interpret: bool) -> list[jax.Array]:
    """Rows i and i + distance exchange the bits outside of `kept` of one for those inside of the other."""
    out = list(fields)
    given = kept ^ 0xFFFFFFFF
    shift = jnp.uint32(distance)
    for i in range(len(fields)):
        if i & distance:
            continue
        upper, lower = fields[i], fields[i + distance]
        out[i] = _ptx.select(given, upper, lower >> shift, interpret=interpret)
        out[i + distance] = _ptx.select(given, upper << shift, lower, interpret=interpret)
    return out


def _join(arrays: list[jax.Array]) -> jax.Array:
    """2**d arrays as one with d more axes, the last array index the fastest: they stay in the registers of a lane."""
    if len(arrays) == 1:
        return arrays[0]
    return jnp.stack([_join(arrays[::2]), _join(arrays[1::2])], axis=-1)


def inside(first: jax.Array, size: int, total: int) -> jax.Array | None:
    """Which of `size` places from `first` on are below `total`; None for all, whatever the program."""
    return None if total % size == 0 else first + jnp.arange(size, dtype=jnp.int32) < total


def load(ref: Any, mask: jax.Array | None, other: int) -> jax.Array:
    """`other` where the mask, if there is one, does not hold."""
    return _compat.triton_load(ref, mask=mask, other=None if mask is None else jnp.asarray(other, ref.dtype))


def all_of(shape: tuple[int, int], masks: list[jax.Array]) -> jax.Array | None:
    return functools.reduce(jnp.logical_and, (jnp.broadcast_to(mask, shape) for mask in masks)) if masks else None
