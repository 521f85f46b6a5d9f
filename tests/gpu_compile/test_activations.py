"""How many different kernels a product is on a GPU beside its own: for its activations before, for its sums after."""

from __future__ import annotations

import concurrent.futures
import importlib
import multiprocessing

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.bit_matmul import activations, contract, mosaic, triton
from tests.gpu_compile import machine_code

_missing = machine_code.unavailable()
pytestmark = [
    pytest.mark.gpu_compile,
    pytest.mark.skipif(_missing is not None, reason=f"cannot compile for a GPU here: {_missing}"),
    # JAX 0.11 and later say so at every lowering; there is no other lowering of `pallas_call` for a GPU.
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]

# Fusions of XLA: row maximum; rounding and packing of bits; sum of each row; splits added, limbs to floats and scales.
_ONE_ROW_OF_MOSAIC = 4
# With several rows XLA rounds in a kernel of its own; `triton` adds its parts in one more.
_OTHERS = 6
_INT8 = 7  # limbs, which are written apart from their sums, and one for numbers that never change


@pytest.mark.parametrize(
    ("module", "m", "width", "limit"),
    [
        (mosaic, 1, 8, _ONE_ROW_OF_MOSAIC),
        (mosaic, 1, 16, _ONE_ROW_OF_MOSAIC),
        (mosaic, 8, 8, _OTHERS),
        (triton, 1, 8, _OTHERS),
        (triton, 64, 16, _INT8),
    ],
)
def test_kernels_beside_the_product(module, m, width, limit):
    # In a process of its own: Mosaic GPU compiles for the first GPU that a process was asked for, and here come others.
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        names = pool.submit(kernel_names, module.__name__, m, width).result()
    assert sum(name.startswith("bit_matmul") for name in names) == 1
    assert len(names) - 1 <= limit, names


def kernel_names(module: str, m: int, width: int) -> list[str]:
    problem = contract.Problem(m=m, k=4096, n=4096, bits=8, group_size=None, activation_bits=width)

    def product(x, words, scale, bitlayers):
        codes, unit, finite = activations.quantize_rows(x, width)
        y = importlib.import_module(module).matmul(problem, codes, words, scale, bitlayers)
        return y * unit[:, None] + jnp.where(finite, 0.0, jnp.nan)[:, None]

    described = (
        jax.ShapeDtypeStruct((m, problem.k), jnp.float32),
        jax.ShapeDtypeStruct((problem.bits, problem.num_words, problem.n), jnp.uint32),
        jax.ShapeDtypeStruct((4, 1, problem.n), jnp.float32),
        jax.ShapeDtypeStruct((m,), jnp.int32),
    )
    return [kernel.name for kernel in machine_code.compile_kernels(product, *described, gpu="h200")]
