"""`pbjax.quantized`: unmodified functions give on BitTensors what they give on the dequantized weights."""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pbjax
from tests.cases import normal
from tests.models import MLP, Model, NnxMLP, models

MODELS = {model.name: model for model in models()}
FOLLOWED = [name for name, model in MODELS.items() if not model.as_floats]


@pytest.fixture(params=MODELS)
def model(request) -> Model:
    return MODELS[request.param]


def run_quietly(apply, *args):
    """Runs a function of which it is known that it unpacks weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pbjax.DequantizedWarning)
        return apply(*args)


def assert_trees_close(actual, expected, relative):
    """Every leaf within `relative` of the expected leaf's largest magnitude; NaN is never close."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(a).all()
        assert np.abs(a - b).max() <= relative * np.abs(b).max()


def tensors_of(tree):
    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_tensor) if is_tensor(leaf)]


def is_tensor(leaf):
    return isinstance(leaf, pbjax.BitTensor)


def test_equals_the_dequantized_model(model):
    # 24-bit activations: what is left is float32 rounding, bfloat16 rounding in the mixed-precision model.
    qparams = pbjax.quantize(model.params, 8, fn=model.fn, args=model.args, activation_bits=24)
    apply, fn = jax.jit(pbjax.quantized(model.fn)), jax.jit(model.fn)
    for bitlayers in (3, 8):
        used = pbjax.with_bitlayers(qparams, bitlayers)
        expected = fn(pbjax.dequantize(used), *model.args)
        actual = run_quietly(apply, used, *model.args)
        assert_trees_close(actual, expected, 2**-7 if model.name == "mixed_precision" else 1e-5)


@pytest.mark.parametrize("name", FOLLOWED)
def test_float_activations_equal_the_dequantized_model(name):
    model = MODELS[name]
    qparams = pbjax.quantize(model.params, 4, fn=model.fn, args=model.args, activation_bits=None)
    expected = jax.jit(model.fn)(pbjax.dequantize(qparams), *model.args)
    actual = jax.jit(pbjax.quantized(model.fn))(qparams, *model.args)
    assert_trees_close(actual, expected, 2**-6 if model.name == "mixed_precision" else 1e-5)


def test_weights_are_packed_for_their_use(model):
    qparams = jax.eval_shape(lambda: pbjax.quantize(model.params, 8, fn=model.fn, args=model.args))
    found = tuple((tensor.stack_shape, tensor.contract_axes) for tensor in tensors_of(qparams))
    assert found == model.layouts


def test_what_is_unpacked_is_reported(model):
    qparams = pbjax.quantize(model.params, 8, fn=model.fn, args=model.args)
    report = pbjax.report(qparams, fn=model.fn, args=model.args)
    assert tuple(name for row in report.rows for name in row.dequantized_by) == model.as_floats
    trace = functools.partial(jax.eval_shape, pbjax.quantized(model.fn), qparams, *model.args)
    if not model.as_floats:
        trace()  # warnings are errors
    else:
        with pytest.warns(
            pbjax.DequantizedWarning, match=rf"kernel \({model.as_floats[0]}\)|w \({model.as_floats[0]}\)"
        ):
            trace()


@pytest.mark.parametrize("name", ["mlp", "tied_embedding", "loop", "nnx_mlp"])
def test_shape_structs_serve_as_arguments(name):
    model = MODELS[name]
    struct = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)  # noqa: E731
    from_structs = pbjax.quantize(model.params, 8, fn=model.fn, args=struct(model.args))
    from_arrays = pbjax.quantize(model.params, 8, fn=model.fn, args=model.args)
    jax.tree.map(np.testing.assert_array_equal, from_structs, from_arrays)


@pytest.mark.parametrize("name", ["mlp", "lstm", "attention", "tied_embedding", "scanned_blocks", "fori"])
def test_jit_equals_eager(name):
    model = MODELS[name]
    qparams = pbjax.quantize(model.params, 5, fn=model.fn, args=model.args)
    apply = pbjax.quantized(model.fn)
    assert_trees_close(apply(qparams, *model.args), jax.jit(apply)(qparams, *model.args), 1e-4)


@pytest.mark.parametrize("name", ["mlp", "lstm", "tied_embedding", "scanned_blocks", "nnx_mlp", "cond"])
def test_vmap_over_bitlayers_equals_a_loop(name):
    model = MODELS[name]
    qparams = pbjax.quantize(model.params, 6, fn=model.fn, args=model.args)

    @jax.jit
    def at(bitlayers):
        return pbjax.quantized(model.fn)(pbjax.with_bitlayers(qparams, bitlayers), *model.args)

    counts = jnp.array([1, 4, 6, 2])
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[at(b) for b in counts])
    assert_trees_close(jax.vmap(at)(counts), expected, 1e-4)


def test_bitlayers_are_no_reason_to_compile():
    model = MODELS["lstm"]
    qparams = pbjax.quantize(model.params, 8, fn=model.fn, args=model.args)
    traces = []

    @jax.jit
    def apply(qparams, x):
        traces.append(None)
        return pbjax.quantized(model.fn)(qparams, x)

    results = [apply(pbjax.with_bitlayers(qparams, b), *model.args) for b in (8, 4, 1)]
    assert len(traces) == 1
    assert apply._cache_size() == 1
    assert not jnp.allclose(results[0], results[1], atol=1e-4)


def test_examples_of_a_batch_with_bitlayers_of_their_own():
    model = MODELS["mlp"]
    qparams = pbjax.quantize(model.params, 8, fn=model.fn, args=model.args)
    apply = jax.jit(lambda b, x: pbjax.quantized(model.fn)(pbjax.with_bitlayers(qparams, b), x[None])[0])
    counts = jnp.array([8, 1, 3, 5])
    (x,) = model.args
    together = jax.jit(jax.vmap(apply))(counts, x)
    one_by_one = jnp.stack([apply(b, row) for b, row in zip(counts, x, strict=True)])
    np.testing.assert_array_equal(together, one_by_one)


@pytest.mark.parametrize("name", ["mlp", "lstm", "attention", "scanned_blocks", "fori"])
def test_gradient_with_respect_to_inputs(name):
    model = MODELS[name]
    qparams = pbjax.quantize(model.params, 8, fn=model.fn, args=model.args, activation_bits=24)
    loss = lambda apply: lambda params, x: jnp.sum(jnp.square(apply(params, x)))  # noqa: E731
    fn = model.fn
    if name == "fori":  # a while loop with a traced count has no reverse derivative; a scan has
        fn = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]  # noqa: E731
    actual = jax.jit(jax.grad(loss(pbjax.quantized(fn)), argnums=1))(qparams, *model.args)
    expected = jax.jit(jax.grad(loss(fn), argnums=1))(pbjax.dequantize(qparams), *model.args)
    assert_trees_close(actual, expected, 1e-4)


def test_gradient_inside_the_function():
    def loss_gradient(params, x):
        return jax.grad(lambda x: jnp.sum(jnp.tanh(x @ params["w"])))(x)

    params, x = {"w": normal(16, 12)}, normal(4, 16)
    qparams = pbjax.quantize(params, 8, fn=loss_gradient, args=(x,), activation_bits=24)
    actual = run_quietly(pbjax.quantized(loss_gradient), qparams, x)
    assert_trees_close(actual, loss_gradient(pbjax.dequantize(qparams), x), 1e-5)


def test_weights_that_loops_and_calls_return_as_they_came_stay_packed():
    """As NNX transforms return every weight of a module. The function's own result is the BitTensor then."""

    def fn(params, x):
        step = lambda w, x: (w, jnp.tanh(x @ w))  # noqa: E731
        w, x = jax.lax.fori_loop(0, 3, lambda _, state: step(*state), (params["w"], x))
        (w, x), _ = jax.lax.scan(lambda state, _: (step(*state), None), (w, x), length=2)
        w, x = jax.lax.while_loop(lambda state: jnp.sum(state[0]) > 1e9, lambda state: step(*state), (w, x))
        w, x = jax.lax.cond(x[0, 0] > 0, jax.checkpoint(step), jax.jit(step), w, x)
        return w, x

    params, x = {"w": normal(16, 16)}, normal(4, 16)
    qparams = pbjax.quantize(params, 8, activation_bits=24, rules={"w": 8})
    with pytest.warns(pbjax.DequantizedWarning) as caught:
        w, y = jax.jit(pbjax.quantized(fn))(qparams, x)
    assert str(caught[0].message).count("(") == 1  # the sum, of which the loop's condition consists
    assert "w (reduce_sum)" in str(caught[0].message)
    jax.tree.map(np.testing.assert_array_equal, w, qparams["w"])
    assert_trees_close(y, fn(pbjax.dequantize(qparams), x)[1], 1e-4)


def test_arguments_that_are_no_arrays_and_results_that_are_none():
    def fn(params, x, mode, *, scale, names=("a",)):
        assert mode == "plain"
        assert isinstance(scale, float)
        return {"y": scale * (x @ params["w"]), "mode": mode, "none": None, "names": names}

    params = {"w": jnp.eye(32), "label": "kept"}
    qparams = pbjax.quantize(params, 8, rules={"w": 8})
    out = pbjax.quantized(fn)(qparams, jnp.ones((1, 32)), "plain", scale=2.0)
    assert out["mode"] == "plain"
    assert out["none"] is None
    assert out["names"] == ("a",)
    assert out["y"].shape == (1, 32)


def test_without_bit_tensors_nothing_changes():
    model = MODELS["mlp"]
    np.testing.assert_array_equal(
        pbjax.quantized(model.fn)(model.params, *model.args), model.fn(model.params, *model.args)
    )


def test_mutable_collections_and_flags_of_linen():
    model = MODELS["conv"]
    qparams = pbjax.quantize(model.params, 8, rules={"Dense_0/kernel": 8, "": None})
    apply = pbjax.quantized(model.fn)
    y, state = apply(qparams, *model.args, mutable=["batch_stats"])
    assert set(state) == {"batch_stats"}
    assert y.shape == (2, 10)


def test_a_product_over_part_of_an_axis_keeps_its_weight_float():
    def fn(params, x):
        return x @ params["w"][2:10] + x[:, :1] @ params["v"]

    params, x = {"w": jnp.ones((16, 12)), "v": jnp.ones((1, 12))}, jnp.ones((4, 8))
    qparams = pbjax.quantize(params, 8, fn=fn, args=(x,))
    assert not is_tensor(qparams["w"])
    forced = pbjax.quantize(params, 8, fn=fn, args=(x,), rules={"w": 8})
    with pytest.warns(pbjax.DequantizedWarning, match=r"w \(slice\)"):
        y = pbjax.quantized(fn)(forced, x)
    assert_trees_close(y, fn(pbjax.dequantize(forced), x), 1e-4)


def test_lookup_out_of_range_follows_its_mode():
    def pick(params, indices, mode):
        return params["w"].at[indices].get(mode=mode)

    params, indices = {"w": normal(12, 16)}, jnp.array([[0, 11], [12, 40]])
    qparams = pbjax.quantize(params, 8, rules={"w": pbjax.Spec(contract=(1,))})
    for mode in ("fill", "clip"):
        actual = pbjax.quantized(pick)(qparams, indices, mode)
        np.testing.assert_array_equal(actual, pick(pbjax.dequantize(qparams), indices, mode))
    assert np.isnan(pbjax.quantized(pick)(qparams, indices, "fill")[1]).all()


def test_custom_derivatives_without_weights_survive():
    @jax.custom_jvp
    def clipped(x):
        return jnp.clip(x, -1, 1)

    clipped.defjvp(lambda primals, tangents: (clipped(*primals), 7 * tangents[0]))
    params, x = {"w": jnp.eye(32)}, jnp.full((1, 32), 3.0)
    qparams = pbjax.quantize(params, 8, rules={"w": 8})
    gradient = jax.grad(lambda x: jnp.sum(pbjax.quantized(lambda p, x: clipped(x @ p["w"]))(qparams, x)))(x)
    expected = 7 * jnp.sum(pbjax.dequantize(qparams)["w"], axis=1)
    np.testing.assert_allclose(gradient[0], expected, rtol=1e-6)


def test_nnx_module_as_an_argument():
    module, (x,) = NnxMLP(nnx.Rngs(0)), MODELS["nnx_mlp"].args
    qmodule = pbjax.quantize(module, 8)
    assert type(qmodule) is NnxMLP
    y = jax.jit(pbjax.quantized(lambda m, x: m(x)))(qmodule, x)
    graphdef, state = nnx.split(qmodule)
    expected = jax.jit(pbjax.quantized(lambda state, x: nnx.merge(graphdef, state)(x)))(state, x)
    np.testing.assert_array_equal(y, expected)


def test_mlp_within_the_error_of_its_weights():
    model = MODELS["mlp"]
    qparams = pbjax.quantize(model.params, 16, fn=MLP().apply, args=model.args)
    exact = model.fn(model.params, *model.args)
    errors = [
        float(jnp.abs(pbjax.quantized(model.fn)(pbjax.with_bitlayers(qparams, b), *model.args) - exact).max())
        for b in (2, 4, 8, 12)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3
