"""The product in C++ on the CPU, through XLA's foreign function interface: one call is one product.

The library is built when the package is installed, where there is a C++ compiler. It chooses instructions when it runs
(AVX-512 with or without AMX, AVX2, NEON, or portable C++), works on the threads of XLA, and reads the words where they
lie.
"""

from __future__ import annotations

import ctypes
import functools
import pathlib
import re
import sys

import jax
import jax.numpy as jnp

import cpu_kernels
from pallas_kernels import _compat
from pallas_kernels.bit_matmul import contract

_TARGET = "pbjax_bit_matmul"
_NARROW = (jnp.float32, jnp.bfloat16, jnp.float16)  # row types that the library reads

# Those that were measured against backend `xla`, and faster (examples/benchmarks/results/cpu.csv).
_FAST = ("avx512_amx", "avx512")


def missing(platform: str) -> str | None:
    """Why the library cannot be called, or None."""
    del platform
    library = _load()
    return library if isinstance(library, str) else None


def slow() -> str | None:
    """Why plain JAX is to be preferred on this machine, or None."""
    if instructions()[0] in _FAST:
        return None
    return f"without {' or '.join(_FAST)} it was not measured to be faster than XLA's own code: name it to use it"


def unsupported(problem: contract.Problem) -> str | None:
    """Runs everything."""
    del problem
    return None


def instructions() -> tuple[str, ...]:
    """The sets of instructions that this machine can run, best first; empty without the library."""
    library = _load()
    if isinstance(library, str):
        return ()
    return tuple(library.PbjaxInstructions().decode().split())


def matmul(
    problem: contract.Problem,
    x: jax.Array,
    words: jax.Array,
    scale: jax.Array,
    bitlayers: jax.Array,
    *,
    instructions: str = "",
) -> jax.Array:
    """The product of the contract, or of rows of floats as they come.

    Args:
      problem: the static facts.
      x: as the contract has it; or, with fixed-point activations too, float[m, k], which is then quantized inside.
        The result of float rows is the finished one: times the step of the row, NaN in rows that are not finite.
      words: uint32[bits, ceil(k / 32), n].
      scale: f32[min(bits, 4), groups, n].
      bitlayers: int32[m].
      instructions: one of `instructions()`, or "" for the best.

    Returns:
      f32[m, n].
    """
    return _call(problem, x, words, scale, bitlayers, prefixes=False, instructions=instructions)


def prefixes(
    problem: contract.Problem,
    x: jax.Array,
    words: jax.Array,
    scale: jax.Array,
    limit: jax.Array,
    *,
    instructions: str = "",
) -> jax.Array:
    """The product at every number of bitlayers up to `limit`, which reads each word once. f32[bits, m, n]."""
    limits = jnp.asarray(limit, jnp.int32).reshape(1)
    return _call(problem, x, words, scale, limits, prefixes=True, instructions=instructions)


def _call(
    problem: contract.Problem,
    x: jax.Array,
    words: jax.Array,
    scale: jax.Array,
    counts: jax.Array,
    *,
    prefixes: bool,
    instructions: str,
) -> jax.Array:
    _register()
    if x.dtype not in (jnp.int32, *_NARROW):
        x = x.astype(jnp.float32)
    shape = (problem.bits,) * prefixes + (problem.m, problem.n)
    ffi_call = jax.ffi.ffi_call(_TARGET, jax.ShapeDtypeStruct(shape, jnp.float32))
    operands = (x, words, scale, counts.astype(jnp.int32))
    y = ffi_call(
        *operands,
        group_size=problem.group_size or 0,
        activation_bits=problem.activation_bits or 0,
        prefixes=prefixes,
        instructions=instructions,
    )
    return _compat.varying_like(y, *operands)


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none.

    It lies beside this module. An editable installation has it in another folder of the package, and a checkout that
    hides an installation, being first on the path, in the folder that it hides.
    """
    for folder in (*cpu_kernels.__path__, *(pathlib.Path(entry, "cpu_kernels") for entry in sys.path)):
        for file in sorted(pathlib.Path(folder).glob("_native.*")):
            try:
                library = ctypes.CDLL(str(file))
                library.PbjaxInstructions.restype = ctypes.c_char_p
                built_with = divmod(library.PbjaxInterface(), 1000)
            except (OSError, AttributeError) as error:  # AttributeError: a library of another version of pbjax
                return f"its C++ library cannot be loaded: {error}"
            if built_with > _interface():
                return (
                    "its C++ library was built with a newer JAX than this one: upgrade JAX, "
                    "or build pbjax beside this one (`pip install --no-build-isolation`)"
                )
            return library
    return "its C++ library was not built: install pbjax where there is a C++17 compiler"


def _interface() -> tuple[int, int]:
    """The version of XLA's foreign function interface in the JAX that runs, as its headers say.

    It takes libraries of older versions. Others it refuses when they are registered, and every product with them.
    """
    try:
        header = pathlib.Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text()
    except OSError:  # a JAX without its headers
        header = ""
    numbers = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header))
    return int(numbers.get("MAJOR", sys.maxsize)), int(numbers.get("MINOR", 0))


@functools.cache
def _register() -> None:
    library = _load()
    assert not isinstance(library, str), "`missing` was not asked"
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(library.PbjaxBitMatmul), platform="cpu")
