"""What the 1-bit tensor-core kernel becomes on a GPU: registers, loads and instructions, read from the machine code."""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.bit_matmul import _mosaic_kernel, contract, mosaic
from tests.gpu_compile import machine_code

_missing = machine_code.reason_to_skip()
pytestmark = [
    pytest.mark.gpu_compile,
    pytest.mark.skipif(_missing is not None, reason=f"cannot compile for a GPU here: {_missing}"),
]


def problem(m=1, k=4096, n=4096, bits=8, activation_bits=16, group_size=None) -> contract.Problem:
    return contract.Problem(m=m, k=k, n=n, bits=bits, group_size=group_size, activation_bits=activation_bits)


PROBLEMS = {
    "one_row": problem(),
    "one_row_of_8_bits": problem(activation_bits=8),
    "one_row_of_24_bits": problem(activation_bits=24),
    "sixteen_bits": problem(bits=16),
    "sixteen_bits_by_24": problem(bits=16, activation_bits=24),
    "four_rows": problem(m=4),
    "eight_rows_of_8_bits": problem(m=8, activation_bits=8),
    "two_blocks_of_rows": problem(m=5, activation_bits=24),
    "large": problem(k=16384, n=16384),
    "small": problem(k=256, n=256),
    "uneven": problem(k=4001, n=4100),
    "groups": problem(group_size=128),
    "groups_of_3_words": problem(k=4032, group_size=96),
    "n_10": problem(n=10),
    "n_1001": problem(n=1001),
    "n_4097": problem(n=4097),
    "n_4097_eight_rows_of_8_bits": problem(m=8, n=4097, activation_bits=8),
    "long_k": problem(k=65536),
}

# Instructions of the loop over bitlayers per word that a lane loads: for loads, addresses and the order of registers,
# and for each limb of each row. Hopper's memory delivers 4.8 TB/s / (132 * 1.98 GHz) = 4.6 words per clock to a
# multiprocessor, which issues 4 * 32 lanes of instructions: 28 per word. 8 limbs use less than half of them.
_INSTRUCTIONS_PER_WORD = 2.5
_INSTRUCTIONS_PER_WORD_AND_LIMB = 1.25
# A sweep also adds up the sums of each bitlayer among lanes and warps, and stores them: as much again as the rest of
# its loop, and more with few words between two bitlayers. Still fewer than the 28 that keep up with the memory.
_INSTRUCTIONS_PER_WORD_OF_A_SWEEP = {
    "one_row": 7.3,
    "one_row_of_8_bits": 4.1,
    "one_row_of_24_bits": 10.4,
    "sixteen_bits": 7.3,
    "sixteen_bits_by_24": 10.4,
    "four_rows": 22.4,
    "eight_rows_of_8_bits": 21.5,
    "two_blocks_of_rows": 24.0,
    "large": 7.6,
    "small": 10.9,
    "uneven": 7.3,
    "groups": 10.9,
    "groups_of_3_words": 10.9,
    "n_10": 10.4,
    "n_1001": 11.2,
    "n_4097": 6.6,
    "n_4097_eight_rows_of_8_bits": 22.3,
    "long_k": 7.6,
}
# 65536 registers for 16 warps of 32 lanes; with more than 4 limbs of activations, for 12 warps.
_REGISTERS = 128
_REGISTERS_MANY_LIMBS = 168
_REGISTERS_NARROW_LOADS = 192  # for 8 warps: more loads, each with an address of its own


@functools.cache
def kernel(problem: contract.Problem, gpu: str, sweep: bool) -> machine_code.Kernel:
    """The one kernel of a product that is not XLA's own."""
    described = (
        jax.ShapeDtypeStruct((problem.m, problem.k), jnp.int32),
        jax.ShapeDtypeStruct((problem.bits, problem.num_words, problem.n), jnp.uint32),
        jax.ShapeDtypeStruct((min(problem.bits, 4), problem.groups, problem.n), jnp.float32),
        jax.ShapeDtypeStruct(() if sweep else (problem.m,), jnp.int32),
    )
    run = mosaic.prefixes if sweep else mosaic.matmul
    kernels = machine_code.compile_kernels(functools.partial(run, problem), *described, gpu=gpu)
    epilogue, found = [kernel for kernel in kernels if kernel.name.startswith("bit_matmul")]
    assert epilogue.name == "bit_matmul_epilogue"
    assert epilogue.spill_bytes == 0
    assert not epilogue.uses_local_memory
    return found


@pytest.mark.parametrize("sweep", [False, True], ids=["product", "sweep"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_hopper(name, sweep):
    p, found = PROBLEMS[name], kernel(PROBLEMS[name], "h200", sweep)
    config = mosaic.config_for(p)
    row_limbs = config.rows * p.activation_limbs
    # n of a multiple of 4 is read 16 bytes at a time, others as far as their alignment goes.
    width, opcode = {0: (4, "LDG.E.128"), 2: (2, "LDG.E.64")}.get(p.n % 4, (1, "LDG.E"))
    assert found.spill_bytes == 0
    assert not found.uses_local_memory
    most = _REGISTERS if row_limbs <= 4 else _REGISTERS_MANY_LIMBS
    assert found.registers <= (most if width == 4 else _REGISTERS_NARROW_LOADS)
    # Native: an emulated product would be many integer instructions, or IMMA.
    (loop,) = [loop for loop in found.loops if machine_code.count(loop, "BMMA.168256.AND.POPC")]
    assert machine_code.count(loop, "BMMA") == 2 * config.steps * row_limbs * config.depth
    assert found.count("IMMA") == 0
    # Words are all that the loop loads, those of `depth` bitlayers before the first of them is used.
    loads = [i for i, opcode in enumerate(loop) if opcode.startswith("LDG")]
    assert len(loads) * width == 2 * config.steps * config.depth * _mosaic_kernel.LANE_CHANNELS
    assert {loop[i].removesuffix(".CONSTANT") for i in loads} == {opcode}
    per_word = len(loop) / (width * len(loads))
    if sweep:
        assert per_word <= _INSTRUCTIONS_PER_WORD_OF_A_SWEEP[name]
    else:
        first_use = next(i for i, opcode in enumerate(loop) if opcode.startswith("BMMA"))
        assert max(loads) < first_use
        assert per_word <= _INSTRUCTIONS_PER_WORD + row_limbs * _INSTRUCTIONS_PER_WORD_AND_LIMB


@pytest.mark.parametrize("name", ["one_row", "eight_rows_of_8_bits", "uneven"])
def test_blackwell_emulates(name):
    # In a process of its own: Mosaic GPU assembles all kernels of a process for the first GPU it was asked for.
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(kernel, PROBLEMS[name], "b200", False).result()
    assert found.arch == "sm_100a"
    assert found.spill_bytes == 0
    assert not found.uses_local_memory
    assert found.count("BMMA") == 0
    assert found.count("IMMA") > 0
