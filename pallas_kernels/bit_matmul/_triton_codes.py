"""From words to codes of 8 bits, in the registers of a Triton kernel.

The 8 words of 8 bitlayers of one channel are 8 rows of 32 bits; what a tensor core takes are 32 codes of 8 bits. Three
exchanges of half of the bits between pairs of words (H. S. Warren, Hacker's Delight, "Transposing a Bit Matrix") turn
one into the other, at 1.5 instructions for each code, however many bitlayers are in use. Word p of the outcome has in
its bytes the codes of k = p, p + 8, p + 16, p + 24, so activations are laid out in that order (`arrange`).

Codes are at the top of their byte and less 128: c8 - 128 with c8 = c * 2**(8 - w), for the w bitlayers in use.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _compat
from pallas_kernels.bit_matmul import contract

_BYTES = contract.WORD_BITS // 8
_POSITIONS = 8  # bit positions of a byte
_EXCHANGES = ((4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555))  # distance of rows, bits that stay


def arrange(x: jax.Array) -> jax.Array:
    """[.., m, k], k a multiple of 32, with k within each word in the order of the codes."""
    by_word = x.reshape(*x.shape[:-1], -1, _BYTES, _POSITIONS)
    return jnp.swapaxes(by_word, -1, -2).reshape(x.shape)


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


def signed(bitlayers: list[jax.Array]) -> jax.Array:
    """uint32[words, channels] of each of up to 8 bitlayers -> int8[32 * words, channels], c8 - 128."""
    num_words, num_channels = bitlayers[0].shape
    fields = [~bitlayers[0], *bitlayers[1:]]  # the top bit of a byte, inverted, is 128 less
    fields += [jnp.zeros_like(fields[0])] * (contract.LIMB_BITS - len(fields))
    for distance, kept in _EXCHANGES:
        fields = _exchange(fields, distance, kept)
    # Word 7 - p has position p. Selected, not joined: the position is one of a lane's own, so that nothing is done.
    position = jnp.arange(_POSITIONS, dtype=jnp.int32)[None, :, None]
    shape = num_words, _POSITIONS, num_channels
    field = jnp.broadcast_to(fields[_POSITIONS - 1][:, None, :], shape)
    for p in range(1, _POSITIONS):
        field = jnp.where(jnp.broadcast_to(position == p, shape), fields[_POSITIONS - 1 - p][:, None, :], field)
    shift = 8 * jnp.arange(_BYTES, dtype=jnp.uint32)[None, None, :, None]
    values = (field[:, :, None, :] >> shift).astype(jnp.int32).astype(jnp.int8)
    return values.reshape(num_words * contract.WORD_BITS, num_channels)


def _exchange(fields: list[jax.Array], distance: int, kept: int) -> list[jax.Array]:
    """Rows i and i + distance exchange the bits outside of `kept` of one for those inside of the other."""
    out = list(fields)
    given = jnp.uint32(kept ^ 0xFFFFFFFF)
    shift = jnp.uint32(distance)
    for i in range(len(fields)):
        if i & distance:
            continue
        upper, lower = fields[i], fields[i + distance]
        # Bits of the first word where `given`, else of the second: written so that it is one LOP3.
        moved = lower >> shift
        out[i] = moved ^ ((upper ^ moved) & given)
        moved = upper << shift
        out[i + distance] = lower ^ ((moved ^ lower) & given)
    return out


def inside(first: jax.Array, size: int, total: int) -> jax.Array | None:
    """Which of `size` places from `first` on are below `total`; None for all, whatever the program."""
    return None if total % size == 0 else first + jnp.arange(size, dtype=jnp.int32) < total


def load(ref: Any, mask: jax.Array | None, other: int) -> jax.Array:
    """`other` where the mask, if there is one, does not hold."""
    return _compat.triton_load(ref, mask=mask, other=None if mask is None else jnp.asarray(other, ref.dtype))


def all_of(shape: tuple[int, int], masks: list[jax.Array]) -> jax.Array | None:
    return functools.reduce(jnp.logical_and, (jnp.broadcast_to(mask, shape) for mask in masks)) if masks else None
