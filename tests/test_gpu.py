"""On an NVIDIA GPU: its kernels have the bits of the oracle, on inputs that are new in every run.

    JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu tests/test_gpu.py

The other tests of products run on the GPU too under `JAX_PLATFORMS=cuda,cpu`.
"""

from __future__ import annotations

import dataclasses
import functools
import secrets

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pbjax
from pallas_kernels.bit_matmul import activations, mosaic, triton, xla
from pbjax import _backends
from tests import test_product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no NVIDIA GPU, or JAX_PLATFORMS hides it"),
    # JAX 0.11 and later say so at every lowering; there is no other lowering of `pallas_call` for a GPU.
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]

KERNELS = {"mosaic": mosaic, "triton": triton}
each_kernel = pytest.mark.parametrize("backend", KERNELS)


@pytest.fixture
def seed(record_property):
    """New in every run; pytest shows it where a test fails."""
    value = secrets.randbits(31)
    record_property("seed", value)
    return value


def skip_unless_it_runs(backend, problem):
    if reason := _backends.BACKENDS[backend].refusal(problem, "cuda"):
        pytest.skip(f"{backend}: {reason}")


@each_kernel
@pytest.mark.parametrize("case", test_product.CASES, ids=str)
def test_fixed_point_is_exact(case, backend, seed):
    skip_unless_it_runs(backend, case.problem)
    test_product.check_fixed_point(backend, case, seed)


def large(m, width, group_size=None, k=4096, n=4096, bits=8):
    return pbjax.Problem(m=m, k=k, n=n, bits=bits, group_size=group_size, activation_bits=width)


LARGE = [
    *(large(m, width) for m in (1, 2, 8, 16, 64, 256) for width in (8, 16)),
    *(large(m, 16, group_size=128) for m in (1, 64)),
    *(large(m, 24, bits=16) for m in (1, 64)),
    *(large(m, 16, k=4001, n=4100) for m in (3, 70)),
    *(large(m, 8, k=65536, n=256) for m in (1, 64)),
    *(large(m, 8, n=n) for m in (1, 8) for n in (1001, 1002)),
]


def large_operands(problem, seed):
    rng = np.random.default_rng(seed)
    top = 2 ** (problem.activation_bits - 1) - 1
    x = rng.integers(-top, top + 1, (problem.m, problem.k), np.int32)
    words = rng.integers(0, 2**32, (problem.bits, problem.num_words, problem.n), np.uint32)
    scale = rng.uniform(0.5, 2, (min(problem.bits, 4), problem.groups, problem.n)).astype(np.float32)
    counts = rng.integers(1, problem.bits + 1, problem.m, np.int32)
    return tuple(map(jnp.asarray, (x, words, scale, counts)))


@each_kernel
@pytest.mark.parametrize(
    "problem", LARGE, ids=lambda p: f"{p.m}x{p.k}x{p.n}w{p.bits}a{p.activation_bits}g{p.group_size}"
)
def test_large_products_have_the_bits_of_xla_on_the_cpu(problem, backend, seed):
    """Every number of bitlayers in one batch, garbage past k, all blocks full and not; three times over."""
    skip_unless_it_runs(backend, problem)
    args = large_operands(problem, seed)
    with jax.default_device(jax.devices("cpu")[0]):
        expected = np.asarray(jax.jit(functools.partial(xla.matmul, problem))(*map(np.asarray, args)))
    product = jax.jit(functools.partial(KERNELS[backend].matmul, problem))
    for _ in range(3):  # a race between warps shows in some runs only
        np.testing.assert_array_equal(product(*args), expected)


@each_kernel
@pytest.mark.parametrize(
    ("m", "width", "k"), [(1, 8, 4096), (1, 16, 14336), (1, 24, 28672), (4, 8, 4001), (70, 16, 4001)]
)
def test_rows_are_packed_as_by_xla(m, width, k, backend, seed):
    """The product of rows packed in one kernel has the bits of that of codes from XLA on the CPU."""
    problem = large(m, width, k=k, n=512)
    skip_unless_it_runs(backend, problem)
    _, words, scale, counts = large_operands(problem, seed)
    x = jax.random.normal(jax.random.key(seed), (m, k)) * 2.0 ** np.random.default_rng(seed).integers(-90, 90)
    with jax.default_device(jax.devices("cpu")[0]):
        codes, unit, _ = activations.quantize_rows(jnp.asarray(np.asarray(x)), width)
        expected = np.asarray(xla.matmul(problem, codes, *map(np.asarray, (words, scale, counts))))
    packed, of_rows, poison = jax.jit(functools.partial(KERNELS[backend].quantize_rows, problem))(x)
    np.testing.assert_array_equal(of_rows, unit)
    np.testing.assert_array_equal(poison, 0)
    y = jax.jit(functools.partial(KERNELS[backend].matmul, problem))(packed, words, scale, counts)
    np.testing.assert_array_equal(y, expected)


@each_kernel
@pytest.mark.parametrize("m", [1, 8, 64])
def test_a_sweep_has_the_bits_of_its_products(m, backend, seed):
    problem = large(m, 16, k=2048, n=1024)
    skip_unless_it_runs(backend, problem)
    x, words, scale, _ = large_operands(problem, seed)
    sweep = jax.jit(functools.partial(KERNELS[backend].prefixes, problem))(x, words, scale, jnp.int32(problem.bits))
    product = jax.jit(functools.partial(KERNELS[backend].matmul, problem))
    for count in range(1, problem.bits + 1):
        expected = product(x, words, scale, jnp.full((m,), count, jnp.int32))
        np.testing.assert_array_equal(sweep[count - 1], expected)


@each_kernel
@pytest.mark.parametrize("m", [2, 64])
def test_candidates_of_the_tuner_have_the_same_bits(m, backend, seed):
    problem = large(m, 8, k=1024, n=512)
    skip_unless_it_runs(backend, problem)
    args = large_operands(problem, seed)
    expected = jax.jit(functools.partial(xla.matmul, problem))(*args)
    for config in KERNELS[backend].candidates(problem):
        y = jax.jit(functools.partial(KERNELS[backend].matmul, problem, config=config))(*args)
        np.testing.assert_array_equal(y, expected, err_msg=str(config))


@pytest.mark.parametrize("backend", ["triton"])  # named, so that a fault is that backend's
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("m", [1, 64, 256])
def test_float_activations(m, dtype, backend, seed):
    """Against float64; gamma of the 4096 terms, three parts each."""
    problem = dataclasses.replace(large(m, 8), activation_bits=None)
    _, words, scale, counts = large_operands(large(m, 8), seed)
    x = jax.random.normal(jax.random.key(seed), (m, problem.k), dtype)
    y = np.asarray(jax.jit(functools.partial(KERNELS[backend].matmul, problem))(x, words, scale, counts), np.float64)
    bits = np.unpackbits(np.asarray(words).view(np.uint8).reshape(8, -1, problem.n, 4), axis=-1, bitorder="little")
    bits = np.moveaxis(bits, -1, 2).reshape(8, problem.k, problem.n)
    x = np.asarray(x, np.float64)
    for row in {0, m - 1}:
        count = int(counts[row])
        values = sum((2.0 * bits[i] - 1) * 2.0 ** -(i + 1) for i in range(count))
        factor = np.asarray(scale, np.float64)[min(count, 4) - 1, 0]
        bound = 3 * 4096 * 2.0**-24 * np.abs(x[row]).sum() * factor
        assert np.all(np.abs(y[row] - x[row] @ values * factor) <= bound)
