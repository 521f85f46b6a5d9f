"""`pbjax.linen` and `pbjax.nnx`: Flax's layers, with float kernels or BitTensors, and whole NNX models on bitlayers."""

from __future__ import annotations

import functools
import inspect
import linecache
import pickle
import warnings

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import pbjax

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (4, 5, 32))
IMAGE = jax.random.normal(KEY, (2, 5, 4, 3))
TOKENS = jnp.arange(6).reshape(2, 3)
CARRY = (X[:, 0], X[:, 1])

# name, arguments of the constructor, arguments of a call
LINEN = [
    ("Dense", dict(features=7), (X,)),
    ("Dense", dict(features=7, use_bias=False, dtype=jnp.bfloat16), (X,)),
    ("DenseGeneral", dict(features=(3, 4), axis=(-2, -1)), (X,)),
    ("DenseGeneral", dict(features=6, axis=-1, batch_dims=(0,)), (X,)),
    ("Einsum", dict(shape=(32, 3, 5), einsum_str="bti,ihd->bthd"), (X,)),
    ("Conv", dict(features=6, kernel_size=(3, 3)), (IMAGE,)),
    ("ConvLocal", dict(features=6, kernel_size=(2, 3)), (IMAGE,)),
    ("ConvTranspose", dict(features=6, kernel_size=(3, 3), strides=(2, 2)), (IMAGE,)),
    ("Embed", dict(num_embeddings=20, features=8), (TOKENS,)),
    ("SimpleCell", dict(features=32), (X[:, 0], X[:, 1])),
    ("LSTMCell", dict(features=32), (CARRY, X[:, 1])),
    ("OptimizedLSTMCell", dict(features=32), (CARRY, X[:, 1])),
    ("GRUCell", dict(features=32), (X[:, 0], X[:, 1])),
    ("MGUCell", dict(features=32), (X[:, 0], X[:, 1])),
    ("ConvLSTMCell", dict(features=3, kernel_size=(3, 3)), ((IMAGE, IMAGE), IMAGE)),
    ("MultiHeadDotProductAttention", dict(num_heads=4), (X,)),
    ("MultiHeadAttention", dict(num_heads=4), (X,)),
]
NNX = [
    ("Linear", dict(in_features=32, out_features=7), (X,)),
    ("Linear", dict(in_features=32, out_features=7, use_bias=False, dtype=jnp.bfloat16), (X,)),
    ("LinearGeneral", dict(in_features=(5, 32), out_features=(3, 4), axis=(-2, -1)), (X,)),
    ("LinearGeneral", dict(in_features=32, out_features=6, axis=-1, batch_axis={0: 4}), (X,)),
    ("Einsum", dict(einsum_str="bti,ihd->bthd", kernel_shape=(32, 3, 5)), (X,)),
    ("Einsum", dict(einsum_str="bti,tio->bto", kernel_shape=(5, 32, 3)), (X,)),
    ("Conv", dict(in_features=3, out_features=6, kernel_size=(3, 3)), (IMAGE,)),
    (
        "ConvTranspose",
        dict(in_features=3, out_features=6, kernel_size=(3, 3), strides=(2, 2), transpose_kernel=True),
        (IMAGE,),
    ),
    ("Embed", dict(num_embeddings=20, features=8), (TOKENS,)),
    ("SimpleCell", dict(in_features=32, hidden_features=32), (X[:, 0], X[:, 1])),
    ("LSTMCell", dict(in_features=32, hidden_features=32), (CARRY, X[:, 1])),
    ("OptimizedLSTMCell", dict(in_features=32, hidden_features=32), (CARRY, X[:, 1])),
    ("GRUCell", dict(in_features=32, hidden_features=32), (X[:, 0], X[:, 1])),
    ("MultiHeadAttention", dict(num_heads=4, in_features=32, decode=False), (X,)),
]
PAIRS = [
    *((getattr(pbjax.linen, name), getattr(nn, name)) for name in sorted({name for name, *_ in LINEN})),
    *((getattr(pbjax.nnx, name), getattr(nnx, name)) for name in sorted({name for name, *_ in NNX})),
]


def rules_of(name):
    """`quantize` with `fn` leaves tables alone that are only looked up."""
    return {"embedding": 8} if name == "Embed" else None


@pytest.fixture(autouse=True)
def reference():
    """Which backend multiplies makes no difference here, and the oracle compiles fastest."""
    with pbjax.use_backend("reference"):
        yield


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def tensors_of(tree):
    is_tensor = lambda leaf: isinstance(leaf, pbjax.BitTensor)  # noqa: E731
    return list(filter(is_tensor, jax.tree.leaves(tree, is_leaf=is_tensor)))


def call(module, *args):
    return module(*args)


@pytest.mark.parametrize(("name", "arguments", "args"), LINEN)
def test_linen_layer(name, arguments, args):
    layer, flax_layer = getattr(pbjax.linen, name)(**arguments), getattr(nn, name)(**arguments)
    variables = jax.jit(layer.init)(KEY, *args)
    expected = jax.eval_shape(flax_layer.init, KEY, *args)
    assert jax.tree.structure(variables) == jax.tree.structure(expected)
    qvariables = pbjax.quantize(variables, 8, fn=flax_layer.apply, args=args, rules=rules_of(name))
    prefix = pbjax.with_bitlayers(qvariables, 3)
    ours, flaxs, float_ours, float_flaxs = jax.jit(
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
    ours, flaxs = jax.jit(lambda q: (model(pbjax.linen).apply(q, X), pbjax.quantized(model(nn).apply)(q, X)))(
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


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(32, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.linear(x)))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(50, 32, rngs=rngs)
        self.first = Block(rngs)
        self.again = self.first
        self.stack = nnx.vmap(Block)(rngs.split(3))
        self.scale = nnx.Param(jnp.ones(32))
        self.calls = 0

    def __call__(self, tokens):
        self.calls += 1
        x = self.again(self.first(self.embed(tokens)))
        x = nnx.scan(nnx.remat(call), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.stack, x)
        return self.embed.attend(x * self.scale[...].reshape(1, 1, -1))


@pytest.fixture(scope="module")
def net():
    return NnxNet(nnx.Rngs(0))


class TestNnxQuantize:
    def test_the_model_keeps_its_class_and_shares_what_it_shared(self, net):
        qnet = pbjax.nnx.quantize(net, 8)
        assert type(qnet) is NnxNet
        assert type(qnet.first.linear) is pbjax.nnx.Linear
        assert qnet.first is qnet.again
        assert type(net.first.linear) is nnx.Linear  # not changed
        assert type(qnet.first.linear.kernel) is pbjax.nnx.PackedParam
        assert qnet.stack.linear.kernel.get_raw_value().stack_shape == (3,)
        assert len(tensors_of(nnx.state(qnet))) == 3

    def test_state_written_on_the_way_is_the_float_models(self, net):
        """Batch statistics, random numbers, and attributes, through jit, scan and remat."""
        qnet = pbjax.nnx.quantize(net, 8, activation_bits=24)
        graphdef, state = nnx.split(qnet)
        float_net = nnx.merge(graphdef, pbjax.dequantize(state))
        for model in (qnet, float_net):
            model.y = nnx.data(nnx.jit(call)(model, TOKENS))
        graphdef, state = nnx.split(net)
        run = lambda state, tokens: nnx.merge(graphdef, state)(tokens)  # noqa: E731
        pure = nnx.merge(graphdef, pbjax.quantize(state, 8, fn=run, args=(TOKENS,), activation_bits=24))
        pure.y = nnx.data(nnx.jit(pbjax.quantized(call))(pure, TOKENS))
        for model in (qnet, pure):
            assert model.calls == 1
            assert model.first.dropout.rngs.count[...] == float_net.first.dropout.rngs.count[...]
            np.testing.assert_allclose(model.y, float_net.y, rtol=1e-3, atol=1e-4)
            for part in ("first", "stack"):
                actual, expected = (getattr(m, part).norm.var[...] for m in (model, float_net))
                np.testing.assert_allclose(actual, expected, rtol=1e-4)
                assert (actual != 1).all()

    def test_transforms_and_precision(self, net):
        qnet = pbjax.nnx.quantize(nnx.clone(net), 8)
        qnet.eval()
        graphdef, packed, rest = nnx.split(qnet, pbjax.nnx.PackedParam, ...)
        assert len(tensors_of(packed)) == 3
        at = jax.jit(lambda packed, rest, b: nnx.merge(graphdef, pbjax.with_bitlayers(packed, b), rest)(TOKENS))
        curve = jax.vmap(at, in_axes=(None, None, 0))(packed, rest, jnp.array([8, 2]))
        np.testing.assert_allclose(curve[0], nnx.jit(call)(qnet, TOKENS), rtol=1e-4, atol=1e-4)
        assert jnp.abs(curve[0] - curve[1]).max() > 1e-2
        # From outside of a trace, as NNX allows it where nothing is written.
        linear = qnet.first.linear
        np.testing.assert_array_equal(jax.jit(lambda x: linear(x))(X), linear(X))

    def test_optimizers_leave_packed_weights_alone(self, net):
        qnet = pbjax.nnx.quantize(nnx.clone(net), 8)
        qnet.eval()
        optimizer = nnx.Optimizer(qnet, optax.sgd(0.1), wrt=nnx.Param)
        before = jax.tree.map(jnp.copy, tensors_of(nnx.state(qnet)))

        @nnx.jit
        def step(model, optimizer):
            gradients = nnx.grad(lambda model: jnp.mean(jnp.square(model(TOKENS))))(model)
            optimizer.update(model, gradients)

        step(qnet, optimizer)
        assert_same(tensors_of(nnx.state(qnet)), before)
        assert (qnet.scale[...] != 1).any()

    def test_rules_and_ensembles(self, net):
        rules = {"embed": None, "stack/linear": pbjax.Spec(bits=3, activation_bits=None)}
        qnet = pbjax.nnx.quantize(net, 8, rules=rules)
        assert [(t.bits, t.activation_bits) for t in tensors_of(nnx.state(qnet))] == [(8, 16), (3, None)]
        assert type(qnet.embed.embedding) is nnx.Param
        ensemble = pbjax.nnx.quantize(nnx.vmap(lambda r: nnx.Linear(32, 7, rngs=r))(nnx.Rngs(0).split(2)), 8)
        y = nnx.vmap(call, in_axes=(0, None))(ensemble, X[0])
        for i in range(2):
            one = jax.tree.map(lambda leaf, i=i: leaf[i], nnx.state(ensemble))
            member = nnx.merge(nnx.graphdef(ensemble), one)
            np.testing.assert_array_equal(y[i], member(X[0]))

    def test_sown_values_and_returned_modules_are_the_callers(self):
        class Sower(nnx.Module):
            def __init__(self):
                self.linear = nnx.Linear(32, 4, rngs=nnx.Rngs(0))

            def __call__(self, x):
                self.sow(nnx.Intermediate, "seen", x)
                return self.linear(x)

        model = pbjax.quantize(Sower(), 8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of `sow`, in newer versions of Flax
            same, y = pbjax.quantized(lambda model, x: (model, model(x)))(model, X)
        assert same is model
        assert y.shape == (4, 5, 4)
        np.testing.assert_array_equal(model.seen.get_raw_value()[0], X)

    def test_refuses(self):
        with pytest.raises(TypeError, match="`model` must be an NNX module, but got dict"):
            pbjax.nnx.quantize({"kernel": jnp.ones((2, 2))}, 8)
        with pytest.raises(ValueError, match="pattern 'bias' matches none of kernel"):
            pbjax.nnx.quantize(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), 8, rules={"bias": 4})
        with pytest.raises(ValueError, match="`model` must have a layer to put on bitlayers, but got none of Conv, "):
            pbjax.nnx.quantize(nnx.BatchNorm(4, rngs=nnx.Rngs(0)), 8)
        linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        linear.kernel[...] = jnp.full((2, 2), jnp.nan)
        with pytest.raises(ValueError, match="finite, but layers/0/kernel holds a NaN"):
            pbjax.nnx.quantize(nnx.Sequential(linear), 8)

        def grow(model, x):
            model.more = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
            return model(x)

        with pytest.raises(ValueError, match=r"must not give a module new modules, but got Linear at more"):
            pbjax.quantized(grow)(pbjax.quantize(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), 8), jnp.ones((1, 2)))


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


class PlusOne(pbjax.linen.Dense):
    @nn.compact
    def __call__(self, inputs):
        return super().__call__(inputs) + 1

    def raw(self, inputs):
        return super().__call__(inputs)


class Parent(nn.Module):
    layer: nn.Module

    def __call__(self, x):
        return self.layer(x)


class NotAlone(nn.Module):
    """A layer under a name of its own, between random numbers that its parent draws."""

    layer: nn.Module

    def __call__(self, x):
        drawn = jax.random.uniform(self.make_rng("dropout"))
        return self.layer(self.layer(x)) * drawn + jax.random.uniform(self.make_rng("dropout"))


class Mixing(nn.Module):
    """An `attention_fn` with weights and random numbers of its own."""

    dense: type[nn.Module]

    @nn.compact
    def __call__(self, query, key, value, **kwargs):
        query = nn.Dropout(0.5, deterministic=False)(self.dense(8)(query))
        self.sow("intermediates", "query", query)
        return nn.dot_product_attention(query, key, value, **kwargs)


class InALoop(nn.Module):
    attention: type[nn.Module]
    transform: str

    @nn.compact
    def __call__(self, x):
        make = lambda: self.attention(4, dropout_rate=0.5, deterministic=False, name="layer")  # noqa: E731
        kwargs = dict(variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True})
        if self.transform == "scan":
            body = lambda layer, x, _: (layer(x), None)  # noqa: E731
            return nn.scan(body, length=3, **kwargs)(make(), x, None)[0]
        if self.transform == "vmap":
            return nn.vmap(lambda layer, x: layer(x), **kwargs)(make(), jnp.stack([x, x + 1, x + 2]))
        return nn.remat(lambda layer, x: layer(x))(make(), x)


class TestLinenLayerIsFlaxsUnderQuantized:
    """Everything that Flax does around a layer's call happens as it does around its own layer."""

    def test_a_subclass_runs_the_method_that_it_calls(self):
        layer, flax_layer = PlusOne(7), nn.Dense(7)
        qvariables = pbjax.quantize(layer.init(KEY, X), 8)
        expected = pbjax.quantized(flax_layer.apply)(qvariables, X)
        np.testing.assert_array_equal(layer.apply(qvariables, X, method="raw"), expected)
        np.testing.assert_array_equal(layer.apply(qvariables, X, method=PlusOne.raw), expected)
        np.testing.assert_array_equal(layer.apply(qvariables, X), pbjax.quantized(lambda y: y + 1)(expected))

    @pytest.mark.parametrize("on_bitlayers", [False, True])
    @pytest.mark.parametrize(
        ("name", "arguments", "x", "num_calls"),
        [("MultiHeadAttention", dict(num_heads=4), X, 5), ("Embed", dict(num_embeddings=20, features=8), TOKENS, 2)],
    )
    def test_interceptors_see_each_call_once(self, name, arguments, x, num_calls, on_bitlayers):
        def double(method, args, kwargs, context):
            calls.append((context.module.path, context.method_name))
            result = method(*args, **kwargs)
            return result if context.method_name == "setup" else 2 * result

        seen = []
        for library in (pbjax.linen, nn):
            model, calls = Parent(getattr(library, name)(**arguments)), []
            variables, apply = model.init(KEY, x), model.apply
            if on_bitlayers:
                variables = pbjax.quantize(variables, 8, fn=apply, args=(x,), rules=rules_of(name))
                apply = apply if library is pbjax.linen else pbjax.quantized(apply)
            calls.clear()
            with nn.intercept_methods(double):
                seen.append((apply(variables, x), calls))
        (ours, our_calls), (flaxs, flax_calls) = seen
        assert our_calls == flax_calls
        assert len(our_calls) == 1 + num_calls
        np.testing.assert_array_equal(ours, flaxs)

    @pytest.mark.parametrize(("inside", "make_key"), [(False, jax.random.PRNGKey), (True, jax.random.key)])
    @pytest.mark.parametrize("broadcast_dropout", [False, True])
    def test_dropout_draws_the_same_mask(self, broadcast_dropout, inside, make_key):
        def model(library):
            layer = library.MultiHeadAttention(
                4, dropout_rate=0.5, deterministic=False, broadcast_dropout=broadcast_dropout
            )
            return NotAlone(layer) if inside else layer

        variables = model(nn).init({"params": KEY, "dropout": KEY}, X)
        rngs = {"params": KEY, "dropout": make_key(1)}
        apply = functools.partial(model(nn).apply, rngs=rngs)
        qvariables = pbjax.quantize(variables, 8, fn=apply, args=(X,))
        ours, flaxs, others = jax.jit(
            lambda q: (
                model(pbjax.linen).apply(q, X, rngs=rngs),
                pbjax.quantized(apply)(q, X),
                model(pbjax.linen).apply(q, X, rngs={"dropout": make_key(2)}),
            )
        )(qvariables)
        np.testing.assert_array_equal(ours, flaxs)
        assert (ours != others).any()

    @pytest.mark.parametrize("transform", ["scan", "vmap", "remat"])
    def test_dropout_under_lifted_transforms(self, transform):
        ours, flaxs = (InALoop(library.MultiHeadAttention, transform) for library in (pbjax.linen, nn))
        rngs = {"dropout": KEY}
        variables = flaxs.init({"params": KEY, **rngs}, X)
        assert_same(variables, ours.init({"params": KEY, **rngs}, X))
        float_apply = functools.partial(flaxs.apply, rngs=rngs)
        qvariables = pbjax.quantize(variables, 8, fn=float_apply, args=(X,), activation_bits=24)
        assert len(tensors_of(qvariables)) == 4
        y = jax.jit(functools.partial(ours.apply, rngs=rngs))(qvariables, X)
        expected = jax.jit(pbjax.quantized(float_apply))(qvariables, X)
        if transform == "vmap":  # one product of three layers, or three products
            np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
        else:
            np.testing.assert_array_equal(y, expected)
        np.testing.assert_allclose(y, float_apply(pbjax.dequantize(qvariables), X), rtol=1e-3, atol=1e-4)

    def test_intermediates_of_submodules_are_captured(self):
        layer, flax_layer = (library.MultiHeadAttention(num_heads=4) for library in (pbjax.linen, nn))
        variables = layer.init(KEY, X)
        qvariables = pbjax.quantize(variables, 8, fn=layer.apply, args=(X,))
        ours, flaxs, float_ours, float_flaxs = jax.jit(
            lambda q, v: (
                layer.apply(q, X, capture_intermediates=True),
                pbjax.quantized(flax_layer.apply)(q, X, capture_intermediates=True, mutable=["intermediates"]),
                layer.apply(v, X, capture_intermediates=True),
                flax_layer.apply(v, X, capture_intermediates=True, mutable=["intermediates"]),
            )
        )(qvariables, variables)
        assert set(ours[1]["intermediates"]) == {"__call__", "query", "key", "value", "out"}
        for actual, expected in ((ours, flaxs), (float_ours, float_flaxs)):
            assert_same(actual[0], expected[0])
            assert_same(actual[1]["intermediates"], expected[1]["intermediates"])

    def test_a_module_among_the_attributes_is_called_as_flax_calls_it(self):
        ours, flaxs = (
            Parent(library.MultiHeadAttention(num_heads=4, attention_fn=Mixing(library.Dense)))
            for library in (pbjax.linen, nn)
        )
        params = flaxs.init({"params": KEY, "dropout": KEY}, X)["params"]
        keywords = dict(rngs={"dropout": KEY}, mutable=["intermediates"])
        apply = functools.partial(flaxs.apply, **keywords)
        qvariables = pbjax.quantize({"params": params}, 8, fn=apply, args=(X,))
        assert len(tensors_of(qvariables)) == 5
        actual, expected = jax.jit(lambda q: (ours.apply(q, X, **keywords), pbjax.quantized(apply)(q, X)))(qvariables)
        assert_same(actual, expected)

    def test_outside_of_apply_it_says_what_flax_says(self):
        with pytest.raises(flax.errors.CallCompactUnboundModuleError):
            pbjax.linen.Dense(3)(X)


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
            nnx.jit(call)(layer, IMAGE)
        message, line = self.only(caught)
        assert line == "return module(*args)"
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
