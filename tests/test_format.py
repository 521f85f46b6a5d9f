"""The number format: codes, bitlayers, scales, and the law that the first b bitlayers are the b-bit quantization."""

from __future__ import annotations

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import pbjax
from pbjax import _format
from tests import oracle

quantize = jax.jit(_format.quantize, static_argnums=(1, 2, 3))
unpack = jax.jit(_format.unpack, static_argnums=1)
dequantize = jax.jit(_format.dequantize, static_argnums=(3, 4))

# (k, group_size): whole words, one more, one less; one group, groups of one and of two words, a short last one.
LAYOUTS = ((64, None), (65, 32), (95, 64), (1, None), (33, None), (128, 64))


def gaussian(k, n, seed=0):
    return np.random.default_rng(seed).standard_normal((k, n)).astype(np.float32)


@st.composite
def weights(draw, k, n=5):
    """Gaussian channels of very different magnitude, one on the edges of the cells, one sparse, one zero."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weight = rng.standard_normal((k, n)) * 10.0 ** rng.integers(-4, 5, n)
    weight[:, 1] = rng.integers(-64, 65, k) / 64
    weight[:, 2] *= rng.random(k) < 0.1
    weight[:, 3] = 0
    return weight.astype(np.float32)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=12)
def test_first_b_bitlayers_are_the_b_bit_quantization(data):
    """words[:b] and every row of scales that b bits have, bit for bit."""
    k, group_size = data.draw(st.sampled_from(LAYOUTS))
    bits = data.draw(st.integers(2, 16))
    fewer = data.draw(st.integers(1, bits - 1))
    dtype = data.draw(st.sampled_from((jnp.float32, jnp.bfloat16, jnp.float16)))
    weight = jnp.asarray(data.draw(weights(k))).astype(dtype)
    words, scale = quantize(weight, bits, group_size, None)
    words_b, scale_b = quantize(weight, fewer, group_size, None)
    np.testing.assert_array_equal(words[:fewer], words_b)
    np.testing.assert_array_equal(scale[: min(fewer, 4)], scale_b)
    np.testing.assert_array_equal(unpack(words, k) >> np.uint32(bits - fewer), unpack(words_b, k))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_codes_on_cell_edges(bits):
    """w / s a multiple of 2**-15 is exact in float32, so the code is the definition's, edges and all."""
    weight = (np.arange(-(2**15), 2**15 + 1)[:, None] * 2.0**-15).astype(np.float32)
    weight = weight[:: max(1, 2 ** (12 - bits))]  # every edge of up to 13 bits, and all of 16
    words, _ = quantize(weight, bits, None, None)
    codes = np.asarray(unpack(words, weight.shape[0]))
    np.testing.assert_array_equal(codes, oracle.exact_codes(weight, bits, None).astype(np.uint32))
    assert set(codes.ravel()) == set(range(2**bits))


@pytest.mark.parametrize("largest", [2.0**-100, 2.0**100, 2.0**127])
def test_codes_do_not_depend_on_the_power_of_two(largest):
    """All a float32 can hold, down to where its reciprocal is no longer normal."""
    weight = gaussian(40, 3)
    weight /= np.abs(weight).max(0)
    words, scale = quantize(weight, 8, None, None)
    words_of_largest, scale_of_largest = quantize((weight * largest).astype(np.float32), 8, None, None)
    np.testing.assert_array_equal(words_of_largest, words)
    np.testing.assert_array_equal(scale_of_largest[3], scale[3] * np.float32(largest))


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=8)
def test_codes_are_the_definition(data):
    """Exactly, but where float32 rounds (w / s) + 1 over the edge of a cell: 2 roundings of 2**-24."""
    k, group_size = data.draw(st.sampled_from(LAYOUTS))
    bits = data.draw(st.sampled_from((1, 3, 8, 16)))
    weight = data.draw(weights(k))
    codes = np.asarray(unpack(quantize(weight, bits, group_size, None)[0], k)).astype(np.int64)
    exact = oracle.exact_codes(weight, bits, group_size).astype(np.int64)
    # In units of 2**-23, the codes of 24 bits tell how far w / s lies from the edge of its cell.
    fine = oracle.exact_codes(weight, 24, group_size).astype(np.int64) & (2 ** (24 - bits) - 1)
    near_edge = np.minimum(fine, 2 ** (24 - bits) - 1 - fine) <= 1
    np.testing.assert_array_equal(codes[~near_edge], exact[~near_edge])
    assert np.abs(codes - exact).max() <= 1
    hypothesis.event(f"bits={bits}: {near_edge.mean():.0%} of the codes near an edge")
    assert near_edge[:, [0, 4]].mean() < 0.1 or k == 1


@pytest.mark.parametrize(("k", "group_size"), LAYOUTS)
def test_scales_leave_the_product_with_the_weight_below_4_bitlayers(k, group_size):
    """scale_b = <w, w> / <w, v_b>, within the roundings of a sum over a group; max|w|, exactly, from 4 on."""
    weight = gaussian(k, 6)
    words, scale = quantize(weight, 5, group_size, None)
    codes = np.asarray(unpack(words, k))
    operations = (group_size or k) + 6
    for b in (1, 2, 3):
        exact = oracle.exact_scale(weight, codes, 5, b, group_size)
        # <w, v_b> is a sum of |w| |v_b|, as w and v_b have one sign: nothing cancels.
        assert np.all(np.abs(scale[b - 1] - exact) <= oracle.gamma(2 * operations) * exact)
    np.testing.assert_array_equal(scale[3], oracle.exact_scale(weight, codes, 5, 4, group_size).astype(np.float32))


@pytest.mark.parametrize("bits", [1, 4, 11, 16])
@pytest.mark.parametrize("k", [1, 31, 32, 33, 64])
def test_bit_t_of_word_j_of_bitlayer_i(bits, k):
    """words[i, j] holds bit bits - 1 - i of codes 32 * j + t at t, and unpacking inverts packing."""
    codes = oracle.every_code(np.random.default_rng(k), bits, k, 3).astype(np.uint32)
    words = np.asarray(jax.jit(_format.pack, static_argnums=1)(codes, bits))
    np.testing.assert_array_equal(words, oracle.pack(codes, bits))
    np.testing.assert_array_equal(unpack(words, k), codes)


def test_packed_at_once_is_packed():
    """The oracle's two ways."""
    for bits, k in ((5, 40), (16, 33), (1, 1), (9, 64)):
        codes = oracle.every_code(np.random.default_rng(k), bits, k, 3)
        np.testing.assert_array_equal(oracle.pack_at_once(codes, bits), oracle.pack(codes, bits), strict=True)


@pytest.mark.parametrize("bits", [1, 3, 16])
def test_one_bit_set(bits):
    """A code with one bit set sets one bit of one word."""
    for i in range(bits):
        for k in (0, 31, 32, 39):
            codes = np.zeros((40, 2), np.uint32)
            codes[k, 1] = 1 << (bits - 1 - i)
            expected = np.zeros((bits, 2, 2), np.uint32)
            expected[i, k // 32, 1] = 1 << (k % 32)
            np.testing.assert_array_equal(oracle.pack(codes, bits), expected)
            np.testing.assert_array_equal(jax.jit(_format.pack, static_argnums=1)(codes, bits), expected)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_the_generators_yield_every_code(bits):
    """What the tests of products and of quantization run on holds every code, the top one too."""
    assert set(oracle.every_code(np.random.default_rng(0), bits, 40, 30).ravel()) == set(range(2**bits))
    weight = np.random.default_rng(0).uniform(-1, 1, (4096, 4)).astype(np.float32)
    codes = unpack(quantize(weight, bits, None, None)[0], 4096)
    assert set(np.asarray(codes).ravel()) == set(range(2**bits))


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("bits", [1, 3, 4, 16])
def test_zero_weights_are_exact(bits, group_size):
    weight = np.zeros((40, 3), np.float32)
    weight[:, 1] = gaussian(40, 1)[:, 0]
    words, scale = quantize(weight, bits, group_size, None)
    assert not np.any(np.asarray(scale)[:, :, [0, 2]])
    assert np.all(np.asarray(scale)[:, :, 1] > 0)
    for b in range(1, bits + 1):
        value = np.asarray(dequantize(words, scale, b, 40, group_size))
        assert not np.any(value[:, [0, 2]])
        assert np.all(value[:, 1] != 0)  # mid-rise: no cell is centred on zero


@pytest.mark.parametrize("k", [40, 64])
def test_dequantized_weight_is_scale_times_the_centre(k):
    """w_b = scale_b * v_b, one rounding."""
    words, scale = quantize(gaussian(k, 5), 7, 32, None)
    codes = np.asarray(unpack(words, k))
    for b in range(1, 8):
        values = oracle.prefix_values(codes, 7, b).astype(np.float32)
        expected = np.repeat(np.asarray(scale)[min(b, 4) - 1], 32, axis=0)[:k] * values
        np.testing.assert_array_equal(dequantize(words, scale, b, k, 32), expected)


@functools.cache
def gaussian_errors(clip_bits=None):
    """Relative RMS error at 1 to 8 bitlayers of a Gaussian weight, scaled per channel.

    It grows with k, as the largest of k values does (2 bitlayers: 0.45 at k = 1024, 0.48 at 4096).
    The bounds below are for 2048.
    """
    weight = gaussian(2048, 64)
    words, scale = quantize(weight, 8, None, clip_bits)
    errors = [np.linalg.norm(dequantize(words, scale, b, 2048, None) - weight) for b in range(1, 9)]
    return np.array(errors) / np.linalg.norm(weight)


def test_error_of_gaussian_weights():
    """No larger than what scales without bias cost: 1.26, 1.14, 1.04 times the least squares at 1, 2, 3."""
    for bitlayers, expected in {1: 0.76, 2: 0.53, 3: 0.27, 4: 0.14, 8: 0.0083}.items():
        assert float(f"{gaussian_errors()[bitlayers - 1]:.2g}") <= expected, bitlayers
    assert np.all(np.diff(gaussian_errors()) < 0)


HARD = {  # weights of k inputs that few bitlayers do not fit
    "outlier": lambda k: np.r_[1000 * np.ones((1, 2)), gaussian(k - 1, 2)],
    "large outlier": lambda k: np.r_[1e6 * np.ones((1, 2)), gaussian(k - 1, 2)],
    "sparse": lambda k: gaussian(k, 2) * (np.arange(k) % 61 == 0)[:, None],
    "one-hot": lambda k: np.eye(k, 2),
}


@pytest.mark.parametrize("k", [64, 4096, 65536, 2**20])
@pytest.mark.parametrize("case", HARD)
def test_scales_of_weights_that_few_bitlayers_do_not_fit(case, k):
    """They are the definition's, in float64, but for roundings; and w_b is no farther from w than 0 is."""
    weight = HARD[case](k).astype(np.float32)
    words, scale = quantize(weight, 4, None, None)
    codes, exact = np.asarray(unpack(words, k)), weight.astype(np.float64)
    for b in (1, 2, 3):
        expected = oracle.exact_scale(weight, codes, 4, b, None)
        np.testing.assert_allclose(scale[b - 1], expected, rtol=2**-21 if k < 2**20 else 2**-16)
        error = np.asarray(scale[b - 1], np.float64) * oracle.prefix_values(codes, 4, b) - exact
        assert (np.linalg.norm(error, axis=0) <= (1 + 2**-16) * np.linalg.norm(exact, axis=0)).all()


def test_scales_of_weights_at_the_rounding_of_fixed_point():
    """The most that many small weights can be off, all in one direction: k * 2**-27."""
    k = 2**16
    weight = np.full((k, 1), 1.5 * 2.0**-27)
    weight[0] = 1
    words, scale = quantize(weight.astype(np.float32), 1, None, None)
    exact = oracle.exact_scale(weight, np.asarray(unpack(words, k)), 1, 1, None)
    error = abs(scale[0, 0, 0] / exact.item() - 1)
    assert k * 2.0**-30 < error <= k * 2.0**-27


def test_no_scale_is_infinite():
    for weight in (np.linspace(-3.3e38, 3.3e38, 64), np.full(64, 2e38), np.r_[3e38, np.full(63, 1e30)]):
        _, scale = quantize(weight.astype(np.float32)[:, None], 4, None, None)
        assert np.isfinite(scale).all()


def test_clip_bits_trades_8_bitlayers_for_4():
    assert gaussian_errors(4)[3] < 0.9 * gaussian_errors()[3]
    assert gaussian_errors(4)[7] > gaussian_errors()[7]


@pytest.mark.parametrize(("clip_bits", "case"), [(1, "gaussian"), (2, "signs"), (3, "signs")])
def test_clip_bits_chooses_the_widest_of_equal_ranges(clip_bits, case):
    """With 1 bitlayer, or weights of one magnitude below 4, all have one error but for its rounding."""
    weight = gaussian(512, 64) if case == "gaussian" else np.sign(gaussian(512, 64))
    clipped, plain = (quantize(weight, 4, 64, clip) for clip in (clip_bits, None))
    jax.tree.map(np.testing.assert_array_equal, clipped, plain)


def test_clip_bits_is_the_best_of_the_scales():
    """No other clipping point of a fine grid is better by more than the grid of the search allows."""
    weight = gaussian(512, 2)
    words, scale = quantize(weight, 4, None, 4)
    error = np.square(dequantize(words, scale, 4, 512, None) - weight).sum(0)
    for j in range(2):
        w = weight[:, j].astype(np.float64)
        best = np.inf
        for s in np.linspace(0.3, 1, 141) * np.abs(w).max():
            code = np.clip(np.floor((w / s + 1) * 8), 0, 15)
            best = min(best, np.square(w - s * (2 * code - 15) / 16).sum())
        assert best <= error[j] * (1 + 1e-6)
        assert error[j] <= 1.05 * best


@pytest.mark.parametrize(("group_size", "clip_bits"), [(None, None), (64, None), (64, 3)])
def test_jit_equals_eager(group_size, clip_bits):
    """Also where w / s falls next to the edge of a cell, as some of many weights do at 16 bits."""
    weight = gaussian(4097, 16)
    eager = _format.quantize(jnp.asarray(weight), 16, group_size, clip_bits)
    jax.tree.map(np.testing.assert_array_equal, quantize(weight, 16, group_size, clip_bits), eager)


@pytest.mark.parametrize(("k", "block_n"), [(4097, 64), (1000, 256), (2**15, 32)])
@pytest.mark.parametrize("group_size", [None, 64])
def test_in_blocks_equals_at_once(group_size, k, block_n):
    """Two blocks of channels and a rest."""
    weight = gaussian(k, 2 * block_n + 3)
    in_blocks = jax.jit(_format.quantize_in_blocks, static_argnums=(1, 2, 3))(weight, 5, group_size, None)
    jax.tree.map(np.testing.assert_array_equal, in_blocks, quantize(weight, 5, group_size, None))


def test_stack_equals_loop():
    """A stack of layers, `vmap` over it, and a loop give the same bits."""
    stack = jnp.asarray(gaussian(3 * 65, 7).reshape(3, 65, 7))
    rules = {"kernel": pbjax.Spec(stack=(0,), group_size=32)}
    stacked = pbjax.quantize({"kernel": stack}, 6, rules=rules)
    mapped = jax.vmap(lambda layer: pbjax.quantize({"kernel": layer}, 6, group_size=32))(stack)
    loop = [pbjax.quantize({"kernel": layer}, 6, group_size=32) for layer in stack]
    loop = jax.tree.map(lambda *leaves: jnp.stack(leaves), *loop)
    assert jax.tree.structure(stacked) == jax.tree.structure(mapped) == jax.tree.structure(loop)
    jax.tree.map(np.testing.assert_array_equal, stacked, loop)
    jax.tree.map(np.testing.assert_array_equal, mapped, loop)
    assert stacked["kernel"].shape == (3, 65, 7)
