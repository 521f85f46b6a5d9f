"""`pbjax.sweep`: what a loop over numbers of bitlayers gives, for every kind of tree, compiled once."""

from __future__ import annotations

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pbjax
from tests import models
from tests.cases import normal

MODELS = {model.name: model for model in models.models()}
X = normal(3, 40, seed=1)
QPARAMS = pbjax.quantize({"kernel": normal(40, 6), "bias": jnp.ones(6)}, 8)


def outputs(qparams):
    return {"y": pbjax.matmul(X, qparams["kernel"]) + qparams["bias"][None]}


@pytest.mark.parametrize("name", ["mlp", "tied_embedding", "scanned_blocks", "nnx_mlp"])
def test_equals_a_loop(name):
    model = MODELS[name]
    qparams = pbjax.quantize(model.params, 8, fn=model.fn, args=model.args)
    fn = pbjax.quantized(model.fn)
    metric = lambda qparams: fn(qparams, *model.args)  # noqa: E731
    one = jax.jit(metric)
    swept = pbjax.sweep(metric, qparams, [8, 1, 3])
    for b, y in zip([8, 1, 3], swept, strict=True):
        np.testing.assert_allclose(y, one(pbjax.with_bitlayers(qparams, b)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("batch_size", [None, 1, 3, 8, 20])
def test_chunks_change_nothing(batch_size):
    y = pbjax.sweep(outputs, QPARAMS, batch_size=batch_size)["y"]
    loop = [outputs(pbjax.with_bitlayers(QPARAMS, b))["y"] for b in range(1, 9)]
    np.testing.assert_array_equal(y, jnp.stack(loop))


def test_compiles_once():
    traces = []

    def metric(qparams):
        traces.append(None)
        return outputs(qparams)["y"].sum()

    first = pbjax.sweep(metric, QPARAMS, batch_size=3)
    num = len(traces)
    other = jax.tree.map(lambda leaf: leaf * 2 if leaf.dtype == jnp.float32 else leaf, QPARAMS)
    second = pbjax.sweep(metric, other, [3, 2, 1, 5], batch_size=3)
    assert len(traces) == num
    np.testing.assert_allclose(second[0], 2 * first[2], rtol=1e-6)


def test_modules_that_write_into_themselves_stay_as_they_are():
    class Counting(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(40, 4, rngs=nnx.Rngs(0))
            self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32))

        def __call__(self, x):
            self.calls[...] += 1
            return self.layer(x)

    model = pbjax.nnx.quantize(Counting(), 4)
    y = pbjax.sweep(lambda model: model(X), model, [2, 4])
    np.testing.assert_array_equal(y[1], model(X))
    assert int(model.calls[...]) == 1  # of the call above


def test_leaves_that_are_no_arrays():
    layer = equinox.nn.MLP(40, 3, 16, 1, key=jax.random.key(0))  # holds its activation as a leaf
    qlayer = pbjax.quantize(layer, 4, rules={"weight": pbjax.Spec(contract=(1,))})
    apply = pbjax.quantized(lambda layer, x: jax.vmap(layer)(x))
    assert pbjax.sweep(lambda qlayer: apply(qlayer, X), qlayer, [1, 4]).shape == (2, 3, 3)


@pytest.mark.parametrize("values", [(1, 1.0, True), (0.0, -0.0)])
def test_numbers_that_python_calls_equal_are_not(values):
    def metric(qparams):
        return jnp.float32(1) / (float(qparams["number"]) + isinstance(qparams["number"], (bool, float)))

    for value in values:
        np.testing.assert_array_equal(
            pbjax.sweep(metric, {**QPARAMS, "number": value}, [1])[0], metric({"number": value})
        )


def test_inside_of_jit():
    def product(qparams):  # alone, since a compiler may round the addition of a bias with it
        return pbjax.matmul(X, qparams["kernel"])

    y = jax.jit(lambda counts: pbjax.sweep(product, QPARAMS, counts, batch_size=2))(jnp.array([1, 9]))
    np.testing.assert_array_equal(y[0], product(pbjax.with_bitlayers(QPARAMS, 1)))
    np.testing.assert_array_equal(y[1], product(QPARAMS))  # clipped to 8, as `with_bitlayers` does


class Unhashable:
    __hash__ = None

    def __call__(self, qparams):
        return 0.0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: pbjax.sweep(outputs, QPARAMS, range(1, 10)),
            ValueError,
            r"`bitlayers` must lie in 1\.\.8, the bitlayers stored, but got .* \(kernel\)\. Use fewer, or quantize",
        ),
        (lambda: pbjax.sweep(outputs, QPARAMS, [0, 1]), ValueError, r"`bitlayers` must lie in 1\.\.8"),
        (
            lambda: pbjax.sweep(outputs, QPARAMS, [1.5]),
            TypeError,
            r"`bitlayers` must be an integer or an integer array",
        ),
        (lambda: pbjax.sweep(outputs, QPARAMS, []), ValueError, r"`bitlayers` must be one or more numbers in a row"),
        (lambda: pbjax.sweep(outputs, QPARAMS, 4), ValueError, r"but got 4 \(argument of sweep\)\. For one number"),
        (lambda: pbjax.sweep(outputs, QPARAMS, [[1]]), ValueError, r"must be one or more numbers in a row, but got"),
        (lambda: pbjax.sweep(outputs, {"kernel": X}), ValueError, r"`tree` must hold BitTensors, but it has none"),
        (
            lambda: pbjax.sweep(None, QPARAMS),
            TypeError,
            r"`metric` must be a function, but got None \(argument of sweep",
        ),
        (
            lambda: pbjax.sweep(Unhashable(), QPARAMS),
            TypeError,
            r"`metric` must have a hash, but got Unhashable \(argument of sweep\)\. Wrap it in a function\.",
        ),
        (
            lambda: pbjax.sweep(outputs, QPARAMS, batch_size=0),
            ValueError,
            r"`batch_size` must be at least 1, but got 0 \(argument of sweep\)",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
