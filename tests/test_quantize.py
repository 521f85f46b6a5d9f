"""`quantize`, `dequantize`, `with_bitlayers`, `truncate` and `report` on trees."""

from __future__ import annotations

import builtins
import subprocess
import sys
import textwrap

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict

import pbjax
from tests.cases import normal

KEY = jax.random.key(0)


def is_tensor(leaf):
    return isinstance(leaf, pbjax.BitTensor)


def tensors_of(tree):
    """Paths and BitTensors of a tree."""
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_tensor)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat if is_tensor(leaf)}


PARAMS = {
    "params": {
        "Dense_0": {"kernel": normal(40, 24), "bias": normal(24)},
        "Dense_1": {"kernel": normal(24, 8, seed=1), "bias": normal(8)},
        "norm": {"scale": normal(24)},
    }
}


# Which leaves, in which trees.


class EquinoxMLP(equinox.Module):
    first: equinox.nn.Linear
    activation: object

    def __call__(self, x):
        return self.activation(self.first(x))


def trees():
    dense = nn.Dense(8).init(KEY, jnp.ones((1, 24)))
    module = nnx.Linear(24, 8, rngs=nnx.Rngs(0))
    equinox_mlp = EquinoxMLP(equinox.nn.Linear(24, 8, key=KEY), jnp.tanh)
    return {
        "linen": (dense, None, {"params/kernel"}),
        "frozen": (FrozenDict(dense), None, {"params/kernel"}),
        "nnx_state": (nnx.state(module), None, {"kernel/value"}),
        "nnx_module": (module, None, {"kernel/value"}),
        "equinox": (equinox_mlp, {"weight": pbjax.Spec(contract=(1,))}, {"first/weight"}),
        "nested": ([{"kernel": normal(24, 8)}, (normal(3, 3), "text", None, 7)], None, {"0/kernel"}),
    }


@pytest.mark.parametrize("name", trees())
def test_trees_of_every_kind(name):
    tree, rules, expected = trees()[name]
    quantized = pbjax.quantize(tree, 8, rules=rules)
    assert set(tensors_of(quantized)) == expected
    assert type(quantized) is type(tree)
    restored = pbjax.dequantize(quantized)
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(tree), strict=True):
        if not hasattr(a, "shape"):
            assert a is b
            continue
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, atol=2**-7 * float(jnp.abs(b).max()))


def test_equinox_module_runs():
    tree, rules, _ = trees()["equinox"]
    quantized = pbjax.quantize(tree, 8, rules=rules, activation_bits=24)
    x = normal(24)
    y = pbjax.quantized(lambda m, x: m(x))(quantized, x)
    np.testing.assert_allclose(y, pbjax.dequantize(quantized)(x), rtol=1e-5, atol=1e-6)


def test_default_takes_kernels_of_rank_two_or_more():
    tree = {
        "kernel": normal(8),
        "a": {"kernel": normal(8, 8)},
        "b": {"weight": normal(8, 8)},
        "c": {"kernel": jnp.eye(4, dtype=int)},
    }
    assert set(tensors_of(pbjax.quantize(tree, 4))) == {"a/kernel"}


def test_with_fn_takes_every_weight_that_a_product_consumes():
    def fn(params, x):
        return (x @ params["w"]) * params["gain"] + params["table"][:1]

    tree = {"w": normal(16, 8), "gain": normal(4, 8), "table": normal(5, 8)}
    assert set(tensors_of(pbjax.quantize(tree, 4, fn=fn, args=(normal(4, 16),)))) == {"w"}


def test_first_matching_rule_decides():
    quantized = pbjax.quantize(PARAMS, 8, rules={"Dense_0": None, "kernel": 3, "Dense_1/kernel": 5})
    assert {path: t.bits for path, t in tensors_of(quantized).items()} == {"params/Dense_1/kernel": 3}


def test_spec_overrides_only_what_it_names():
    rules = {
        "Dense_0/kernel": pbjax.Spec(group_size=None, activation_bits=None),
        "Dense_1": pbjax.Spec(bits=2, contract=(-1,)),
    }
    quantized = tensors_of(
        pbjax.quantize(
            PARAMS,
            8,
            group_size=32,
            activation_bits=8,
            rules={**rules, "bias": None} | {"Dense_1/bias": None},
            select=lambda p, x: x.ndim > 1,
        )
    )
    first, second = quantized["params/Dense_0/kernel"], quantized["params/Dense_1/kernel"]
    assert (first.bits, first.group_size, first.activation_bits) == (8, None, None)
    assert (second.bits, second.group_size, second.activation_bits) == (2, 32, 8)
    assert second.contract_axes == (1,)


def test_select_sees_path_and_value():
    seen = {}

    def select(path, leaf):
        seen[path] = leaf.shape
        return path.endswith("Dense_1/kernel")

    quantized = pbjax.quantize(PARAMS, 8, select=select)
    assert set(tensors_of(quantized)) == {"params/Dense_1/kernel"}
    assert seen["params/norm/scale"] == (24,)


def test_bit_tensors_stay_as_they_are():
    once = pbjax.quantize(PARAMS, 4)
    twice = pbjax.quantize(once, 8)
    jax.tree.map(np.testing.assert_array_equal, once, twice)


@pytest.mark.parametrize(
    ("shape", "spec", "stack", "contract", "output"),
    [
        ((24, 8), pbjax.Spec(), (), (0,), (1,)),
        ((3, 3, 4, 8), pbjax.Spec(), (), (0, 1, 2), (3,)),
        ((5, 24, 8), pbjax.Spec(stack=(0,)), (5,), (0,), (1,)),
        ((2, 5, 24, 8), pbjax.Spec(stack=(0, 1), contract=(3,)), (2, 5), (1,), (0,)),
        ((24, 2, 4), pbjax.Spec(contract=(0,)), (), (0,), (1, 2)),
        ((2, 12, 8), pbjax.Spec(contract=(0, 1)), (), (0, 1), (2,)),
        ((8, 2, 12), pbjax.Spec(contract=(2, 1)), (), (2, 1), (0,)),
    ],
)
def test_axes(shape, spec, stack, contract, output):
    weight = normal(*shape)
    tensor = pbjax.quantize({"w": weight}, 8, rules={"w": spec})["w"]
    assert (tensor.stack_shape, tensor.contract_axes, tensor.output_axes) == (stack, contract, output)
    assert tensor.shape == shape
    np.testing.assert_allclose(pbjax.dequantize({"w": tensor})["w"], weight, atol=2**-8 * float(jnp.abs(weight).max()))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtypes(dtype):
    weight = normal(40, 8, dtype=dtype)
    tensor = pbjax.quantize({"kernel": weight}, 8)["kernel"]
    from_float32 = pbjax.quantize({"kernel": weight.astype(jnp.float32)}, 8)["kernel"]
    np.testing.assert_array_equal(tensor.words, from_float32.words)
    np.testing.assert_array_equal(tensor.scale, from_float32.scale)
    assert pbjax.dequantize({"kernel": tensor})["kernel"].dtype == dtype


def test_numpy_weights():
    weight = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    a, b = (pbjax.quantize({"kernel": w}, 8)["kernel"] for w in (weight, jnp.asarray(weight)))
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("group_size", [None, 32])
def test_pure(group_size):
    """The same bits eagerly, jitted, mapped over a stack, and in blocks of channels."""
    stack = normal(3, 40, 24)
    quantize = lambda w: pbjax.quantize({"kernel": w}, 8, group_size=group_size)  # noqa: E731
    eager = [quantize(w) for w in stack]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *eager)
    spec = pbjax.Spec(stack=(0,), group_size=group_size)
    for other in (
        jax.vmap(quantize)(stack),
        jax.jit(jax.vmap(quantize))(stack),
        pbjax.quantize({"kernel": stack}, 8, rules={"kernel": spec}),
    ):
        jax.tree.map(np.testing.assert_array_equal, other, stacked)


def test_eval_shape():
    shapes = jax.eval_shape(lambda tree: pbjax.quantize(tree, 8), PARAMS)
    expected = pbjax.quantize(PARAMS, 8)
    assert jax.tree.structure(shapes) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(shapes), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


# Fewer bitlayers.


@pytest.mark.parametrize("bits", [1, 3, 4, 7])
def test_truncated_equals_quantized_to_fewer_bits(bits):
    """The nesting law on trees: also what `with_bitlayers` uses is that prefix."""
    tree = pbjax.quantize(PARAMS, 8, group_size=32)
    fewer = pbjax.quantize(PARAMS, bits, group_size=32)
    jax.tree.map(np.testing.assert_array_equal, pbjax.truncate(tree, bits), fewer)
    x = normal(3, 40)
    kernel = lambda t: t["params"]["Dense_0"]["kernel"]  # noqa: E731
    prefix = pbjax.with_bitlayers(tree, bits)
    np.testing.assert_array_equal(pbjax.matmul(x, kernel(prefix)), pbjax.matmul(x, kernel(fewer)))
    jax.tree.map(np.testing.assert_array_equal, pbjax.dequantize(prefix), pbjax.dequantize(fewer))


def test_truncate_keeps_smaller_tensors_and_counts():
    tree = pbjax.with_bitlayers(pbjax.quantize(PARAMS, 8, rules={"Dense_0/kernel": 3}), {"Dense_1": 2})
    cut = tensors_of(pbjax.truncate(tree, 4))
    assert [(t.bits, int(t.bitlayers)) for t in cut.values()] == [(3, 3), (4, 2)]
    kept = tensors_of(pbjax.truncate(tree, 8))
    assert all(kept[name] is tensor for name, tensor in tensors_of(tree).items())  # nothing copied


def test_truncate_by_path_and_in_stacks():
    tree = pbjax.quantize(PARAMS, 8)
    cut = tensors_of(pbjax.truncate(tree, {"Dense_0": 3}))
    assert [(t.bits, int(t.bitlayers)) for t in cut.values()] == [(3, 3), (8, 8)]
    stack = pbjax.quantize({"w": normal(3, 64, 5)}, 8, rules={"w": pbjax.Spec(stack=(0,))})
    numbers = np.array([2, 5, 1])
    cut = pbjax.truncate(stack, {"w": numbers})["w"]
    assert cut.bits == 5
    np.testing.assert_array_equal(cut.bitlayers, numbers)
    used = pbjax.with_bitlayers(stack, {"w": numbers})
    np.testing.assert_array_equal(pbjax.dequantize(cut), pbjax.dequantize(used)["w"])


def test_with_bitlayers_copies_nothing():
    tree = pbjax.quantize(PARAMS, 8)
    fewer = pbjax.with_bitlayers(tree, 4)
    for path, tensor in tensors_of(fewer).items():
        assert tensor.words is tensors_of(tree)[path].words
        assert int(tensor.bitlayers) == 4


def counts(tree):
    return {path.split("/")[1]: np.asarray(tensor.bitlayers).tolist() for path, tensor in tensors_of(tree).items()}


def test_with_bitlayers_by_pattern_and_by_tree():
    tree = pbjax.quantize(PARAMS, 8)
    assert counts(pbjax.with_bitlayers(tree, {"Dense_0": 2})) == {"Dense_0": 2, "Dense_1": 8}
    assert counts(pbjax.with_bitlayers(tree, {"Dense_0": 2, ".*": jnp.int32(5)})) == {"Dense_0": 2, "Dense_1": 5}
    numbers = {
        "params": {"Dense_0": {"kernel": 3, "bias": 0}, "Dense_1": {"kernel": None, "bias": 0}, "norm": {"scale": 0}}
    }
    assert counts(pbjax.with_bitlayers(tree, numbers)) == {"Dense_0": 3, "Dense_1": 8}


def test_with_bitlayers_per_layer_of_a_stack():
    tree = pbjax.quantize({"params": {"a": {"kernel": normal(3, 24, 8)}}}, 8, rules={"kernel": pbjax.Spec(stack=(0,))})
    assert counts(pbjax.with_bitlayers(tree, 4)) == {"a": [4, 4, 4]}
    assert counts(pbjax.with_bitlayers(tree, jnp.array([1, 2, 8]))) == {"a": [1, 2, 8]}


def test_traced_bitlayers_are_clipped():
    tree = pbjax.quantize(PARAMS, 6)
    clipped = jax.jit(lambda n: pbjax.with_bitlayers(tree, n))
    assert counts(clipped(100)) == {"Dense_0": 6, "Dense_1": 6}
    assert counts(clipped(-3)) == {"Dense_0": 1, "Dense_1": 1}


# What it costs.

MEMORY_SCRIPT = """
    import resource, sys
    import jax, jax.numpy as jnp, numpy as np, pbjax
    num = int(sys.argv[1])
    pbjax.quantize({"kernel": np.ones((2048, 2048), np.float32)}, 8)  # compiled and warm
    weights = [np.full((2048, 2048), i + 1, np.float32) for i in range(num)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tree = pbjax.quantize({str(i): {"kernel": w} for i, w in enumerate(weights)}, 8)
    jax.block_until_ready(tree)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_peak_memory_stays_near_the_largest_leaf():
    """Beyond its result, quantizing 12 weights of 16 MiB takes less than three times one of them."""

    def grown(num):
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(MEMORY_SCRIPT), str(num)], capture_output=True, text=True, check=True
        )
        return int(run.stdout)

    leaf, num = 2048 * 2048 * 4, 12
    result = num * leaf // 4
    assert grown(num) - result < 3 * leaf


def test_progress_bar(capsys):
    pbjax.quantize(PARAMS, 8, progress=True)
    assert "quantize" in capsys.readouterr().err
    pbjax.quantize(PARAMS, 8)
    assert capsys.readouterr().err == ""


# The report.


def test_report_is_text_in_a_notebook(monkeypatch):
    """rich would print the table by itself there, and leave an empty string."""
    shell = type("ZMQInteractiveShell", (), {})
    monkeypatch.setattr(builtins, "get_ipython", shell, raising=False)
    assert rich.console.Console().is_jupyter
    assert "kernel" in str(pbjax.report(pbjax.quantize(PARAMS, 8)))


def test_report_as_data_and_as_table():
    quantized = pbjax.quantize(PARAMS, 8, rules={"Dense_1/kernel": 4})
    report = pbjax.report(pbjax.with_bitlayers(quantized, {"Dense_0": 5}), PARAMS)
    first, second = report.rows
    assert (first.path, first.shape, first.bits, first.bitlayers) == ("params/Dense_0/kernel", (40, 24), 8, (5, 5))
    assert first.float_bytes == 40 * 24 * 4
    assert first.packed_bytes == 8 * 2 * 24 * 4 + 4 * 24 * 4
    assert (len(first.errors), len(second.errors)) == (8, 4)
    for row, path in ((first, "Dense_0"), (second, "Dense_1")):
        weight = PARAMS["params"][path]["kernel"]
        for b, error in enumerate(row.errors, 1):
            values = pbjax.dequantize(pbjax.with_bitlayers(quantized, {path: b}))["params"][path]["kernel"]
            expected = np.linalg.norm(weight - values) / np.linalg.norm(weight)
            np.testing.assert_allclose(error, expected, rtol=1e-5)
    assert report.total.packed_bytes == first.packed_bytes + second.packed_bytes
    assert min(first.errors[0], second.errors[0]) < report.total.errors[0] < max(first.errors[0], second.errors[0])
    assert report.total.errors[7] == first.errors[7]
    dicts = report.to_dicts()
    assert [row["path"] for row in dicts] == ["params/Dense_0/kernel", "params/Dense_1/kernel", "total"]
    text = str(report)
    assert "params/Dense_0/kernel" in text
    assert f"{first.errors[3]:.4f}" in text
    assert "original" in text


def test_report_without_the_original():
    report = pbjax.report(pbjax.quantize(PARAMS, 8))
    assert report.reference == "stored"
    assert report.rows[0].errors[7] == 0
    assert report.rows[0].errors[0] > 0.3


def test_numpy_integers_are_integers():
    """Widths given as NumPy integers come out as Python's own: they are static fields, compared and hashed."""
    given = pbjax.quantize(
        PARAMS, np.int64(6), group_size=np.int32(32), activation_bits=np.uint8(8), clip_bits=np.int16(4)
    )
    plain = pbjax.quantize(PARAMS, 6, group_size=32, activation_bits=8, clip_bits=4)
    assert jax.tree.structure(given) == jax.tree.structure(plain)
    tensors = [
        t for t in jax.tree.leaves(given, is_leaf=lambda t: isinstance(t, pbjax.BitTensor)) if hasattr(t, "bits")
    ]
    assert tensors
    assert all(type(v) is int for t in tensors for v in (t.bits, t.group_size, t.activation_bits))


def test_without_jit():
    """`jax.disable_jit` is for looking into things: the same words, and the same bits of a product."""
    kernel, x = np.arange(15, dtype=np.float32).reshape(5, 3) - 7, np.ones((2, 5), np.float32)
    expected = pbjax.quantize({"kernel": kernel}, 3)["kernel"]
    y = pbjax.matmul(x, expected)
    with jax.disable_jit():
        w = pbjax.quantize({"kernel": kernel}, 3)["kernel"]
        np.testing.assert_array_equal(w.words, expected.words)
        np.testing.assert_array_equal(pbjax.matmul(x, w), y)
