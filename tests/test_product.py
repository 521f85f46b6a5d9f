"""The product: one table of cases drives every backend against Python integers; then what `pbjax.matmul` promises."""

from __future__ import annotations

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import pbjax
from pallas_kernels.bit_matmul import activations
from pbjax import _backends
from tests import cases, oracle
from tests.cases import normal

MIXED = "mixed"  # another number of bitlayers in every row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(cases.Shape):
    bitlayers: int | str
    activation_bits: int | None = 16
    dtype: str = "float32"

    def __str__(self):
        dtype = "" if self.activation_bits else f"-{self.dtype}"
        group = f"g{self.group_size}" if self.group_size else ""
        return f"w{self.bitlayers}of{self.bits}a{self.activation_bits}{dtype}-{self.m}x{self.k}x{self.n}{group}"


CASES = (
    Case(bits=1, bitlayers=1, m=1, k=64, n=5),
    Case(bits=16, bitlayers=16, m=1, k=33, n=3),
    Case(bits=16, bitlayers=9, m=2, k=31, n=1, activation_bits=2),
    Case(bits=4, bitlayers=4, m=1, k=1, n=1, activation_bits=24),
    Case(bits=8, bitlayers=3, m=1, k=160, n=7, group_size=32, activation_bits=8),
    Case(bits=8, bitlayers=8, m=1, k=600, n=4, activation_bits=9),  # more than one block of words
    Case(bits=12, bitlayers=MIXED, m=4, k=161, n=3, group_size=64),  # a short last group
    Case(bits=9, bitlayers=8, m=3, k=95, n=2, activation_bits=17),
    Case(bits=16, bitlayers=MIXED, m=20, k=65, n=2, activation_bits=24),
    Case(bits=5, bitlayers=MIXED, m=40, k=1025, n=3, group_size=512, activation_bits=12),
    Case(bits=8, bitlayers=MIXED, m=130, k=40, n=4, activation_bits=8),
    Case(bits=3, bitlayers=2, m=7, k=32, n=130),
    Case(bits=16, bitlayers=2, m=3, k=96, n=3),  # a run-time choice of `xla`: few bitlayers of many,
    Case(bits=16, bitlayers=13, m=3, k=96, n=3),  # and many
    Case(bits=2, bitlayers=2, m=1, k=65536 + 64, n=2),
    Case(bits=9, bitlayers=MIXED, m=5, k=65536 + 33, n=2),
    Case(bits=2, bitlayers=1, m=1, k=2 * 32800, n=2, group_size=32800, activation_bits=8),  # groups too long for int32
    Case(bits=4, bitlayers=4, m=0, k=40, n=3),
)

FLOAT_CASES = (
    Case(bits=8, bitlayers=8, m=1, k=200, n=5, activation_bits=None),
    Case(bits=16, bitlayers=MIXED, m=6, k=161, n=3, group_size=64, activation_bits=None),
    Case(bits=4, bitlayers=3, m=33, k=65, n=4, activation_bits=None, dtype="bfloat16"),
    Case(bits=3, bitlayers=MIXED, m=130, k=31, n=2, group_size=32, activation_bits=None, dtype="float16"),
    Case(bits=1, bitlayers=1, m=1, k=1, n=1, activation_bits=None),
    Case(bits=2, bitlayers=2, m=0, k=40, n=3, activation_bits=None),
)


def backends(names):
    """Those that cannot run here are skipped, with their reason."""
    platform = _backends.default_platform()
    reasons = {name: _backends.BACKENDS[name].unavailable(platform) for name in names}
    return pytest.mark.parametrize(
        "backend",
        [
            pytest.param(name, marks=pytest.mark.skipif(why is not None, reason=f"{name}: {why}"))
            for name, why in reasons.items()
        ],
    )


each_backend = backends(_backends.BACKENDS)


@functools.cache
def compiled(backend, problem):
    if reason := _backends.BACKENDS[backend].unsupported(problem):
        pytest.skip(f"{backend}: {reason}")
    jit = cases.jit_once if backend == "reference" else jax.jit
    return jit(functools.partial(_backends.BACKENDS[backend].matmul, problem))


@dataclasses.dataclass(frozen=True)
class Operands:
    q: np.ndarray  # activation codes
    codes: np.ndarray
    words: np.ndarray
    counts: np.ndarray
    scale: np.ndarray
    exact_scale: np.ndarray  # powers of two

    def run(self, backend, problem, scale):
        return np.asarray(compiled(backend, problem)(self.q, self.words, scale, self.counts))


@functools.cache
def operands(case, seed=0):
    rng = np.random.default_rng([seed, case.k, case.n, case.m])
    codes = oracle.every_code(rng, case.bits, case.k, case.n)
    counts = rng.integers(1, case.bits + 1, case.m) if case.bitlayers == MIXED else np.full(case.m, case.bitlayers)
    shape = (min(case.bits, 4), case.problem.groups, case.n)
    return Operands(
        q=oracle.activation_codes(rng, case.activation_bits or 16, case.m, case.k),
        codes=codes,
        words=oracle.garbage_past_k(rng, oracle.pack_at_once(codes, case.bits), case.k),
        counts=counts.astype(np.int32),
        scale=rng.uniform(0.5, 2, shape).astype(np.float32),
        exact_scale=(2.0 ** rng.integers(-2, 3, shape)).astype(np.float32),
    )


def check_fixed_point(backend, case, seed=0):
    """To the last bit for one group, whose conversion is laid down; exactly where float32 holds every sum; within the
    roundings of the conversion everywhere. Returns how many values were compared exactly."""
    given, problem = operands(case, seed), case.problem
    rest = (case.bits, given.counts, case.group_size, case.activation_bits)
    num_exact = 0
    for scale in (given.scale, given.exact_scale):
        y = given.run(backend, problem, scale)
        assert y.dtype == np.float32
        assert y.shape == (case.m, case.n)
        value, magnitude = oracle.product(given.q, given.codes, scale, *rest)
        # A limb is converted and added; so is a code limb and a segment; a group's product takes six operations.
        operations = 2 * problem.activation_limbs + 2 + len(problem.segments) + 6 * problem.groups
        assert np.all(np.abs(y - value) <= oracle.gamma(operations) * magnitude)
        if scale is given.exact_scale:
            unit = scale.min() * 2.0 ** -(given.counts[:, None] + case.activation_bits - 2.0)
            fits = magnitude < 2**24 * unit
            np.testing.assert_array_equal(y[fits], value[fits])
            num_exact += fits.sum()
        if len(problem.segments) == 1:
            exact = oracle.product_bits(given.q, given.codes, scale, case.bits, given.counts, case.activation_bits)
            np.testing.assert_array_equal(y, exact)
            num_exact += exact.size
        expected = given.run("reference", problem, scale)
        np.testing.assert_array_equal(y, expected)
        np.testing.assert_array_equal(np.signbit(y), np.signbit(expected))  # of zeros, too
    return num_exact


@each_backend
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fixed_point_is_exact(case, backend):
    check_fixed_point(backend, case)


def test_cases_hold_every_code_and_every_exact_kind():
    """The table's inputs hold all codes, counts and extremes, and exact comparisons, of one group and of several."""
    by_groups = {1: 0, 2: 0}
    for case in CASES:
        if case.m and case.k < 10_000:
            by_groups[min(case.problem.groups, 2)] += check_fixed_point("reference", case)
    assert min(by_groups.values()) > 0
    assert {case.k % 32 for case in CASES} >= {0, 1, 31}
    full = operands(Case(bits=5, bitlayers=MIXED, m=40, k=1025, n=3, activation_bits=4))
    assert set(full.codes.ravel()) == set(range(32))
    assert set(full.counts) == set(range(1, 6))
    assert set(full.q.ravel()) == set(range(-7, 8))


@each_backend
@hypothesis.given(
    m=st.sampled_from((1, 2, 6)),
    k=st.sampled_from((1, 31, 64, 65, 130)),
    n=st.sampled_from((1, 3)),
    bits=st.integers(1, 16),
    group_size=st.sampled_from((None, 32, 64)),
    activation_bits=st.integers(2, 24),
    seed=st.integers(0, 1000),
)
@hypothesis.settings(max_examples=8)
def test_fixed_point_is_exact_on_random_cases(backend, seed, **fields):
    check_fixed_point(backend, Case(bitlayers=MIXED, **fields), seed)


@each_backend
@pytest.mark.parametrize("m", [1, 6])
def test_largest_sums_stay_in_int32(backend, m):
    """Limbs of 255 by code limbs of 255 and -255 over more k than int32 holds, in both paths of `xla`."""
    k = 3 * 32768
    q = np.tile(np.where(np.arange(m) % 2, -1, 2**15 - 1).astype(np.int32)[:, None], (1, k))  # limbs 127 255, -1 255
    codes = np.tile([255, 0], (k, 1))
    problem = pbjax.Problem(m=m, k=k, n=2, bits=8, group_size=None, activation_bits=16)
    words = np.tile(np.array([2**32 - 1, 0], np.uint32), (8, k // 32, 1))
    counts, scale = np.full(m, 8, np.int32), np.ones((4, 1, 2), np.float32)
    y = compiled(backend, problem)(q, words, scale, counts)
    # The integers are multiples of 255 k = 2**15 * 765: with 15 factors of two, float32 holds all but the largest.
    value, magnitude = oracle.product(q, codes, scale, 8, counts, None, 16)
    assert np.all(np.abs(y - value) <= oracle.gamma(9) * magnitude)
    assert np.all(np.abs(y - value) <= 2.0**-22 * np.abs(value)) or m > 1
    np.testing.assert_array_equal(y[1:2], value[1:2])


@each_backend
@pytest.mark.parametrize("case", FLOAT_CASES, ids=str)
def test_float_activations(case, backend):
    """Against float64, within the roundings of a float32 sum over k: x is exact in float32 whatever its dtype."""
    given, problem = operands(case), case.problem
    x = np.random.default_rng(1).standard_normal((case.m, case.k)).astype(case.dtype)
    y = np.asarray(compiled(backend, problem)(x, given.words, given.scale, given.counts))
    assert y.dtype == np.float32
    assert y.shape == (case.m, case.n)
    x = x.astype(np.float64)
    for row, b in enumerate(given.counts):
        values = oracle.prefix_values(given.codes, case.bits, b)
        value, magnitude = np.zeros((2, case.n))
        for g, ks in enumerate(oracle.group_slices(case.k, case.group_size)):
            scale = given.scale[min(b, 4) - 1, g].astype(np.float64)
            value += scale * (x[row, ks] @ values[ks])
            magnitude += scale * np.abs(x[row, ks]).sum()
        assert np.all(np.abs(y[row] - value) <= oracle.gamma(case.k + case.bits + problem.groups + 4) * magnitude)


@backends([name for name in _backends.BACKENDS if name != "reference"])
@pytest.mark.parametrize(
    "case",
    [
        Case(bits=12, bitlayers=12, m=2, k=70, n=3),
        Case(bits=5, bitlayers=5, m=1, k=97, n=3, group_size=32, activation_bits=8),
        Case(bits=9, bitlayers=9, m=40, k=70, n=3),
    ],
    ids=str,
)
def test_prefixes_are_the_products_at_every_count(case, backend):
    """One pass gives, to the last bit, what a product at each number of bitlayers gives, up to the limit."""
    given, problem = operands(case), case.problem
    prefixes = jax.jit(functools.partial(_backends.BACKENDS[backend].prefixes, problem))
    for limit in (case.bits, 3):
        y = np.asarray(prefixes(given.q, given.words, given.scale, jnp.int32(limit)))
        assert y.shape == (case.bits, case.m, case.n)
        for b in range(1, limit + 1):
            counts = np.full(case.m, b, np.int32)
            expected = compiled("reference", problem)(given.q, given.words, given.scale, counts)
            np.testing.assert_array_equal(y[b - 1], expected)


# Activations.

quantize_rows = jax.jit(activations.quantize_rows, static_argnums=1)


def rows_of_all_sizes(k=50):
    rng = np.random.default_rng(3)
    sizes = np.array([1.0, 3e-38, 1e-30, 1e-5, 1e20, 3e38])
    rows = rng.uniform(-1, 1, (6, k)) * sizes[:, None]
    rows[:, 7] = sizes * (-1.0) ** np.arange(6)
    return rows.astype(np.float32)


@pytest.mark.parametrize("activation_bits", [2, 3, 8, 16, 20, 24])
def test_activation_codes_are_the_nearest(activation_bits):
    """|q - x / t| <= 1/2 and three roundings, saturated; rows below 2**-100 keep the step of 2**-100."""
    x = rows_of_all_sizes()
    codes, unit, finite = map(np.asarray, quantize_rows(x, activation_bits))
    top = 2 ** (activation_bits - 1) - 1
    assert finite.all()
    for row in range(len(x)):
        t = max(oracle.exact_step(x[row], activation_bits), oracle.Fraction(1, 2**100 * top))
        assert abs(float(oracle.Fraction(float(unit[row])) / (t * 2 ** (activation_bits - 2))) - 1) <= oracle.gamma(2)
        for q, value in zip(codes[row].tolist(), x[row].tolist(), strict=True):
            exact = oracle.Fraction(value) / t
            assert abs(q - exact) <= 0.5 + oracle.gamma(4) * abs(float(exact))
    assert np.abs(codes).max() == top
    if activation_bits <= 20:
        np.testing.assert_array_equal(codes[[0, 2, 3, 4, 5], 7], top * np.array([1, 1, -1, 1, -1]))


@pytest.mark.parametrize("activation_bits", [2, 8, 16, 20])
def test_activation_codes_on_the_grid(activation_bits):
    """Multiples of t come back as they are."""
    q = oracle.activation_codes(np.random.default_rng(0), activation_bits, 8, 40)
    x = (q * 2.0 ** np.arange(-70, 90, 20)[:, None]).astype(np.float32)
    codes, unit, _ = quantize_rows(x, activation_bits)
    np.testing.assert_array_equal(codes, q)
    np.testing.assert_allclose(unit, 2.0 ** (np.arange(-70, 90, 20) + activation_bits - 2), rtol=oracle.gamma(2))


def test_activation_codes_do_not_depend_on_the_power_of_two():
    """The codes of x and of 2**e x are the same, and the unit follows."""
    x = np.random.default_rng(5).standard_normal((4, 60)).astype(np.float32)
    codes, unit, _ = quantize_rows(x, 16)
    for exponent in (-90, -1, 64, 125):
        codes_e, unit_e, _ = quantize_rows(x * np.float32(2.0**exponent), 16)
        np.testing.assert_array_equal(codes_e, codes)
        np.testing.assert_array_equal(unit_e, unit * np.float32(2.0**exponent))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_activation_codes_of_narrow_floats(dtype):
    x = jnp.asarray(rows_of_all_sizes()[[0, 3]] * 100).astype(dtype)
    for got, expected in zip(quantize_rows(x, 16), quantize_rows(x.astype(jnp.float32), 16), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_zero_and_empty_rows_have_zero_codes():
    codes, unit, finite = quantize_rows(np.array([[0.0, -0.0], [1e-45, 0.0]], np.float32), 16)
    np.testing.assert_array_equal(codes, np.zeros((2, 2), np.int32))
    assert np.all(np.isfinite(unit))
    assert np.all(finite)
    assert quantize_rows(np.zeros((0, 4), np.float32), 16)[0].shape == (0, 4)


@each_backend
@pytest.mark.parametrize("m", [1, 3, 40])
@pytest.mark.parametrize("largest", [2.0**-90, 2.0**100, 2.0**124])
def test_float_rows_of_any_size(largest, m, backend):
    """Nothing on the way overflows where the result does not; only the roundings differ from those of small rows."""
    case = Case(bits=8, bitlayers=8, m=m, k=64, n=5, activation_bits=None)
    given = operands(case)
    x = np.random.default_rng(1).standard_normal((m, case.k)).astype(np.float32) / 64
    run = compiled(backend, case.problem)
    y, small = (run(x * np.float32(size), given.words, given.scale, given.counts) for size in (largest, 1))
    np.testing.assert_array_equal(np.asarray(y) / np.float32(largest), small)


# `pbjax.matmul`.


def bit_tensor(k, n, bits, group_size=None, activation_bits=16, dtype=jnp.float32, seed=0):
    """A weight with every code and uneven scales."""
    rng = np.random.default_rng(seed)
    codes = oracle.every_code(rng, bits, k, n)
    groups = len(oracle.group_slices(k, group_size))
    return pbjax.BitTensor(
        words=jnp.asarray(oracle.garbage_past_k(rng, oracle.pack_at_once(codes, bits), k)),
        scale=jnp.asarray(rng.uniform(0.5, 2, (min(bits, 4), groups, n)), jnp.float32),
        bitlayers=jnp.int32(bits),
        packed_shape=(k, n),
        contract_axes=(0,),
        output_axes=(1,),
        dtype=np.dtype(dtype),
        bits=bits,
        group_size=group_size,
        activation_bits=activation_bits,
    )


matmul = jax.jit(pbjax.matmul, static_argnames=("activation_bits", "backend", "preferred_element_type"))


def test_row_does_not_depend_on_its_neighbours():
    """To the last bit, with one row, 40, 130 or 300 around it, which `xla` computes in different ways."""
    x, w = normal(300, 97), bit_tensor(97, 5, 8, group_size=64)
    counts = jax.random.randint(jax.random.key(1), (300,), 1, 9)
    all_rows = np.asarray(matmul(x, w, bitlayers=counts))
    assert np.all(np.isfinite(all_rows))
    for rows in (slice(0, 1), slice(150, 151), slice(299, 300), slice(3, 43), slice(170, 300)):
        np.testing.assert_array_equal(matmul(x[rows], w, bitlayers=counts[rows]), all_rows[rows])


@each_backend
@pytest.mark.parametrize("activation_bits", [4, 16, None])
@pytest.mark.parametrize("m", [4, 40])
def test_nan_and_infinity_poison_their_own_row(m, activation_bits, backend):
    w = bit_tensor(70, 3, 6, group_size=32)
    x = np.array(normal(m, 70))
    clean = np.asarray(matmul(x, w, activation_bits=activation_bits, backend=backend))
    assert np.all(np.isfinite(clean))
    x[0, 5], x[2, 69], x[3, 0] = np.nan, np.inf, -np.inf
    y = np.asarray(matmul(x, w, activation_bits=activation_bits, backend=backend))
    bad = np.isin(np.arange(m), (0, 2, 3))
    assert np.all(np.isnan(y[bad]))
    np.testing.assert_array_equal(y[~bad], clean[~bad])


def test_nan_is_seen_among_many_values():
    """A maximum that XLA vectorizes may pass over it: here, at 40 rows of 512."""
    x, w = np.ones((40, 512), np.float32), bit_tensor(512, 3, 4)
    x[0, 0], x[39, 511] = np.nan, np.nan
    y = np.asarray(jax.jit(pbjax.matmul)(x, w))
    np.testing.assert_array_equal(np.isnan(y).all(axis=1), np.arange(40) % 39 == 0)


def operands_of_path(m, group_size):
    """With more channels than a vector register holds, since compilers fuse differently in vectorized loops."""
    x, w = normal(m, 70), bit_tensor(70, 33, 6, group_size=group_size)
    return x, w, np.asarray(matmul(x, w))


each_path = pytest.mark.parametrize(("m", "group_size"), [(1, None), (2, 32), (40, None)])


@pytest.mark.parametrize(("m", "group_size"), [(2, 32), (40, None)])
def test_jit_equals_eager(m, group_size):
    x, w, expected = operands_of_path(m, group_size)
    np.testing.assert_array_equal(pbjax.matmul(x, w), expected)


@each_path
def test_no_rounding_is_lost_to_the_caller(m, group_size):
    """To the last bit with a bias added in the same compilation, which must not fuse into the last multiplication: of
    arguments, of constants (which a compiler may know to be finite), and in a sweep."""
    x, w, y = operands_of_path(m, group_size)
    bias = np.array(normal(1, 33, seed=1))
    np.testing.assert_array_equal(jax.jit(lambda x, w, bias: pbjax.matmul(x, w) + bias)(x, w, bias), y + bias)
    np.testing.assert_array_equal(jax.jit(lambda w, bias: bias - pbjax.matmul(x, w))(w, bias), bias - y)
    sweep = jax.jit(jax.vmap(lambda b: pbjax.matmul(x, w, bitlayers=b) + bias))(jnp.arange(5, 7))
    np.testing.assert_array_equal(sweep[1], y + bias)


@each_path
def test_constants_change_nothing(m, group_size):
    """To the last bit when operands are constants, which a compiler could multiply first."""
    x, w, y = operands_of_path(m, group_size)
    np.testing.assert_array_equal(jax.jit(lambda words: pbjax.matmul(x, w.replace(words=words)))(w.words), y)
    np.testing.assert_array_equal(jax.jit(lambda: pbjax.matmul(x, w))(), y)


def test_constant_scales_are_not_multiplied_first():
    """I * scale * t from the left, also where scale and t are constants of one element."""
    for seed in range(4):
        x, w = normal(1, 70, seed=seed), bit_tensor(70, 1, 1, seed=seed)
        expected = matmul(x, w)
        np.testing.assert_array_equal(jax.jit(lambda b, x=x, w=w: pbjax.matmul(x, w, bitlayers=b))(1), expected)


def test_matmul_on_the_grid_is_the_oracle():
    """End to end: x = q * 2**e, whose codes are exact, and integers that float32 holds; two roundings by the scales."""
    rng = np.random.default_rng(0)
    q = oracle.activation_codes(rng, 8, 5, 40)
    x = (q * 2.0 ** np.arange(-20, 30, 10)[:, None]).astype(np.float32)
    w = bit_tensor(40, 3, 5, activation_bits=8)
    codes = oracle.every_code(np.random.default_rng(0), 5, 40, 3)
    for b in range(1, 6):
        value, _ = oracle.product(q, codes, np.asarray(w.scale), 5, np.full(5, b), None, 8)
        expected = value * 2.0 ** (np.arange(-20, 30, 10)[:, None] + 6)
        np.testing.assert_allclose(matmul(x, w, bitlayers=b), expected, rtol=oracle.gamma(4), atol=0)


@pytest.mark.parametrize("activation_bits", [4, 8, 16])
def test_matmul_approximates_the_float_product(activation_bits):
    """Within half a step of every activation, and the roundings."""
    x, w = normal(3, 200), bit_tensor(200, 4, 8, group_size=64, activation_bits=activation_bits)
    weight = np.asarray(pbjax.dequantize(w), np.float64)
    step = np.abs(x).max(1, keepdims=True) / (2 ** (activation_bits - 1) - 1)
    bound = 0.51 * step * np.abs(weight).sum(0) + oracle.gamma(40) * (np.abs(x) @ np.abs(weight))
    error = np.abs(matmul(x, w) - np.asarray(x, np.float64) @ weight)
    assert np.all(error <= bound)
    assert np.all(error > 0)  # it did quantize


@pytest.mark.parametrize("activation_bits", [16, None])
def test_bitlayers_of_rows_are_those_of_each_row_alone(activation_bits):
    """To the last bit with fixed point; any shape that broadcasts to the rows."""
    x, w = normal(2, 5, 70), bit_tensor(70, 3, 6, activation_bits=activation_bits)
    check = np.testing.assert_array_equal
    if activation_bits is None:  # another sum over k for another number of rows
        check = functools.partial(np.testing.assert_allclose, rtol=0, atol=2 * oracle.gamma(80) * 2 * 70 * 4)
    for bitlayers in (
        jnp.array([[1, 2, 3, 4, 5], [6, 5, 1, 1, 2]]),
        jnp.array([[3], [5]]),
        jnp.array([6, 1, 2, 3, 4]),
        2,
    ):
        y = matmul(x, w, bitlayers=bitlayers)
        per_row = np.broadcast_to(bitlayers, (2, 5))
        for i, j in np.ndindex(2, 5):
            check(y[i, j], matmul(x[i, j], w, bitlayers=int(per_row[i, j])))


def test_bitlayers_beyond_the_count_do_not_matter():
    """b of 16 bitlayers used is the product of a weight truncated to b, to the last bit."""
    x, w = normal(3, 70), bit_tensor(70, 3, 16)
    for b in (3, 9):
        np.testing.assert_array_equal(matmul(x, w, bitlayers=b), matmul(x, pbjax.truncate(w, b)))


@pytest.mark.parametrize("bitlayers", [-5, 0, 99])
def test_traced_bitlayers_are_clipped(bitlayers):
    x, w = normal(3, 70), bit_tensor(70, 3, 4)
    expected = matmul(x, w, bitlayers=1 if bitlayers < 1 else 4)
    np.testing.assert_array_equal(matmul(x, w, bitlayers=bitlayers), expected)
    np.testing.assert_array_equal(matmul(x, w.replace(bitlayers=jnp.int32(bitlayers))), expected)


@pytest.mark.parametrize("activation_bits", [16, None])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(dtype, activation_bits):
    """The result has the dtype of x and w, or the one preferred, rounded once from float32."""
    w = bit_tensor(70, 3, 6, dtype=dtype, activation_bits=activation_bits)
    x = normal(2, 70).astype(dtype)
    y = matmul(x, w)
    assert y.dtype == dtype
    y32 = matmul(x, w, preferred_element_type=jnp.float32)
    assert y32.dtype == jnp.float32
    np.testing.assert_array_equal(y, y32.astype(dtype))
    if activation_bits:
        np.testing.assert_array_equal(y32, matmul(x.astype(jnp.float32), w.replace(dtype=np.dtype(jnp.float32))))
    else:
        exact = np.asarray(x, np.float64) @ np.asarray(
            pbjax.dequantize(w.replace(dtype=np.dtype(np.float32))), np.float64
        )
        bound = oracle.gamma(80) * 2 * np.abs(np.asarray(x, np.float64)).sum(1, keepdims=True)
        assert np.all(np.abs(y32 - exact) <= bound)
        narrow = bound + oracle.ROUNDOFF[dtype] * (np.abs(exact) + bound)
        assert np.all(np.abs(np.asarray(y, np.float64) - exact) <= narrow)


def test_dtypes_mix_as_in_any_jax_product():
    """They promote; under strict promotion, as here, they must be cast, or the result's dtype named."""
    x, w = normal(2, 70).astype(jnp.bfloat16), bit_tensor(70, 3, 4)
    with jax.numpy_dtype_promotion("standard"):
        y = matmul(x, w)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, matmul(x, w, preferred_element_type=jnp.float32))
    with pytest.raises(ValueError, match="`x` and `w` must have dtypes that promote, but got bfloat16 and float32"):
        matmul(x, w)


@pytest.mark.parametrize(
    ("shape", "contract", "rows"),
    [((6, 4, 5), (0,), (3,)), ((4, 5, 6), (0, 1), (2, 3)), ((6, 40), (1,), ()), ((3, 7, 5), (2, 0), (3,))],
)
def test_any_axes_are_contracted(shape, contract, rows):
    """As `tensordot` with the dequantized weight, within float32's roundings."""
    weight = normal(*shape)
    w = pbjax.quantize({"w": weight}, 8, activation_bits=None, rules={"w": pbjax.Spec(contract=contract)})["w"]
    x = normal(*rows, *(shape[a] for a in contract), seed=1)
    first = len(rows)
    axes = (tuple(range(first, first + len(contract))), contract)
    dense = np.asarray(pbjax.dequantize(w), np.float64)
    expected = np.tensordot(np.asarray(x, np.float64), dense, axes)
    bound = oracle.gamma(60) * np.tensordot(np.abs(x), np.full_like(dense, np.abs(weight).max()), axes)
    y = matmul(x, w)
    assert y.shape == expected.shape
    assert np.all(np.abs(y - expected) <= bound)


@each_backend
@pytest.mark.parametrize("rows", [(0,), (2, 0), ()])
def test_no_rows_and_one_row(rows, backend):
    w = bit_tensor(33, 3, 4)
    y = matmul(jnp.ones((*rows, 33)), w, backend=backend)
    assert y.shape == (*rows, 3)
    assert np.all(np.isfinite(y))
