"""XLA's own products on a GPU, each in the ways in which somebody who tunes it would run it; the fastest is compared.

Flags are those of the compiler, given to each program by itself. Products of one row are what others call GEMV: there
cuBLAS takes bfloat16 as it is only where the result is bfloat16 too (XLA converts the whole weight otherwise), and a
weight stored with k last may be read faster.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

CUBLAS = {"xla_gpu_enable_triton_gemm": False}
NAMES = ("f32", "bf16", "int8", "int4")
COMPARED = ("f32", "bf16")  # with variants
OPTIONAL = ("int8", "int4")  # left out where XLA does not compile them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
    """One way to run one product.

    Attributes:
      name: one of NAMES.
      variant: "xla" with the flags as they are, "cublas" without XLA's Triton products, "transposed": k last.
      fn: of (rows, weight), not jitted.
      options: of XLA's compiler.
      rows: of activations, as fn takes them.
      weight: as fn takes it.
      weight_bytes: of the weight in memory.
    """

    name: str
    variant: str
    fn: Callable[[jax.Array, jax.Array], jax.Array]
    options: dict[str, Any]
    rows: jax.Array
    weight: jax.Array
    weight_bytes: int


def all_of(x: jax.Array, w: jax.Array) -> Iterator[Baseline]:
    """Of f32[m, k] and f32[k, n]."""
    num = w.size
    for name, dtype, size in (("f32", jnp.float32, 4 * num), ("bf16", jnp.bfloat16, 2 * num)):
        rows, weight = x.astype(dtype), w.astype(dtype)
        ways = [("xla", _dot, {}, weight), ("cublas", _dot, CUBLAS, weight)]
        if len(x) == 1:
            ways.append(("transposed", _dot_transposed, {}, jnp.copy(weight.T)))
        for variant, fn, options, stored in ways:
            yield Baseline(
                name=name, variant=variant, fn=fn, options=options, rows=rows, weight=stored, weight_bytes=size
            )
    scale = jnp.abs(w).max(axis=0, keepdims=True)
    half = x.astype(jnp.bfloat16)
    for name, rows, bits, dtype, fn in (("int8", x, 8, jnp.int8, _int8_dot), ("int4", half, 4, jnp.int4, _int4_dot)):
        codes = jnp.rint(w / scale * (2 ** (bits - 1) - 1)).astype(dtype)
        yield Baseline(
            name=name,
            variant="xla",
            fn=lambda x, w, fn=fn: fn(x, w, scale),
            options={},
            rows=rows,
            weight=codes,
            weight_bytes=num * bits // 8,
        )


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.dot(x, w, precision="highest" if x.dtype == jnp.float32 else None)


def _dot_transposed(x: jax.Array, w: jax.Array) -> jax.Array:
    precision = "highest" if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), precision=precision)


def _int8_dot(x: jax.Array, w: jax.Array, scale: jax.Array) -> jax.Array:
    """Activations quantized for each row."""
    step = jnp.abs(x).max(axis=1, keepdims=True) / 127
    sums = jax.lax.dot(jnp.rint(x / step).astype(jnp.int8), w, preferred_element_type=jnp.int32)
    return sums.astype(jnp.float32) * step * (scale / 127)


def _int4_dot(x: jax.Array, w: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.dot(x, w.astype(jnp.bfloat16), preferred_element_type=jnp.float32) * (scale / 7)
