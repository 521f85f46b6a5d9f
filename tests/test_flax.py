"""`pbjax.linen` and `pbjax.nnx`: Flax's layers, with float kernels or BitTensors."""

from __future__ import annotations

import inspect
import linecache
import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import pbjax
from tests import cases
from tests.flax_layers import IMAGE, KEY, LINEN, NNX, TOKENS, X, assert_same, call, rules_of, tensors_of

PAIRS = [
    *((getattr(pbjax.linen, name), getattr(nn, name)) for name in sorted({name for name, *_ in LINEN})),
    *((getattr(pbjax.nnx, name), getattr(nnx, name)) for name in sorted({name for name, *_ in NNX})),
]

pytestmark = pytest.mark.usefixtures("reference_backend")


@pytest.mark.parametrize(("name", "arguments", "args"), LINEN)
def test_linen_layer(name, arguments, args):
    layer, flax_layer = getattr(pbjax.linen, name)(**arguments), getattr(nn, name)(**arguments)
    variables = cases.jit_once(layer.init)(KEY, *args)
    expected = jax.eval_shape(flax_layer.init, KEY, *args)
    assert jax.tree.structure(variables) == jax.tree.structure(expected)
    qvariables = pbjax.quantize(variables, 8, fn=flax_layer.apply, args=args, rules=rules_of(name))
    prefix = pbjax.with_bitlayers(qvariables, 3)
    ours, flaxs, float_ours, float_flaxs = cases.jit_once(
        lambda q, v, *args: (
            layer.apply(q, *args),
            pbjax.quantized(flax_layer.apply)(q, *args),
            layer.apply(v, *args),
            flax_layer.apply(v, *args),
        )
    )(prefix, variables, *args)
    assert_same(ours, flaxs)
    assert_same(float_ours, float_flaxs)


@pytest.mark.parametrize(("name", "arguments", "args"), NNX)
def test_nnx_layer(name, arguments, args):
    layer = getattr(pbjax.nnx, name)(**arguments, rngs=nnx.Rngs(0))
    flax_layer = getattr(nnx, name)(**arguments, rngs=nnx.Rngs(0))
    assert_same(nnx.to_pure_dict(nnx.state(layer)), nnx.to_pure_dict(nnx.state(flax_layer)))
    qlayer, qflax_layer = (pbjax.nnx.quantize(each, 8) for each in (layer, flax_layer))
    assert type(qlayer) is type(qflax_layer) is type(layer)
    traced = pbjax.quantize(flax_layer, 8, fn=call, args=args, rules=rules_of(name))  # packs for what it sees
    assert_same(tensors_of(qflax_layer), tensors_of(traced))
    ours, replaced, flaxs, float_ours, float_flaxs = nnx.jit(
        lambda *layers: tuple((call if i != 2 else pbjax.quantized(call))(each, *args) for i, each in enumerate(layers))
    )(qlayer, qflax_layer, traced, layer, flax_layer)
    assert_same(ours, flaxs)
    assert_same(replaced, flaxs)
    assert_same(float_ours, float_flaxs)


@pytest.mark.parametrize(("ours", "flaxs"), PAIRS)
def test_same_name_and_constructor_and_picklable(ours, flaxs):
    assert ours.__name__ == flaxs.__name__
    assert inspect.signature(ours.__init__) == inspect.signature(flaxs.__init__)
    assert inspect.signature(ours.__call__) == inspect.signature(flaxs.__call__)
    assert ours.__doc__ != flaxs.__doc__
    assert pickle.loads(pickle.dumps(ours)) is ours


def test_every_layer_is_tested():
    public = set(pbjax.linen.__all__) | (set(pbjax.nnx.__all__) - {"quantize", "PackedParam"})
    assert {ours.__name__ for ours, _ in PAIRS} == public


@pytest.mark.parametrize("kind", ["rnn", "bidirectional"])
@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell"])
def test_linen_cells_under_rnn(cell, kind):
    def model(library):
        rnn = lambda: nn.RNN(getattr(library, cell)(8))  # noqa: E731
        return rnn() if kind == "rnn" else nn.Bidirectional(rnn(), rnn())

    variables = model(nn).init(KEY, X)
    assert jax.tree.structure(variables) == jax.tree.structure(model(pbjax.linen).init(KEY, X))
    qvariables = pbjax.quantize(variables, 8)
    ours, flaxs = cases.jit_once(lambda q: (model(pbjax.linen).apply(q, X), pbjax.quantized(model(nn).apply)(q, X)))(
        qvariables
    )
    assert_same(ours, flaxs)


def test_linen_attention_with_a_cache():
    """What a layer writes into its variables arrives there, one token after the other."""
    layer, flax_layer = (
        library.MultiHeadDotProductAttention(num_heads=4, decode=True) for library in (pbjax.linen, nn)
    )
    variables = layer.init(KEY, X)
    cached = lambda params, x: layer.apply({**variables, "params": params}, x, mutable=["cache"])  # noqa: E731
    params = pbjax.quantize(variables["params"], 8, fn=cached, args=(X[:, :1],))

    def tokens(apply):
        cache, outputs = variables["cache"], []
        for i in range(3):
            y, state = apply({"params": params, "cache": cache}, X[:, i : i + 1], mutable=["cache"])
            cache, outputs = state["cache"], [*outputs, y]
        return outputs, cache

    ours, flaxs = jax.jit(lambda: (tokens(layer.apply), tokens(pbjax.quantized(flax_layer.apply))))()
    assert_same(ours, flaxs)
    assert ours[1]["cache_index"] == 3


def test_linen_embed_attends_with_the_table_that_it_looks_up():
    layer, flax_layer = pbjax.linen.Embed(20, 32), nn.Embed(20, 32)
    variables = layer.init(KEY, TOKENS)
    qvariables = pbjax.quantize(variables, 8, fn=lambda v, x: layer.apply(v, x, method="attend"), args=(X,))
    ours = layer.apply(qvariables, X, method="attend")
    np.testing.assert_array_equal(ours, pbjax.quantized(flax_layer.apply)(qvariables, X, method=nn.Embed.attend))
    np.testing.assert_array_equal(
        layer.apply(qvariables, TOKENS), pbjax.dequantize(qvariables)["params"]["embedding"][TOKENS]
    )


def test_table_in_the_documentation_is_current():
    from tests import layer_table

    assert layer_table.FILE.read_text() == layer_table.table()


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


class Masked(nn.Module):
    def setup(self):
        self.c0 = pbjax.linen.Conv(6, (3, 3), mask=jnp.ones((3, 3, 3, 6)))

    def __call__(self, x):
        return self.c0(x)  # the line of the warning


class TestDequantizedWarning:
    """It names the weight as the tree does, at the line that called the layer, and advises only what can help."""

    @staticmethod
    def only(caught):
        (warning,) = [each for each in caught if each.category is pbjax.DequantizedWarning]
        assert warning.filename == __file__
        return str(warning.message), linecache.getline(warning.filename, warning.lineno).strip()

    def test_linen(self):
        model = Masked()
        qvariables = pbjax.quantize(model.init(KEY, IMAGE), 8)
        with pytest.warns(pbjax.DequantizedWarning) as caught:
            jax.jit(model.apply)(qvariables, IMAGE)
        message, line = self.only(caught)
        assert line == "return self.c0(x)  # the line of the warning"
        assert message == (
            "Conv runs these weights as floats, because the operation in brackets has no form on bitlayers: "
            "params/c0/kernel (mul)."
        )

    def test_linen_at_the_root_and_packed_for_another_use(self):
        layer = pbjax.linen.DenseGeneral((3, 4), axis=-1)
        qvariables = pbjax.quantize(layer.init(KEY, X), 8)  # as if the last axis alone were the output
        with pytest.warns(pbjax.DequantizedWarning) as caught:
            jax.jit(lambda q: layer.apply(q, X))(qvariables)
        message, line = self.only(caught)
        assert line.startswith("jax.jit(lambda q: layer.apply")
        assert "at least not as the weight is packed: params/kernel (" in message
        assert message.endswith("`pbjax.quantize` with `fn` and `args` packs each weight for its use.")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layer.apply(pbjax.quantize(layer.init(KEY, X), 8, fn=layer.apply, args=(X,)), X)

    def test_nnx(self):
        layer = pbjax.nnx.Conv(3, 6, (3, 3), mask=jnp.ones((3, 3, 3, 6)), rngs=nnx.Rngs(0))
        layer = pbjax.quantize(layer, 8)
        with pytest.warns(pbjax.DequantizedWarning) as caught:
            nnx.jit(lambda layer: layer(IMAGE))(layer)
        message, line = self.only(caught)
        assert line == "nnx.jit(lambda layer: layer(IMAGE))(layer)"
        assert message == (
            "Conv runs these weights as floats, because the operation in brackets has no form on bitlayers: "
            "kernel (mul)."
        )

    def test_quantized(self):
        apply = jax.jit(pbjax.quantized(lambda w, x: x @ jnp.sin(w)))
        weight = pbjax.quantize({"w": jnp.eye(32)}, 8, rules={"w": 8})["w"]
        with pytest.warns(pbjax.DequantizedWarning, match=r"<lambda> runs .*\(sin\)\.$") as caught:
            apply(weight, X)
        assert self.only(caught)[1] == "apply(weight, X)"
