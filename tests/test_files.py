"""`pbjax.save` and `pbjax.load`: what goes in comes out, the prefix that is asked for and no more, where it is sent."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx
from flax.core import FrozenDict
from hypothesis import strategies as st

import pbjax
from pbjax import files
from pbjax.files import _checkpoint, _layout
from tests.saved import assert_same, normal, packed_tree

DTYPES = sorted(_layout.DTYPES.values(), key=str)


@st.composite
def weights(draw):
    k, n = draw(st.integers(1, 70)), draw(st.integers(1, 5))
    stack = draw(st.sampled_from([(), (1,), (2,), (2, 3)]))
    weight = normal(*stack, k, n, seed=draw(st.integers(0, 9)))
    bits = draw(st.integers(1, 16))
    spec = pbjax.Spec(
        bits=bits,
        stack=tuple(range(len(stack))),
        contract=(len(stack),),
        group_size=draw(st.sampled_from([None, 32])),
        activation_bits=draw(st.sampled_from([None, 8, 16])),
    )
    packed = pbjax.quantize({"kernel": weight}, bits, rules={"kernel": spec})
    return pbjax.with_bitlayers(packed, draw(st.integers(1, bits)))["kernel"]


@st.composite
def arrays(draw):
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    dtype = draw(st.sampled_from(DTYPES))
    data = draw(st.binary(min_size=(size := int(np.prod(shape, dtype=int)) * dtype.itemsize), max_size=size))
    if dtype == np.bool_:
        data = bytes(b & 1 for b in data)
    return np.frombuffer(data, dtype).reshape(shape)  # NaNs of any kind among them


constants = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
names = st.text('ab .é"\\', min_size=1, max_size=3)
trees = st.recursive(
    constants | arrays() | weights(),
    lambda children: st.one_of(
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.dictionaries(names, children, max_size=3),
        st.dictionaries(st.integers(), children, max_size=2),
        st.dictionaries(st.tuples(names, st.integers()), children, max_size=2),
    ),
    max_leaves=6,
)


@hypothesis.given(trees, st.integers(1, 16), st.sampled_from([None, 1, 100]))
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_what_goes_in_comes_out(tmp_path, tree, bits, max_shard_bytes):
    """Any tree, in one file or several; fewer bitlayers are `truncate`'s; nothing but the file is left behind."""
    path = tmp_path / "tree"
    pbjax.save(path, tree, {"a": [1, None]}, max_shard_bytes=max_shard_bytes)
    assert_same(pbjax.load(path), tree)
    assert files.info(path).metadata == {"a": [1, None]}
    assert files.verify(path) == []
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, pbjax.BitTensor))
    if any(isinstance(leaf, pbjax.BitTensor) for leaf in leaves):
        expected = pbjax.truncate(tree, bits)
        assert_same(pbjax.load(path, bits=bits), expected)
        files.truncate(path, tmp_path / "short", bits, max_shard_bytes=max_shard_bytes)
        assert_same(pbjax.load(tmp_path / "short"), expected)
    assert {file.name.split("-")[0] for file in tmp_path.iterdir()} <= {
        *("tree", "tree.index.json", "short", "short.index.json")
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_are_those_of_safetensors(path, dtype):
    """Written by pbjax, read by the safetensors library, which finds the same bytes under the same name of a dtype."""
    array = np.arange(6).reshape(2, 3).astype(dtype)
    pbjax.save(path, {"a": array})
    ((name, view),) = safetensors.deserialize(path.read_bytes())
    assert (name, _layout.DTYPES[view["dtype"]], tuple(view["shape"])) == ("a", dtype, (2, 3))
    assert bytes(view["data"]) == array.tobytes()
    loaded = pbjax.load(path)["a"]
    assert loaded.dtype == dtype
    assert isinstance(loaded, np.ndarray) == (dtype.name in ("int64", "uint64", "float64"))  # JAX would cut them


def test_safetensors_library_reads_all_of_it(path):
    """Every bitlayer is a tensor of its own, aligned to its dtype, in the order of bitlayers."""
    tree = {"odd": np.ones(3, np.uint8), **packed_tree()}
    pbjax.save(path, tree)
    with _checkpoint.Source(str(path)) as source:
        entries = source.header.entries
    assert all(entry.begin % entry.dtype.itemsize == 0 for entry in entries.values())
    assert source.header.start % 8 == 0
    levels = [int(name.rsplit("/", 1)[1]) for name in entries if re.search("/(words|scale)/", name)]
    assert levels == sorted(levels)
    views = dict(safetensors.deserialize(path.read_bytes()))
    assert views.keys() == entries.keys()
    assert _layout.PADDING in views
    kernel = tree["stack"]["kernel"]
    for i in range(8):
        words = np.frombuffer(views[f"stack/kernel/words/{i}"]["data"], np.uint32)
        np.testing.assert_array_equal(words, np.asarray(kernel.words[:, i]).reshape(-1))
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata()["pbjax.version"] == "1"


def test_linen_model_from_a_file(path):
    """A whole model, a precision read from the file against one chosen at run time, to the last bit."""
    model = nn.Sequential([nn.Dense(40), nn.relu, nn.Dense(3)])
    x = normal(5, 70)
    qparams = pbjax.quantize(model.init(jax.random.key(0), x), 8)
    pbjax.save(path, qparams)
    apply = jax.jit(pbjax.quantized(model.apply))
    for b in (8, 4, 1):
        expected = apply(pbjax.with_bitlayers(qparams, b), x)
        np.testing.assert_array_equal(apply(pbjax.load(path, bits=b), x), expected)


class OwnParam(nnx.Param):
    pass


def nnx_model():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(nnx.Linear(64, 32, rngs=rngs), nnx.BatchNorm(32, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))


def test_nnx_state_needs_no_model(path):
    """With Variables of Flax and of pbjax, their metadata, and the random keys in them."""
    qmodel = pbjax.nnx.quantize(nnx_model(), 8)
    qmodel.layers[0].bias.set_metadata("note", (1, "a", None))
    graphdef, state = nnx.split(qmodel)
    pbjax.save(path, state)
    loaded = pbjax.load(path)
    assert_same(loaded, state)
    assert type(loaded["layers"][0]["kernel"]) is pbjax.nnx.PackedParam
    assert loaded["layers"][0]["bias"].get_metadata()["note"] == (1, "a", None)
    x = normal(4, 64)
    short = nnx.merge(graphdef, pbjax.load(path, bits=3))
    np.testing.assert_array_equal(short(x), pbjax.truncate(qmodel, 3)(x))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Point:
    x: jax.Array
    y: jax.Array


class Pair(NamedTuple):
    a: object
    b: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Named:
    x: jax.Array
    name: str = dataclasses.field(metadata={"static": True})


def test_static_fields_come_from_like(path):
    pbjax.save(path, {"p": Named(jnp.ones(3), "saved")})
    loaded = pbjax.load(path, like={"p": Named(jnp.zeros(3), "given")})
    assert_same(loaded, {"p": Named(jnp.ones(3), "given")})


def test_like_has_the_dtypes(path):
    tree = {
        "a": {"kernel": jnp.asarray(normal(40, 3), jnp.bfloat16)},
        "b": np.ones(2, np.int64),
        "k": jax.random.key(0),
        "c": jnp.ones(2),
    }
    pbjax.save(path, pbjax.quantize(tree, 4))
    expected = pbjax.load(path)
    for like in (tree, jax.eval_shape(lambda: tree), expected):  # of 64 bits JAX says 32
        assert_same(pbjax.load(path, like=like), expected)
    for name, value, text in (
        ("c", jnp.ones(2, jnp.bfloat16), "c is bfloat16 where the file has float32"),
        ("b", np.ones(2, np.float32), "b is float32 where the file has int64"),
        ("a", {"kernel": normal(40, 3)}, "a/kernel is float32 where the file has bfloat16"),
        ("k", jax.random.key(0, impl="rbg"), r"k is key<rbg> where the file has key<fry>"),
    ):
        with pytest.raises(ValueError, match=rf"`like` must have the dtypes of .*, but {text}"):
            pbjax.load(path, like={**tree, name: value})


@pytest.mark.parametrize(
    "make",
    [
        lambda: pbjax.nnx.quantize(nnx_model(), 4),
        lambda: {"p": Point(jnp.ones(3), jnp.zeros(2, jnp.int8))},
        lambda: Pair([jnp.ones(3)], {"c": packed_tree()}),
        lambda: FrozenDict(packed_tree()),
        lambda: nnx.State({"a": OwnParam(jnp.ones(2))}),
        lambda: nnx.State({"a": nnx.Param(jnp.ones(2), note=abs)}),
        lambda: nnx.Param(jnp.ones(2)),
    ],
    ids=["nnx module", "dataclass", "named tuple", "FrozenDict", "own Variable", "Variable with a function", "Param"],
)
def test_classes_are_brought_by_like(path, make):
    """A file makes no object of a class that it names; a tree of the same structure, with any values, does."""
    tree = make()
    pbjax.save(path, tree)
    if type(tree) is nnx.Param:
        assert_same(pbjax.load(path), tree)
        return
    with pytest.raises(ValueError, match=r"`like` must be given for a tree that holds a [\w.]+, a class that files do"):
        pbjax.load(path)
    like = jax.tree.map(lambda leaf: leaf, tree)
    assert_same(pbjax.load(path, like=like), tree)
    assert files.verify(path) == []


def test_float_like_takes_packed_weights(path):
    """`like` stands for the structure: the float module that was quantized, or its shapes, will do."""
    tree = {"a": {"kernel": normal(40, 3)}, "b": jnp.ones(2)}
    q = pbjax.quantize(tree, 4)
    pbjax.save(path, q)
    for like in (tree, jax.eval_shape(lambda: tree)):
        assert_same(pbjax.load(path, like=like), q)


@pytest.mark.parametrize("max_shard_bytes", [None, 5000])
def test_prefix_reads_the_prefix_only(path, max_shard_bytes):
    """Bytes that the process read, as Linux counts them: headers, other leaves, and the bitlayers asked for."""
    tree = pbjax.quantize({f"l{i}": {"kernel": normal(256, 128, seed=i), "bias": np.ones(5)} for i in range(3)}, 8)
    pbjax.save(path, tree, max_shard_bytes=max_shard_bytes)
    pbjax.load(path, bits=1)  # what Python reads once is read
    stored = 3 * 256 * 128 // 8  # of one bitlayer

    def bytes_read(bits):
        before = int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])
        tree = pbjax.load(path, bits=bits)
        after = int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])
        return after - before, tree

    reads = {b: bytes_read(b)[0] for b in range(1, 9)}
    scales = 3 * 128 * 4
    for b in range(1, 8):
        more = stored + scales * (b < 4)
        if max_shard_bytes is None:
            assert reads[b + 1] - reads[b] == more
        else:  # and the headers of the files that hold it
            assert more <= reads[b + 1] - reads[b] < more + 2500 * (more // max_shard_bytes + 2)
    overhead = sum(file.stat().st_size for file in path.parent.iterdir()) - 8 * stored
    assert 4 * stored < reads[4] < 4 * stored + overhead + 1000
    assert_same(bytes_read(4)[1], pbjax.truncate(tree, 4))


def test_later_bitlayers_need_not_be_there(path):
    """Of several files those of bitlayers that nobody asks for may be missing; those asked for may not."""
    tree = packed_tree()
    pbjax.save(path, tree, max_shard_bytes=500)
    last = max(path.parent.glob("*-of-*"))
    last.unlink()
    assert_same(pbjax.load(path, bits=4), pbjax.truncate(tree, 4))
    with pytest.raises(files.FileError, match=rf"the index lists {last.name}, which is not there"):
        pbjax.load(path)


def test_saving_again_leaves_nothing_behind(path):
    """From one file to several and back; other files in the folder stay."""
    other = path.with_name("model-other.safetensors")
    other.write_bytes(b"")
    for i, max_shard_bytes in enumerate([None, 300, 300, 200, None]):
        tree = {"x": jnp.full(200, i), "y": jnp.full(200, i)}
        pbjax.save(path, tree, max_shard_bytes=max_shard_bytes)
        assert_same(pbjax.load(path), tree)
        num = 1 if max_shard_bytes is None else 3
        assert len(list(path.parent.iterdir())) == num + 1
    assert other.exists()
    assert_same(pbjax.load(path), tree)


def test_index_of_several_files_is_hugging_faces(path):
    pbjax.save(path, packed_tree(), max_shard_bytes=2000)
    index = json.loads(path.with_name("model.safetensors.index.json").read_text())
    tensors = {}
    for shard in set(index["weight_map"].values()):
        with safetensors.safe_open(path.with_name(shard), "np") as file:
            tensors.update(dict.fromkeys(set(file.keys()) - {_layout.PADDING}, shard))
    assert tensors == index["weight_map"]
    assert index["metadata"]["total_size"] >= sum(leaf.nbytes for leaf in jax.tree.leaves(packed_tree()))
    assert_same(pbjax.load(f"{path}.index.json"), packed_tree())


def test_arguments_of_load(path):
    tree = {"a": jnp.ones((4, 4)), "k": packed_tree()}
    pbjax.save(path, tree)
    with pytest.raises(FileNotFoundError):
        pbjax.load(path.with_name("nothing"))
    for bits, error in ((0, ValueError), (17, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match=r"`bits` must .* \(argument of load\)"):
            pbjax.load(path, bits=bits)
    with pytest.raises(ValueError, match=r"`like` must have the leaves of .*, but has b that the file has not"):
        pbjax.load(path, like={"b": 1})
    with pytest.raises(ValueError, match=r"`like` must have .*, but a has \(3,\) where the file has \(4, 4\)"):
        pbjax.load(path, like={**tree, "a": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"`sharding` must be a sharding, a dict from path patterns .* or a tree"):
        pbjax.load(path, sharding=[jax.devices()[0]])
    with pytest.raises(TypeError, match=r"`sharding` must hold shardings or devices, but got 3 for a"):
        pbjax.load(path, sharding={"^a$": 3})
    with pytest.raises(ValueError, match=r"`sharding` must name leaves of the tree, but pattern 'nope' matches none"):
        pbjax.load(path, sharding={"nope": jax.devices()[0]})
    pbjax.save(path, {"a": np.ones(3)})
    with pytest.raises(ValueError, match=r"`bits` must come with a file of BitTensors, but .* has none"):
        pbjax.load(path, bits=3)
    with pytest.raises(ValueError, match=r"`sharding` must be for arrays that JAX holds, but a is float64\. Enable"):
        pbjax.load(path, sharding=jax.devices()[0])


@pytest.mark.parametrize("where", ["device", "sharding", "patterns", "tree"])
def test_arrays_go_where_they_are_sent(path, where):
    tree = packed_tree()
    pbjax.save(path, tree)
    device = jax.devices()[0]
    single = jax.sharding.SingleDeviceSharding(device)
    argument = {
        "device": device,
        "sharding": single,
        "patterns": {"kernel": single, "bias": device},
        "tree": jax.tree.map(lambda leaf: leaf.sharding, tree),
    }[where]
    loaded = pbjax.load(path, bits=3, sharding=argument)
    assert_same(loaded, pbjax.truncate(tree, 3))
    assert all(leaf.committed for leaf in jax.tree.leaves(loaded))
    assert not any(leaf.committed for leaf in jax.tree.leaves(pbjax.load(path)))
