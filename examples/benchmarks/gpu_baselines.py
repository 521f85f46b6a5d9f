"""XLA's own products on a GPU, each in the ways in which somebody who tunes it would run it; the fastest is compared.

Flags are those of the compiler, given to each program by itself. Products of one row are what others call GEMV: there
cuBLAS takes bfloat16 as it is only where the result is bfloat16 too (XLA converts the whole weight otherwise), and a
weight stored with k last may be read faster.

`f32_highest` is float32 to the last bit or so, `f32_default` what JAX does unless told otherwise: XLA may round the
operands to TF32, of 10 fraction bits, on the way to the tensor core. `int8` quantizes each row of float32 activations
in the call, for a product of int8 by int8; `int8_weights` and `int4_weights` bring the weights alone to bfloat16, for
bfloat16 activations.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

CUBLAS = {"xla_gpu_enable_triton_gemm": False}
FLOATS = ("f32_highest", "f32_default", "bf16")
OPTIONAL = ("int8", "int8_weights", "int4_weights")  # left out where XLA does not compile or run them
NAMES = (*FLOATS, *OPTIONAL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
    """One way to run one product.

    Attributes:
      name: one of NAMES.
      variant: "xla" with the flags as they are, "cublas" without XLA's Triton products, "transposed": k last.
      fn: of (rows, weight, *rest), not jitted.
      options: of XLA's compiler.
      rows: of activations, as fn takes them.
      weight: as fn takes it.
      weight_bytes: of the weight in memory.
      rest: of the operands: scales of output channels.
    """

    name: str
    variant: str
    fn: Callable[..., jax.Array]
    options: dict[str, Any]
    rows: jax.Array
    weight: jax.Array
    weight_bytes: int
    rest: tuple[jax.Array, ...] = ()


def all_of(x: jax.Array, w: jax.Array) -> Iterator[Baseline]:
    """Of f32[m, k] and f32[k, n]."""
    half_x, half_w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    scale = jnp.abs(w).max(axis=0)
    kinds: list[tuple[str, Callable[..., jax.Array], jax.Array, jax.Array, int, tuple[jax.Array, ...]]] = [
        ("f32_highest", _highest_dot, x, w, 32, ()),
        ("f32_default", _dot, x, w, 32, ()),
        ("bf16", _dot, half_x, half_w, 16, ()),
        ("int8", _int8_dot, x, _codes(w, scale, 8), 8, (scale / 127,)),
        ("int8_weights", _weights_dot, half_x, _codes(w, scale, 8), 8, (scale / 127,)),
        ("int4_weights", _weights_dot, half_x, _codes(w, scale, 4), 4, (scale / 7,)),
    ]
    variants = [("xla", {}, False), ("cublas", CUBLAS, False)]
    if len(x) == 1:
        variants.append(("transposed", {}, True))
    for (name, fn, rows, weight, bits, rest), (variant, options, turned) in itertools.product(kinds, variants):
        yield Baseline(
            name=name,
            variant=variant,
            fn=lambda x, w, *rest, fn=fn, k_axis=int(turned): fn(x, w, k_axis, *rest),
            options=options,
            rows=rows,
            weight=jnp.copy(weight.T) if turned else weight,
            weight_bytes=w.size * bits // 8,
            rest=rest,
        )


def _codes(w: jax.Array, scale: jax.Array, bits: int) -> jax.Array:
    return jnp.rint(w / scale[None] * (2 ** (bits - 1) - 1)).astype(f"int{bits}")


def _contract(x: jax.Array, w: jax.Array, k_axis: int, **options: Any) -> jax.Array:
    return lax.dot_general(x, w, (((1,), (k_axis,)), ((), ())), **options)


def _dot(x: jax.Array, w: jax.Array, k_axis: int) -> jax.Array:
    return _contract(x, w, k_axis)


def _highest_dot(x: jax.Array, w: jax.Array, k_axis: int) -> jax.Array:
    return _contract(x, w, k_axis, precision="highest")


def _int8_dot(x: jax.Array, w: jax.Array, k_axis: int, scale: jax.Array) -> jax.Array:
    """Activations quantized for each row. f32[m, n]."""
    step = jnp.abs(x).max(axis=1, keepdims=True) / 127
    sums = _contract(jnp.rint(x / step).astype(jnp.int8), w, k_axis, preferred_element_type=jnp.int32)
    return sums.astype(jnp.float32) * step * scale[None]


def _weights_dot(x: jax.Array, w: jax.Array, k_axis: int, scale: jax.Array) -> jax.Array:
    """Weights become bfloat16, exactly; their scales come after the sum. bf16[m, n]."""
    sums = _contract(x, w.astype(x.dtype), k_axis, preferred_element_type=jnp.float32)
    return (sums * scale[None]).astype(x.dtype)
