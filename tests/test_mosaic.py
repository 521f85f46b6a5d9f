"""The 1-bit tensor-core kernel without a GPU: its program emulated lane by lane, and its lowering for CUDA."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bit_matmul import _mosaic_kernel, contract, mosaic, reference, xla
from tests import cases, warp_emulator

# JAX 0.11 and later say so at every lowering; rows are packed by a kernel of Triton's.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


def problem(m, k, n, bits, group_size=None, activation_bits=16):
    return contract.Problem(m=m, k=k, n=n, bits=bits, group_size=group_size, activation_bits=activation_bits)


CASES = {
    "one_row": problem(1, 256, 32, 4),
    "smallest": problem(1, 1, 4, 1, activation_bits=2),
    "k_31": problem(2, 31, 12, 3, activation_bits=8),
    "k_33": problem(1, 33, 36, 2),
    "k_320": problem(1, 320, 160, 4, activation_bits=12),
    "k_1056": problem(1, 1056, 64, 2, activation_bits=24),
    "k_2600": problem(2, 2600, 32, 3),
    "n_1": problem(1, 70, 1, 3),
    "n_10": problem(2, 288, 10, 4, activation_bits=8),
    "n_13": problem(3, 320, 13, 9, group_size=64),
    "n_1001": problem(1, 64, 1001, 2, activation_bits=8),
    "n_1002": problem(1, 33, 1002, 1),
    "nine_bits": problem(3, 96, 40, 9, activation_bits=8),
    "sixteen_bits": problem(2, 288, 32, 16, activation_bits=24),
    "rows_of_two_programs": problem(9, 64, 32, 4),
    "rows_of_three_limbs": problem(5, 64, 8, 2, activation_bits=20),
    "groups_of_a_word": problem(2, 96, 32, 4, group_size=32, activation_bits=8),
    "groups_of_four_words": problem(1, 500, 36, 3, group_size=128),
    "groups_of_forty_words": problem(1, 2700, 32, 2, group_size=1280),
    "two_segments": problem(1, 40000, 8, 1, activation_bits=8),
    "two_segments_per_group": problem(1, 66000, 4, 1, group_size=65536, activation_bits=8),
}
CONFIGS = [
    _mosaic_kernel.Config(rows=1, steps=1, depth=1, warps_k=1),
    _mosaic_kernel.Config(rows=2, steps=1, depth=4, warps_k=2),
    _mosaic_kernel.Config(rows=1, steps=2, depth=2, warps_k=4),
    _mosaic_kernel.Config(rows=3, steps=3, depth=4, warps_k=1),
]


LAUNCHES = []  # (plan, sums, words) of each emulated launch, as it left them


def emulated_launch(plan, *operands):
    def run(*operands):
        sums, words = warp_emulator.launch(plan, *map(np.asarray, operands))
        LAUNCHES.append((plan, sums, words))
        return sums.array.astype(np.int32)

    return jax.pure_callback(run, jax.ShapeDtypeStruct(plan.sums_shape, jnp.int32), *operands)


@pytest.fixture
def emulated(monkeypatch):
    """Replaces the GPU by the emulation."""
    LAUNCHES.clear()
    monkeypatch.setattr("pallas_kernels.bit_matmul._mosaic_gpu.launch", emulated_launch)


# Traced in tests that use `emulated` only.
emulated_matmul, emulated_prefixes = (
    cases.jit_once(functools.partial(run, interpret=True), static_argnums=0, static_argnames="config")
    for run in (mosaic.matmul, mosaic.prefixes)
)
expected_matmul, expected_limb_sums = (
    cases.jit_once(run, static_argnums=0) for run in (reference.matmul, xla.limb_sums)
)


def operands(p, *, seed=0, extreme=False):
    rng = np.random.default_rng(seed)
    low, high = -(2 ** (p.activation_bits - 1)), 2 ** (p.activation_bits - 1)
    words_shape = (p.bits, p.num_words, p.n)
    if extreme:
        x = np.full((p.m, p.k), low)
        words = np.full(words_shape, 0xFFFFFFFF, np.uint32)
    else:
        x = rng.integers(low, high, (p.m, p.k))
        words = rng.integers(0, 2**32, words_shape, np.uint32)  # the bits past k too
    scale = rng.uniform(0.5, 2, (min(p.bits, contract.NUM_SCALES), p.groups, p.n)).astype(np.float32)
    return jnp.array(x, jnp.int32), jnp.array(words), jnp.array(scale)


def counts(p, kind):
    last, row = p.bits, np.arange(p.m)
    return jnp.array(
        {"all": row * 0 + last, "one": row * 0 + 1, "mixed": 1 + (row * 5 + last // 2) % last}[kind], jnp.int32
    )


@pytest.mark.parametrize("kind", ["all", "one", "mixed"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("emulated")
def test_matmul_equals_reference(name, kind):
    p = CASES[name]
    x, words, scale = operands(p)
    bitlayers = counts(p, kind)
    got = emulated_matmul(p, x, words, scale, bitlayers)
    np.testing.assert_array_equal(got, expected_matmul(p, x, words, scale, bitlayers), strict=True)
    ((plan, sums, used_words),) = LAUNCHES
    assert np.all(sums.num_stores == 1)
    # Nothing beyond the largest count of a launch is read.
    assert used_words.max_first_index == int(bitlayers.max()) - 1
    assert plan.config == mosaic.config_for(p)


@pytest.mark.parametrize("name", [*CASES, "more_rows_than_a_product_has"])
@pytest.mark.usefixtures("emulated")
def test_limb_sums_equal_those_of_xla(name):
    """What devices that share k add up; `xla` is compared with the reference in tests of meshes, and of products."""
    p = CASES.get(name, problem(40, 64, 6, 3, group_size=32))
    x, words, _ = operands(p)
    bitlayers = counts(p, "mixed")
    sums = cases.jit_once(functools.partial(mosaic.limb_sums, p))(x, words, bitlayers)
    np.testing.assert_array_equal(sums, expected_limb_sums(p, x, words, bitlayers), strict=True)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("name", ["nine_bits", "groups_of_four_words", "rows_of_three_limbs", "n_10", "n_13"])
@pytest.mark.usefixtures("emulated")
def test_config_never_shows(name, config):
    p = CASES[name]
    x, words, scale = operands(p)
    bitlayers = counts(p, "mixed")
    got = emulated_matmul(p, x, words, scale, bitlayers, config=config)
    np.testing.assert_array_equal(got, expected_matmul(p, x, words, scale, bitlayers))


@pytest.mark.parametrize("limit", ["none", "one", "all"])
@pytest.mark.parametrize(
    "name", ["one_row", "k_31", "k_1056", "n_10", "n_13", "nine_bits", "sixteen_bits", "groups_of_four_words"]
)
@pytest.mark.usefixtures("emulated")
def test_prefixes_equal_reference(name, limit):
    p = CASES[name]
    x, words, scale = operands(p)
    limit = {"none": 0, "one": 1, "all": p.bits}[limit]
    got = emulated_prefixes(p, x, words, scale, jnp.int32(limit))
    assert got.shape == (p.bits, p.m, p.n)
    for count in range(1, limit + 1):
        want = expected_matmul(p, x, words, scale, jnp.full((p.m,), count, jnp.int32))
        np.testing.assert_array_equal(got[count - 1], want)
    ((_, sums, used_words),) = LAUNCHES
    assert used_words.max_first_index == limit - 1
    assert np.all(sums.num_stores[:limit] == 1)
    assert np.all(sums.num_stores[limit:] == 0)


@pytest.mark.parametrize("activation_bits", [8, 24])
@pytest.mark.usefixtures("emulated")
def test_largest_sums_fit(activation_bits):
    p = problem(1, contract.MAX_EXACT_K, 4, 8, activation_bits=activation_bits)
    x, words, scale = operands(p, extreme=True)
    x = x.at[:, 1:].set(-1)  # every lower limb 255
    got = emulated_matmul(p, x, words, scale, counts(p, "all"))
    np.testing.assert_array_equal(got, expected_matmul(p, x, words, scale, counts(p, "all")))


@pytest.mark.parametrize("n", [36, 34, 33])  # words of 16, 8 and 4 bytes
@pytest.mark.usefixtures("emulated")
def test_every_bit_of_words_and_codes_counts_once(n):
    """One bit of the words, one of the activations: the product is there, in its channel, and nowhere else."""
    p = problem(1, 320, n, 1, activation_bits=8)
    scale = jnp.ones((1, 1, p.n), jnp.float32)
    rng = np.random.default_rng(1)
    for k, channel, bit in zip(
        rng.permutation(p.k)[:24], rng.permutation(p.n)[:24], rng.integers(0, 8, 24), strict=True
    ):
        words = np.zeros((1, p.num_words, p.n), np.uint32)
        words[0, k // 32, channel] = np.uint32(1) << np.uint32(k % 32)
        x = np.zeros((1, p.k), np.int32)
        x[0, k] = -128 if bit == 7 else 1 << bit
        got = emulated_matmul(p, jnp.array(x), jnp.array(words), scale, jnp.array([1], jnp.int32))
        want = np.where(np.arange(p.n) == channel, 1, -1) * float(x[0, k]) * 2.0**-7
        np.testing.assert_array_equal(np.asarray(got)[0], want)


@pytest.mark.parametrize(
    ("p", "match"),
    [
        (problem(1, 64, 32, 4, activation_bits=None), "`activation_bits` must be an integer"),
        (problem(1, 40032, 4, 1, group_size=33024), "`group_size` above 32768 must be a multiple of it"),
        (problem(17, 64, 32, 4), "must be at most 32, but got 17 \\* 2"),
    ],
)
def test_unsupported(p, match):
    with pytest.raises(contract.Unsupported, match=match):
        mosaic.matmul(p, None, None, None, None)


@pytest.mark.parametrize("m", [1, 8, 32])
@pytest.mark.parametrize("k", [64, 4096])
@pytest.mark.parametrize("activation_bits", [8, 16, 24])
def test_heuristic_keeps_to_the_registers(m, k, activation_bits):
    p = problem(m, k, 4096, 8, activation_bits=activation_bits)
    config = mosaic.config_for(p)
    assert config.registers(config.rows * p.activation_limbs) <= 112


@pytest.mark.parametrize("sweep", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_lowers_for_cuda(name, sweep):
    p = CASES[name]
    run = mosaic.prefixes if sweep else mosaic.matmul
    shapes = jax.eval_shape(lambda: operands(p))
    last = jax.ShapeDtypeStruct(() if sweep else (p.m,), jnp.int32)
    with cases.h200():
        lowered = jax.jit(lambda *args: run(p, *args)).trace(*shapes, last).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize("empty", ["m", "k", "n"])
def test_nothing_to_add(empty):
    p = dataclasses.replace(CASES["one_row"], **{empty: 0})
    np.testing.assert_array_equal(mosaic.matmul(p, None, None, None, None), np.zeros((p.m, p.n)))
    np.testing.assert_array_equal(mosaic.prefixes(p, None, None, None, None), np.zeros((4, p.m, p.n)))
