"""`pbjax.nnx.quantize`: whole NNX models on bitlayers, and NNX modules under `pbjax.quantized`."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import pbjax
from tests.flax_layers import TOKENS, X, assert_same, call, tensors_of

pytestmark = pytest.mark.usefixtures("reference_backend")


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
