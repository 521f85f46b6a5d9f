"""The C++ backend beyond the table of cases: every set of instructions, threads, and calls as XLA makes them."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
import platform
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pbjax
from cpu_kernels import bit_matmul as cpu
from pallas_kernels.bit_matmul import xla
from tests.cases import normal
from tests.test_product import Case, operands

# Where it has to be there, as in CI, a build that failed is no run of skipped tests.
EXPECTED = bool(os.environ.get("PBJAX_EXPECT_CPU"))
pytestmark = pytest.mark.skipif(not cpu.instructions() and not EXPECTED, reason=str(cpu.missing("cpu")))


def test_it_was_built():
    assert cpu.missing("cpu") is None
    assert cpu.instructions()[-1] == "portable"


# Wider and deeper than the table of all backends: several blocks of channels and of words, full and partial.
CASES = (
    Case(bits=8, bitlayers=8, m=1, k=1100, n=1100),
    Case(bits=2, bitlayers=2, m=1, k=4100, n=77, group_size=1024),
    Case(bits=13, bitlayers=11, m=1, k=1100, n=1100, activation_bits=8),
    Case(bits=16, bitlayers="mixed", m=9, k=1100, n=650, activation_bits=24),
    Case(bits=4, bitlayers=3, m=150, k=300, n=200, group_size=128),
    Case(bits=9, bitlayers="mixed", m=300, k=100, n=40, activation_bits=7),
    Case(bits=8, bitlayers=7, m=2, k=33000, n=50),  # few channels: words of k are shared out over threads
)


@functools.cache
def by_xla(case, sweep=False):
    """Operands and their product, or sweep, by `xla`: once for all sets of instructions."""
    given = operands(case)
    args = given.q, given.words, given.scale, jnp.int32(case.bits) if sweep else given.counts
    return args, np.asarray(jax.jit(functools.partial(xla.prefixes if sweep else xla.matmul, case.problem))(*args))


@pytest.mark.parametrize("instructions", cpu.instructions())
@pytest.mark.parametrize("case", CASES, ids=str)
def test_large_blocks_are_exact(case, instructions):
    """To the last bit as `xla`, for each set of instructions."""
    args, expected = by_xla(case)
    y = jax.jit(functools.partial(cpu.matmul, case.problem, instructions=instructions))(*args)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("instructions", cpu.instructions())
def test_sweep_of_large_blocks_is_exact(instructions):
    case = Case(bits=8, bitlayers=8, m=2, k=1100, n=1100)
    args, expected = by_xla(case, sweep=True)
    y = jax.jit(functools.partial(cpu.prefixes, case.problem, instructions=instructions))(*args)
    np.testing.assert_array_equal(y, expected)


def test_rows_of_floats_are_finished_inside():
    """As the activations and the epilogue in JAX, to the last bit, for rows of all sizes and dtypes."""
    w = pbjax.quantize({"kernel": normal(200, 33)}, 8, group_size=64)["kernel"]
    x = normal(6, 200, seed=1) * np.array([1, 3e-38, 1e-30, 1e20, 3e38, 0], np.float32)[:, None]
    for dtype, widths in ((jnp.float32, (2, 8, 16, 24)), (jnp.bfloat16, (8, 24)), (jnp.float16, (2, 16))):
        rows = x.astype(dtype)
        for bits in widths:
            run = functools.partial(pbjax.matmul, rows, w, activation_bits=bits, preferred_element_type=jnp.float32)
            np.testing.assert_array_equal(run(backend="cpu"), run(backend="xla"))


def test_products_that_underflow_keep_their_sign():
    """Zeros have signs, and these are those of `xla`, too."""
    w = pbjax.quantize({"kernel": 1e-25 * normal(64, 16)}, 4)["kernel"]
    x = 1e-22 * normal(3, 64, seed=1)
    ours, expected = (np.asarray(pbjax.matmul(x, w, activation_bits=8, backend=backend)) for backend in ("cpu", "xla"))
    assert not expected.any()
    assert 0 < np.signbit(expected).sum() < expected.size
    np.testing.assert_array_equal(np.signbit(ours), np.signbit(expected))


def test_calls_from_eight_threads_give_the_same_bits():
    """At once, on XLA's one pool of threads, large and small products, many times."""
    cases = [Case(bits=8, bitlayers=5, m=m, k=512, n=n) for m in (1, 3) for n in (40, 2048)]
    given = [operands(case) for case in cases]
    runs = [jax.jit(functools.partial(cpu.matmul, case.problem)) for case in cases]
    expected = [np.asarray(run(o.q, o.words, o.scale, o.counts)) for run, o in zip(runs, given, strict=True)]

    def work(thread):
        for i in range(60):
            which = (thread + i) % len(cases)
            o = given[which]
            y = runs[which](o.q, o.words, o.scale, o.counts)
            np.testing.assert_array_equal(y, expected[which])
        return True

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


@pytest.mark.parametrize("instructions", cpu.instructions())
@pytest.mark.parametrize(
    "case", [Case(bits=8, bitlayers=7, m=1, k=33000, n=50), Case(bits=8, bitlayers=5, m=1, k=1100, n=1100)], ids=str
)
def test_float_sums_do_not_depend_on_threads(case, instructions):
    """The same bits in every call, whichever thread came in time."""
    given = operands(case)
    problem = dataclasses.replace(case.problem, activation_bits=None)
    run = jax.jit(functools.partial(cpu.matmul, problem, instructions=instructions))
    x = given.q.astype(jnp.float32)
    first = np.asarray(run(x, given.words, given.scale, given.counts))
    assert np.isfinite(first).all()
    for _ in range(20):
        np.testing.assert_array_equal(run(x, given.words, given.scale, given.counts), first)


QEMU = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")


@pytest.mark.skipif(platform.machine() != "x86_64" or QEMU is None, reason="no QEMU that emulates other processors")
@pytest.mark.parametrize(
    ("processor", "instructions"), [("Nehalem", "portable"), ("SandyBridge", "portable"), ("Haswell", "avx2 portable")]
)
def test_older_processors_are_asked_first(processor, instructions):
    """Finding the instructions of a machine needs none that it may not have; QEMU refuses those, as machines do."""
    code = (
        "import ctypes, sys; names = ctypes.CDLL(sys.argv[1]).PbjaxInstructions; names.restype = ctypes.c_char_p;"
        "print(names().decode())"
    )
    library = cpu._load()
    assert not isinstance(library, str)
    command = [QEMU, "-cpu", processor, sys.executable, "-I", "-c", code, library._name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (0, instructions), done.stderr


def test_unknown_instructions_are_an_error():
    case = dataclasses.replace(CASES[0], k=40, n=3)
    given = operands(case)
    with pytest.raises(Exception, match="no kernels named sse1"):
        jax.block_until_ready(
            cpu.matmul(case.problem, given.q, given.words, given.scale, given.counts, instructions="sse1")
        )


def test_counts_out_of_range_read_nothing_beyond():
    """`matmul` of pbjax clips them; the library does not rely on it."""
    case = Case(bits=3, bitlayers=3, m=4, k=40, n=5)
    given = operands(case)
    run = functools.partial(cpu.matmul, case.problem, given.q, given.words, given.scale)
    y = run(np.array([-7, 0, 99, 2**31 - 1], np.int32))
    np.testing.assert_array_equal(y, run(np.array([1, 1, 3, 3], np.int32)))


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "its C\\+\\+ library was not built"), (b"text", "its C\\+\\+ library cannot be loaded: .*")],
)
def test_library_that_is_missing_or_broken(monkeypatch, tmp_path, content, reason):
    if content:
        (tmp_path / "_native.so").write_bytes(content)
    monkeypatch.setattr(cpu.cpu_kernels, "__path__", [str(tmp_path)])
    monkeypatch.setattr(cpu.sys, "path", [])
    assert re.match(reason, cpu._load.__wrapped__())


def test_library_of_another_version_of_pbjax(monkeypatch, tmp_path):
    """Another shared object, which has none of its functions."""
    shutil.copy(np.random.mtrand.__file__, tmp_path / "_native.so")
    monkeypatch.setattr(cpu.cpu_kernels, "__path__", [str(tmp_path)])
    assert re.match(r"its C\+\+ library cannot be loaded: .*PbjaxInstructions", str(cpu._load.__wrapped__()))


def test_library_built_with_a_newer_jax(monkeypatch):
    """XLA would refuse it with every product."""
    assert (0, 0) < cpu._interface() < (1000, 0)  # found in the headers
    monkeypatch.setattr(cpu, "_interface", lambda: (0, 0))
    assert re.match(r"its C\+\+ library was built with a newer JAX than this one: ", str(cpu._load.__wrapped__()))


def test_jax_without_headers_takes_any_library(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu.jax.ffi, "include_dir", lambda: str(tmp_path))
    assert cpu._interface() > (1000, 0)


def test_export_needs_an_allowance():
    """The call is no part of what JAX promises to keep; with the allowance it gives the same bits."""
    w = pbjax.quantize({"kernel": normal(70, 5)}, 4)["kernel"]
    x = normal(3, 70, seed=1)
    product = jax.jit(lambda x: pbjax.matmul(x, w, backend="cpu"))
    with pytest.raises(ValueError, match="custom_call @pbjax_bit_matmul"):
        jax.export.export(product)(x)
    allowance = jax.export.DisabledSafetyCheck.custom_call("pbjax_bit_matmul")
    exported = jax.export.export(product, disabled_checks=[allowance])(x)
    np.testing.assert_array_equal(jax.export.deserialize(exported.serialize()).call(x), product(x))
