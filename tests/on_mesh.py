"""What tests/test_mesh.py runs in processes of their own: only those can have several devices on the CPU.

`python -m tests.on_mesh NAME` runs one function on eight devices, or in one of two processes on four each.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import re
import sys
import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pbjax
from pallas_kernels.bit_matmul import triton
from pbjax import _backends
from tests import cases, test_stateful

BITS, K, N = 6, 512, 64
COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter"


def make_mesh(axis_type=AxisType.Auto):
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(axis_type,) * 2)


def normal(*shape, seed=0):
    return np.array(jax.random.normal(jax.random.key(seed), shape))


def put(mesh, value, spec):
    return jax.device_put(value, NamedSharding(mesh, spec))


@functools.cache
def weight(group_size, activation_bits=16, k=K):
    kernel = {"kernel": normal(k, N)}
    return pbjax.quantize(kernel, BITS, group_size=group_size, activation_bits=activation_bits)["kernel"]


def cut(mesh, w, k_axes, n_axes):
    groups = k_axes if w.group_size else None
    return w.replace(
        words=put(mesh, w.words, P(None, k_axes, n_axes)),
        scale=put(mesh, w.scale, P(None, groups, n_axes)),
        bitlayers=put(mesh, w.bitlayers, P()),
    )


def collectives(fn, *args, jit=jax.jit):
    """The result, and how often which collective is in the compiled program."""
    compiled = jit(fn).lower(*args).compile()
    counts = collections.Counter(re.findall(rf" ({COLLECTIVES})(?:-start)?\(", compiled.as_text()))
    return compiled(*args), dict(counts)


def rounding_of_sum(x, w):
    """A bound of the rounding errors of two float32 sums over k, and of a product each."""
    return 2 * (K + 32) * 2.0**-24 * np.abs(x).sum(1, keepdims=True) * float(w.scale.max())


# name: (mesh axes of rows, of k, of n, of k in x), collectives of the product
CUTS = {
    "data": ("a", None, None, None, {}),
    "n": (None, None, "b", None, {}),
    "n_over_both": (None, None, ("a", "b"), None, {}),
    "k": (None, "b", None, None, {"all-reduce": 1}),
    "k_over_both": (None, ("a", "b"), None, None, {"all-reduce": 1}),
    "k_of_x_too": (None, "b", None, "b", {"all-reduce": 2}),  # one of them of max|x|, a number for each row
    "data_and_n": ("a", None, "b", None, {}),
    "data_and_k": ("a", "b", None, None, {"all-reduce": 1}),
    "k_and_n": (None, "b", "a", None, {"all-reduce": 1}),
}


def products(axis_type):
    """Every cut, with few and many rows, with and without groups: the bits of one device, and few collectives."""
    mesh = make_mesh(axis_type)
    product = lambda x, w, b: pbjax.matmul(x, w, bitlayers=b)  # noqa: E731
    on_one_device = jax.jit(product)
    for (name, cuts), (group_size, activation_bits) in itertools.product(
        CUTS.items(), ((None, 16), (64, 16), (64, None))
    ):
        if axis_type == AxisType.Explicit and group_size:
            continue  # axes become the compiler's: what follows is the same
        if activation_bits is None and name not in ("n", "k", "data"):
            continue
        rows, k_axes, n_axes, k_of_x, expected = cuts
        m = 2 if group_size and activation_bits else 40
        w, x = weight(group_size, activation_bits), normal(m, K, seed=1)
        counts = np.arange(m, dtype=np.int32) % BITS + 1
        one = on_one_device(x, w, counts)
        args = put(mesh, x, P(rows, k_of_x)), cut(mesh, w, k_axes, n_axes), put(mesh, counts, P(rows))
        y, found = collectives(product, *args)
        if activation_bits is None:  # a float sum in another order
            assert np.all(np.abs(y - one) <= rounding_of_sum(x, w)), (name, group_size, m)
        else:
            np.testing.assert_array_equal(y, one, err_msg=str((name, group_size, m)))
        assert found == expected, (name, group_size, m, activation_bits, found)
        assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(rows, n_axes)), 2), (name, y.sharding)


def auto():
    products(AxisType.Auto)


def explicit():
    products(AxisType.Explicit)
    mesh = make_mesh(AxisType.Explicit)
    x, w = normal(4, 3, K, seed=1), weight(64)
    one = jax.jit(pbjax.matmul)(x, w)
    y = jax.jit(jax.vmap(pbjax.matmul, (0, None)))(put(mesh, x, P("a")), cut(mesh, w, None, "b"))
    assert jax.typeof(y).sharding.spec == P("a", None, "b")
    np.testing.assert_array_equal(y, one)


def transforms():
    """`vmap` over x, over bitlayers and over both, gradients, and `scan` over layers, on words cut over k or n."""
    mesh = make_mesh()
    x, g, every = normal(BITS, K, seed=1), normal(BITS, N, seed=2), jnp.arange(1, BITS + 1)
    functions = {
        "sweep": lambda x, w: jax.vmap(lambda b: pbjax.matmul(x, w, bitlayers=b))(every),
        "both": lambda x, w: jax.vmap(lambda x, b: pbjax.matmul(x, w, bitlayers=b))(x, every),
    }

    @jax.jit
    def gradients(x, w):
        return jax.vjp(lambda x, s: pbjax.matmul(x, w.replace(scale=s)), x, w.scale)[1](g)

    for group_size, (k_axes, n_axes) in ((None, ("b", None)), (64, (None, "b")), (64, ("a", "b"))):
        w = weight(group_size)
        for name, fn in functions.items():
            one = jax.jit(fn)(x, w)
            y, found = collectives(fn, put(mesh, x, P()), cut(mesh, w, k_axes, n_axes))
            np.testing.assert_array_equal(y, one, err_msg=str((name, group_size, k_axes)))
            assert found == ({"all-reduce": 1} if k_axes else {}), (name, found)

        one = gradients(x, w)
        got = gradients(put(mesh, x, P()), cut(mesh, w, k_axes, n_axes))
        for value, reference in zip(got, one, strict=True):
            np.testing.assert_allclose(value, reference, rtol=0, atol=1e-4 * np.abs(reference).max())


def long_k():
    """k beyond what int32 sums, in shards that are not cut where the sums are."""
    mesh = make_mesh()
    for k, k_axes in ((65536, ("a", "b")), (131072, "a"), (98304, "a"), (98304, "b")):
        x = normal(2, k, seed=1)
        w = pbjax.quantize({"kernel": normal(k, 2)}, 3)["kernel"]
        one = jax.jit(pbjax.matmul)(x, w)
        y, found = collectives(pbjax.matmul, put(mesh, x, P()), cut(mesh, w, k_axes, None))
        np.testing.assert_array_equal(y, one, err_msg=str((k, k_axes)))
        assert found == {"all-reduce": 1}


def interpreted(name, module, ran):
    """A backend for GPUs that runs on the CPU, its kernels as JAX operations; adds to `ran` which functions did."""

    def function(fn):
        def run(*args, **options):
            ran.add(fn)
            return getattr(module, fn)(*args, interpret=True, **options)

        return run

    functions = {fn: function(fn) for fn in ("matmul", "prefixes", "quantize_rows", "limb_sums", "scale_groups")}
    return dataclasses.replace(_backends.BACKENDS[name], platforms=None, missing=lambda platform: None, **functions)


def kernels():
    """Devices that share k run the kernels of the backend that was named, for the bits of one device.

    The oracle has these bits: tests/test_triton.py compares them on one.
    """
    ran = set()
    _backends.BACKENDS["triton"] = interpreted("triton", triton, ran)
    mesh, every, k = make_mesh(), jnp.arange(1, BITS + 1), 256
    matmul = functools.partial(pbjax.matmul, backend="triton")
    expected = jax.jit(lambda x, w, b: pbjax.matmul(x, w, bitlayers=b, backend="reference"))
    for group_size, m, activation_bits in ((None, 40, 8), (64, 3, 8)):
        w, x, counts = weight(group_size, activation_bits, k), normal(m, k, seed=1), np.arange(m) % BITS + 1
        scale = P(None, "b" if group_size else None)
        specs = P(None, "b"), w.replace(words=P(None, "b"), scale=scale, bitlayers=P()), P()
        parts = lambda x, w, b: matmul(x, w, bitlayers=b, axis_name="b")  # noqa: E731
        products = {
            "product": lambda x, w, b: matmul(x, w, bitlayers=b),
            "sweep": lambda x, w, _: jax.vmap(lambda b: matmul(x, w, bitlayers=b))(every),
            "parts": jax.shard_map(parts, mesh=mesh, in_specs=specs, out_specs=P()),
        }
        for name, product in products.items() if group_size else [("product", products["product"])]:
            sweep = name == "sweep"
            one = np.stack([expected(x, w, count) for count in every]) if sweep else expected(x, w, counts)
            ran.clear()
            args = put(mesh, x, P()), cut(mesh, w, "b", None), put(mesh, counts, P())
            y, found = collectives(product, *args, jit=cases.jit_once)
            np.testing.assert_array_equal(y, one, err_msg=str((name, group_size, m)))
            assert ran == ({"limb_sums", "scale_groups"} if group_size else {"limb_sums"}), (name, ran)
            assert found == {"all-reduce": 1 + (name == "parts")}, (name, found)


def shard_map():
    """Inside `jax.shard_map`, with its check of what varies: over n, over k by `axis_name`, and over both."""
    mesh = make_mesh()
    for group_size, activation_bits, m in ((None, 16, 40), (64, 16, 2), (64, None, 40)):
        w, x = weight(group_size, activation_bits), normal(m, K, seed=1)
        x[0, 0], x[1, K - 1] = np.nan, -np.inf  # seen by one shard, known to all
        one = jax.jit(pbjax.matmul)(x, w)
        assert np.isnan(one[:2]).all()
        for k_axes, n_axes in ((None, "b"), ("b", None), (("a", "b"), None), ("a", "b")):
            local = functools.partial(pbjax.matmul, axis_name=k_axes)
            scale = P(None, k_axes if group_size else None, n_axes)
            specs = P(None, k_axes), w.replace(words=P(None, k_axes, n_axes), scale=scale, bitlayers=P())
            for check_vma in (True, False) if k_axes == "b" and activation_bits else (True,):
                fn = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(None, n_axes), check_vma=check_vma)
                y, found = collectives(fn, x, w)
                if activation_bits is None:  # a float sum in another order
                    assert np.all(np.abs(y - one)[2:] <= rounding_of_sum(x, w)[2:])
                    assert np.isnan(y[:2]).all()
                else:
                    np.testing.assert_array_equal(y, one)
                assert found == ({"all-reduce": 2} if k_axes else {}), (found, k_axes)
    # An unmodified function on the part of each device, and on whole weights with the rows of each.
    fn = pbjax.quantized(lambda x, w: jnp.tanh(x @ w) + 1)
    w, x = weight(64), normal(8, K, seed=1)
    one = jax.jit(fn)(x, w)
    cut_n = w.replace(words=P(None, None, "b"), scale=P(None, None, "b"), bitlayers=P())
    for specs, out in (((P(), cut_n), P(None, "b")), ((P("a"), P()), P("a"))):
        y = jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=out))(x, w)
        np.testing.assert_array_equal(y, one)


def shard_map_gradients():
    """Through the check of what varies: of x that all devices have, and of each one's scales."""
    mesh, w, x, g = make_mesh(), weight(64), normal(3, K, seed=1), normal(3, N, seed=2)

    def gradients(x, scale, words, bitlayers, g, axis_name=None):
        w_of = lambda s: w.replace(words=words, scale=s, bitlayers=bitlayers)  # noqa: E731
        return jax.vjp(lambda x, s: pbjax.matmul(x, w_of(s), axis_name=axis_name), x, scale)[1](g)

    args = x, w.scale, w.words, w.bitlayers, g
    one = jax.jit(gradients)(*args)
    over_n = (
        (P(), P(None, None, "b"), P(None, None, "b"), P(), P(None, "b")),
        gradients,
    )
    over_k = (
        (P(None, "b"), P(None, "b"), P(None, "b"), P(), P()),
        functools.partial(gradients, axis_name="b"),
    )
    for specs, fn in (over_n, over_k):
        got = jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=specs[:2]))(*args)
        for value, reference in zip(got, one, strict=True):
            np.testing.assert_allclose(value, reference, rtol=0, atol=1e-5 * np.abs(reference).max())


def quantize():
    """A sharded weight is packed where it lies, to the bits of one device; no float weight travels."""
    stack = normal(4, 256, 8, 16)
    kernel = normal(K, N)
    layouts = [
        (kernel, (), P(None, "b"), P(None, None, "b"), P(None, None, "b")),
        (kernel, (), P("b"), P(None, "b", None), P(None, "b", None)),
        (kernel, (), P("a", "b"), P(None, "a", "b"), P(None, "a", "b")),
        (kernel, (), P(("a", "b")), P(None, ("a", "b"), None), P(None, ("a", "b"), None)),
        (stack, (0,), P("a", "b"), P("a", None, "b", None), P("a", None, "b", None)),
        (stack, (0,), P(None, "b", "a"), P(None, None, "b", "a"), P(None, None, "b", "a")),
    ]
    combinations = [(AxisType.Auto, group_size, layout) for group_size in (None, 32) for layout in layouts]
    # Explicit axes serve as well for words as for scales, with groups or without: each layout with one of the two.
    combinations += [(AxisType.Explicit, (None, 32)[i % 2], layout) for i, layout in enumerate(layouts)]
    for axis_type, group_size, (value, axes, spec, words, scale) in combinations:
        mesh = make_mesh(axis_type)
        rules = {"kernel": pbjax.Spec(stack=axes, contract=(len(axes),), group_size=group_size)}
        one = pbjax.quantize({"kernel": value}, 5, rules=rules)["kernel"]
        w = pbjax.quantize({"kernel": put(mesh, value, spec)}, 5, rules=rules)["kernel"]
        jax.tree.map(np.testing.assert_array_equal, w, one)
        assert w.words.sharding.is_equivalent_to(NamedSharding(mesh, words), w.words.ndim), w.words.sharding
        if group_size is None:
            scale = P(*scale[: len(axes)], None, None, scale[-1])
        assert w.scale.sharding.is_equivalent_to(NamedSharding(mesh, scale), w.scale.ndim), w.scale.sharding
    for key in _quantize_programs():
        assert key <= {"all-reduce"}, key


def _quantize_programs():
    """The kinds of collectives in a program that packs a kernel cut over k and n."""
    from pbjax import _quantize, _sharding, _specs

    for group_size, spec in itertools.product((None, 32), (P(None, "b"), P("b"), P("a", "b"))):
        leaf = put(make_mesh(), normal(K, N), spec)
        rule = _specs.Rule(widths=_specs.check_widths(5, group_size, 16, None, "test"))
        plan = _specs.plan("kernel", leaf, [], rule)
        shardings = _sharding.packed_shardings(
            leaf, "kernel", num_stack=0, contract_axes=(0,), output_axes=(1,), group_size=group_size
        )
        text = _quantize._packer(plan, shardings, leaf.shape, leaf.dtype).lower(leaf).compile().as_text()
        yield set(re.findall(rf" ({COLLECTIVES})(?:-start)?\(", text))


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(256, name="up")(x))
        return nn.Dense(32, name="down")(x)


def model():
    """An unmodified model, its first kernel cut over n and its second over k: one all-reduce in all."""
    x = normal(8, 64, seed=1)
    variables = MLP().init(jax.random.key(0), x)
    specs = {"up": {"kernel": P(None, "b"), "bias": P("b")}, "down": {"kernel": P("b"), "bias": P()}}
    for group_size in (None, 32):
        one = jax.jit(pbjax.quantized(MLP().apply))(pbjax.quantize(variables, 6, group_size=group_size), x)
        for mesh in (make_mesh(), make_mesh(AxisType.Explicit)):
            sharded = {"params": jax.tree.map(functools.partial(put, mesh), variables["params"], specs)}
            qvariables = pbjax.quantize(sharded, 6, group_size=group_size)
            y, found = collectives(pbjax.quantized(MLP().apply), qvariables, put(mesh, x, P("a")))
            np.testing.assert_array_equal(y, one)
            assert found == {"all-reduce": 2}, found  # one of max|x|: the hidden activations are cut over k


def errors():
    """What cannot be cut says which sizes can."""
    mesh = make_mesh()

    def expect(text, fn, *args, error=ValueError):
        with pytest.raises(error, match=text):
            fn(*args)

    def quantize(kernel, spec, **options):
        return pbjax.quantize({"d": {"kernel": put(mesh, kernel, spec)}}, 4, **options)

    expect(
        r"d/kernel, cut over k, must fall into whole words of 32, but got k = 264 in 8 shards\. Use a k that is a "
        r"multiple of 256",
        quantize,
        normal(264, 8),
        P(("a", "b")),
    )
    expect(
        r"groups of 64, but got k = 384 in 4 shards\. Use a k that is a multiple of 256",
        lambda: quantize(normal(384, 8), P("b"), group_size=64),
    )
    expect(
        r"must be cut along the first of its output axes, but d/kernel of shape \(32, 8, 4\) is cut along axis 2",
        lambda: quantize(normal(32, 8, 4), P(None, None, "b"), rules={"kernel": pbjax.Spec(contract=(0,))}),
    )
    w = pbjax.quantize({"kernel": normal(384, 8)}, 4, group_size=128)["kernel"]
    w = w.replace(words=put(mesh, w.words, P(None, "b")))
    expect(
        r"must fall into whole groups of 128, but got k = 384 in 4 shards\. Use a k that is a multiple of 512",
        jax.jit(pbjax.matmul),
        np.ones((1, 384), np.float32),
        w,
        error=Exception,
    )

    def local(x, kernel):
        return pbjax.matmul(x, pbjax.quantize({"kernel": kernel}, 4)["kernel"], axis_name="b")

    on_mesh = lambda k: jax.shard_map(local, mesh=mesh, in_specs=(P(None, "b"), P("b")), out_specs=P())(  # noqa: E731
        np.ones((1, k), np.float32), np.ones((k, 8), np.float32)
    )
    expect(r"`w`, cut over k along \('b',\), must fall into whole words of 32, but got k = 80", on_mesh, 80)
    expect(r"`w.scale` must be the same on all devices that share k, but it varies over \('b',\)", on_mesh, 128)


def assert_equal_on(actual, expected):
    """Equal values, each on the devices where it should be."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)
        np.testing.assert_array_equal(a, b)


def tree_to_save(mesh, specs):
    """Float weights, cut by `specs`, and their shardings."""
    floats = {"flat": normal(K, N), "stack": normal(4, 256, 32, seed=1), "bias": normal(N, seed=2)}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in zip(floats, specs, strict=True)}
    return jax.device_put(floats, shardings), shardings


def packed(floats):
    rules = {"flat": pbjax.Spec(group_size=64), "stack": pbjax.Spec(bits=5, stack=(0,)), "bias": None}
    return pbjax.quantize(floats, BITS, rules=rules)


SPECS = {
    "n": (P(None, "b"), P(None, None, "b"), P("b")),
    "k and n": (P("b", "a"), P(None, "b", "a"), P()),
    "stack": (P(("a", "b")), P("b"), P()),
}


def files():
    """What was saved from one mesh is loaded onto another, as if the floats had been quantized there."""
    other = jax.make_mesh((8,), ("n",), axis_types=(AxisType.Auto,))
    elsewhere, other_shardings = tree_to_save(other, (P(None, "n"), P(None, "n"), P("n")))
    for specs in SPECS.values():
        mesh = make_mesh()
        floats, shardings = tree_to_save(mesh, specs)
        q = packed(floats)
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/model.safetensors"
            pbjax.save(path, q, max_shard_bytes=20000)
            assert_equal_on(pbjax.load(path, sharding=shardings), q)
            assert_equal_on(pbjax.load(path, sharding=jax.tree.map(lambda leaf: leaf.sharding, q)), q)
            patterns = {"^fl": shardings["flat"], "stack": shardings["stack"], ".": shardings["bias"]}
            assert_equal_on(pbjax.load(path, bits=2, sharding=patterns), packed_prefix(q, shardings, 2))
            assert_equal_on(pbjax.load(path, sharding=other_shardings), packed(elsewhere))
            with pytest.raises(
                ValueError, match=r"flat, cut over k, must fall into whole groups of 64, but got k = 512"
            ):
                pbjax.load(path, sharding={"flat": NamedSharding(jax.make_mesh((3,), ("c",)), P("c"))})


def packed_prefix(q, shardings, bits):
    return {
        name: leaf if name == "bias" else pbjax.truncate(leaf, bits) for name, leaf in q.items()
    }  # slicing leaves every part where it is


def orbax():
    """Orbax saves quantized trees as any others, and restores them to the shardings of a target, on any mesh."""
    other = jax.make_mesh((8,), ("n",), axis_types=(AxisType.Auto,))
    elsewhere = packed(tree_to_save(other, (P(None, "n"), P(None, None, "n"), P("n")))[0])
    q = packed(tree_to_save(make_mesh(), SPECS["k and n"])[0])
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(f"{folder}/tree", q)
        checkpointer.wait_until_finished()
        for target in (q, elsewhere):
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
            restored = checkpointer.restore(f"{folder}/tree", abstract)
            assert_equal_on(restored, target)
        x = put(other, normal(4, K, seed=1), P())
        np.testing.assert_array_equal(pbjax.matmul(x, restored["flat"]), pbjax.matmul(x, elsewhere["flat"]))
        assert pbjax.with_bitlayers(restored, 2)["flat"].bitlayers == 2


def random_sequences():
    """tests/test_stateful.py, with weights that are cut over the devices."""
    test_stateful.run_on_mesh()


def processes(port, process_id, path):
    """Two processes, of four devices each: words cut over k and over n across both, from arrays and from a file."""
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(process_id))
    assert len(jax.devices()) == 8
    assert len(jax.local_devices()) == 4
    mesh = make_mesh()  # axis "a" runs over the processes
    x, kernel = normal(4, K, seed=1), normal(K, N)

    def spread(value, spec):
        return jax.make_array_from_callback(value.shape, NamedSharding(mesh, spec), lambda index: value[index])

    for group_size, (spec, expected) in itertools.product(
        (None, 64), ((P(None, "a"), {}), (P("a"), {"all-reduce": 1}), (P("a", "b"), {"all-reduce": 1}))
    ):
        one = jax.jit(pbjax.matmul)(x, pbjax.quantize({"kernel": kernel}, BITS, group_size=group_size)["kernel"])
        w = pbjax.quantize({"kernel": spread(kernel, spec)}, BITS, group_size=group_size)["kernel"]
        y, found = collectives(pbjax.matmul, spread(x, P()), w)
        assert found == expected, (spec, found)
        for shard in y.addressable_shards:
            np.testing.assert_array_equal(shard.data, one[shard.index])
    whole = pbjax.load(path)
    for specs, bits in itertools.product(SPECS.values(), (None, 3)):
        shardings = {
            name: NamedSharding(mesh, spec) for name, spec in zip(("flat", "stack", "bias"), specs, strict=True)
        }
        loaded = pbjax.load(path, bits=bits, sharding=shardings)
        assert not loaded["flat"].words.is_fully_addressable
        expected = whole if bits is None else pbjax.truncate(whole, bits)
        for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            for shard in a.addressable_shards:
                np.testing.assert_array_equal(shard.data, np.asarray(b)[shard.index])


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    globals()[sys.argv[1]](*sys.argv[2:])
