"""Rows packed in one kernel: the codes, bits and sums of `activations.quantize_rows`, in each product's own order."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bit_matmul import _int8_operands, activations, contract, limbs, mosaic, reference, triton
from tests import cases, memory_watch
from tests.cases import normal

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def watched():
    """No kernel touches what is in no array."""
    with memory_watch.watch():
        yield


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(cases.Shape):
    cut: dict[str, int] | None = None  # of `triton`, instead of what `config_for` would choose

    @property
    def triton(self) -> triton.SerialConfig:
        return dataclasses.replace(triton._triton_serial.config_for(self.problem), **(self.cut or {}))


CASES = {
    "one_of_everything": Case(m=1, k=1, n=4, bits=1, activation_bits=2),
    "one_past_a_word": Case(m=2, k=33, n=4, bits=8, activation_bits=7),
    "full_blocks": Case(m=1, k=512, n=4, bits=8, activation_bits=16, cut={"num_blocks": 2}),
    "blocks_of_rows": Case(m=5, k=300, n=4, bits=8, activation_bits=9),
    "widest": Case(m=3, k=200, n=4, bits=16, activation_bits=24),
    "short_last_group": Case(m=2, k=230, n=4, bits=5, activation_bits=16, group_size=96),
    "many_words_to_a_program": Case(m=1, k=5000, n=4, bits=3, activation_bits=6, cut={"num_blocks": 3}),
    "two_segments": Case(m=1, k=contract.MAX_EXACT_K + 40, n=4, bits=1, activation_bits=3),
}


def rows(case: Case, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    x = normal(case.m, case.k, seed=case.k)
    return (x * jnp.exp2(jnp.arange(case.m, dtype=jnp.float32) % 4 * 37 - 60)[:, None]).astype(dtype)


quantize_rows = jax.jit(activations.quantize_rows, static_argnums=1)
expected_matmul = cases.jit_once(reference.matmul, static_argnums=0)


def pack_mosaic(case: Case, x: jax.Array):
    return cases.jit_once(lambda x: mosaic.quantize_rows(case.problem, x, interpret=True))(x)


def pack_triton(case: Case, x: jax.Array):
    return cases.jit_once(lambda x: triton.quantize_rows(case.problem, x, config=case.triton, interpret=True))(x)


def assert_packed(case: Case, x: jax.Array):
    """The bits of XLA's own packing of XLA's own codes, and what both say of the rows."""
    codes, unit, finite = quantize_rows(x, case.activation_bits)
    cut = triton._triton_serial._cut(case.problem, case.triton)
    expected, bits = jax.jit(
        lambda codes: (
            mosaic._pack(mosaic._plan(case.problem, None, sweep=False), codes),
            cut.arrange(limbs.pack(triton._pad(case.problem, codes), case.activation_bits)),
        )
    )(codes)
    packed, *of_rows = pack_mosaic(case, x)
    jax.tree.map(np.testing.assert_array_equal, packed, expected)
    np.testing.assert_array_equal(of_rows, (unit, np.where(finite, 0.0, np.nan)))
    packed, *of_rows = pack_triton(case, x)
    np.testing.assert_array_equal(of_rows, (unit, np.where(finite, 0.0, np.nan)))
    np.testing.assert_array_equal(packed.row_sums, expected.row_sums)
    np.testing.assert_array_equal(packed.bits[: case.m], bits)
    np.testing.assert_array_equal(packed.bits[case.m :], 0)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bits_are_those_of_xla(case):
    assert_packed(case, rows(case))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_floats(dtype):
    case = dataclasses.replace(CASES["one_past_a_word"], m=1)
    assert_packed(case, normal(1, case.k, dtype=dtype))


@pytest.mark.parametrize("activation_bits", [2, 8, 16, 24])
def test_ties_go_to_even(activation_bits):
    """x = step * (i + 1/2) exactly, of both signs, with powers of two around them."""
    top = 2 ** (activation_bits - 1) - 1
    i = np.linspace(-top, top - 1, 64).round()
    x = np.concatenate([[top], i + 0.5, [np.nextafter(0.5, 1), np.nextafter(0.5, 0), -0.0, 1e-30]])
    x = x * 2.0 ** np.array([-120, 0, 90])[:, None]
    assert_packed(Case(m=3, k=x.shape[1], n=4, bits=1, activation_bits=activation_bits), jnp.asarray(x, jnp.float32))


def test_extreme_rows():
    """Zeros, subnormals, the largest float, NaN and infinities: each row by itself."""
    x = np.zeros((6, 70), np.float32)
    x[1:] = np.random.default_rng(0).normal(size=(5, 70))
    x[1] *= 1e-39
    x[2, 3] = np.finfo(np.float32).max
    x[3, 69], x[4, 0], x[5, 40] = np.nan, np.inf, -np.inf
    assert_packed(Case(m=6, k=70, n=4, bits=2, activation_bits=8), jnp.asarray(x))


@pytest.mark.parametrize("case", [CASES["blocks_of_rows"]])
def test_products_take_packed_rows(case):
    rng = np.random.default_rng(0)
    problem = case.problem
    words = jnp.asarray(rng.integers(0, 2**32, (case.bits, problem.num_words, case.n), dtype=np.uint32))
    scale = jnp.asarray(rng.normal(size=(4, problem.groups, case.n)), jnp.float32)
    counts = jnp.asarray(case.bits - np.arange(case.m) % case.bits, jnp.int32)
    codes, *_ = quantize_rows(rows(case), case.activation_bits)
    packed, *_ = pack_triton(case, rows(case))
    options = dict(config=case.triton, interpret=True)
    y = cases.jit_once(lambda *a: triton.matmul(problem, *a, **options))(packed, words, scale, counts)
    np.testing.assert_array_equal(y, expected_matmul(problem, codes, words, scale, counts))
    y = cases.jit_once(lambda *a: triton.prefixes(problem, *a, **options))(packed, words, scale, jnp.int32(case.bits))
    for b in range(1, case.bits + 1):
        of_b = expected_matmul(problem, codes, words, scale, jnp.full((case.m,), b, jnp.int32))
        np.testing.assert_array_equal(y[b - 1], of_b)


@pytest.mark.parametrize("group_size", [None, 64])
def test_products_finish_their_rows(group_size):
    """Multiplied by the step, and NaN where the row is not finite, as the caller would."""
    case = dataclasses.replace(CASES["blocks_of_rows"], group_size=group_size)
    problem = case.problem
    words = jax.random.bits(jax.random.key(0), (case.bits, problem.num_words, case.n), jnp.uint32)
    scale = normal(4, problem.groups, case.n, seed=1)
    packed, unit, poison = pack_triton(case, rows(case).at[2, 7].set(jnp.inf))
    last = jnp.full((case.m,), case.bits, jnp.int32), jnp.int32(case.bits)
    for run, bitlayers in zip((triton.matmul, triton.prefixes), last, strict=True):
        product = cases.jit_once(functools.partial(run, problem, config=case.triton, interpret=True))
        y = product(packed, words, scale, bitlayers)
        finished = product(packed._replace(steps=(unit, poison)), words, scale, bitlayers)
        np.testing.assert_array_equal(finished, np.asarray(y) * np.asarray(unit)[:, None] + np.asarray(poison)[:, None])
        assert np.isnan(finished).any()


@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("backend", [mosaic, triton])
def test_no_rows(backend, group_size):
    problem = contract.Problem(m=0, k=100, n=4, bits=3, group_size=group_size, activation_bits=16)
    packed, unit, poison = backend.quantize_rows(problem, jnp.ones((0, 100)), interpret=True)
    weight = jnp.ones((3, 4, 4), jnp.uint32), jnp.ones((3, problem.groups, 4))
    packed = packed._replace(steps=(unit, poison))
    y = backend.matmul(problem, packed, *weight, jnp.ones(0, jnp.int32), interpret=True)
    sweep = backend.prefixes(problem, packed, *weight, jnp.int32(3), interpret=True)
    assert (y.shape, sweep.shape) == ((0, 4), (3, 0, 4))


LIMBS = {
    "one_limb": Case(m=40, k=64, n=4, bits=4, activation_bits=6),
    "three_limbs_one_past_a_word": Case(m=20, k=33, n=4, bits=1, activation_bits=24),
    "groups_of_two_words": Case(m=5, k=230, n=4, bits=2, activation_bits=16, group_size=64),
    "two_segments": Case(m=300, k=contract.MAX_EXACT_K + 40, n=4, bits=2, activation_bits=8),
}


@pytest.mark.parametrize("case", LIMBS.values(), ids=LIMBS)
def test_limbs_are_those_of_xla(case):
    """Many rows, also where a program has several blocks of words."""
    assert isinstance(triton.config_for(case.problem), triton.Int8Config)
    x = rows(case).at[3, 5].set(jnp.nan)
    codes, unit, finite = quantize_rows(x, case.activation_bits)
    expected = _int8_operands.prepare(case.problem, triton._pad(case.problem, codes))
    packed, *of_rows = jax.jit(lambda x: triton.quantize_rows(case.problem, x, interpret=True))(x)
    jax.tree.map(np.testing.assert_array_equal, packed, expected)
    np.testing.assert_array_equal(of_rows, (unit, np.where(finite, 0.0, np.nan)))


@pytest.mark.parametrize("cut", [{"parts": None}, {"block_rows": 16}], ids=str)
def test_products_of_many_rows_finish_them(cut):
    """As `test_products_finish_their_rows`; rows of different counts, in one block and in several, and the sweep."""
    case = dataclasses.replace(LIMBS["three_limbs_one_past_a_word"], bits=3)
    problem, config = case.problem, dataclasses.replace(triton.config_for(case.problem), **cut)
    words = jax.random.bits(jax.random.key(0), (case.bits, problem.num_words, case.n), jnp.uint32)
    scale = normal(case.bits, problem.groups, case.n, seed=1)
    counts = jnp.asarray(1 + np.arange(case.m) * 7 % case.bits, jnp.int32), jnp.int32(case.bits)
    packed, unit, poison = jax.jit(lambda x: triton.quantize_rows(problem, x, interpret=True))(
        rows(case).at[2, 7].set(jnp.inf)
    )
    for run, bitlayers in zip((triton.matmul, triton.prefixes), counts, strict=True):
        product = cases.jit_once(functools.partial(run, problem, config=config, interpret=True))
        y = product(packed, words, scale, bitlayers)
        finished = product(packed._replace(steps=(unit, poison)), words, scale, bitlayers)
        np.testing.assert_array_equal(finished, np.asarray(y) * np.asarray(unit)[:, None] + np.asarray(poison)[:, None])
        assert np.isnan(finished).any()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_lowers_for_cuda(case):
    with cases.h200():
        for fn, config in ((mosaic.quantize_rows, None), (triton.quantize_rows, case.triton)):
            traced = jax.jit(lambda x, fn=fn, config=config: fn(case.problem, x, config=config)).trace(rows(case))
            assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()
