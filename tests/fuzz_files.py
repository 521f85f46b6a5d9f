"""Damaged files: random mutations, each of which `pbjax.load` must refuse with a FileError, or survive unharmed.

`python -m tests.fuzz_files COUNT [SEED]` runs COUNT mutations and prints how they ended. Half of them are made in the
bytes of a file, the other half in its description, under checksums that are made right again, as damage by a program
would be. Address space is limited, so that an allocation that a file's numbers ask for, not its size, is an error.
"""

from __future__ import annotations

import collections
import json
import os
import random
import resource
import sys
import tempfile
import time
import zlib
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import pbjax
from pbjax import files
from pbjax.files import _layout

NASTY = [
    *(-1, 0, 1, 2, 3, 5, 31, 64, 255, 2**31 - 1, 2**31, 2**53, 2**62, 2**63, 2**64, 10**30, 1.5, 1e400, float("nan")),
    *(None, True, False, "", "x", "F32", "I64", "BOOL", "U32", "F4", "key", "array", "bits", "dict", "../x", "float32"),
    *([], {}, [[]], [0], [2**40, 2**40], [0, 2**62], [1] * 40, {"tuple": [[]]}, ["none"], ["array", "bias"]),
    *(["nnx.State", []], ["nnx.Variable", "Param", [], ["none"]], ["other", "os.system", [["none"]]], ["list", 3]),
    json.loads("[" * 300 + "]" * 300),
]


def example_tree():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(40, 3)).astype(np.float32)
    stack = rng.normal(size=(2, 40, 3)).astype(np.float32)
    rules = {"stack": pbjax.Spec(bits=5, stack=(0,), contract=(1,), group_size=32)}
    packed = pbjax.quantize({"kernel": kernel, "stack": stack}, 3, rules=rules)
    return {
        **packed,
        "bias": jnp.arange(3, dtype=jnp.bfloat16),
        "rest": [(jnp.array([True]), 3, 0.5), None, "text"],
        "key": jax.random.key(1),
        "state": nnx.State({0: nnx.Param(jnp.ones(2))}),
    }


def mutate_bytes(rng, data):
    """Damage as disks, transfers and hands do it."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        # Headers are more interesting than weights, and the first bytes than the others.
        place = min(int(len(data) * rng.random() ** rng.choice((1, 1, 3, 9))), len(data) - 1)
        size = rng.choice((1, 1, 2, 4, 8, 64, 1000))
        match rng.randrange(8):
            case 0 | 1:
                data[place] ^= 1 << rng.randrange(8)
            case 2:
                data[place] = rng.randrange(256)
            case 3:
                del data[place : place + size]
            case 4:
                data[place:place] = rng.randbytes(size)
            case 5:
                data[place : place + size] = bytes(len(data[place : place + size]))
            case 6:
                del data[place:]
            case 7:
                data[:8] = rng.choice((rng.randrange(2**16), rng.randrange(2**64), 2**64 - 1)).to_bytes(8, "little")
        if not data:
            break
    return bytes(data)


def mutate_description(rng, data):
    """A header that says something else, with lengths and checksums that fit it."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header[_layout.METADATA]
    for key in ("pbjax.version", "pbjax.checksum"):
        del metadata[key]
    tree = json.loads(metadata["pbjax.tree"])
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.5:
            tree = change(rng, tree)
        else:
            changed = change(rng, header)
            header = changed if isinstance(changed, dict) else header
    metadata = header.pop(_layout.METADATA, {})
    if isinstance(metadata, dict):
        metadata["pbjax.tree"] = json.dumps(tree)
        if rng.random() < 0.5:
            metadata["pbjax.crc32"] = "".join(checksum_of(entry, body) for entry in header.values())
    else:
        metadata = {}
    text = _layout.seal({_layout.METADATA: metadata, **header})
    if rng.random() < 0.1:
        body = mutate_bytes(rng, body)
    return len(text).to_bytes(8, "little") + text + body


def checksum_of(entry, body):
    try:
        begin, end = entry["data_offsets"]
        return f"{zlib.crc32(body[begin:end]):08x}"
    except (TypeError, KeyError, ValueError):
        return "0" * 8


def change(rng, value):
    """A JSON value with one place in it changed."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.15:
        return rng.choice(NASTY)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = rng.choice(keys)
    value = value.copy()
    match rng.randrange(10):
        case 0:
            del value[key]
        case 1 if isinstance(value, list):
            value.insert(key, value[key])
        case 1:
            value[f"{key}2"] = value[key]
        case 2 if isinstance(value, dict):
            value[rng.choice(keys)] = value.pop(key)
        case 3 if type(value[key]) is int:
            value[key] += rng.choice((-8, -4, -1, 1, 4, 32))
        case 4:
            other = rng.choice(keys)
            value[key], value[other] = value[other], value[key]
        case _:
            value[key] = change(rng, value[key])
    return value


def contents(tree):
    leaves, treedef = jax.tree.flatten(tree)
    is_key = lambda leaf: jnp.issubdtype(getattr(leaf, "dtype", object), jax.dtypes.prng_key)  # noqa: E731
    leaves = [jax.random.key_data(leaf) if is_key(leaf) else leaf for leaf in leaves]
    return str(treedef), [(np.asarray(leaf).dtype.name, np.shape(leaf), np.asarray(leaf).tobytes()) for leaf in leaves]


def run(count, seed=0):
    """Outcomes of `count` mutations, counted.

    Raises:
      AssertionError: a mutation that was taken for a whole file with other contents.
      Exception: whatever `pbjax.load` raises that it should not.
    """
    rng = random.Random(seed)
    outcomes = collections.Counter()
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place) / "model.safetensors"
        pbjax.save(path, example_tree())
        data, whole = path.read_bytes(), contents(pbjax.load(path))
        limit_memory(2**30)
        for i in range(count):
            damaged = (mutate_bytes, mutate_description)[i % 2](rng, data)
            path.write_bytes(damaged)
            try:
                tree = pbjax.load(path, bits=rng.choice((None, None, 2)))
            except files.FileError as error:
                if error.path != str(path):
                    raise
                outcomes["refused, " + ("tensor named" if error.tensor is not None else "file named")] += 1
            except ValueError as error:
                if i % 2 == 0 or not str(error).startswith(("`like` must be given", "`bits` must come with")):
                    raise
                outcomes["another tree, refused for its classes or for `bits`"] += 1
            else:
                if i % 2:
                    contents(tree)
                    outcomes["read, as the description said"] += 1
                else:
                    assert damaged == data or contents(tree) in (whole, contents(pbjax.truncate(example_tree(), 2)))
                    outcomes["read, unharmed"] += 1
    return outcomes


def limit_memory(num_bytes):
    """Allows the process so much more address space than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + num_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    start = time.perf_counter()
    outcomes = run(int(sys.argv[1]), *map(int, sys.argv[2:]))
    for outcome, number in sorted(outcomes.items()):
        print(f"{number:8} {outcome}")  # noqa: T201
    print(f"{sum(outcomes.values())} mutations in {time.perf_counter() - start:.0f} s")  # noqa: T201
