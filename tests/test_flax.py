"""`pbjax.linen` and `pbjax.nnx`: Flax's layers, with a float kernel or a BitTensor."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import pbjax

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (4, 5, 32))

LINEN = [
    ("Dense", dict(features=7)),
    ("Dense", dict(features=7, use_bias=False, dtype=jnp.bfloat16)),
    ("DenseGeneral", dict(features=(3, 4), axis=(-2, -1))),
    ("DenseGeneral", dict(features=6, axis=-1, batch_dims=(0,))),
]
NNX = [
    ("Linear", (32, 7), {}),
    ("Linear", (32, 7), dict(use_bias=False, dtype=jnp.bfloat16)),
    ("LinearGeneral", ((5, 32), (3, 4)), dict(axis=(-2, -1))),
    ("LinearGeneral", (32, 6), dict(axis=-1, batch_axis={0: 4})),
]


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize(("name", "arguments"), LINEN)
def test_linen_layer(name, arguments):
    layer, flax_layer = getattr(pbjax.linen, name)(**arguments), getattr(nn, name)(**arguments)
    variables = layer.init(KEY, X)
    assert_same(variables, flax_layer.init(KEY, X))
    assert_same(layer.apply(variables, X), flax_layer.apply(variables, X))
    qvariables = pbjax.quantize(variables, 8, fn=flax_layer.apply, args=(X,))
    for bitlayers in (8, 3):
        prefix = pbjax.with_bitlayers(qvariables, bitlayers)
        expected = jax.jit(pbjax.quantized(flax_layer.apply))(prefix, X)
        assert_same(jax.jit(layer.apply)(prefix, X), expected)
        assert_same(layer.apply(prefix, X), expected)


@pytest.mark.parametrize(("name", "positional", "arguments"), NNX)
def test_nnx_layer(name, positional, arguments):
    layer = getattr(pbjax.nnx, name)(*positional, **arguments, rngs=nnx.Rngs(0))
    flax_layer = getattr(nnx, name)(*positional, **arguments, rngs=nnx.Rngs(0))
    assert_same(nnx.to_pure_dict(nnx.state(layer)), nnx.to_pure_dict(nnx.state(flax_layer)))
    assert_same(layer(X), flax_layer(X))
    call = lambda layer, x: layer(x)  # noqa: E731
    qlayer, qflax_layer = (pbjax.quantize(each, 8, fn=call, args=(X,)) for each in (layer, flax_layer))
    assert type(qlayer) is type(layer)
    expected = jax.jit(pbjax.quantized(call))(qflax_layer, X)
    assert_same(nnx.jit(call)(qlayer, X), expected)
    assert_same(qlayer(X), expected)


@pytest.mark.parametrize(
    ("ours", "flaxs"),
    [
        (pbjax.linen.Dense, nn.Dense),
        (pbjax.linen.DenseGeneral, nn.DenseGeneral),
        (pbjax.nnx.Linear, nnx.Linear),
        (pbjax.nnx.LinearGeneral, nnx.LinearGeneral),
    ],
)
def test_same_constructor(ours, flaxs):
    assert ours.__name__ == flaxs.__name__
    assert list(inspect.signature(ours.__init__).parameters) == list(inspect.signature(flaxs.__init__).parameters)


class Net(nn.Module):
    dense: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        x = nn.relu(self.dense(16)(x))
        self.sow("intermediates", "hidden", x)
        return self.dense(3, name="head")(x)


def test_linen_layers_inside_a_model():
    """The layers have Flax's automatic names, so parameters of a Flax model fit; sow and vmap over bitlayers work."""
    ours, flaxs = Net(pbjax.linen.Dense), Net(nn.Dense)
    variables = flaxs.init(KEY, X)
    variables = {"params": variables["params"]}
    assert_same({"params": ours.init(KEY, X)["params"]}, variables)
    qvariables = pbjax.quantize(variables, 8)
    y, state = ours.apply(qvariables, X, mutable=["intermediates"])
    assert state["intermediates"]["hidden"][0].shape == (4, 5, 16)
    np.testing.assert_array_equal(y, pbjax.quantized(flaxs.apply)(qvariables, X))

    @jax.jit
    def at(b):
        return ours.apply(pbjax.with_bitlayers(qvariables, b), X)

    counts = jnp.arange(1, 9)
    np.testing.assert_allclose(jax.vmap(at)(counts), jnp.stack([at(b) for b in counts]), rtol=1e-4, atol=1e-5)


def test_linen_layer_is_trainable_before_it_is_quantized():
    layer = pbjax.linen.Dense(3)
    variables = layer.init(KEY, X)
    gradient = jax.grad(lambda v: jnp.sum(jnp.square(layer.apply(v, X))))(variables)
    expected = jax.grad(lambda v: jnp.sum(jnp.square(nn.Dense(3).apply(v, X))))(variables)
    assert_same(gradient, expected)


def test_partitioned_kernels_keep_their_box():
    layer = pbjax.linen.Dense(8, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model")))
    variables = layer.init(KEY, X)
    qvariables = pbjax.quantize(variables, 8, rules={"kernel": 8})
    assert isinstance(qvariables["params"]["kernel"], nn.Partitioned)
    unboxed = pbjax.quantize(nn.meta.unbox(variables), 8)
    np.testing.assert_array_equal(layer.apply(qvariables, X), layer.apply(unboxed, X))
