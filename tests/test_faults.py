"""What goes wrong at run time, one entry for each row of docs/faults.md, on every backend that runs here."""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import multiprocessing
import multiprocessing.dummy
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pbjax
from pbjax import _backends, _format
from tests import oracle

DOCUMENT = pathlib.Path(__file__).parent.parent / "docs" / "faults.md"
PLATFORM = _backends.default_platform()
RUNNABLE = [name for name, backend in _backends.BACKENDS.items() if backend.unavailable(PLATFORM) is None]

M, K, N, BITS = 3, 70, 4, 5
ACTIVATIONS = (16, None)
X = np.random.default_rng(0).standard_normal((M, K)).astype(np.float32)
WEIGHT = np.random.default_rng(1).standard_normal((K, N)).astype(np.float32)

TOLERANCE = 2 * oracle.gamma(2 * K) * K * np.abs(X).max() * np.abs(WEIGHT).max()  # of two sums over k in float32

FAULTS: dict[str, Callable[[str], None]] = {}  # by what docs/faults.md calls them; each takes the name of a backend
ELSEWHERE: dict[str, Callable[[], None]] = {}  # those in which no backend has a part


def fault(what):
    return functools.partial(FAULTS.setdefault, what)


def elsewhere(what):
    return functools.partial(ELSEWHERE.setdefault, what)


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("what", FAULTS)
def test_product(what, backend):
    FAULTS[what](backend)


@pytest.mark.parametrize("what", ELSEWHERE)
def test_elsewhere(what):
    ELSEWHERE[what]()


def test_the_document_has_a_row_for_each():
    rows = re.findall(r"^\| ([^|]+?) \| ([^|]+?) \| ([^|]+?) \|$", DOCUMENT.read_text(), re.MULTILINE)
    rows = [row for row in rows if row[0] != "what" and not row[0].startswith("-")]
    assert [what for what, _, _ in rows] == [*FAULTS, *ELSEWHERE]
    assert [where for _, _, where in rows] == ["all"] * len(FAULTS) + ["none"] * len(ELSEWHERE)
    assert set(RUNNABLE) >= {"xla", "reference"}


@functools.cache
@jax.ensure_compile_time_eval()
def tensor(group_size=None, activation_bits=16):
    return quantize(WEIGHT, group_size=group_size, activation_bits=activation_bits)


def quantize(weight, **options):
    return pbjax.quantize({"kernel": weight}, BITS, **options)["kernel"]


traced_quantize = jax.jit(lambda weight, group_size: quantize(weight, group_size=group_size), static_argnums=1)


def product(backend, x, w, **options):
    return np.asarray(pbjax.matmul(x, w, backend=backend, **options))


def check_close(y, x, w):
    """Within a step of the activations of the dense product, whose roundings are far smaller."""
    dense = np.asarray(pbjax.dequantize(w), np.float64)
    step = np.abs(x).max(1, keepdims=True).astype(np.float64) / 2**15
    bound = step * np.abs(dense).sum(0) + oracle.gamma(2 * K) * (np.abs(x).astype(np.float64) @ np.abs(dense))
    assert np.all(np.abs(y - x.astype(np.float64) @ dense) <= bound)


@fault("a NaN or an infinity in a row of activations")
def bad_row(backend):
    for bad, activation_bits in itertools.product((np.nan, np.inf, -np.inf), ACTIVATIONS):
        x = X.copy()
        x[1, 69] = bad
        w, zeroed = tensor(), np.where(np.isfinite(x), x, 0)
        run = functools.partial(product, backend, w=w, activation_bits=activation_bits)
        y, expected = run(x), run(zeroed)
        assert np.isnan(y[1]).all()
        np.testing.assert_array_equal(y[[0, 2]], expected[[0, 2]])
    sweep = jax.vmap(lambda b: pbjax.matmul(x, w, bitlayers=b, backend=backend))(jnp.arange(1, BITS + 1))
    np.testing.assert_array_equal(np.isnan(sweep), np.broadcast_to(np.array([[0], [1], [0]]), (BITS, M, N)))


@fault("denormal activations")
def denormal_activations(backend):
    x = np.where(np.arange(K) % 2, X, np.float32(1e-40))
    x[2] = 1e-40
    for activation_bits in ACTIVATIONS:
        run = functools.partial(product, backend, w=tensor(), activation_bits=activation_bits)
        y = run(x)
        np.testing.assert_array_equal(y, run(np.where(x == np.float32(1e-40), 0, x)))
        assert not y[2].any()
        assert y[:2].all()


@fault("activations below 2**-100")
def small_activations(backend):
    x = X / np.abs(X).max() * np.float32(2.0**-110)
    y = product(backend, x, tensor())
    dense = np.asarray(pbjax.dequantize(tensor()), np.float64)
    assert np.all(np.abs(y - x.astype(np.float64) @ dense) <= 2.0**-115 * np.abs(dense).sum(0) * (1 + 1e-6))
    assert y.any()
    y = product(backend, x, tensor(), activation_bits=None)
    np.testing.assert_array_equal(y, product(backend, x * 2.0**100, tensor(), activation_bits=None) * 2.0**-100)


@fault("activations of any size up to the largest")
def huge_activations(backend):
    """Sums on the way pass float32's range, the result does not; and where it does, it is an infinity."""
    x = np.full((1, K), np.finfo(np.float32).max)
    for activation_bits, group_size in itertools.product(ACTIVATIONS, (None, 32)):
        w = quantize(np.abs(WEIGHT) * 1e-5, group_size=group_size)
        run = functools.partial(product, backend, x, activation_bits=activation_bits)
        y = run(w)
        assert np.isfinite(y).all()
        check_close(y, x, w)
        np.testing.assert_array_equal(run(w.replace(scale=w.scale * 2.0**60)), np.full((1, N), np.inf))


@fault("weights near the largest float32")
def huge_weights(backend):
    """Float activations of moderate size give the result where there is one; fixed point overflows on the way."""
    weight = np.abs(WEIGHT) / np.abs(WEIGHT).max()
    weight[:, 1] *= np.float32(3e38)
    x = np.abs(X) * np.float32(1e-6)
    for group_size in (None, 32):
        w = quantize(weight, group_size=group_size)
        check_close(product(backend, x, w, activation_bits=None), x, w)
        y = product(backend, x, w)
        assert not np.isfinite(y[:, 1]).any()
        others = [0, 2, 3]
        np.testing.assert_array_equal(y[:, others], product("reference", x, w)[:, others])
        assert np.isfinite(y[:, others]).all()
        fits = quantize(np.where(np.arange(N) == 1, weight / (4 * K), weight), group_size=group_size)
        check_close(product(backend, x, fits), x, fits)


@fault("weights of zero")
def zero_weights(backend):
    weight = np.where(np.arange(N) == 2, 0, WEIGHT)
    for activation_bits, group_size in itertools.product(ACTIVATIONS, (None, 32)):
        w = quantize(weight, group_size=group_size)
        for x in (X, np.abs(X), -np.abs(X)):
            y = product(backend, x, w, activation_bits=activation_bits)
            assert not y[:, 2].view(np.uint32).any()  # nor is any of them a negative zero
            assert y[:, [0, 1, 3]].all()


@fault("a NaN or an infinity in a weight under a trace")
def bad_traced_weight(backend):
    for bad, group_size in itertools.product((np.nan, -np.inf), (None, 32)):
        weight = WEIGHT.copy()
        weight[40, 1] = bad
        w, good = (traced_quantize(each, group_size) for each in (weight, WEIGHT))
        for b, activation_bits in itertools.product((1, BITS), ACTIVATIONS):
            run = functools.partial(product, backend, X, bitlayers=b, activation_bits=activation_bits)
            y = run(w)
            assert np.isnan(y[:, 1]).all()
            np.testing.assert_array_equal(y[:, [0, 2, 3]], run(good)[:, [0, 2, 3]])
        dense = np.asarray(pbjax.dequantize(w))
        bad_rows = slice(None) if group_size is None else slice(32, 64)
        assert np.isnan(dense[bad_rows, 1]).all()
        assert np.isnan(dense).sum() == np.isnan(dense[bad_rows, 1]).sum()


@fault("more inputs than int32 sums exactly (32768)")
def long_k(backend):
    k = 2 * 32768 + 33
    rng = np.random.default_rng(2)
    q = oracle.activation_codes(rng, 8, 2, k)
    w = pbjax.quantize({"kernel": rng.standard_normal((k, 2)).astype(np.float32)}, 3, activation_bits=8)["kernel"]
    y = product(backend, q.astype(np.float32), w)  # the codes are q: the largest of a row is 127
    np.testing.assert_array_equal(y, product("reference", q.astype(np.float32), w))
    exact = q.astype(np.float64) @ np.asarray(pbjax.dequantize(w), np.float64)
    magnitude = np.abs(q).astype(np.float64) @ np.abs(np.asarray(pbjax.dequantize(w), np.float64))
    assert np.all(np.abs(y - exact) <= oracle.gamma(12) * magnitude)


@fault("no rows")
def no_rows(backend):
    matmul = functools.partial(pbjax.matmul, w=tensor(), backend=backend)
    none = jnp.zeros((0, K))
    assert matmul(none).shape == (0, N)
    assert jax.vmap(matmul)(jnp.zeros((0, M, K))).shape == (0, M, N)
    assert jax.vmap(matmul)(jnp.zeros((M, 0, K))).shape == (M, 0, N)
    assert jax.vmap(lambda b: matmul(none, bitlayers=b))(jnp.arange(1, BITS + 1)).shape == (BITS, 0, N)
    assert jax.vmap(lambda b: matmul(X, bitlayers=b))(jnp.zeros(0, jnp.int32)).shape == (0, M, N)
    sweeps = jax.vmap(jax.vmap(lambda x, b: matmul(x, bitlayers=b), (None, 0)), (0, None))
    assert sweeps(jnp.zeros((0, M, K)), jnp.arange(1, 3)).shape == (0, 2, M, N)
    dx, dscale = jax.grad(lambda x, w: pbjax.matmul(x, w, backend=backend).sum(), (0, 1), allow_int=True)(
        none, tensor()
    )
    assert dx.shape == (0, K)
    assert not dscale.scale.any()


@fault("weights of 2**31 elements and more")
def many_elements(backend):
    """Shapes, and a program that is lowered, without an array of that size."""
    shape = (65536, 32769)
    w = jax.eval_shape(quantize, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert w.shape == shape
    assert w.words.shape == (BITS, 2048, 32769)
    assert w.nbytes == 4 * (BITS * 2048 * 32769 + 4 * 32769)
    x = jax.ShapeDtypeStruct((2, shape[0]), jnp.float32)
    matmul = functools.partial(pbjax.matmul, backend=backend)
    lowered = jax.jit(matmul).lower(x, w)
    assert lowered.out_info.shape == (2, shape[1])
    assert jax.eval_shape(pbjax.dequantize, w).shape == shape
    dx = jax.eval_shape(jax.grad(lambda x, w: matmul(x, w).sum()), x, w)
    assert dx.shape == x.shape
    wide = jax.ShapeDtypeStruct((2, 2**31), jnp.float32)
    y = jax.eval_shape(lambda x, w: matmul(x, quantize(w)), jax.ShapeDtypeStruct((1, 2), jnp.float32), wide)
    assert y.shape == (1, 2**31)


@fault("64-bit mode (jax_enable_x64)")
def x64(backend):
    expected = {bits: product(backend, X, tensor(), activation_bits=bits) for bits in ACTIVATIONS}
    w, gradient = tensor(), lambda x, bits: pbjax.matmul(x, w, activation_bits=bits, backend=backend).sum()
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        for bits, dtype in itertools.product(ACTIVATIONS, (np.float32, np.float64)):
            y = product(backend, X.astype(dtype), w, activation_bits=bits)
            assert y.dtype == dtype
            np.testing.assert_array_equal(y, expected[bits])
            assert jax.grad(gradient)(X.astype(dtype), bits).dtype == dtype
        sweep = jax.vmap(lambda b: pbjax.matmul(X, w, bitlayers=b, backend=backend))(jnp.arange(1, BITS + 1))
        np.testing.assert_array_equal(sweep[-1], expected[16])
        np.testing.assert_array_equal(quantize(WEIGHT.astype(np.float64)).words, w.words)
        assert np.isnan(product(backend, X.astype(np.float64) * 1e300, w)).all()  # no float32


@fault("strict dtype promotion")
def strict(backend):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        x = jnp.asarray(X)
        y = pbjax.matmul(x, tensor(), backend=backend)
        assert y.dtype == jnp.float32
        sweep = jax.vmap(lambda b: pbjax.matmul(x, tensor(), bitlayers=b, backend=backend))(jnp.arange(1, 3))
        assert sweep.shape == (2, M, N)
        assert jax.grad(lambda x: pbjax.matmul(x, tensor(), backend=backend).sum())(x).shape == x.shape
        with pytest.raises(ValueError, match="`x` and `w` must have dtypes that promote, but got bfloat16 and float32"):
            pbjax.matmul(x.astype(jnp.bfloat16), tensor(), backend=backend)


def _all_of(backend, activation_bits):
    """A product, a sweep, a batch and a derivative: what debugging modes have to get through."""
    matmul = functools.partial(pbjax.matmul, w=tensor(), activation_bits=activation_bits, backend=backend)
    if activation_bits is None:  # the same rules
        return [matmul(X)]
    sweep = jax.vmap(lambda b: matmul(X, bitlayers=b))(jnp.arange(1, BITS + 1))
    return [matmul(X), sweep, jax.vmap(matmul)(X), jax.grad(lambda x: matmul(x).sum())(X)]


def _check_all_of(backend, mode):
    for activation_bits in ACTIVATIONS:
        expected = _all_of(backend, activation_bits)
        with mode():
            found = _all_of(backend, activation_bits)
        for i, (got, value) in enumerate(zip(found, expected, strict=True)):
            if activation_bits and i < 3:  # derivatives are sums of floats
                np.testing.assert_array_equal(got, value)
            else:
                np.testing.assert_allclose(got, value, rtol=0, atol=TOLERANCE)


@fault("jax.disable_jit")
def disable_jit(backend):
    _check_all_of(backend, jax.disable_jit)


@fault("jax.debug_nans and jax.debug_infs")
def debug_nans(backend):
    _check_all_of(backend, lambda: jax.debug_nans(True))
    _check_all_of(backend, lambda: jax.debug_infs(True))
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        pbjax.matmul(np.where(np.arange(K) == 3, np.nan, X).astype(np.float32), tensor(), backend=backend)


@fault("jax.check_tracer_leaks")
def check_tracer_leaks(backend):
    with jax.check_tracer_leaks(True):
        for fn in (lambda: _all_of(backend, 16), lambda: quantize(jnp.asarray(WEIGHT))):
            jax.block_until_ready(jax.jit(fn)())


@fault("threads")
def threads(backend):
    """Eight at once, each with a choice of backend of its own, give the bits of one."""
    expected = {name: product(name, X, tensor()) for name in (backend, "reference")}
    barrier = multiprocessing.dummy.Barrier(8)

    def run(i):
        name = (backend, "reference")[i % 2]
        barrier.wait(60)
        with pbjax.use_backend(name):
            for _ in range(20):
                chosen = pbjax.select_backend(
                    pbjax.Problem(m=1, k=K, n=N, bits=BITS, group_size=None, activation_bits=8)
                )
                assert chosen.name == name
                np.testing.assert_array_equal(jax.jit(pbjax.matmul)(X, tensor()), expected[name])
                fresh = quantize(WEIGHT[:, : 1 + i % 4])
                np.testing.assert_array_equal(fresh.words, tensor().words[..., : 1 + i % 4])

    tensor()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(run, range(8)))


@fault("time between products")
def time_between_products(backend):
    """Whatever passes before the next product, its bits are the same, and once a program rests, so do all threads."""
    rng = np.random.default_rng(6)
    x = rng.standard_normal((1, 1024), np.float32)
    w = quantize(rng.standard_normal((1024, 1024), np.float32))  # enough work for several threads
    run = jax.jit(functools.partial(pbjax.matmul, backend=backend))
    expected = product("reference", x, w)
    for pause in (0, 0.0002, 0.0004, 0.001, 0.01) * 4:
        time.sleep(pause)
        np.testing.assert_array_equal(run(x, w), expected)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1


@fault("vmap of vmap of vmap of vmap")
def deep_vmap(backend):
    """Over activations, bitlayers, weights and both again, in several orders: the bits of the products one by one."""
    rng = np.random.default_rng(5)
    sizes = {"x": 2, "bitlayers": 3, "w": 2, "both": 2}
    weights = [quantize(rng.standard_normal((K, N)).astype(np.float32)) for _ in range(sizes["w"])]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)
    x = rng.standard_normal((sizes["x"], sizes["both"], M, K)).astype(np.float32)
    counts = rng.integers(1, BITS + 1, (sizes["bitlayers"], sizes["both"]), dtype=np.int32)
    axes = {"x": (0, None, None), "bitlayers": (None, 0, None), "w": (None, None, 0), "both": (-3, -1, None)}
    one = jax.jit(functools.partial(pbjax.matmul, backend=backend))
    for order in (("x", "bitlayers", "w", "both"), ("w", "both", "bitlayers", "x"), ("bitlayers", "x", "both", "w")):
        fn = lambda x, counts, w: pbjax.matmul(x, w, bitlayers=counts, backend=backend)  # noqa: E731
        for name in reversed(order):
            # The axis of both is the last before rows, and the last of the counts.
            fn = jax.vmap(fn, axes[name])
        y = np.asarray(jax.jit(fn)(x, counts, stacked))
        for index in np.ndindex(*(sizes[name] for name in order)):
            at = dict(zip(order, index, strict=True))
            count = jnp.int32(counts[at["bitlayers"], at["both"]])
            np.testing.assert_array_equal(y[index], one(x[at["x"], at["both"]], weights[at["w"]], bitlayers=count))


@fault("a number of bitlayers out of range")
def bitlayers_out_of_range(backend):
    fewest, most = (product(backend, X, tensor(), bitlayers=b) for b in (1, BITS))
    traced = jax.jit(lambda b: pbjax.matmul(X, tensor(), bitlayers=b, backend=backend))
    for value in (-(2**31), -1, 0):
        np.testing.assert_array_equal(traced(value), fewest)
    for value in (2**31 - 1, np.uint8(255), np.uint32(2**32 - 1), np.int16(300)):
        np.testing.assert_array_equal(traced(value), most)
        np.testing.assert_array_equal(pbjax.matmul(X, tensor(), bitlayers=jnp.asarray(value), backend=backend), most)
    sweep = jax.vmap(traced)(jnp.array([-(2**31), 2**31 - 1, BITS], jnp.int32))
    np.testing.assert_array_equal(sweep, np.stack([fewest, most, most]))
    for value in (0, -1, BITS + 1, 2**40, -(2**70), np.uint64(2**63)):
        with pytest.raises(ValueError, match=rf"`bitlayers` must lie in 1\.\.{BITS}, the bitlayers stored, but got"):
            pbjax.matmul(X, tensor(), bitlayers=value, backend=backend)


@fault("donated and deleted arrays")
def deleted(backend):
    w = quantize(WEIGHT)
    doubled = jax.jit(lambda w: w.replace(scale=w.scale * 2), donate_argnums=0)(w)
    np.testing.assert_array_equal(product(backend, X, doubled), 2 * product(backend, X, tensor()))
    assert w.words.is_deleted()
    assert repr(w) == repr(doubled)
    with pytest.raises((RuntimeError, ValueError), match=r"deleted or donated|has been deleted"):
        jax.block_until_ready(pbjax.matmul(X, w, backend=backend))
    x = jnp.asarray(X)
    x.delete()
    with pytest.raises(RuntimeError, match="has been deleted"):
        pbjax.matmul(x, doubled, backend=backend)


@elsewhere("a NaN or an infinity in a weight whose values are known")
def bad_known_weight():
    for bad, kind in ((np.nan, "a NaN"), (np.inf, "an infinity")):
        with pytest.raises(ValueError, match=f"a weight to quantize must be finite, but kernel holds {kind}"):
            quantize(np.where(WEIGHT[40, 1] == WEIGHT, np.float32(bad), WEIGHT))


@elsewhere("denormal weights")
def denormal_weights():
    weight = np.where(np.arange(N) == 1, np.float32(1e-40), WEIGHT)
    w = quantize(weight)
    assert not np.asarray(w.scale)[:, :, 1].any()
    assert not np.asarray(pbjax.dequantize(w))[:, 1].any()
    np.testing.assert_array_equal(np.asarray(w.scale)[:, :, [0, 2, 3]], np.asarray(tensor().scale)[:, :, [0, 2, 3]])
    smallest = np.finfo(np.float32).tiny * np.sign(WEIGHT)
    np.testing.assert_array_equal(quantize(smallest).scale[-1], np.full((1, N), np.finfo(np.float32).tiny))


@elsewhere("a weight without elements")
def empty_weight():
    for shape in ((0, 3), (3, 0), (0, 40, 3)):
        with pytest.raises(ValueError, match=r"a weight to quantize must not be empty, but kernel is float32\["):
            quantize(np.zeros(shape, np.float32))


@elsewhere("groups larger than the weight")
def large_groups():
    w = quantize(WEIGHT, group_size=2**70)
    assert w.group_size == 96
    np.testing.assert_array_equal(w.words, tensor().words)
    np.testing.assert_allclose(w.scale, tensor().scale, rtol=1e-5)
    np.testing.assert_array_equal(w.scale[-1], tensor().scale[-1])


@elsewhere("weights far smaller than the largest of their group")
def outlier():
    k = 2**16
    weight = np.random.default_rng(0).standard_normal((k, 2)).astype(np.float32)
    weight[0] = 1000
    w = quantize(weight)
    codes = np.asarray(_format.unpack(w.words, k))
    for b in (1, 2, 3):
        exact = oracle.exact_scale(weight, codes, w.bits, b, None)
        np.testing.assert_allclose(w.scale[b - 1], exact, rtol=k * 2.0**-27)
        unpacked = pbjax.dequantize(pbjax.with_bitlayers(w, b))
        assert np.linalg.norm(unpacked - weight) <= 1.0001 * np.linalg.norm(weight)
    np.testing.assert_array_equal(w.scale[3], 1000)
    grouped = quantize(weight, group_size=1024)
    np.testing.assert_array_equal(grouped.scale[3, 1:], np.abs(weight).reshape(64, 1024, 2).max(1)[1:])


@elsewhere("more than 2**20 inputs to a scale")
def too_long():
    def shapes(group_size):
        weight = jax.ShapeDtypeStruct((2**20 + 1, 2), jnp.float32)
        return jax.eval_shape(functools.partial(quantize, group_size=group_size), weight)

    match = r"at most 1048576 inputs to a scale, but kernel of shape \(1048577, 2\) has 1048577\. Give it a smaller"
    with pytest.raises(ValueError, match=match):
        shapes(None)
    assert shapes(1024).scale.shape == (4, 1025, 2)


@elsewhere("processes that are spawned")
def spawned():
    """A BitTensor travels to them, and every backend computes there what it computes here."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        results = [pool.submit(product, backend, X, tensor()) for backend in RUNNABLE]
        for backend, result in zip(RUNNABLE, results, strict=True):
            np.testing.assert_array_equal(result.result(240), product(backend, X, tensor()))


FORK = """
import os, sys
import numpy as np
import jax
import pbjax
from cpu_kernels import bit_matmul
bit_matmul.instructions()  # loads the C++ library
child = os.fork()
if child == 0:
    w = pbjax.quantize({"kernel": np.eye(64, dtype=np.float32)}, 4)["kernel"]
    for backend in sys.argv[1:]:
        y = pbjax.matmul(np.ones((2, 64), np.float32), w, backend=backend)
        assert np.isfinite(np.asarray(y)).all()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("JAX runs from here on", file=sys.stderr, flush=True)
jax.devices()
if os.fork() == 0:
    os._exit(0)
"""


@elsewhere("processes that are forked")
def forked():
    command = [sys.executable, "-W", "error", "-c", FORK, *RUNNABLE]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    before, after = done.stderr.split("JAX runs from here on")
    assert not before
    assert "RuntimeWarning: os.fork() was called" in after
