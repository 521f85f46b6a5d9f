"""`python -m pbjax`: what it does, prints and returns."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import pbjax
from pbjax import files
from pbjax.__main__ import main


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


TENSORS = {
    "model.layers.0.fc.weight": normal(48, 64),  # PyTorch's order, (out, in)
    "model.layers.0.fc.bias": np.ones(48, np.float16),
    "embed.weight": normal(10, 64, seed=1),
}
RENAME = {
    r"^model\.layers\.(\d+)\.fc\.weight$": [r"layers_\1.fc.kernel", [1, 0]],
    r"^model\.layers\.(\d+)": r"layers_\1",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    safetensors.numpy.save_file(TENSORS, "floats.safetensors", {"format": "pt"})
    return tmp_path


def quantize(*options):
    command = ["quantize", "floats.safetensors", "q.safetensors", "--bits", "8", "--rename", json.dumps(RENAME)]
    return main([*command, *options])


def printed(capsys):
    out, err = capsys.readouterr()
    return out, err


def test_quantize_is_the_functions(folder, capsys):
    """From PyTorch's names and orders of axes to a tree of Flax's, the same bits as `pbjax.quantize`."""
    rules = {"fc/kernel": {"bits": 6, "contract": [0]}, "embed": {"contract": [1], "activation_bits": None}}
    (folder / "rules.json").write_text(json.dumps(rules))
    assert quantize("--rules", "rules.json", "--group-size", "32", "--activation-bits", "8", "--json") == 0
    done = json.loads(printed(capsys)[0])
    assert [row["path"] for row in done["weights"]] == ["embed/weight", "layers_0/fc/kernel", "total"]
    assert 0 < done["weights"][1]["errors"][5] < done["weights"][1]["errors"][0] < 1
    tree = {
        "embed": {"weight": TENSORS["embed.weight"]},
        "layers_0": {
            "fc": {"kernel": TENSORS["model.layers.0.fc.weight"].T, "bias": TENSORS["model.layers.0.fc.bias"]}
        },
    }
    specs = {
        "fc/kernel": pbjax.Spec(bits=6),
        "embed": pbjax.Spec(contract=(1,), activation_bits=None),
    }
    expected = pbjax.quantize(tree, 8, rules=specs, group_size=32, activation_bits=8)
    loaded = pbjax.load("q.safetensors")
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)


def test_info(folder, capsys):
    quantize()
    capsys.readouterr()
    assert main(["info", "q.safetensors"]) == 0
    table = printed(capsys)[0]
    for text in ("layers_0/fc/kernel", "64x48", "float32", "3,844", "error 4", "embed/weight", "format version 1"):
        assert text in table
    assert main(["info", "q.safetensors", "--json"]) == 0
    leaves = {leaf["path"]: leaf for leaf in json.loads(printed(capsys)[0])["leaves"]}
    kernel = leaves["layers_0/fc/kernel"]
    assert (kernel["bits"], kernel["shape"], kernel["num_bytes"]) == (8, [64, 48], 8 * 2 * 48 * 4 + 4 * 48 * 4 + 4)
    report = pbjax.report(pbjax.load("q.safetensors"))
    assert kernel["errors"] == list(report.rows[0].errors)
    assert leaves["embed/weight"]["bits"] is None
    assert main(["info", "q.safetensors", "--json", "--no-errors"]) == 0
    assert json.loads(printed(capsys)[0])["leaves"][0]["errors"] == []


def test_info_of_every_kind_of_leaf(folder, capsys):
    pbjax.save("x", {"a": 3, "b": None, "key": jax.random.split(jax.random.key(0)), "c": jnp.ones((2, 3))}, {"n": 1})
    assert main(["info", "x", "--json"]) == 0
    info = json.loads(printed(capsys)[0])
    found = {leaf["path"]: (leaf["dtype"], leaf["shape"]) for leaf in info["leaves"]}
    assert found == {"a": (None, []), "key": ("key<threefry2x32>", [2]), "c": ("float32", [2, 3])}
    assert info["metadata"] == {"n": 1}


def test_truncate(folder, capsys):
    quantize()
    assert main(["truncate", "q.safetensors", "q4.safetensors", "--bits", "4"]) == 0
    expected = pbjax.truncate(pbjax.load("q.safetensors"), 4)
    jax.tree.map(np.testing.assert_array_equal, pbjax.load("q4.safetensors"), expected)
    assert os.path.getsize("q4.safetensors") < os.path.getsize("q.safetensors")
    assert (
        main(["truncate", "q.safetensors", "q.safetensors", "--bits", "2", "--force", "--max-shard-bytes", "600"]) == 0
    )
    jax.tree.map(np.testing.assert_array_equal, pbjax.load("q.safetensors"), pbjax.truncate(expected, 2))
    assert not os.path.exists("q.safetensors")
    assert os.path.exists("q.safetensors.index.json")
    capsys.readouterr()
    assert main(["verify", "q.safetensors"]) == 0
    assert printed(capsys)[0] == "q.safetensors: whole\n"


def test_verify_names_damaged_tensors(folder, capsys):
    quantize()
    data = bytearray((folder / "q.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "q.safetensors").write_bytes(data)
    capsys.readouterr()
    assert main(["verify", "q.safetensors"]) == 1
    assert printed(capsys)[0] == (
        "q.safetensors: tensor 'layers_0/fc/kernel/words/7': is damaged: its checksum differs\n"
    )
    assert main(["verify", "q.safetensors", "--json"]) == 1
    assert json.loads(printed(capsys)[0])["damaged"][0]["tensor"] == "layers_0/fc/kernel/words/7"
    assert main(["truncate", "q.safetensors", "q4.safetensors", "--bits", "4"]) == 0  # the damage lies behind
    assert main(["verify", "q4.safetensors"]) == 0


FAILURES = {
    "damaged": (["verify", "empty"], 1, "must begin with the 8 bytes"),
    "plain floats": (["info", "floats.safetensors"], 1, "float weights are read by `convert`"),
    "no command": ([], 2, "usage"),
    "no bits": (["truncate", "q.safetensors", "out"], 2, "--bits"),
    "bits": (["truncate", "q.safetensors", "out", "--bits", "17"], 2, r"`bits` must lie in 1..16"),
    "nothing to quantize": (["quantize", "floats.safetensors", "out", "--bits", "4"], 2, "none of its 3 leaves"),
    "there already": (["truncate", "q.safetensors", "q.safetensors", "--bits", "4"], 2, "Replace it with --force"),
    "rules": (["quantize", "floats.safetensors", "out", "--bits", "4", "--rules", "{"], 2, "neither JSON nor a JSON"),
    "rule": (
        ["quantize", "floats.safetensors", "out", "--bits", "4", "--rules", '{"fc": {"bit": 3}}'],
        2,
        "rules must hold fields of pbjax.Spec, but got bit",
    ),
    "rules as a list": (
        ["quantize", "floats.safetensors", "out", "--bits", "4", "--rules", "list.json"],
        2,
        "JSON obj",
    ),
    "bits as text": (["truncate", "q.safetensors", "out", "--bits", "x"], 2, "argument --bits: invalid int value: 'x'"),
    "rules as a JSON list": (
        ["quantize", "floats.safetensors", "out", "--bits", "4", "--rules", "[1]"],
        2,
        "argument --rules: must be a JSON object",
    ),
    "reserved name": (
        ["quantize", "floats.safetensors", "out", "--bits", "4", "--rename", '{".*embed.*": "__metadata__"}'],
        2,
        "a name that is not reserved",
    ),
    "packed already": (["quantize", "q.safetensors", "out", "--bits", "4"], 2, "Use `truncate` for fewer bitlayers"),
    "no file": (["info", "nothing"], 3, "No such file"),
    "no folder": (
        ["truncate", "q.safetensors", "no/out", "--bits", "4"],
        3,
        "a folder that is there, but got 'no/out'",
    ),
    "folder without a model": (["quantize", ".", "out", "--bits", "4"], 3, "holds neither model.safetensors nor"),
}


@pytest.mark.parametrize(("arguments", "code", "message"), FAILURES.values(), ids=FAILURES)
def test_failures(folder, capsys, arguments, code, message):
    """An exit code for each kind, a message on standard error, and no file written."""
    (folder / "empty").write_bytes(b"")
    (folder / "list.json").write_text("[]")
    quantize("--no-errors")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    capsys.readouterr()
    assert main(arguments) == code
    out, err = printed(capsys)
    assert out == ""
    assert message in err
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    if arguments:
        assert main([*arguments, "--json"]) == code
        failure = json.loads(printed(capsys)[0])
        assert failure["exit_code"] == code
        assert message in failure["error"]


def test_as_a_process(folder):
    """Through the interpreter, with the exit code of the process, and help that documents the codes."""
    run = [sys.executable, "-W", "error", "-m", "pbjax"]
    help_text = subprocess.run([*run, "--help"], capture_output=True, text=True, timeout=120, check=True).stdout
    for word in ("quantize", "info", "truncate", "verify", "exit codes: 0 done; 1 a file is damaged"):
        assert word in " ".join(help_text.split())
    result = subprocess.run([*run, "info", "nothing"], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 3
    assert result.stderr == "python -m pbjax: [Errno 2] No such file or directory: 'nothing'\n"


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_output_that_cannot_be_written(folder, options):
    """One line on standard error and the code of the system's errors, from commands that print text, tables, JSON."""
    quantize("--no-errors")
    for command in ("verify", "info"):
        with open("/dev/full", "w") as full:
            result = subprocess.run(
                [sys.executable, "-W", "error", "-m", "pbjax", command, "q.safetensors", *options],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                timeout=120,
                check=False,
            )
        assert result.stderr == "python -m pbjax: [Errno 28] No space left on device\n"
        assert result.returncode == 3


def test_names_are_no_markup(folder, capsys):
    """Brackets and colons in names of files and leaves are printed as they are."""
    name, leaf = "[bold]m:key:.[0]", "w[red]:key:[/x]"
    pbjax.save(name, {leaf: np.ones(3, np.float32)})
    assert main(["info", name]) == 0
    table = printed(capsys)[0]
    assert name in table
    assert leaf in table
    for text in (f"{name}: whole\n", f"{name}: tensor '{leaf}': is damaged: its checksum differs\n"):
        main(["verify", name])
        assert printed(capsys)[0] == text
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)


def test_progress_bars_go_to_standard_error(folder, capsys):
    files.convert("floats.safetensors", "q", 4, rules={"fc/weight": 4}, progress=True)
    files.truncate("q", "q2", 2, progress=True)
    files.verify("q2", progress=True)
    files.info("q2", errors=True, progress=True)
    out, err = printed(capsys)
    assert out == ""
    for what in ("quantize", "truncate", "verify", "errors"):
        assert what in err
    assert err.count("100%") >= 4
