"""What Flax does around a Linen layer's call, under `pbjax.quantized`."""

from __future__ import annotations

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import pbjax
from tests import cases
from tests.flax_layers import KEY, TOKENS, X, assert_same, rules_of, tensors_of

pytestmark = pytest.mark.usefixtures("reference_backend")


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

        variables = cases.jit_once(model(nn).init)({"params": KEY, "dropout": KEY}, X)
        rngs = {"params": KEY, "dropout": make_key(1)}
        apply = functools.partial(model(nn).apply, rngs=rngs)
        qvariables = pbjax.quantize(variables, 8, fn=apply, args=(X,))
        ours, flaxs, others = cases.jit_once(
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
        variables, ours_too = cases.jit_once(lambda keys: (flaxs.init(keys, X), ours.init(keys, X)))(
            {"params": KEY, **rngs}
        )
        assert_same(variables, ours_too)
        float_apply = functools.partial(flaxs.apply, rngs=rngs)
        qvariables = pbjax.quantize(variables, 8, fn=float_apply, args=(X,), activation_bits=24)
        assert len(tensors_of(qvariables)) == 4
        y = cases.jit_once(functools.partial(ours.apply, rngs=rngs))(qvariables, X)
        expected = cases.jit_once(pbjax.quantized(float_apply))(qvariables, X)
        if transform == "vmap":  # one product of three layers, or three products
            np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
        else:
            np.testing.assert_array_equal(y, expected)
        on_floats = cases.jit_once(float_apply)(pbjax.dequantize(qvariables), X)
        np.testing.assert_allclose(y, on_floats, rtol=1e-3, atol=1e-4)

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
