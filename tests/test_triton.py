"""The Triton kernels: their bits are those of the reference, as JAX operations, and they lower for a GPU."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels.bit_matmul import _triton_int8, _triton_order, contract, epilogue, reference, triton, xla
from tests import cases, memory_watch, oracle
from tests.cases import normal

# JAX 0.11 and later say so at every lowering; there is no other lowering of `pallas_call` for a GPU.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

K_OF_TWO_SEGMENTS = contract.MAX_EXACT_K + 40


@pytest.fixture(autouse=True)
def watched():
    """No kernel touches what is in no array."""
    with memory_watch.watch():
        yield


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(cases.Shape):
    cut: dict[str, int | None] | None = None  # instead of what `config_for` would choose

    @property
    def config(self) -> triton.Config:
        return dataclasses.replace(triton.config_for(self.problem), **(self.cut or {}))


FIXED_POINT = {
    "one_of_everything": Case(m=1, k=1, n=1, bits=1, activation_bits=2),
    "k_one_below_a_word": Case(m=1, k=31, n=5, bits=3, activation_bits=8),
    "k_one_past_a_word": Case(m=1, k=33, n=4, bits=8, activation_bits=3),
    "n_past_a_block": Case(m=1, k=128, n=130, bits=2, activation_bits=4),
    "rows_past_a_block": Case(m=3, k=140, n=8, bits=4, activation_bits=6),
    "two_code_limbs": Case(m=2, k=40, n=3, bits=16, activation_bits=7),
    "sign_alone_in_its_limb": Case(m=1, k=128, n=3, bits=9, activation_bits=9),
    "three_activation_limbs": Case(m=1, k=200, n=4, bits=2, activation_bits=24),
    "groups_of_a_word": Case(m=2, k=96, n=3, bits=4, activation_bits=5, group_size=32),
    "short_last_group": Case(m=2, k=230, n=3, bits=5, activation_bits=8, group_size=96),
    "seventeen_groups": Case(m=2, k=32 * 17, n=70, bits=9, activation_bits=4, group_size=32),
    "many_parts": Case(m=1, k=32 * 37, n=5, bits=3, activation_bits=9, cut={"block_words": 1, "num_blocks": 1}),
    "many_blocks": Case(m=3, k=32 * 21, n=5, bits=3, activation_bits=4, cut={"num_blocks": 3}),
    "two_words_at_a_time": Case(
        m=1, k=32 * 9, n=5, bits=10, activation_bits=4, cut={"block_words": 2, "num_blocks": 2}
    ),
    "eight_words_at_a_time": Case(m=1, k=32 * 17, n=5, bits=2, activation_bits=3, cut={"block_words": 8}),
    "two_segments": Case(m=1, k=K_OF_TWO_SEGMENTS, n=2, bits=2, activation_bits=3),
    "segments_inside_groups": Case(
        m=1, k=2 * K_OF_TWO_SEGMENTS, n=2, bits=1, activation_bits=2, group_size=K_OF_TWO_SEGMENTS + 24
    ),
}


SMALL = {"block_n": 16, "block_rows": 16}
MANY_ROWS = {
    "one_limb_of_each": Case(m=40, k=140, n=8, bits=4, activation_bits=6, cut=SMALL),
    "finished_by_its_program": Case(m=40, k=140, n=20, bits=4, activation_bits=6, cut={**SMALL, "parts": None}),
    "one_block_of_rows": Case(m=12, k=33, n=5, bits=3, activation_bits=8),
    "two_limbs_of_both": Case(m=17, k=300, n=20, bits=16, activation_bits=16, cut=SMALL),
    "three_limbs_in_three_passes": Case(m=5, k=31, n=3, bits=8, activation_bits=24, cut={**SMALL, "parts": None}),
    "more_parts_than_blocks": Case(m=6, k=32 * 9, n=3, bits=5, activation_bits=9, cut={**SMALL, "parts": 7}),
    "groups_of_a_word": Case(m=6, k=96, n=3, bits=4, activation_bits=6, group_size=32, cut=SMALL),
    "short_last_group": Case(m=7, k=230, n=3, bits=12, activation_bits=8, group_size=96, cut=SMALL),
    "groups_in_parts": Case(m=7, k=230, n=3, bits=9, activation_bits=16, group_size=96, cut={**SMALL, "parts": 2}),
    "two_segments": Case(m=5, k=K_OF_TWO_SEGMENTS, n=2, bits=2, activation_bits=9, cut=SMALL),
    "two_segments_in_one_program": Case(
        m=5, k=K_OF_TWO_SEGMENTS, n=2, bits=2, activation_bits=9, cut={**SMALL, "parts": None}
    ),
    "segments_inside_groups": Case(
        m=17, k=2 * K_OF_TWO_SEGMENTS, n=2, bits=1, activation_bits=2, group_size=K_OF_TWO_SEGMENTS + 24, cut=SMALL
    ),
}
EXACT = FIXED_POINT | MANY_ROWS

expected_matmul = cases.jit_once(reference.matmul, static_argnums=0)
expected_limb_sums = cases.jit_once(xla.limb_sums, static_argnums=0)


def interpreted(run, case: Case):
    """A function of `triton` for a case, its kernels as JAX operations; over many words LLVM's optimizations pay."""
    jit = jax.jit if case.k > 10_000 else cases.jit_once
    return jit(lambda *args: run(case.problem, *args, config=case.config, interpret=True))


def operands(case: Case) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Every value of a code and garbage past k; all counts of bitlayers as far as there are rows."""
    rng = np.random.default_rng(case.k)
    problem = case.problem
    words = rng.integers(0, 2**32, (case.bits, problem.num_words, case.n), dtype=np.uint32)
    scale = rng.normal(size=(min(case.bits, contract.NUM_SCALES), problem.groups, case.n)).astype(np.float32)
    bitlayers = case.bits - np.arange(case.m) % case.bits
    x = oracle.activation_codes(rng, case.activation_bits or 8, case.m, case.k)
    return jnp.asarray(x), jnp.asarray(words), jnp.asarray(scale), jnp.asarray(bitlayers, jnp.int32)


@pytest.mark.parametrize("m", [1, 64, 70, 2100])
def test_rows_are_sorted_and_put_back(m):
    """By comparison and by a sort: rows of equal counts stay in order."""
    counts = np.random.default_rng(m).integers(1, 9, m)
    order, rank = jax.jit(functools.partial(_triton_order.by_count, interpret=True))(jnp.asarray(counts, jnp.int32))
    np.testing.assert_array_equal(order, np.argsort(counts, stable=True))
    np.testing.assert_array_equal(order[rank], np.arange(m))


def test_rows_decide_the_kernel():
    assert {type(case.config) for case in FIXED_POINT.values()} == {triton.SerialConfig}
    assert {type(case.config) for case in MANY_ROWS.values()} == {triton.Int8Config}
    assert isinstance(FLOAT["rows_past_a_block"].config, triton.DotConfig)
    assert isinstance(FLOAT["many_rows"].config, triton.DotRowsConfig)
    assert isinstance(FLOAT["dot_of_xla"].config, triton.UnpackConfig)
    groups = dataclasses.replace(FLOAT["dot_of_xla"], k=1024, group_size=512)
    assert isinstance(groups.config, triton.DotConfig)  # which scales groups and adds them up


@pytest.mark.parametrize("case", EXACT.values(), ids=EXACT)
def test_fixed_point_has_the_bits_of_the_reference(case):
    assert triton.unsupported(case.problem) is None
    args = operands(case)
    np.testing.assert_array_equal(interpreted(triton.matmul, case)(*args), expected_matmul(case.problem, *args))


@pytest.mark.parametrize(
    "case",
    [FIXED_POINT[name] for name in ("two_code_limbs", "sign_alone_in_its_limb", "short_last_group", "many_parts")]
    + [MANY_ROWS[name] for name in ("finished_by_its_program", "two_limbs_of_both", "groups_in_parts", "two_segments")],
    ids=str,
)
def test_limb_sums_are_those_of_xla(case):
    """What devices that share k add up; `xla` is compared with the reference in tests of meshes, and of products."""
    x, words, _, bitlayers = operands(case)
    args = x, words, bitlayers
    sums = interpreted(triton.limb_sums, case)(*args)
    np.testing.assert_array_equal(sums, expected_limb_sums(case.problem, *args), strict=True)


def test_limb_sums_that_are_too_many_come_in_blocks_of_rows(monkeypatch):
    case = Case(m=17, k=140, n=8, bits=9, activation_bits=9, cut=SMALL)
    x, words, _, bitlayers = operands(case)
    sizes = []
    run = _triton_int8.limb_sums
    monkeypatch.setattr(_triton_int8, "limb_sums", lambda p, *a, **options: sizes.append(p.m) or run(p, *a, **options))
    monkeypatch.setattr(triton, "_MAX_SUMS", 4 * 7 * case.n * case.config.parts)
    args = x, words, bitlayers
    sums = interpreted(triton.limb_sums, case)(*args)
    assert sizes == [7, 7, 3]
    np.testing.assert_array_equal(sums, expected_limb_sums(case.problem, *args))


@pytest.mark.parametrize("groups", [2, 16, 17, 33])
def test_groups_are_scaled_as_by_xla(groups):
    """Sums of any magnitude; n that fills no block; the same bits."""
    problem = contract.Problem(m=5, k=32 * groups, n=70, bits=6, group_size=32, activation_bits=16)
    rng = np.random.default_rng(groups)
    sums = rng.normal(size=(groups, 5, 70)) * 2.0 ** rng.integers(-30, 30, (groups, 1, 1))
    scale = rng.normal(size=(4, groups, 70))
    args = *(jnp.asarray(a, jnp.float32) for a in (sums, scale)), jnp.arange(1, 6, dtype=jnp.int32)
    y = cases.jit_once(lambda *a: triton.scale_groups(problem, *a, interpret=True))(*args)
    np.testing.assert_array_equal(y, epilogue.scale_groups(*args, 16), strict=True)


@pytest.mark.parametrize(
    "case",
    [FIXED_POINT[name] for name in ("rows_past_a_block", "two_words_at_a_time", "seventeen_groups", "many_parts")]
    + [MANY_ROWS[name] for name in ("two_limbs_of_both", "more_parts_than_blocks", "two_segments", "groups_of_a_word")]
    + [Case(m=5, k=31, n=3, bits=8, activation_bits=24, cut=SMALL)],
    ids=str,
)
def test_all_prefixes_have_the_bits_of_the_reference(case):
    """What lies beyond the limit is not looked at."""
    *args, _ = operands(case)
    sweep = interpreted(triton.prefixes, case)
    counts = jnp.arange(1, case.bits + 1, dtype=jnp.int32)[:, None].repeat(case.m, axis=1)
    expected = np.stack([expected_matmul(case.problem, *args, each) for each in counts])
    for limit in (0, 1, case.bits - 1, case.bits):
        np.testing.assert_array_equal(sweep(*args, jnp.int32(limit))[:limit], expected[:limit])


@pytest.mark.parametrize("m", [1, 5])
def test_largest_sums_do_not_overflow(m):
    """All codes at their top, all activations at their lowest, k as large as int32 allows in one segment."""
    case = Case(m=m, k=contract.MAX_EXACT_K, n=1, bits=8, activation_bits=8)
    x = jnp.full((m, case.k), -128, jnp.int32)
    words = jnp.full((8, case.problem.num_words, 1), 0xFFFFFFFF, jnp.uint32)
    args = (x, words, jnp.ones((4, 1, 1), jnp.float32), jnp.full((m,), 8, jnp.int32))
    y = interpreted(triton.matmul, case)(*args)
    np.testing.assert_array_equal(y, np.float32(-128 * 255 * case.k) * np.float32(2.0 ** -(8 + 8 - 2)))


def test_largest_sums_of_a_lower_limb_do_not_overflow():
    case = Case(m=3, k=contract.MAX_EXACT_K, n=2, bits=8, activation_bits=16)
    x = jnp.array([-1, 255, 32767])[:, None] * jnp.ones((1, case.k), jnp.int32)  # the lower limb is 255
    words = jnp.stack(
        [jnp.zeros((8, case.problem.num_words)), jnp.full((8, case.problem.num_words), 2**32 - 1)], axis=2
    )
    args = (x, words.astype(jnp.uint32), jnp.ones((4, 1, 2), jnp.float32), jnp.array([8, 8, 1], jnp.int32))
    y = interpreted(triton.matmul, case)(*args)
    np.testing.assert_array_equal(y, expected_matmul(case.problem, *args))


def test_a_row_does_not_depend_on_others():
    """Alone, on the other kernel, with other counts beside it: the same bits."""
    alone = Case(m=1, k=140, n=5, bits=6, activation_bits=16)
    assert isinstance(alone.config, triton.SerialConfig)
    one = interpreted(triton.matmul, alone)
    for m in (3, 40):
        case = dataclasses.replace(alone, m=m)
        assert isinstance(case.config, triton.Int8Config)
        x, words, scale, bitlayers = operands(case)
        y = interpreted(triton.matmul, case)(x, words, scale, bitlayers)
        for row in (0, m - 1):
            np.testing.assert_array_equal(y[row], one(x[row : row + 1], words, scale, bitlayers[row : row + 1])[0])


FLOAT = {
    "one_row": Case(m=1, k=70, n=3, bits=2),
    "one_bitlayer": Case(m=3, k=70, n=5, bits=1),
    "two_code_limbs": Case(m=3, k=40, n=5, bits=11),
    "sign_alone_in_its_limb": Case(m=5, k=40, n=3, bits=9),
    "rows_past_a_block": Case(m=40, k=33, n=66, bits=3, cut={"block_rows": 16}),
    "short_last_group": Case(m=3, k=1300, n=4, bits=5, group_size=512, cut={"num_blocks": 5}),
    "many_blocks": Case(m=2, k=32 * 16 * 3, n=4, bits=4, cut={"num_blocks": 7}),
    "groups_of_a_word": Case(m=3, k=32 * 9, n=5, bits=3, group_size=32),
    "groups_of_four_words": Case(m=2, k=256, n=130, bits=11, group_size=128, cut={"num_blocks": 2}),
    "groups_of_seven_words": Case(m=70, k=1000, n=4, bits=5, group_size=224, cut={"block_rows": 16}),
    "many_rows": Case(m=70, k=140, n=20, bits=3, cut=SMALL),
    "many_rows_two_code_limbs": Case(m=66, k=300, n=40, bits=9, cut={**SMALL, "block_words": 2, "num_blocks": 3}),
    "many_rows_one_bitlayer": Case(m=140, k=33, n=5, bits=1),
    "dot_of_xla": Case(m=1024, k=33, n=5, bits=3),
    "dot_of_xla_two_code_limbs": Case(m=1030, k=140, n=70, bits=11, cut={"block_n": 32, "block_words": 2}),
}


def float_operands(case: Case, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
    _, *rest = operands(case)
    return normal(case.m, case.k, seed=case.k, dtype=dtype), *rest


def assert_close(case: Case, y: jax.Array, x: jax.Array, words: jax.Array, scale: jax.Array, bitlayers: jax.Array):
    """Each sum of k terms rounds at most k times and a few more, in whatever order; so does the reference."""
    expected = expected_matmul(case.problem, x, words, scale, bitlayers)
    bound = np.abs(np.asarray(x, np.float32)).sum(axis=1)[:, None] * np.abs(scale).max(axis=(0, 1))[None]
    terms = 3 * case.problem.num_words * contract.WORD_BITS + 10 * case.problem.groups  # three parts of an activation
    assert np.all(np.abs(y - expected) <= 2 * oracle.gamma(terms) * bound)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(name, jnp.float32) for name in FLOAT]
    + [
        (name, dtype)
        for name in ("two_code_limbs", "many_rows_two_code_limbs", "dot_of_xla")  # of each kernel
        for dtype in (jnp.bfloat16, jnp.float16)
    ]
    + [("groups_of_a_word", jnp.bfloat16)],
)
def test_float_activations(case, dtype):
    """With all counts of bitlayers in one batch, and with one; NaN stays in its row."""
    case = FLOAT[case]
    assert triton.unsupported(case.problem) is None
    x, words, scale, bitlayers = float_operands(case, dtype)
    product = interpreted(triton.matmul, case)
    y = product(x, words, scale, bitlayers)
    assert_close(case, y, x, words, scale, bitlayers)
    one_count = jnp.full((case.m,), pl.cdiv(3 * case.bits, 4), jnp.int32)
    assert_close(case, product(x, words, scale, one_count), x, words, scale, one_count)
    row = case.m // 2
    is_nan = np.isnan(product(x.at[row, 2].set(jnp.nan), words, scale, bitlayers))
    np.testing.assert_array_equal(is_nan, np.repeat(np.arange(case.m)[:, None] == row, case.n, axis=1))


@pytest.mark.parametrize(
    "case", ["one_bitlayer", "two_code_limbs", "short_last_group", "groups_of_four_words", "dot_of_xla"]
)
def test_all_prefixes_of_float_activations(case):
    case = FLOAT[case]
    limit = case.bits - 2 if case.bits > 3 else case.bits
    x, words, scale, _ = float_operands(case, jnp.float32)
    sweep = interpreted(triton.prefixes, dataclasses.replace(case, cut=None))(x, words, scale, jnp.int32(limit))
    for i in range(limit):
        assert_close(case, sweep[i], x, words, scale, jnp.full((case.m,), i + 1, jnp.int32))


def test_a_sweep_has_no_part_without_words():
    """Seven parts of ten blocks would be five of two and two of none, which begin where the words end."""
    case = Case(m=1, k=32 * 20, n=512, bits=10)
    x, words, scale, _ = float_operands(case, jnp.bfloat16)
    sweep = interpreted(triton.prefixes, dataclasses.replace(case, cut=None))(x, words, scale, jnp.int32(case.bits))
    assert_close(case, sweep[-1], x, words, scale, jnp.full((1,), case.bits, jnp.int32))


def test_unsupported():
    problem = Case(m=1, k=256, n=3, bits=4, group_size=128).problem
    assert triton.unsupported(dataclasses.replace(problem, activation_bits=8)) is None
    assert triton.unsupported(problem) is None
    many_groups = Case(m=1, k=2**20, n=4096, bits=16, group_size=32, activation_bits=8).problem
    many_rows = Case(m=10**6, k=256, n=4096, bits=16, activation_bits=16).problem
    for too_large in (many_groups, many_rows):
        assert "more than 536870912" in triton.unsupported(too_large)
    assert triton.unsupported(dataclasses.replace(many_rows, bits=8)) is None
    many_codes = Case(m=2**17, k=2**13, n=8, bits=4, activation_bits=16).problem
    assert "2147483648 codes" in triton.unsupported(many_codes)
    assert triton.unsupported(dataclasses.replace(many_codes, activation_bits=8)) is None
    assert "k is 0" in triton.unsupported(dataclasses.replace(problem, k=0))


def test_configuration_of_another_kernel():
    case = FIXED_POINT["one_of_everything"]
    config = triton.config_for(FLOAT["one_row"].problem)
    with pytest.raises(TypeError, match=r"`config` must be that of a kernel for fixed-point activations, but got"):
        triton.matmul(case.problem, *operands(case), config=config)
    case, many = FLOAT["short_last_group"], triton.config_for(FLOAT["dot_of_xla"].problem)
    with pytest.raises(ValueError, match=r"`config` must be a DotConfig for 3 groups, but got Config"):
        triton.matmul(case.problem, *float_operands(case, jnp.float32), config=many)


def test_nothing_to_multiply():
    problem = Case(m=0, k=40, n=3, bits=4, activation_bits=8).problem
    args = (jnp.zeros((0, 40), jnp.int32), jnp.zeros((4, 2, 3), jnp.uint32), jnp.ones((4, 1, 3), jnp.float32))
    assert triton.matmul(problem, *args, jnp.zeros((0,), jnp.int32)).shape == (0, 3)
    assert triton.prefixes(problem, *args, jnp.int32(4)).shape == (4, 0, 3)


@pytest.mark.parametrize("case", [*EXACT.values(), *FLOAT.values()], ids=[*EXACT, *(f"float_{name}" for name in FLOAT)])
def test_lowers_for_cuda(case):
    """Without a GPU: what Triton's dialect cannot express fails here, not on the user's machine."""
    *args, bitlayers = operands(case) if case.activation_bits else float_operands(case, jnp.float32)
    product = jax.jit(lambda *a: triton.matmul(case.problem, *a, config=case.config))
    sweep = jax.jit(lambda *a: triton.prefixes(case.problem, *a, config=case.config))
    with cases.h200():
        for traced in (product.trace(*args, bitlayers), sweep.trace(*args, bitlayers[0])):
            assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()
