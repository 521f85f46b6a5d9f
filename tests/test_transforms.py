"""The product under JAX's transforms: the same bits as a loop, and no more passes over the words than needed."""

from __future__ import annotations

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import pbjax
from pbjax import _backends
from tests import cases, oracle
from tests.cases import normal

BITS, K, N = 6, 70, 3


@functools.cache
@jax.ensure_compile_time_eval()  # the first call may be inside a trace, whose values must not be kept
def weight(activation_bits=16, group_size=32):
    kernel = {"kernel": normal(K, N, seed=9)}
    return pbjax.quantize(kernel, BITS, group_size=group_size, activation_bits=activation_bits)["kernel"]


@functools.cache
@jax.ensure_compile_time_eval()
def stack():
    """Four layers with 1, 3, 4 and 6 bitlayers in use."""
    rules = {"kernel": pbjax.Spec(stack=(0,), group_size=32)}
    w = pbjax.quantize({"kernel": normal(4, K, N, seed=8)}, BITS, rules=rules)["kernel"]
    return w.replace(bitlayers=jnp.array([1, 3, 4, 6], jnp.int32))


def layer(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


matmul = jax.jit(pbjax.matmul, static_argnames=("activation_bits", "backend"))


@pytest.fixture
def passes(monkeypatch):
    """Products run on a backend that counts: appends (matmul or prefixes, rows) for each pass over the words."""
    done = []
    reference = _backends.BACKENDS["reference"]

    def counted(kind):
        def run(problem, *operands):
            jax.debug.callback(lambda: done.append((kind, problem.m)))
            return getattr(reference, kind)(problem, *operands)

        return run

    fields = dict(unsupported=reference.unsupported, matmul=counted("matmul"), prefixes=counted("prefixes"))
    backend = _backends.Backend(name="counted", **fields)
    monkeypatch.setattr(_backends, "BACKENDS", {**_backends.BACKENDS, "counted": backend})

    def count(fn, *args):
        with pbjax.use_backend("counted"):
            y = cases.jit_once(fn)(*args)
        jax.effects_barrier()
        counts = done[:]
        done.clear()
        return np.asarray(y), counts

    return count


# `vmap`. Each entry: the function of x[A, B, 2, k], counts[A, B, C] that is mapped, and the passes it should take.

A, B, ROWS = 3, 2, 2


def mapped(in_axes, *outer_axes):
    fn = jax.vmap(lambda x, b: pbjax.matmul(x, weight(), bitlayers=b), in_axes)
    for axes in outer_axes:
        fn = jax.vmap(fn, axes)
    return fn


VMAPS = {
    # name: (function, shape of x before its rows, shape of the counts, passes)
    "x": (mapped((0, None)), (A,), (), [("matmul", A * ROWS)]),
    "bitlayers": (mapped((None, 0)), (), (A,), [("prefixes", ROWS)]),
    "both": (mapped((0, 0)), (A,), (A,), [("matmul", A * ROWS)]),
    "x_then_x": (mapped((0, None), (0, None)), (A, B), (), [("matmul", A * B * ROWS)]),
    "bitlayers_then_bitlayers": (mapped((None, 0), (None, 0)), (), (A, B), [("prefixes", ROWS)]),
    "x_then_bitlayers": (mapped((0, None), (None, 0)), (B,), (A,), [("prefixes", B * ROWS)]),
    "bitlayers_then_x": (mapped((None, 0), (0, None)), (A,), (B,), [("prefixes", A * ROWS)]),
    "x_then_both": (mapped((0, None), (0, 0)), (A, B), (A,), [("matmul", A * B * ROWS)]),
    "bitlayers_then_both": (mapped((None, 0), (0, 0)), (A,), (A, B), [("prefixes", A * ROWS)]),
    "both_then_bitlayers": (mapped((0, 0), (None, 0)), (B,), (A, B), [("prefixes", B * ROWS)]),
    "both_then_both": (mapped((0, 0), (0, 0)), (A, B), (A, B), [("matmul", A * B * ROWS)]),
}


def loop(x, counts, batch, x_axes, count_axes):
    """The same with one product at a time; `x_axes` are the batch axes that x has."""
    out = np.zeros((*batch, ROWS, N), np.float32)
    for index in np.ndindex(*batch):
        x_index = tuple(index[a] for a in x_axes)
        out[index] = matmul(x[x_index], weight(), bitlayers=counts[tuple(index[a] for a in count_axes)])
    return out


# The batch axes that x and the counts have, outermost first.
AXES = {
    "x": ((0,), ()),
    "bitlayers": ((), (0,)),
    "both": ((0,), (0,)),
    "x_then_x": ((0, 1), ()),
    "bitlayers_then_bitlayers": ((), (0, 1)),
    "x_then_bitlayers": ((1,), (0,)),
    "bitlayers_then_x": ((0,), (1,)),
    "x_then_both": ((0, 1), (0,)),
    "bitlayers_then_both": ((0,), (0, 1)),
    "both_then_bitlayers": ((1,), (0, 1)),
    "both_then_both": ((0, 1), (0, 1)),
}


@pytest.mark.parametrize("name", VMAPS)
def test_vmap_equals_loop_in_one_pass(name, passes):
    """To the last bit, and every order of `vmap` over x and bitlayers reads the words once."""
    fn, x_batch, count_batch, expected_passes = VMAPS[name]
    x = normal(*x_batch, ROWS, K)
    counts = jax.random.randint(jax.random.key(1), count_batch, 1, BITS + 1)
    x_axes, count_axes = AXES[name]
    sizes = dict(zip(x_axes, x_batch, strict=True)) | dict(zip(count_axes, count_batch, strict=True))
    expected = loop(x, counts, tuple(sizes[a] for a in sorted(sizes)), x_axes, count_axes)
    assert len({tuple(row) for row in expected.reshape(-1, N)}) >= A  # the batch does make a difference
    np.testing.assert_array_equal(jax.jit(fn)(x, counts), expected)
    y, done = passes(fn, x, counts)
    np.testing.assert_array_equal(y, expected)
    assert done == expected_passes


def test_sweep_with_a_count_per_row():
    """`vmap` over counts of rows: row r of sweep s has counts[s, r]."""
    x, counts = normal(4, K), jax.random.randint(jax.random.key(2), (5, 4), 1, BITS + 1)
    y = jax.jit(jax.vmap(lambda b: pbjax.matmul(x, weight(), bitlayers=b)))(counts)
    np.testing.assert_array_equal(y, np.stack([matmul(x, weight(), bitlayers=b) for b in counts]))


def test_sweep_through_with_bitlayers(passes):
    """The whole curve by one function of the number, in one pass."""
    x, tree = normal(4, K), {"kernel": weight()}
    sweep = jax.vmap(lambda b: pbjax.matmul(x, pbjax.with_bitlayers(tree, b)["kernel"]))
    y, done = passes(sweep, jnp.arange(1, BITS + 1))
    np.testing.assert_array_equal(y, np.stack([matmul(x, weight(), bitlayers=b) for b in range(1, BITS + 1)]))
    assert done == [("prefixes", 4)]


def test_sweep_clips_what_is_out_of_range():
    x, counts = normal(4, K), jnp.array([-3, 0, 1, BITS, BITS + 1, 99])
    y = np.asarray(jax.jit(jax.vmap(lambda b: pbjax.matmul(x, weight(), bitlayers=b)))(counts))
    np.testing.assert_array_equal(y, y[np.array([2, 2, 2, 3, 3, 3])])
    assert not np.array_equal(y[2], y[3])


@pytest.mark.parametrize("axis_size", [1, 5])
def test_sweep_of_float_activations(axis_size):
    """Within the roundings of two sums over k."""
    x, w = normal(4, K), weight(None)
    y = jax.jit(jax.vmap(lambda b: pbjax.matmul(x, w, bitlayers=b)))(jnp.arange(1, axis_size + 1))
    for b in range(1, axis_size + 1):
        bound = 2 * oracle.gamma(K + 12) * np.abs(x).sum(1, keepdims=True) * float(w.scale.max())
        assert np.all(np.abs(y[b - 1] - matmul(x, w, bitlayers=b)) <= bound)


@pytest.mark.parametrize("x_axis", [0, None])
@pytest.mark.parametrize("sweep", [False, True])
def test_mapped_words_equal_loop(x_axis, sweep, passes):
    """A pass for each weight, and no more; a sweep over bitlayers inside it does not repeat it."""
    w = stack()
    x = normal(4, 2, K) if x_axis == 0 else normal(2, K)
    counts = jnp.array([2, 5, 6])
    if sweep:
        fn = jax.vmap(lambda x, w: jax.vmap(lambda b: pbjax.matmul(x, w, bitlayers=b))(counts), (x_axis, 0))
    else:
        fn = jax.vmap(pbjax.matmul, (x_axis, 0))
    y, done = passes(fn, x, w)
    for i in range(4):
        x_i = x[i] if x_axis == 0 else x
        for j, b in enumerate(counts if sweep else [w.bitlayers[i]]):
            np.testing.assert_array_equal(y[i, j] if sweep else y[i], matmul(x_i, layer(w, i), bitlayers=b))
    assert done == [("prefixes" if sweep else "matmul", 2)] * 4


def test_mapped_scale_equals_loop():
    """An ensemble of scales over shared words."""
    x, w = normal(2, K), weight()
    scales = jnp.stack([w.scale, 2 * w.scale, -0.3 * w.scale])
    y = jax.jit(jax.vmap(lambda s: pbjax.matmul(x, w.replace(scale=s))))(scales)
    np.testing.assert_array_equal(y, np.stack([matmul(x, w.replace(scale=s)) for s in scales]))


def test_out_axes_and_axis_size():
    """`in_axes` and `out_axes` other than the first."""
    x = normal(2, 5, K)
    y = jax.jit(jax.vmap(lambda x: pbjax.matmul(x, weight()), in_axes=1, out_axes=2))(x)
    np.testing.assert_array_equal(jnp.moveaxis(y, 2, 1), matmul(x, weight()))


def test_scan_over_a_stack_equals_loop():
    """Each layer with its own number of bitlayers."""
    x = normal(2, K)

    def step(carry, w):
        return carry * 0.5 + 1.0, pbjax.matmul(carry, w)

    _, y = jax.jit(lambda x, w: lax.scan(step, x, w))(x, stack())
    for i in range(4):
        np.testing.assert_array_equal(y[i], matmul(x, layer(stack(), i)))
        x = x * 0.5 + 1.0


# Derivatives.


def dense_product(x, scale, w, b):
    """x . w_b as a plain function of x and the scales, in float32."""
    ones = pbjax.dequantize(w.replace(scale=jnp.ones_like(w.scale), bitlayers=jnp.int32(b)))
    spread = jnp.repeat(scale[min(b, 4) - 1], w.group_size or K, axis=0)[:K]
    return jnp.matmul(x, ones * spread, precision="highest")


def check_gradients(got, expected, magnitudes):
    """Two float32 sums over at most K + rows terms, and a product; `magnitudes` bound the sums of absolute values."""
    for values in zip(got, expected, magnitudes, strict=True):
        value, reference, magnitude = map(np.asarray, values)
        assert value.shape == reference.shape
        assert np.any(reference != 0)
        assert np.all(np.abs(value - reference) <= 2 * oracle.gamma(K + 16) * magnitude)


@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize("activation_bits", [16, None])
@pytest.mark.parametrize("bitlayers", [2, 6])
def test_gradients_are_those_of_the_dense_product(bitlayers, activation_bits, group_size):
    x, w = normal(4, K), weight(activation_bits, group_size)
    g = normal(4, N, seed=2)

    @jax.jit
    def gradients(x, scale, b):
        return jax.vjp(lambda x, s: pbjax.matmul(x, w.replace(scale=s), bitlayers=b), x, scale)[1](g)

    got = gradients(x, w.scale, bitlayers)
    expected = jax.vjp(lambda x, s: dense_product(x, s, w, bitlayers), x, w.scale)[1](g)
    largest = float(jnp.abs(w.scale).max())
    check_gradients(got, expected, (N * jnp.abs(g).max() * largest, (np.abs(x).T @ np.abs(g)).sum(0)))
    unused = np.arange(4) != min(bitlayers, 4) - 1
    assert not np.any(np.asarray(got[1])[unused])


def test_gradient_is_the_finite_difference():
    """The product is linear in x and in the scales, so differences are exact but for rounding."""
    x, w, g = normal(4, K), weight(None), normal(4, N, seed=2)

    def loss(x, scale):
        return jnp.sum(pbjax.matmul(x, w.replace(scale=scale), bitlayers=3) * g)

    dx, dscale = jax.jit(jax.grad(loss, (0, 1)))(x, w.scale)
    for argument, gradient in ((0, dx), (1, dscale)):
        direction = normal(*gradient.shape, seed=3)
        forward, backward = ([x, w.scale], [x, w.scale])
        forward[argument], backward[argument] = forward[argument] + direction, backward[argument] - direction
        difference = (loss(*forward) - loss(*backward)) / 2
        np.testing.assert_allclose(jnp.vdot(gradient, direction), difference, rtol=1e-4)


def test_gradients_with_a_count_per_row_are_those_of_each_row():
    x, w, g, counts = normal(5, K), weight(), normal(5, N, seed=2), jnp.array([1, 6, 3, 3, 5])
    got = jax.jit(jax.vjp(lambda x, s: pbjax.matmul(x, w.replace(scale=s), bitlayers=counts), x, w.scale)[1])(g)
    rows = [
        jax.vjp(lambda x, s, b=int(b): dense_product(x, s, w, b), x[i : i + 1], w.scale)[1](g[i : i + 1])
        for i, b in enumerate(counts)
    ]
    expected = jnp.concatenate([dx for dx, _ in rows]), sum(ds for _, ds in rows)
    check_gradients(got, expected, (jnp.abs(g).max() * 15, (np.abs(x).T @ np.abs(g)).sum(0)))


@pytest.mark.parametrize("over", ["x", "bitlayers", "words"])
def test_gradients_under_vmap_equal_loop(over):
    """Within the roundings of the sums over rows and k, whose order `vmap` may change."""
    g = normal(2, N, seed=2)

    def gradients(x, w, b):
        dx, ds = jax.vjp(lambda x, s: pbjax.matmul(x, w.replace(scale=s), bitlayers=b), x, w.scale)[1](g)
        return dx, ds

    if over == "x":
        args, axes = (normal(3, 2, K), weight(), 3), (0, None, None)
    elif over == "bitlayers":
        args, axes = (normal(2, K), weight(), jnp.array([2, 6, 4])), (None, None, 0)
    else:
        args, axes = (normal(2, K), stack(), 3), (None, 0, None)
    got = jax.jit(jax.vmap(gradients, axes))(*args)
    single = jax.jit(gradients)
    for i in range(3):
        picked = [layer(arg, i) if ax == 0 else arg for arg, ax in zip(args, axes, strict=True)]
        expected = single(*picked)
        for value, reference in zip(got, expected, strict=True):
            scale = np.abs(reference).max()
            np.testing.assert_allclose(value[i], reference, rtol=0, atol=oracle.gamma(K + 16) * 8 * scale)
            assert scale > 0


def test_gradient_of_a_tree_has_no_values_for_integers():
    """`jax.grad` of a BitTensor is a BitTensor: of floats for the scale, of float0 for words and bitlayers."""
    x, w = normal(4, K), weight()
    gradient = jax.jit(jax.grad(lambda w: pbjax.matmul(x, w).sum(), allow_int=True))(w)
    assert isinstance(gradient, pbjax.BitTensor)
    assert gradient.words.dtype == jax.dtypes.float0
    assert gradient.words.shape == w.words.shape
    assert gradient.bitlayers.dtype == jax.dtypes.float0
    assert gradient.scale.shape == w.scale.shape
    assert np.any(gradient.scale)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradient_has_the_dtype_of_x(dtype):
    x, w = normal(2, K).astype(dtype), weight().replace(dtype=np.dtype(dtype))
    gradient = jax.jit(jax.grad(lambda x: pbjax.matmul(x, w).astype(jnp.float32).sum()))(x)
    assert gradient.dtype == dtype
    exact = pbjax.dequantize(weight()).sum(1)
    np.testing.assert_allclose(gradient[0].astype(jnp.float32), exact, rtol=oracle.ROUNDOFF[dtype], atol=1e-5)


def test_remat_changes_nothing():
    x, w = normal(2, K), weight()

    def loss(x, scale):
        return jnp.square(pbjax.matmul(x, w.replace(scale=scale))).sum()

    plain = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, w.scale)
    remat = jax.jit(jax.value_and_grad(jax.checkpoint(loss), (0, 1)))(x, w.scale)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=oracle.gamma(2 * K)), remat, plain)


def test_gradient_through_scan():
    """A scan over layers, differentiated with respect to x and to every scale."""
    w = stack()

    def loss(x, scale):
        def step(total, layer):
            return total + jnp.square(pbjax.matmul(x, layer)).sum(), None

        return lax.scan(step, jnp.float32(0), w.replace(scale=scale))[0]

    def loop(x, scale):
        layers = [layer(w.replace(scale=scale), i) for i in range(4)]
        return sum(jnp.square(pbjax.matmul(x, w)).sum() for w in layers)

    got = jax.jit(jax.grad(loss, (0, 1)))(normal(2, K), w.scale)
    expected = jax.jit(jax.grad(loop, (0, 1)))(normal(2, K), w.scale)
    for value, reference in zip(got, expected, strict=True):
        np.testing.assert_allclose(value, reference, rtol=0, atol=oracle.gamma(4 * K) * np.abs(reference).max())
        assert np.any(reference)


# Compilation.

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compilations():
    """The number of compilations so far, as a function."""
    seen = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: seen.append(event))
    return lambda: seen.count(COMPILE_EVENT)


def test_another_number_of_bitlayers_compiles_nothing(compilations):
    """By argument, in the weight, and through `with_bitlayers` on a tree."""
    x, tree = normal(3, K), {"kernel": weight()}
    f = jax.jit(lambda tree, x, b: pbjax.matmul(x, tree["kernel"], bitlayers=b) + pbjax.matmul(x, tree["kernel"]))
    before = compilations()
    f(pbjax.with_bitlayers(tree, 2), x, 3)
    assert compilations() > before  # the listener does hear
    before = compilations()
    f(pbjax.with_bitlayers(tree, 5), x, 4)
    f(pbjax.with_bitlayers(tree, 6), x, 1)
    assert compilations() == before
    assert f._cache_size() == 1


# The BitTensor as a pytree.


def test_eval_shape():
    y = jax.eval_shape(pbjax.matmul, jax.ShapeDtypeStruct((7, K), jnp.float32), weight())
    assert (y.shape, y.dtype) == ((7, N), jnp.float32)
    abstract = jax.eval_shape(lambda w: w, weight())
    assert isinstance(abstract, pbjax.BitTensor)
    assert abstract.shape == (K, N)
    assert jax.eval_shape(pbjax.matmul, jax.ShapeDtypeStruct((7, K), jnp.float32), abstract) == y


def test_tree_map_rebuilds_around_anything():
    """Leaves may be shapes, None or names: nothing is checked when a pytree is built."""
    w = stack()
    assert w.shape == (4, K, N)
    assert w.stack_shape == (4,)
    assert layer(w, 0).shape == (K, N)
    names = jax.tree.map(lambda _: "leaf", w)
    assert names.words == names.scale == names.bitlayers == "leaf"
    assert "leaf" in repr(names)
    assert jax.tree.map(lambda _: None, w).words is None
    assert [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(w)] == [
        ".words",
        ".scale",
        ".bitlayers",
    ]
    assert jax.tree.structure(w) == jax.tree.structure(names)
    assert jax.tree.structure(w) != jax.tree.structure(weight(8))


@pytest.mark.parametrize("copy_of", [copy.deepcopy, copy.copy, lambda w: pickle.loads(pickle.dumps(w))])
def test_copies_are_equal(copy_of):
    w = weight()
    other = copy_of(w)
    assert jax.tree.structure(other) == jax.tree.structure(w)
    jax.tree.map(np.testing.assert_array_equal, other, w)
    np.testing.assert_array_equal(matmul(normal(2, K), other), matmul(normal(2, K), w))


def test_donation():
    """A donated BitTensor is consumed and its buffers reused."""
    expected = jax.tree.map(np.array, weight())
    w = jax.tree.map(jnp.copy, weight())
    scaled = jax.jit(lambda w: w.replace(scale=2 * w.scale), donate_argnums=0)(w)
    assert w.words.is_deleted()
    np.testing.assert_array_equal(scaled.words, expected.words)
    np.testing.assert_array_equal(scaled.scale, 2 * expected.scale)


def test_device_put_with_a_sharding():
    sharding = jax.sharding.NamedSharding(jax.make_mesh((1,), ("n",)), jax.sharding.PartitionSpec())
    w = jax.device_put(weight(), sharding)
    assert w.words.sharding == sharding
    np.testing.assert_array_equal(matmul(normal(2, K), w), matmul(normal(2, K), weight()))


def test_export_round_trip():
    """Serialized and called again, the product gives the same bits; the number of bitlayers stays an argument."""
    x, w = normal(3, K), weight()

    def product(x, words, scale, bitlayers):
        return pbjax.matmul(x, w.replace(words=words, scale=scale, bitlayers=bitlayers), backend="xla")

    args = (x, w.words, w.scale, w.bitlayers)
    exported = jax.export.export(jax.jit(product))(*args)
    restored = jax.export.deserialize(exported.serialize())
    for b in (2, 6):
        args = (x, w.words, w.scale, jnp.int32(b))
        np.testing.assert_array_equal(restored.call(*args), matmul(x, w, bitlayers=b))
