"""Faults of writers: a file is old or new and whole, and an error names what cannot be saved."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pbjax
from pbjax import files
from tests.saved import assert_same, normal, packed_tree


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
