"""`pbjax.files.convert`: checkpoints of float weights, as Hugging Face's libraries write them, packed one by one."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

import pbjax
from pbjax import files


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture
def checkpoint(tmp_path):
    """Two files and their index, under names of PyTorch."""
    parts = {
        "model-00001-of-00002.safetensors": {
            "transformer.h.0.attn.q_proj.weight": normal(16, 32),
            "transformer.h.0.attn.q_proj.bias": normal(16),
            "transformer.h.0.conv.weight": normal(8, 4, 3, 3, seed=1),
        },
        "model-00002-of-00002.safetensors": {
            "transformer.wte.weight": normal(20, 32, seed=2).astype(np.float16),
            "transformer.h.0.rotary": np.arange(4),
        },
    }
    for name, tensors in parts.items():
        safetensors.numpy.save_file(tensors, tmp_path / name)
    weight_map = {tensor: name for name, tensors in parts.items() for tensor in tensors}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return tmp_path, {tensor: array for tensors in parts.values() for tensor, array in tensors.items()}


RENAME = {
    r"^transformer\.h\.(\d+)\.attn\.(.)_proj\.weight$": (r"blocks_\1.attn.\2.kernel", (1, 0)),
    r"^transformer\.h\.(\d+)\.conv\.weight$": (r"blocks_\1.conv.kernel", (2, 3, 1, 0)),
    r"\.rotary$": None,
    r"^transformer\.h\.(\d+)\.attn\.(.)_proj": r"blocks_\1.attn.\2",
    r"^transformer\.wte\.weight$": "embed/embedding",
}


def test_names_become_paths_by_rule(checkpoint, tmp_path):
    """The same tree as renaming and quantizing by hand, to the last bit, from a folder or its index."""
    folder, tensors = checkpoint
    expected = {
        "blocks_0": {
            "attn": {
                "q": {
                    "kernel": tensors["transformer.h.0.attn.q_proj.weight"].T,
                    "bias": tensors["transformer.h.0.attn.q_proj.bias"],
                }
            },
            "conv": {"kernel": tensors["transformer.h.0.conv.weight"].transpose(2, 3, 1, 0)},
        },
        "embed": {"embedding": tensors["transformer.wte.weight"]},
    }
    rules = {"embedding": pbjax.Spec(bits=4, contract=(1,))}
    expected = pbjax.quantize(expected, 6, rules=rules, group_size=32)
    for source in (folder, folder / "model.safetensors.index.json", folder / "model.safetensors"):
        report = files.convert(
            source, tmp_path / "q", 6, rename=RENAME, rules=rules, group_size=32, metadata={"from": "x"}, errors=True
        )
        loaded = pbjax.load(tmp_path / "q")
        assert jax.tree.structure(loaded) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    assert files.info(tmp_path / "q").metadata == {"from": "x"}
    assert {row.path: len(row.errors) for row in report.rows} == {
        "blocks_0/attn/q/kernel": 6,
        "blocks_0/conv/kernel": 6,
        "embed/embedding": 4,
    }
    assert all(0 < row.errors[-1] < row.errors[0] < 1 for row in report.rows)


def test_trees_of_floats_keep_their_structure(tmp_path):
    """A file of `pbjax.save` is quantized as it stands, with all that is not packed, whatever its classes."""
    tree = {"a": [{"kernel": normal(40, 3)}, None, 3.5], "k": jax.random.key(1), "b": np.ones(2, np.int8)}
    pbjax.save(tmp_path / "floats", tree)
    files.convert(tmp_path / "floats", tmp_path / "q", 4)
    expected = pbjax.quantize(tree, 4)
    loaded = pbjax.load(tmp_path / "q")
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    np.testing.assert_array_equal(loaded["a"][0]["kernel"].words, expected["a"][0]["kernel"].words)
    assert files.verify(tmp_path / "q") == []
    with pytest.raises(ValueError, match="`rename` must be left out for a file that holds a tree"):
        files.convert(tmp_path / "q", tmp_path / "x", 4, rename={"a": "b"})


def test_what_is_packed_is_not_packed_again(tmp_path):
    """Packed weights stay beside float ones packed later; where all are packed, the error points to `truncate`."""
    tree = {"a": {"kernel": normal(40, 3)}, "b": {"kernel": normal(40, 5)}}
    pbjax.save(tmp_path / "floats", tree, {"from": "x"})
    files.convert(tmp_path / "floats", tmp_path / "q", 4, rules={"b": None})
    files.convert(tmp_path / "q", tmp_path / "q", 2)
    assert files.info(tmp_path / "q").metadata == {"from": "x"}
    expected = pbjax.quantize(tree, 2, rules={"a": 4})
    jax.tree.map(np.testing.assert_array_equal, pbjax.load(tmp_path / "q"), expected)
    with pytest.raises(ValueError, match=r"`source` must hold a float weight to pack, but .* already\. Use `truncate`"):
        files.convert(tmp_path / "q", tmp_path / "again", 1)
    assert not (tmp_path / "again").exists()


def test_names_of_a_source_that_are_no_paths(tmp_path):
    """A reserved name, and a tensor two levels below another, as some programs store their quantization."""
    source = tmp_path / "model.safetensors"
    for name, match in (
        ("__padding__", r"a name that is not reserved, but __padding__ comes to '__padding__'"),
        ("l.kernel.state.nf4", r"must not put tensors below a tensor, but l/kernel(/state/nf4)? is, or has, one"),
    ):
        safetensors.numpy.save_file({"l.kernel": normal(4, 4), name: normal(4)}, source)
        with pytest.raises(ValueError, match=match):
            files.convert(source, tmp_path / "q", 4, rules={"kernel$": 4})
        assert list(tmp_path.iterdir()) == [source]
        files.convert(source, tmp_path / "q", 4, rename={r"__padding__|nf4": None})
        assert list(pbjax.load(tmp_path / "q")) == ["l"]
        (tmp_path / "q").unlink()


ERRORS = {
    "no match": (
        {"nope": "x"},
        ValueError,
        r"`rename` must name tensors of the checkpoint, but pattern 'nope'",
    ),
    "no group": ({"attn": r"\7"}, ValueError, r"`rename` must refer to groups of its pattern, but '\\\\7' does not"),
    "axes": ({"wte": ("e.kernel", (0, 2))}, ValueError, r"`rename` must order all 2 axes of transformer\.wte\.weight"),
    "kind": ({"wte": 3}, TypeError, r"`rename` must hold text, \(text, axes\) or None, but got 3 for 'wte'"),
    "one path": ({".*": "kernel"}, ValueError, r"a path of its own, but two come to kernel"),
    "metadata": (
        {".*wte.*": "__metadata__"},
        ValueError,
        r"not reserved, but transformer.wte.weight comes to '__metad",
    ),
    "padding": (
        {".*wte.*": "__padding__"},
        ValueError,
        r"not reserved, but transformer.wte.weight comes to '__padding",
    ),
    "below": ({r".*wte.*": "a", r".*conv.*": "a.b"}, ValueError, r"must not put tensors below a tensor, but a(/b)? is"),
    "nothing chosen": ({"wte": "x"}, ValueError, r"`tree` must hold a weight to quantize, but none of its 5 leaves"),
}


@pytest.mark.parametrize(("rename", "error", "match"), ERRORS.values(), ids=ERRORS)
def test_rules_that_do_not_fit(checkpoint, tmp_path, rename, error, match):
    with pytest.raises(error, match=match):
        files.convert(checkpoint[0], tmp_path / "q", 4, rename=rename)
    assert not (tmp_path / "q").exists()


def test_weights_that_cannot_be_packed(tmp_path):
    safetensors.numpy.save_file({"a.kernel": np.full((4, 4), np.nan, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="a weight to quantize must be finite, but a/kernel holds a NaN"):
        files.convert(tmp_path, tmp_path / "q", 4)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_damaged_indices(checkpoint, tmp_path):
    index = checkpoint[0] / "model.safetensors.index.json"
    for weight_map, match in (
        ({"x": "model-00001-of-00002.safetensors"}, "tensor 'x': is not there, though the index lists it"),
        ({"x": "../model.safetensors"}, "files must lie beside the index"),
        ({}, "an index must hold a weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(files.FileError, match=match):
            files.convert(checkpoint[0], tmp_path / "q", 4)


MEMORY = """
import resource, sys
import jax, numpy as np
from pbjax import files
def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
folder = sys.argv[1]
files.convert(f"{folder}/one", f"{folder}/q", 8)  # compiles, and takes what one tensor takes
first = peak()
files.convert(f"{folder}/many", f"{folder}/q", 8, max_shard_bytes=2**25)
print("grew by", peak() - first)
"""


def test_memory_is_that_of_one_tensor(tmp_path):
    """The peak of a process that has converted one tensor hardly grows with 24 of them."""
    shape = (1024, 2048)
    for folder, count in (("one", 1), ("many", 24)):
        (tmp_path / folder).mkdir()
        tensors = {f"l{i}.kernel": normal(*shape) for i in range(count)}
        safetensors.numpy.save_file(tensors, tmp_path / folder / "model.safetensors")
    command = [sys.executable, "-c", MEMORY, tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    grown = int(re.fullmatch(r"grew by (-?\d+)\n", result.stdout)[1])
    one = 4 * shape[0] * shape[1]
    assert grown < 2 * one, f"{grown / one:.1f} tensors"
