"""`jax.export`: whole models on bitlayers, serialized, loaded by a process that knows no model, with equal bits."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import pbjax
from pbjax import _backends

# What serves a model that it has only the file of: pbjax for the type of the weights, and no Flax.
LOAD = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
import jax, jax.export, numpy as np, pbjax
folder = sys.argv[1]
exported = jax.export.deserialize(bytearray(open(f"{folder}/model.bin", "rb").read()))
data = np.load(f"{folder}/data.npz")
args, kwargs = jax.tree.unflatten(exported.in_tree, [data[f"arr_{i}"] for i in range(exported.in_tree.num_leaves)])
for b in range(1, 7):
    y = exported.call(pbjax.with_bitlayers(args[0], b), args[1])
    np.testing.assert_array_equal(y, np.load(f"{folder}/{b}.npy"))
print("equal on", jax.devices()[0].platform, "from", *exported.platforms)
"""


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(40)(x))
        return nn.Dense(3)(x)


def model_and_arguments():
    x = np.array(jax.random.normal(jax.random.key(1), (5, 70)))
    variables = MLP().init(jax.random.key(0), x)
    return pbjax.quantized(MLP().apply), (pbjax.quantize(variables, 6, group_size=32), x)


@pytest.mark.parametrize(
    ("backend", "platforms"),
    [
        ("xla", ("cpu",)),
        ("xla", ("cpu", "cuda")),
        ("reference", ("cpu", "cuda")),
        ("xla", ("cuda", "cpu", "rocm", "tpu")),
        (None, ("cpu",)),  # the automatic choice is one that needs no pbjax where it runs
        (None, ("cpu", "cuda")),
    ],
)
def test_model_in_a_fresh_process(tmp_path, backend, platforms):
    """From a machine without a GPU; the number of bitlayers stays an argument, and the bits those of any backend."""
    fn, args = model_and_arguments()
    with pbjax.use_backend(backend):
        exported = jax.export.export(jax.jit(fn), platforms=platforms)(*args)
    assert exported.platforms == platforms
    (tmp_path / "model.bin").write_bytes(exported.serialize())
    np.savez(tmp_path / "data.npz", *jax.tree.leaves(args))
    for b in range(1, 7):
        np.save(tmp_path / f"{b}.npy", jax.jit(fn)(pbjax.with_bitlayers(args[0], b), args[1]))
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", LOAD, tmp_path], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == f"equal on cpu from {' '.join(platforms)}\n"


def test_export_does_not_depend_on_the_tracing_machine(monkeypatch):
    """A backend that only one platform has is in the program for that platform alone."""

    def matmul(problem, *operands):
        return -_backends.BACKENDS["xla"].matmul(problem, *operands)  # to be told apart

    native = dataclasses.replace(_backends.BACKENDS["xla"], name="native", platforms=("cpu",), matmul=matmul)
    monkeypatch.setattr(_backends, "BACKENDS", {"native": native, **_backends.BACKENDS})
    _, (qvariables, x) = model_and_arguments()
    kernel = qvariables["params"]["Dense_0"]["kernel"]
    product = jax.jit(lambda x, w: pbjax.matmul(x, w))
    texts = {
        platforms: jax.export.export(product, platforms=platforms)(x, kernel).mlir_module()
        for platforms in (("cpu",), ("cuda",), ("cpu", "cuda"))
    }
    with pbjax.use_backend("xla"):
        plain = {p: jax.export.export(product, platforms=p)(x, kernel).mlir_module() for p in (("cpu",), ("cuda",))}
    negations = {platforms: text.count("stablehlo.negate") for platforms, text in texts.items()}
    assert negations[("cpu",)] == plain[("cpu",)].count("stablehlo.negate") + 1
    assert negations[("cuda",)] == plain[("cuda",)].count("stablehlo.negate")
    restored = jax.export.deserialize(jax.export.export(product, platforms=("cpu", "cuda"))(x, kernel).serialize())
    np.testing.assert_array_equal(restored.call(x, kernel), -pbjax.matmul(x, kernel, backend="xla"))


def test_the_library_is_exported_by_name_only():
    """What calls it elsewhere needs pbjax there, so JAX asks for a word more."""
    if _backends.BACKENDS["cpu"].unavailable("cpu"):
        pytest.skip("the C++ library was not built")
    fn, args = model_and_arguments()
    with pbjax.use_backend("cpu"):
        with pytest.raises(ValueError, match="pbjax_bit_matmul"):
            jax.export.export(jax.jit(fn), platforms=("cpu",))(*args)
        allowed = [jax.export.DisabledSafetyCheck.custom_call("pbjax_bit_matmul")]
        exported = jax.export.export(jax.jit(fn), platforms=("cpu",), disabled_checks=allowed)(*args)
    np.testing.assert_array_equal(exported.call(*args), jax.jit(fn)(*args))


@pytest.mark.parametrize("backend", ["mosaic", "triton"])
def test_gpu_backend_by_name_needs_a_gpu(backend):
    """An explicit choice runs or raises: it is no choice for a platform that is not there."""
    fn, args = model_and_arguments()
    with pbjax.use_backend(backend), pytest.raises(pbjax.Unsupported, match=f"backend '{backend}'"):
        jax.export.export(jax.jit(fn), platforms=("cpu", "cuda"))(*args)


def test_tree_of_bit_tensors_is_restored():
    """With stack axes and every static field."""
    rules = {"kernel": pbjax.Spec(bits=5, stack=(0,), contract=(2,), group_size=32, activation_bits=None)}
    tree = {"kernel": jnp.ones((2, 3, 64), jnp.bfloat16)}
    q = pbjax.quantize(tree, 4, rules=rules)
    exported = jax.export.export(jax.jit(lambda q: pbjax.with_bitlayers(q, 2)))(q)
    restored = jax.export.deserialize(exported.serialize())
    assert restored.in_tree == exported.in_tree == jax.tree.structure(((q,), {}))
    assert jax.tree.structure(restored.call(q)) == jax.tree.structure(q)
    np.testing.assert_array_equal(restored.call(q)["kernel"].bitlayers, [2, 2])
