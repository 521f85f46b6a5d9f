"""What the Triton kernels become on a GPU: registers, loads and instructions, read from the machine code."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.bit_matmul import contract, triton
from tests.gpu_compile import machine_code

_missing = machine_code.unavailable()
pytestmark = [
    pytest.mark.gpu_compile,
    pytest.mark.skipif(_missing is not None, reason=f"cannot compile for a GPU here: {_missing}"),
    # JAX 0.11 and later say so at every lowering; there is no other lowering of `pallas_call` for a GPU.
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]

GPUS = ("h200", "a100")

# Instructions of the loop over bitlayers for each word of one channel, row and activation bit. Counting every word
# takes 3: AND, population count, multiply-add. Adding words first takes a few more, but fewer population counts,
# each of which takes the time of four others.
_INSTRUCTIONS_PER_WORD_AND_BIT = 3.65
_INSTRUCTIONS_OF_A_SWEEP = 4.4  # which stores, and with several blocks loads the activations again for each bitlayer
_POPULATION_COUNTS_PER_WORD_AND_BIT = 0.63


def problem(m=1, k=4096, n=4096, bits=8, activation_bits=8, group_size=None) -> contract.Problem:
    return contract.Problem(m=m, k=k, n=n, bits=bits, group_size=group_size, activation_bits=activation_bits)


SERIAL = {
    "w8a8": problem(),
    "w4a16": problem(bits=4, activation_bits=16),
    "w16a24": problem(bits=16, activation_bits=24),
    "w8a4, 8 rows": problem(m=8, activation_bits=4),
    "w8a8, 8 rows": problem(m=8),
    "w8a16, groups": problem(activation_bits=16, group_size=128),
    "w8a8, k of two segments": problem(k=65536),
    "w8a8, n past a block": problem(n=1100),
}


@functools.cache
def kernel(problem: contract.Problem, gpu: str, sweep: bool, dtype: jnp.dtype = jnp.int32) -> machine_code.Kernel:
    """The one kernel of a product that is not XLA's own."""
    described = (
        jax.ShapeDtypeStruct((problem.m, problem.k), dtype),
        jax.ShapeDtypeStruct((problem.bits, problem.num_words, problem.n), jnp.uint32),
        jax.ShapeDtypeStruct((min(problem.bits, 4), problem.groups, problem.n), jnp.float32),
        jax.ShapeDtypeStruct(() if sweep else (problem.m,), jnp.int32),
    )
    run = triton.prefixes if sweep else triton.matmul
    kernels = machine_code.compile_kernels(functools.partial(run, problem), *described, gpu=gpu)
    (found,) = [kernel for kernel in kernels if kernel.name.startswith("bit_matmul")]
    return found


def budget(found: machine_code.Kernel, problem: contract.Problem, prefix: str) -> list[float]:
    """Instructions of each loop over words per word, row and activation bit."""
    loops = [loop for loop in found.loops if machine_code.count(loop, "POPC")]
    assert len(loops) == len(problem.code_limbs)
    work = problem.activation_bits * triton.config_for(problem).block_rows
    return [machine_code.count(loop, prefix) / (4 * machine_code.count(loop, "LDG.E.128") * work) for loop in loops]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("sweep", [False, True], ids=["product", "sweep"])
@pytest.mark.parametrize("problem", SERIAL.values(), ids=SERIAL)
def test_serial(problem, sweep, gpu):
    found = kernel(problem, gpu, sweep)
    assert found.spill_bytes == 0
    assert not found.uses_local_memory
    assert found.count("POPC") > 0
    # Four channels to a lane: each word of a block is in one load of 16 bytes, and no load of words is narrower.
    wide = found.count("LDG.E.128")
    assert wide == triton.config_for(problem).block_words * len(problem.code_limbs)
    assert found.count("LDG.E.64") == 0
    limit = _INSTRUCTIONS_OF_A_SWEEP if sweep else _INSTRUCTIONS_PER_WORD_AND_BIT
    assert max(budget(found, problem, "")) <= limit
    assert max(budget(found, problem, "POPC")) <= _POPULATION_COUNTS_PER_WORD_AND_BIT


@pytest.mark.parametrize("gpu", GPUS)
def test_serial_where_rows_are_not_aligned(gpu):
    """A row of 4098 words starts at a multiple of 8 bytes only: narrower loads, and no fault."""
    found = kernel(problem(n=4098), gpu, False)
    assert found.spill_bytes == 0
    assert found.count("LDG.E.128") == 0
    assert found.count("LDG.E.64") == 2 * triton.config_for(problem(n=4098)).block_words


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(("dtype", "m"), [(jnp.float32, 16), (jnp.bfloat16, 64)])
def test_dot(dtype, m, gpu):
    """Unpacked in registers and multiplied on the tensor core; up to 16 bitlayers."""
    found = kernel(problem(m=m, bits=16, activation_bits=None), gpu, False, dtype)
    assert found.spill_bytes == 0
    assert not found.uses_local_memory
    assert found.count("HMMA") + found.count("HGMMA") > 0
    assert found.count("LDG.E.128") > 0
