"""One small product of every kind that a GPU kernel has: what compute-sanitizer watches.

    compute-sanitizer python examples/benchmarks/gpu_products.py

The most important come first, and each is told when it is done, so that one sees what was covered where time ran out.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp

import pbjax

READY = "the device answers"  # printed before the first product
K, N = 1000, 132  # which fill no block of any kernel; words are read 16 bytes at a time
SEVERAL = 3  # rows, few and none of them a block
MANY, VERY_MANY = 70, 1030  # rows, for the tensor core, and for a dot of XLA's
BACKENDS = ("mosaic", "triton")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """One product.

    Attributes:
      m: rows.
      activation_bits: of fixed-point activations, or None.
      bits: stored.
      group_size: of scales.
      dtype: of activations.
      by_row: a number of bitlayers for each row, 1 among them and all.
      sweep: the product at every number of bitlayers.
      n: output channels.
    """

    m: int
    activation_bits: int | None
    bits: int = 8
    group_size: int | None = None
    dtype: str = "float32"
    by_row: bool = False
    sweep: bool = False
    n: int = N


PRODUCTS = (
    # Every kernel, then its sweep.
    *(Product(m=m, activation_bits=width) for m, width in ((1, 8), (1, 16), (MANY, 8), (MANY, 16))),
    *(Product(m=m, activation_bits=None, dtype="bfloat16") for m in (1, MANY, VERY_MANY)),
    *(Product(m=m, activation_bits=width, sweep=True) for m, width in ((1, 8), (1, 16), (MANY, 16), (MANY, None))),
    # Rows of different numbers of bitlayers.
    *(Product(m=SEVERAL, activation_bits=width, by_row=True) for width in (8, 16, None)),
    *(Product(m=MANY, activation_bits=width, by_row=True) for width in (8, None)),
    Product(m=VERY_MANY, activation_bits=None, by_row=True),
    # Groups: of few rows, of many, of floats; the last is not full.
    *(Product(m=m, activation_bits=16, group_size=128) for m in (1, MANY)),
    Product(m=MANY, activation_bits=16, group_size=128, sweep=True),
    *(Product(m=m, activation_bits=None, group_size=size) for m in (1, MANY) for size in (64, 512)),
    *(
        Product(m=SEVERAL, activation_bits=None, group_size=64, by_row=not sweep, sweep=sweep)
        for sweep in (True, False)
    ),
    *(Product(m=1, activation_bits=16, group_size=128, sweep=sweep, by_row=not sweep) for sweep in (True, False)),
    # 9 to 16 bitlayers, and activations of three limbs.
    *(Product(m=m, activation_bits=16, bits=16) for m in (1, MANY)),
    *(Product(m=m, activation_bits=None, bits=16) for m in (1, MANY, VERY_MANY)),
    Product(m=MANY, activation_bits=None, bits=16, group_size=64),
    *(Product(m=m, activation_bits=24, bits=16, sweep=True) for m in (1, MANY)),
    # Words that are aligned to 8 bytes, and to 4.
    *(Product(m=1, activation_bits=16, n=N + i) for i in (-2, -1)),
)


def run_all(products: Sequence[Product] = PRODUCTS, backends: Sequence[str] = BACKENDS) -> int:
    """Runs each product on each backend that takes it; returns how many that were."""
    jobs = []
    for product in products:
        for backend in backends:
            problem = pbjax.Problem(
                m=product.m,
                k=K,
                n=product.n,
                bits=product.bits,
                group_size=product.group_size,
                activation_bits=product.activation_bits,
            )
            try:
                pbjax.select_backend(problem, backend)
            except pbjax.Unsupported:
                continue
            jobs.append((product, backend, *_prepare(product, backend)))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = [pool.submit(lowered.compile, _NO_AUTOTUNING) for _, _, lowered, _ in jobs]
        for (product, backend, _, operands), future in zip(jobs, compiled, strict=True):
            y = jax.block_until_ready(future.result()(*operands))
            assert jnp.isfinite(y).all(), (product, backend)
            print(f"done: {backend} {product}", flush=True)
    return len(jobs)


_NO_AUTOTUNING = {"xla_gpu_autotune_level": 0}  # which runs many kernels of XLA's


def _prepare(product: Product, backend: str):
    """What is to be compiled, and its operands."""
    x_key, w_key = jax.random.split(jax.random.key(product.m))
    x = jax.random.normal(x_key, (product.m, K), product.dtype)
    kernel = jax.random.normal(w_key, (K, product.n))
    w = pbjax.quantize({"kernel": kernel}, product.bits, group_size=product.group_size)
    options = dict(activation_bits=product.activation_bits, backend=backend, preferred_element_type=jnp.float32)

    def matmul(x, w, used):
        return pbjax.matmul(x, w, bitlayers=used, **options)

    used = jnp.int32(product.bits)
    if product.by_row:
        used = jnp.linspace(1, product.bits, product.m).astype(jnp.int32)
    if product.sweep:
        matmul, used = jax.vmap(matmul, in_axes=(None, None, 0)), jnp.arange(1, product.bits + 1, dtype=jnp.int32)
    operands = (x, w["kernel"], used)
    return jax.jit(matmul).lower(*operands), operands


if __name__ == "__main__":
    jax.block_until_ready(jnp.ones(8) + 1)
    print(READY, flush=True)
    print(f"{run_all()} products", flush=True)
