"""The product of rows of activations with packed words, and how it goes under `vmap` and `grad`.

`vmap` over activations folds into rows. `vmap` over the number of bitlayers makes one pass that keeps the running
value after every bitlayer, and picks from it. Over both it folds into rows, each with a count of its own. Only where
the words themselves are mapped does anything loop. Derivatives treat the quantization of activations as the identity.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from pallas_kernels import _compat
from pallas_kernels.bit_matmul import contract
from pbjax import _backends, _format, _partition

Product = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Config:
    """What is static about a product beyond the shapes of its operands."""

    choice: _backends.Choice
    group_size: int | None
    activation_bits: int | None
    axes: tuple[str, ...]


def product(
    x: jax.Array,
    words: jax.Array,
    scale: jax.Array,
    bitlayers: jax.Array,
    *,
    group_size: int | None,
    activation_bits: int | None,
    backend: str | None,
    axes: tuple[str, ...] = (),
) -> jax.Array:
    """x . w_b for each row.

    Args:
      x: float[m, k].
      words: uint32[bits, ceil(k / 32), n].
      scale: f32[min(bits, 4), groups, n].
      bitlayers: int32[m] in 1..bits.
      group_size: of the scales.
      activation_bits: width of fixed-point activations, or None.
      backend: where to run, or None for the automatic choice.
      axes: mesh axes of `jax.shard_map` over which each device holds a part of k.

    Returns:
      f32[m, n].
    """
    problem = _problem(x, words, group_size, activation_bits)
    # The backend is settled here, in the caller's context: the rules below may run in another one.
    choice = _backends.choose(problem, backend)
    config = _Config(choice=choice, group_size=group_size, activation_bits=activation_bits, axes=axes)
    # Operands vary over the mesh alike, so that cotangents do as their operands do. What devices that share k have in
    # common stays so, as the result is.
    varying = _compat.varying_axes(x, words, scale, bitlayers)
    x, words = _compat.varying_over((x, words), varying)
    scale, bitlayers = _compat.varying_over((scale, bitlayers), varying.difference(axes))
    return _differentiable(config)(x, words, scale, bitlayers)


def _problem(x: jax.Array, words: jax.Array, group_size: int | None, activation_bits: int | None) -> contract.Problem:
    return contract.Problem(
        m=x.shape[0],
        k=x.shape[1],
        n=words.shape[-1],
        bits=words.shape[0],
        group_size=group_size,
        activation_bits=activation_bits,
    )


def _run(
    config: _Config, x: jax.Array, words: jax.Array, scale: jax.Array, counts: jax.Array, *, prefixes: bool
) -> jax.Array:
    """The product, as it is cut among devices."""
    problem = _problem(x, words, config.group_size, config.activation_bits)
    choice = _backends.choose_again(config.choice, problem)
    run = _partition.partitioned(choice, problem=problem, prefixes=prefixes, axes=config.axes)
    with jax.enable_x64(False):  # the contract knows 32 bits; 64 would widen every index and integer sum
        return run(x, words, scale, counts)


@functools.cache
def _batched(config: _Config) -> tuple[Product, Product]:
    """The product at given counts and at every count up to a limit, with their rules for `vmap`."""
    # Jitted, so that a call outside of jit compiles one program and not every operation by itself.
    run_matmul = jax.jit(functools.partial(_run, config, prefixes=False))
    run_prefixes = jax.jit(functools.partial(_run, config, prefixes=True))

    @custom_vmap
    def matmul(x, words, scale, bitlayers):
        return run_matmul(x, words, scale, bitlayers)

    @custom_vmap
    def prefixes(x, words, scale, limit):
        return run_prefixes(x, words, scale, limit)

    @matmul.def_vmap
    def matmul_rule(axis_size, in_batched, x, words, scale, bitlayers):
        x_batched, words_batched, scale_batched, bitlayers_batched = in_batched
        if words_batched or scale_batched:
            return _map(matmul, in_batched, (x, words, scale, bitlayers)), True
        if x_batched:
            rows = x.shape[1]
            counts = bitlayers if bitlayers_batched else jnp.broadcast_to(bitlayers, (axis_size, rows))
            y = matmul(x.reshape(axis_size * rows, x.shape[2]), words, scale, counts.reshape(axis_size * rows))
            return y.reshape(axis_size, rows, words.shape[-1]), True
        running = prefixes(x, words, scale, jnp.max(bitlayers, initial=1))
        return running[bitlayers - 1, jnp.arange(x.shape[0])], True

    @prefixes.def_vmap
    def prefixes_rule(axis_size, in_batched, x, words, scale, limit):
        x_batched, words_batched, scale_batched, limit_batched = in_batched
        if words_batched or scale_batched:
            return _map(prefixes, in_batched, (x, words, scale, limit)), True
        limit = jnp.max(limit, initial=1) if limit_batched else limit
        if not x_batched:
            return prefixes(x, words, scale, limit), False
        rows = x.shape[1]
        y = prefixes(x.reshape(axis_size * rows, x.shape[2]), words, scale, limit)
        return jnp.moveaxis(y.reshape(y.shape[0], axis_size, rows, words.shape[-1]), 1, 0), True

    return matmul, prefixes


def _map(fn: Product, in_batched: list[bool], args: tuple[jax.Array, ...]) -> jax.Array:
    """Runs `fn` for each mapped weight in turn; operands that are not mapped are shared."""
    mapped = tuple(arg for arg, batched in zip(args, in_batched, strict=True) if batched)

    def one(mapped):
        rest = iter(mapped)
        return fn(*(next(rest) if batched else arg for arg, batched in zip(args, in_batched, strict=True)))

    return lax.map(one, mapped)


@functools.cache
def _differentiable(config: _Config) -> Product:
    """The product with its derivatives with respect to the activations and the scales."""
    matmul, _ = _batched(config)

    @jax.custom_vjp
    def differentiable(x, words, scale, bitlayers):
        return matmul(x, words, scale, bitlayers)

    def forward(x, words, scale, bitlayers):
        # Through `differentiable` again, so that a second derivative finds this rule and not the quantization.
        return differentiable(x, words, scale, bitlayers), (x, words, scale, bitlayers)

    def backward(residuals, g):
        x, words, scale, bitlayers = residuals
        dx = _gradient_of_x(config, x, words, scale, bitlayers, g).astype(x.dtype)
        dscale = _gradient_of_scale(config, x, words, scale, bitlayers, g)
        if config.axes and config.group_size is None:  # one scale for all of k
            dscale = lax.psum(dscale, config.axes)
        return dx, None, dscale, None

    differentiable.defvjp(forward, backward)
    return differentiable


def _sum_over_counts(bits: int, bitlayers: jax.Array, term: Callable, zero: jax.Array) -> jax.Array:
    """sum_b term(b, rows that use b bitlayers), where a count that no row uses costs nothing."""

    def add(total, b):
        rows = bitlayers == b
        return lax.cond(jnp.any(rows), lambda: total + term(b, rows), lambda: total), None

    return lax.scan(add, zero, jnp.arange(1, bits + 1, dtype=jnp.int32))[0]


def _gradient_of_x(config: _Config, x, words, scale, bitlayers, g) -> jax.Array:
    """g . w_b^T row by row, through the dequantized prefix: f32[m, k]."""

    def term(b, rows):
        weight = _format.dequantize(words, scale, b, x.shape[1], config.group_size)
        return jnp.dot(jnp.where(rows[:, None], g, 0), weight.T, precision="highest")

    zero = _compat.varying_like(jnp.zeros(x.shape, jnp.float32), words, scale, bitlayers, g)
    return _sum_over_counts(words.shape[0], bitlayers, term, zero)


def _gradient_of_scale(config: _Config, x, words, scale, bitlayers, g) -> jax.Array:
    """sum_k v_b * (x^T g) over each group: f32[min(bits, 4), groups, n]."""
    bits, k = words.shape[0], x.shape[1]
    ones = jnp.ones_like(scale)

    def term(b, rows):
        outer = jnp.dot(x.T.astype(jnp.float32), jnp.where(rows[:, None], g, 0), precision="highest")
        per_k = _format.dequantize(words, ones, b, k, config.group_size) * outer
        row = jnp.arange(scale.shape[0], dtype=jnp.int32) == jnp.minimum(b, scale.shape[0]) - 1
        return jnp.where(row[:, None, None], _format.group_sum(per_k, config.group_size)[None], 0)

    zero = _compat.varying_like(jnp.zeros_like(scale), x, words, bitlayers, g)
    return _sum_over_counts(bits, bitlayers, term, zero)
