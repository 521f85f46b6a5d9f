"""`pbjax.save`, `pbjax.load` and `pbjax.files`: what goes in comes out, by prefix, or an error says what is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
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
from tests import fuzz_files

DTYPES = sorted(_layout.DTYPES.values(), key=str)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def packed_tree(bits=8):
    """Stacked and plain weights, with groups and without, of several dtypes, among other leaves."""
    floats = {
        "dense": {"kernel": normal(70, 10), "bias": jnp.ones(3, jnp.bfloat16)},
        "stack": {"kernel": normal(3, 64, 8)},
        "heads": {"kernel": jnp.asarray(normal(6, 4, 8), jnp.float16)},
    }
    rules = {
        "stack": pbjax.Spec(stack=(0,), group_size=32),
        "heads": pbjax.Spec(contract=(2, 0), bits=5, activation_bits=None),
    }
    return pbjax.quantize(floats, bits, rules=rules)


def assert_same(actual, expected):
    """Equal structures, dtypes, shapes and bytes; whether NumPy or JAX holds an array is of no account."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if not hasattr(b, "dtype"):
            assert type(a) is type(b)
            assert a == b or (a != a and b != b)
            continue
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


# Round trips.


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


# Faults of writers.


def test_writer_killed_anywhere_leaves_old_or_new_whole():
    """One line in sixteen here; `python -m tests.kill_writer` takes each one."""
    command = [sys.executable, "-m", "tests.kill_writer", "16"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(re.findall(r"lines, old whole [1-9]\d*, new whole [1-9]", result.stdout)) == 5


def test_writer_that_fails_leaves_the_old_file(path, monkeypatch):
    pbjax.save(path, {"a": jnp.ones(3)})
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OSError, match="No space left"):
                pbjax.save(path, {"a": jnp.zeros(3)}, max_shard_bytes=None)
        assert [file.name for file in path.parent.iterdir()] == [path.name]
        assert path.read_bytes() == before


REFUSED = {
    "object": ({"a": [object()]}, TypeError, r"leaves must be arrays .* but a/0 is object\. Leave it out"),
    "dtype": ({"a": jnp.ones(2, jnp.int4)}, TypeError, r"a dtype that safetensors knows, but a is of int4\. Cast it"),
    "complex": ({"a": np.ones(2, complex)}, TypeError, r"safetensors knows, but a is of complex128"),
    "shape only": ({"a": jax.ShapeDtypeStruct((2,), jnp.float32)}, TypeError, "but a is ShapeDtypeStruct"),
    "two of one name": ({"a/b": 1, "a": {"b": 2}}, ValueError, r"names that differ, but got two of 'a/b'\. Rename"),
    "reserved name": ({"__metadata__": jnp.ones(2)}, ValueError, "got two of '__metadata__'"),
    "name of a bitlayer": (
        {**packed_tree(), "dense/kernel/words/0": jnp.ones(2)},
        ValueError,
        "got two of 'dense/kernel/words/0'",
    ),
    "key": ({1.5: jnp.ones(2)}, TypeError, r"keys of dicts must be text, integers or tuples of them, but got 1\.5"),
    "keys of two kinds": ({1: 1, "a": 2}, TypeError, r"keys of a dict must be of one kind, but got \[1, 'a'\]"),
    "BitTensor of shapes": (
        jax.eval_shape(packed_tree),
        TypeError,
        "but dense/bias is ShapeDtypeStruct",
    ),
    "BitTensor that is none": (
        jax.tree.map(lambda leaf: leaf.astype(jnp.float32), packed_tree()),
        TypeError,
        r"`words` must be uint32, but got float32 \(dense/kernel\)",
    ),
}


@pytest.mark.parametrize(("tree", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_saved(path, tree, error, match):
    with pytest.raises(error, match=match):
        pbjax.save(path, tree)
    assert not list(path.parent.iterdir())


def test_arguments_of_save(path):
    for metadata in ([], {"a": object()}):
        with pytest.raises(TypeError, match=r"`metadata` must be .* \(argument of save\)"):
            pbjax.save(path, {}, metadata)
    for metadata in ({1: "a", "1": "b"}, {"a": [{None: 1}]}):
        with pytest.raises(
            TypeError, match=r"`metadata` must have keys of text, but got (1|None) \(argument of save\)"
        ):
            pbjax.save(path, {}, metadata)
    for metadata in ({"a": float("nan")}, {"a": [float("inf")]}):
        with pytest.raises(ValueError, match=r"`metadata` must be what JSON holds, but got Out of range float values"):
            pbjax.save(path, {}, metadata)
    metadata = {}
    metadata["a"] = metadata
    with pytest.raises(ValueError, match=r"`metadata` must not be nested deeper than 100 levels"):
        pbjax.save(path, {}, metadata)
    with pytest.raises(ValueError, match=r"`max_shard_bytes` must be at least 1, but got 0"):
        pbjax.save(path, {}, max_shard_bytes=0)
    with pytest.raises(TypeError, match=r"but a is \w*Tracer"):
        jax.jit(lambda a: pbjax.save(path, {"a": a}))(1.0)
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("max_shard_bytes", [None, 300])
def test_paths_of_save(tmp_path, monkeypatch, max_shard_bytes):
    """What cannot be a file, or could not be loaded again, is refused before anything is written."""
    monkeypatch.chdir(tmp_path)
    tree = {"x": jnp.ones(200), "y": jnp.ones(200)}
    (tmp_path / "folder").mkdir()
    for path, error, match in (
        ("", ValueError, r"`path` must name a file, but got ''"),
        ("new/", ValueError, r"`path` must name a file, but got 'new/'"),
        ("folder", IsADirectoryError, r"`path` must name a file, but 'folder' is a folder\. Add a file name"),
        ("no/m", FileNotFoundError, r"`path` must lie in a folder that is there, but got 'no/m'\. Make the folder"),
        ("m.index.json", ValueError, r"`path` must not end in .index.json, but got 'm.index.json'\. Give 'm', and"),
    ):
        with pytest.raises(error, match=match):
            pbjax.save(path, tree, max_shard_bytes=max_shard_bytes)
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")] == ["folder"]


def test_long_names(tmp_path):
    """As long as the file system takes: a temporary name is no longer, and of its index there can be none."""
    path = tmp_path / ("m" * 255)
    for value in (1, 2):
        pbjax.save(path, {"a": jnp.full(3, value)})
        assert_same(pbjax.load(path), {"a": jnp.full(3, value)})
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("max_shard_bytes", [None, 300])
def test_index_of_another_program_stays(path, max_shard_bytes):
    index = path.with_name(f"{path.name}.index.json")
    index.write_text('{"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    before = index.read_bytes()
    with pytest.raises(ValueError, match=r"must not have an index of another program beside it, .*json is there"):
        pbjax.save(path, {"x": jnp.ones(200), "y": jnp.ones(200)}, max_shard_bytes=max_shard_bytes)
    assert list(path.parent.iterdir()) == [index]
    assert index.read_bytes() == before


def test_deep_trees(path):
    """100 levels come back, also through files of files; more are refused, and so is a list that holds itself."""

    def nested(levels):
        tree = {"kernel": normal(40, 3)}
        for _ in range(levels - 1):
            tree = {"a": tree}
        return tree

    pbjax.save(path, nested(100))
    assert_same(pbjax.load(path), nested(100))
    files.convert(path, path.with_name("q"), 2)
    files.truncate(path.with_name("q"), path.with_name("q"), 1)
    assert_same(pbjax.load(path.with_name("q")), pbjax.quantize(nested(100), 1, clip_bits=None))
    itself = []
    itself.append(itself)
    for tree in (nested(101), nested(10**4), itself):
        with pytest.raises(ValueError, match=r"a tree must not be nested deeper than 100 levels, but \S+/\.\.\. is"):
            pbjax.save(path, tree)
    assert_same(pbjax.load(path), nested(100))


# Faults of files.


def whole_file(path):
    tree = {"a": {"kernel": pbjax.quantize({"kernel": normal(40, 3)}, 2)["kernel"]}, "b": jnp.arange(4)}
    pbjax.save(path, tree)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for key in ("pbjax.version", "pbjax.checksum"):
        del header["__metadata__"][key]
    return data, header, data[8 + length :]


def forged(header, body):
    text = _layout.seal(header)
    return len(text).to_bytes(8, "little") + text + body


def with_entry(name, **fields):
    def damage(data, header, body):
        header[name].update(fields)
        return forged(header, body)

    return damage


def with_tree(change):
    def damage(data, header, body):
        tree = json.loads(header["__metadata__"]["pbjax.tree"])
        header["__metadata__"]["pbjax.tree"] = json.dumps(change(tree))
        return forged(header, body)

    return damage


def with_static(**fields):
    def change(tree):
        tree[1][0][1][1][0][1][2].update(fields)
        return tree

    return with_tree(change)


def flipped(place):
    def damage(data, header, body):
        data = bytearray(data)
        data[place] ^= 4
        return bytes(data)

    return damage


DAMAGE = {
    "empty": (lambda data, *_: b"", r"must begin with the 8 bytes of a header's length, but has 0"),
    "cut in the header": (lambda data, *_: data[:300], r"its header should have \d+ bytes, but the file has 300"),
    "cut in the tensors": (lambda data, *_: data[:-5], r"should hold 92 bytes behind its header, but has 87: cut"),
    "longer": (lambda data, *_: data + b"x", "should hold 92 bytes behind its header, but has 93"),
    "absurd length": (lambda data, *_: b"\xff" * 8 + data[8:], r"should have 18446744073709551615 bytes, but the fi"),
    "flipped bit of a bitlayer": (flipped(-3), r"tensor 'a/kernel/words/1': is damaged: its checksum differs"),
    "flipped bit of a leaf": (flipped(-85), r"tensor 'b': is damaged: its checksum differs"),
    "flipped bit of the header": (flipped(200), r"the header is damaged: its checksum differs|its header is no JSON"),
    "flipped bit of the version": (flipped(8 + 34), r"format version 5, but this pbjax reads version 1\. Use a newer"),
    "no JSON": (lambda *_: b"\x04" + bytes(7) + b"{[}]", r"its header is no JSON"),
    "nested JSON": (lambda *_: (10**5).to_bytes(8, "little") + b"[" * 10**5, "its header is no JSON"),
    "list": (lambda *_: b"\x02" + bytes(7) + b"[]", r"its header must hold a JSON dict, but has list"),
    "plain safetensors": (
        lambda *_: safetensors.numpy.save({"b": np.ones(3)}),
        r"not written by pbjax, or damaged at its start; float weights are read by `convert`",
    ),
    "later version": (
        lambda data, *_: data.replace(b'"pbjax.version":"1"', b'"pbjax.version":"2"'),
        r"format version 2, but this pbjax reads version 1\. Use a newer pbjax",
    ),
    "repeated key": (
        lambda *_: b"\x20" + bytes(7) + b'{"a":1,"a":2}'.ljust(32),
        "its header is no JSON: a key occurs twice",
    ),
    "unknown dtype": (with_entry("b", dtype="I99"), r"tensor 'b': unknown dtype 'I99'"),
    "words of another dtype": (
        with_entry("a/kernel/words/0", dtype="I32"),
        r"tensor 'a/kernel/words/0': must be uint32\[2, 3\] for its weight, but is int32\[2, 3\]",
    ),
    "overlap": (
        with_entry("b", data_offsets=[0, 16]),
        r"tensor '\S+': begins at byte 0, but the one before ends at \d",
    ),
    "outside": (with_entry("b", data_offsets=[0, 10**9]), r"tensor 'b': I32\[4\] takes 16 bytes, but got 1000000000"),
    "absurd shape": (with_entry("b", shape=[2**61, 2**61]), r"tensor 'b': I32\[\d+, \d+\] takes \d+ bytes, but got 16"),
    "empty and absurd": (with_entry("b", shape=[0, 2**40], data_offsets=[0, 0]), r"tensor 'b': an empty tensor of abs"),
    "negative shape": (with_entry("b", shape=[-4]), r"tensor 'b': its shape or its offsets are no sensible integers"),
    "no shape": (with_entry("b", shape="4"), r"tensor 'b': its entry must hold dtype, shape and data_offsets"),
    "missing leaf": (with_tree(lambda tree: ["dict", tree[1][:1]]), r"its tree and its tensors differ: b$"),
    "leaf twice": (with_tree(lambda tree: ["list", [tree, tree]]), r"tensor '\S+': occurs twice in the tree"),
    "unknown node": (with_tree(lambda tree: ["eval", "1"]), r"its tree holds an unknown node: \['eval', '1'\]"),
    "deep tree": (
        lambda data, header, body: forged(
            {**header, "__metadata__": {**header["__metadata__"], "pbjax.tree": '["list",[' * 800 + "]]" * 800}}, body
        ),
        "nested too deeply|no JSON|unknown node",
    ),
    "bits out of range": (
        with_static(bits=17),
        r"tensor 'a/kernel': its description .*`bits` must lie in 1\.\.16",
    ),
    "fewer bits": (with_static(bits=1), r"its tree and its tensors differ: a/kernel/scale/1, a/kernel/words/1"),
    "another k": (
        with_static(packed_shape=[100, 3]),
        r"'a/kernel/words/0': must be uint32\[4, 3\] for its weight, but",
    ),
    "axes": (with_static(contract_axes=[1]), r"tensor 'a/kernel': its description .* axes are not all axes"),
    "dtype of the weight": (
        with_static(dtype="int32"),
        r"its description .* is wrong: dtype is 'int32'",
    ),
    "group size": (with_static(group_size=33), r"its description as a packed weight is wrong: group_size is 33"),
    "field": (with_static(more=1), r"its description as a packed weight is wrong: fields are activation_bits, bits"),
}


@pytest.mark.parametrize(("damage", "match"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_files(path, damage, match):
    """One kind of error, which names the file, the tensor where there is one, and the reason."""
    path.write_bytes(damage(*whole_file(path)))
    with pytest.raises(files.FileError, match=match) as caught:
        pbjax.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert caught.value.path == str(path)


def test_bitlayers_out_of_range(path):
    tree = pbjax.quantize({"kernel": normal(40, 3)}, 2)
    pbjax.save(path, {"kernel": tree["kernel"].replace(bitlayers=jnp.int32(3))})
    with pytest.raises(files.FileError, match=r"tensor 'kernel/bitlayers': must lie in 1\.\.2, the bitlayers stored"):
        pbjax.load(path)


INDEX_DAMAGE = {
    "folder": (lambda index, name: index["weight_map"].update({name: "../x"}), "in no file that the index lists"),
    "number": (lambda index, name: index["weight_map"].update({name: 3}), "in no file that the index lists: '3'"),
    "path": (lambda index, name: index["metadata"]["pbjax.shards"].update({"../x": "0"}), r"must lie beside the index"),
    "checksum": (
        lambda index, name: index["metadata"]["pbjax.shards"].update({index["weight_map"][name]: "00000000"}),
        "is another file than the one that the index lists",
    ),
    "tensor": (lambda index, name: index["weight_map"].pop(name), "its tree and its tensors differ"),
    "no map": (lambda index, name: index.pop("weight_map"), "an index must hold metadata and weight_map"),
}


@pytest.mark.parametrize(("damage", "match"), INDEX_DAMAGE.values(), ids=INDEX_DAMAGE)
def test_damaged_index(path, damage, match):
    pbjax.save(path, {"x": jnp.ones(200), "y": jnp.ones(200)}, max_shard_bytes=900)
    index = Path(f"{path}.index.json")
    document = json.loads(index.read_text())
    for key in ("pbjax.version", "pbjax.checksum"):
        del document["metadata"][key]
    damage(document, "x")
    index.write_bytes(_layout.seal(document))
    with pytest.raises(files.FileError, match=match):
        pbjax.load(path)


def test_files_of_two_checkpoints_are_told_apart(path):
    for value in (1, 2):
        pbjax.save(path.with_name(f"{value}"), {"x": jnp.full(200, value), "y": jnp.ones(200)}, max_shard_bytes=900)
    ones, twos = (sorted(path.parent.glob(f"{value}-*")) for value in (1, 2))
    ones[0].write_bytes(twos[0].read_bytes())
    with pytest.raises(files.FileError, match=f"{ones[0].name}: is another file than the one that the index lists"):
        pbjax.load(path.with_name("1"))


def test_verify_finds_all_damaged_tensors(path):
    data, header, body = whole_file(path)
    for place in (-1, -85):
        data = flipped(place)(data, header, body)
    path.write_bytes(data)
    assert [error.tensor for error in files.verify(path)] == ["a/kernel/words/1", "b"]
    path.write_bytes(with_static(packed_shape=[100, 3])(*whole_file(path)))
    assert [error.tensor for error in files.verify(path)] == ["a/kernel/words/0"]


def test_verify_reads_padding(path):
    pbjax.save(path, {"odd": np.ones(3, np.uint8), **packed_tree()})
    with _checkpoint.Source(str(path)) as source:
        place = source.header.start + source.header.entries[_layout.PADDING].begin
    assert files.verify(path) == []
    data = bytearray(path.read_bytes())
    data[place] = 1
    path.write_bytes(data)
    assert [error.tensor for error in files.verify(path)] == [_layout.PADDING]


def test_damage_behind_the_prefix_is_not_read(path):
    """A flipped bit of the last bitlayer is found where it is read, and only there."""
    data, header, body = whole_file(path)
    path.write_bytes(flipped(-1)(data, header, body))
    assert pbjax.load(path, bits=1)["a"]["kernel"].bits == 1
    with pytest.raises(files.FileError, match="'a/kernel/words/1': is damaged"):
        pbjax.load(path)


def test_error_survives_pickling():
    import pickle

    error = pickle.loads(pickle.dumps(files.FileError("p", "r", "t")))
    assert (error.path, error.reason, error.tensor, str(error)) == ("p", "r", "t", "p: tensor 't': r")


def test_random_damage():
    """In a process of its own, whose address space is limited. `.ci/run` takes more."""
    command = [sys.executable, "-W", "error", "-m", "tests.fuzz_files", "5000"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "5000 mutations in" in result.stdout
    for outcome in ("refused, file named", "refused, tensor named", "read, as the description said", "read, unharmed"):
        assert re.search(rf"[1-9]\d* {outcome}", result.stdout), result.stdout


def test_fuzzer_would_notice(monkeypatch):
    """With checksums that are always right, damaged weights are read: the fuzzer says so."""
    monkeypatch.setattr(fuzz_files, "limit_memory", lambda num_bytes: None)
    monkeypatch.setattr(
        _checkpoint.Checkpoint, "read", lambda self, name, target=None: self.source(name).read(name, target)
    )
    with pytest.raises(AssertionError):
        fuzz_files.run(2000)


# Arguments of load.


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
