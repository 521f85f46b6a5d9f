"""Faults of files: damage of any kind is found, and the error names the file, the tensor and the reason."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import pbjax
from pbjax import files
from pbjax.files import _checkpoint, _layout
from tests import fuzz_files
from tests.saved import normal, packed_tree


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
