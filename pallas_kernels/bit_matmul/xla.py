"""The product in plain jnp and lax: right on every platform, and written for the CPU.

Two ways, each fast where the other is not: `_xla_serial` works on the words themselves, one bitlayer and one
activation bit at a time, so its cost grows with rows * bitlayers * activation bits; `_xla_blocks` unpacks words and
leaves the rest to a dot, so it pays for unpacking once. Both sum the same integers, so which one runs never shows in
a fixed-point result. `_xla_float` is to float rows what `_xla_serial` is to fixed point.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.bit_matmul import _xla_blocks, _xla_float, _xla_serial, contract, epilogue

# rows * activation bits * bitlayers up to which the words themselves are faster. Measured at 2 to 32 rows, 8 and 16
# activation bits, 2, 4 and 8 bitlayers, 4096 x 4096 and 1024 x 1024 (JAX 0.10.2, 2 cores, AVX-512): everywhere the two
# ways cost the same between 384 and 512, since unpacking and a dot of few rows cost about as much at any of these.
_SERIAL_WORK = 448
# The same for float rows, without the activation bits: 4096 x 4096 at 2, 4 and 8 bitlayers takes 0.3, 0.35 and 0.5 of
# the time for 1 row, 0.6, 0.7 and 0.9 for 3, 0.75, 0.8 and 1.15 for 4, and twice the time or more from 5 rows on. A
# sweep takes 0.2 of the time of its dots for 2 rows and 0.5 for 4 [measured].
_FLOAT_WORK = 24
_FLOAT_ROWS = 4


def unsupported(problem: contract.Problem) -> str | None:
    """Runs everything, everywhere."""
    del problem
    return None


def matmul(
    problem: contract.Problem, x: jax.Array, words: jax.Array, scale: jax.Array, bitlayers: jax.Array
) -> jax.Array:
    """The product of the contract."""
    if problem.m == 0 or problem.n == 0:
        return jnp.zeros((problem.m, problem.n), jnp.float32)
    x = _pad(problem, x)
    operands = (x, words, scale, bitlayers)
    if problem.activation_bits is None:
        return _float_matmul(problem, operands)
    serial, blocks = functools.partial(_serial, problem, sweep=False), functools.partial(_xla_blocks.matmul, problem)
    return _either(problem, serial, blocks, operands)


def limb_sums(problem: contract.Problem, x: jax.Array, words: jax.Array, bitlayers: jax.Array) -> jax.Array:
    """The integers of a fixed-point product. int32[segments, activation limbs, code limbs, m, n]."""
    if 0 in (problem.m, problem.n, problem.k):
        limbs = len(problem.segments), problem.activation_limbs, len(problem.code_limbs)
        return jnp.zeros((*limbs, problem.m, problem.n), jnp.int32)
    serial = functools.partial(_serial_sums, problem, sweep=False)
    blocks = functools.partial(_xla_blocks.limb_sums, problem)
    return _either(problem, serial, blocks, (_pad(problem, x), words, bitlayers))


def prefixes(
    problem: contract.Problem, x: jax.Array, words: jax.Array, scale: jax.Array, limit: jax.Array
) -> jax.Array:
    """The product at every number of bitlayers up to `limit`."""
    if problem.m == 0 or problem.n == 0:
        return jnp.zeros((problem.bits, problem.m, problem.n), jnp.float32)
    x = _pad(problem, x)
    limit = jnp.clip(limit, 0, problem.bits).astype(jnp.int32)
    # The words are read once for all counts, and a dot is needed for each: as above, with one bitlayer to each dot.
    if problem.activation_bits is None and problem.m <= _FLOAT_ROWS:
        return _xla_float.prefixes(problem, x, words, scale, limit)
    if problem.activation_bits is None or problem.m * problem.activation_bits > _SERIAL_WORK:
        return _xla_blocks.prefixes(problem, x, words, scale, limit)
    limits = jnp.full((problem.m,), limit, jnp.int32)
    return _serial(problem, x, words, scale, limits, sweep=True).reshape(problem.bits, problem.m, problem.n)


def _either(
    problem: contract.Problem,
    serial: Callable[..., jax.Array],
    blocks: Callable[..., jax.Array],
    operands: tuple[jax.Array, ...],
) -> jax.Array:
    """A fixed-point product by whichever way is the faster; the last operand is the numbers of bitlayers."""
    if problem.m * problem.fixed_point_bits > _SERIAL_WORK:
        return blocks(*operands)
    if problem.m * problem.fixed_point_bits * problem.bits <= _SERIAL_WORK:
        return serial(*operands)
    limit = _SERIAL_WORK // (problem.m * problem.fixed_point_bits)
    return lax.cond(jnp.max(operands[-1]) <= limit, serial, blocks, *operands)


def _float_matmul(problem: contract.Problem, operands: tuple[jax.Array, ...]) -> jax.Array:
    fused, blocks = (functools.partial(module.matmul, problem) for module in (_xla_float, _xla_blocks))
    if problem.m > _FLOAT_ROWS:
        return blocks(*operands)
    if problem.m * problem.bits <= _FLOAT_WORK:
        return fused(*operands)
    return lax.cond(jnp.max(operands[-1]) <= _FLOAT_WORK // problem.m, fused, blocks, *operands)


def _pad(problem: contract.Problem, x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, problem.num_words * contract.WORD_BITS - problem.k)))


def _serial(
    problem: contract.Problem, x: jax.Array, words: jax.Array, scale: jax.Array, bitlayers: jax.Array, *, sweep: bool
) -> jax.Array:
    """f32[m, n], with `sweep` f32[bits * m, n]: the rows of each number of bitlayers in turn."""
    counts = jnp.repeat(jnp.arange(1, problem.bits + 1, dtype=jnp.int32), problem.m) if sweep else bitlayers
    values = jnp.zeros((0, counts.shape[0], problem.n), jnp.float32)
    if problem.segments:
        sums = _serial_sums(problem, x, words, bitlayers, sweep=sweep)
        values = jax.vmap(epilogue.combine_limbs, in_axes=(0, None))(sums, counts)
    sums = epilogue.sum_segments(problem, values)
    return epilogue.scale_groups(sums, scale, counts, problem.fixed_point_bits)


def _serial_sums(
    problem: contract.Problem, x: jax.Array, words: jax.Array, bitlayers: jax.Array, *, sweep: bool
) -> jax.Array:
    """int32[segments, activation limbs, code limbs, m, n], with `sweep` [.., bits * m, n]."""
    parts = [_xla_serial.limb_sums(problem, span, x, words, bitlayers, sweep=sweep) for span in _spans(problem)]
    return jnp.moveaxis(jnp.concatenate(parts, axis=2), 2, 0)


def _spans(problem: contract.Problem) -> list[_xla_serial.Span]:
    """All segments, in one span where they are groups of equal length."""
    if len(problem.segments) == problem.groups > 1:
        return [_xla_serial.Span(start=0, stop=problem.num_words, segment=problem.words_per_group)]
    return [_xla_serial.Span(start=start, stop=stop, segment=stop - start) for _, start, stop in problem.segments]
