"""The oracle: the product written as its definition reads, for checking every other backend against."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.bit_matmul import contract, epilogue


def unsupported(problem: contract.Problem) -> str | None:
    """The reference runs everything, everywhere."""
    del problem
    return None


def matmul(
    problem: contract.Problem, x: jax.Array, words: jax.Array, scale: jax.Array, bitlayers: jax.Array
) -> jax.Array:
    """The product of the contract. Cost: the weight as int32, once per row count and limb."""
    x = jnp.pad(x, ((0, 0), (0, problem.num_words * contract.WORD_BITS - problem.k)))
    digits = _digits(words)
    if problem.activation_bits is None:
        return _float_matmul(problem, x, digits, scale, bitlayers)
    sums = [jnp.zeros((problem.m, problem.n), jnp.float32) for _ in range(problem.groups)]
    for group, start, stop in problem.segments:
        k_range = slice(start * contract.WORD_BITS, stop * contract.WORD_BITS)
        limbs = [
            [_limb_sum(limb, digits[first:last, k_range], bitlayers - first) for first, last in problem.code_limbs]
            for limb in _limbs(x[:, k_range], problem.activation_limbs)
        ]
        sums[group] = sums[group] + epilogue.combine_limbs(jnp.array(limbs), bitlayers)
    return epilogue.scale_groups(jnp.stack(sums), scale, bitlayers, problem.fixed_point_bits)


def prefixes(
    problem: contract.Problem, x: jax.Array, words: jax.Array, scale: jax.Array, limit: jax.Array
) -> jax.Array:
    """The product at every number of bitlayers, one by one."""
    del limit
    counts = jnp.arange(1, problem.bits + 1)
    return jnp.stack([matmul(problem, x, words, scale, jnp.full((problem.m,), b, jnp.int32)) for b in counts])


def _digits(words: jax.Array) -> jax.Array:
    """uint32[bits, num_words, n] -> int32[bits, 32 * num_words, n] of 2 * bit - 1, that is -1 or 1."""
    bits, num_words, n = words.shape
    position = jnp.arange(contract.WORD_BITS, dtype=jnp.uint32)[None, None, :, None]
    bit = (words[:, :, None, :] >> position) & jnp.uint32(1)
    return 2 * bit.reshape(bits, num_words * contract.WORD_BITS, n).astype(jnp.int32) - 1


def _limbs(codes: jax.Array, num: int) -> list[jax.Array]:
    """Two's complement codes in 8-bit limbs, most significant (signed) first."""
    top, *lower = range(contract.LIMB_BITS * (num - 1), -1, -contract.LIMB_BITS)
    return [codes >> top] + [(codes >> shift) & 0xFF for shift in lower]


def _limb_sum(limb: jax.Array, digits: jax.Array, used: jax.Array) -> jax.Array:
    """Shift-accumulate over the bitlayers of one code limb; rows stop at `used`. int32[m, n]."""
    total = jnp.zeros((limb.shape[0], digits.shape[-1]), jnp.int32)
    for i in range(digits.shape[0]):
        total = jnp.where((i < used)[:, None], 2 * total + limb @ digits[i], total)
    return total


def _float_matmul(
    problem: contract.Problem, x: jax.Array, digits: jax.Array, scale: jax.Array, bitlayers: jax.Array
) -> jax.Array:
    weight_of_bit = jnp.where(
        jnp.arange(problem.bits)[None] < bitlayers[:, None],
        0.5 ** jnp.arange(1, problem.bits + 1, dtype=jnp.float32)[None],
        0.0,
    )  # [m, bits]
    size = problem.group_size or problem.num_words * contract.WORD_BITS
    total = jnp.zeros((problem.m, problem.n), jnp.float32)
    for group in range(problem.groups):
        k_range = slice(group * size, (group + 1) * size)
        per_bit = jnp.einsum(
            "mk,bkn->bmn",
            x[:, k_range].astype(jnp.float32),
            digits[:, k_range].astype(jnp.float32),
            precision="highest",
        )
        total = total + jnp.einsum("mb,bmn->mn", weight_of_bit, per_bit, precision="highest") * epilogue.scale_rows(
            scale[:, group], bitlayers
        )
    return total
