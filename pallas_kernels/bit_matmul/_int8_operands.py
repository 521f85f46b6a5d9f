"""What both int8 kernels take beside words: rows as signed limbs, sums of rows, and the words of each program.

A tensor core takes signed operands, so a limb below the top one, u in 0..255, becomes u - 128 (`signed`);
`_triton_int8` tells how 128 comes back.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels.bit_matmul import _triton_codes, contract, limbs

HALF = 128  # what makes 0..255 signed


def segment_spans(problem: contract.Problem) -> np.ndarray:
    """int32[segments, 2], first and last words."""
    return np.array([(start, stop) for _, start, stop in problem.segments], np.int32)


def prepare(problem: contract.Problem, codes: jax.Array | limbs.Packed) -> limbs.Packed:
    """Codes, int32[m, 32 * num_words], as `_triton_pack` makes them of rows; or what it made."""
    if isinstance(codes, limbs.Packed):
        return codes
    parts = limbs.split(codes, problem.activation_limbs)
    return limbs.Packed(bits=_triton_codes.arrange(signed(parts)), row_sums=sum_rows(problem, parts))


def sum_rows(problem: contract.Problem, limb_codes: jax.Array) -> jax.Array:
    """int32[limbs, m, 32 * num_words] -> int32[segments, limbs, m]."""
    if len({stop - start for _, start, stop in problem.segments}) == 1:  # one reduction, however many
        sums = limb_codes.reshape(*limb_codes.shape[:2], len(problem.segments), -1).sum(axis=-1)
        return jnp.moveaxis(sums, 2, 0)
    return jnp.stack(
        [
            limb_codes[..., start * contract.WORD_BITS : stop * contract.WORD_BITS].sum(axis=-1)
            for _, start, stop in problem.segments
        ]
    )


def split_spans(spans: np.ndarray, block_words: int, parts: int) -> np.ndarray:
    """Each segment in as many parts of whole blocks of words; the last may be short, or empty."""
    part_words = block_words * pl.cdiv(pl.cdiv(int(np.max(np.diff(spans))), block_words), parts)
    first = spans[:, :1] + part_words * np.arange(parts)
    stop = np.minimum(first + part_words, spans[:, 1:])
    return np.stack([np.minimum(first, stop), stop], axis=-1).reshape(-1, 2).astype(np.int32)


def signed(parts: jax.Array) -> jax.Array:
    """int32[limbs, m, k] -> int8, all but the first limb less 128."""
    return jnp.concatenate([parts[:1], parts[1:] - HALF]).astype(jnp.int8)
