"""Single PTX instructions that JAX has no operation for, on 32-bit words; in interpret mode as JAX operations.

Compilers do not find all of them in JAX's operations: LLVM takes a selection of bits by a constant mask apart into two
instructions, and neither it nor ptxas sees a permutation of bytes in shifts, or a pair of bfloat16 in a word.

References: PTX ISA 8.8, sections 9.7.8.6 `lop3`, 9.7.9.7 `prmt` and 9.7.4.5 `fma`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _compat

_ONE = 0x3F80  # as bfloat16


def select(mask: int, where: jax.Array, elsewhere: jax.Array, *, interpret: bool) -> jax.Array:
    """Bits of `where` in the mask, of `elsewhere` outside of it, in one LOP3. uint32 of one shape each."""
    if interpret:
        return (where & jnp.uint32(mask)) | (elsewhere & jnp.uint32(mask ^ 0xFFFFFFFF))
    # The table is the function of F0, CC, AA: (CC & F0) | (AA & ~F0).
    return _instruction(f"lop3.b32 $0, {mask:#010x}, $1, $2, 0xCA;", where, elsewhere)


def and_or(word: jax.Array, kept: int, set_bits: int, *, interpret: bool) -> jax.Array:
    """(word & kept) | set_bits in one LOP3. uint32."""
    if interpret:
        return (word & jnp.uint32(kept)) | jnp.uint32(set_bits)
    return _instruction(f"lop3.b32 $0, $1, {kept:#010x}, {set_bits:#010x}, 0xEA;", word)


def and_xor(word: jax.Array, kept: int, flipped: jax.Array, *, interpret: bool) -> jax.Array:
    """(word & kept) ^ flipped in one LOP3. uint32 of one shape each."""
    if interpret:
        return (word & jnp.uint32(kept)) ^ flipped
    return _instruction(f"lop3.b32 $0, $1, {kept:#010x}, $2, 0x6A;", word, flipped)


def permute_bytes(word: jax.Array, selector: tuple[int, int, int, int], *, interpret: bool) -> jax.Array:
    """The bytes of a word that the selector names, for the highest byte first; number 0 is the lowest. uint32."""
    if interpret:
        picked = [((word >> jnp.uint32(8 * byte)) & jnp.uint32(0xFF)) for byte in selector]
        return (picked[0] << 24) | (picked[1] << 16) | (picked[2] << 8) | picked[3]
    return _instruction(f"prmt.b32 $0, $1, 0, 0x{''.join(map(str, selector))};", word)


def add_bfloat16_pairs(a: jax.Array, b: jax.Array, *, interpret: bool) -> jax.Array:
    """a + b of the two bfloat16 in the halves of each word, rounded to nearest even. uint32 of one shape each."""
    if interpret:
        low, high = (x + y for x, y in zip(_halves(a), _halves(b), strict=True))
        return _bits(low) | (_bits(high) << 16)
    # As a multiply-add with one, which needs compute capability 8.0; `add.bf16x2` needs 9.0.
    pair = _ONE | _ONE << 16
    return _instruction(f"{{ .reg .b32 one; mov.b32 one, {pair:#010x}; fma.rn.bf16x2 $0, $1, one, $2; }}", a, b)


def unpack_bfloat16(word: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two bfloat16 in the halves of a word, the lower first; no instruction, if they are joined again."""
    low, high = word.astype(jnp.uint16), (word >> 16).astype(jnp.uint16)
    return lax.bitcast_convert_type(low, jnp.bfloat16), lax.bitcast_convert_type(high, jnp.bfloat16)


def _halves(word: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As float32: low, high."""
    low, high = unpack_bfloat16(word)
    return low.astype(jnp.float32), high.astype(jnp.float32)


def _bits(value: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(value.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)


def _instruction(text: str, *words: jax.Array) -> jax.Array:
    return _compat.triton_inline_asm(text, *words)
