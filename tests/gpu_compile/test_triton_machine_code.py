"""What the Triton kernels become on a GPU: registers, loads and instructions, read from the machine code."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.bit_matmul import _triton_serial, contract, triton
from tests.gpu_compile import machine_code

_missing = machine_code.reason_to_skip()
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
    "w8a8, groups of 3 words": problem(k=4032, group_size=96),
    "w8a8, k of two segments": problem(k=65536),
    "w8a8, n past a block": problem(n=1100),
}


@functools.cache
def kernel(
    problem: contract.Problem,
    gpu: str,
    sweep: bool,
    dtype: jnp.dtype = jnp.int32,
    config: triton.Config | None = None,
) -> machine_code.Kernel:
    """The one kernel of a product that is not XLA's own."""
    described = (
        jax.ShapeDtypeStruct((problem.m, problem.k), dtype),
        jax.ShapeDtypeStruct((problem.bits, problem.num_words, problem.n), jnp.uint32),
        jax.ShapeDtypeStruct((min(problem.bits, 4), problem.groups, problem.n), jnp.float32),
        jax.ShapeDtypeStruct(() if sweep else (problem.m,), jnp.int32),
    )
    run = functools.partial(triton.prefixes if sweep else triton.matmul, problem, config=config)
    kernels = machine_code.compile_kernels(run, *described, gpu=gpu)
    ours = [kernel for kernel in kernels if kernel.name.startswith("bit_matmul")]
    found, *others = sorted(ours, key=lambda kernel: (kernel.name != "bit_matmul_order", kernel.name), reverse=True)
    for other in others:  # what comes after it, by name before it
        assert other.name in ("bit_matmul_epilogue", "bit_matmul_dot_rows", "bit_matmul_order")
        assert other.spill_bytes == 0
        assert not other.uses_local_memory
    return found


def serial_config(problem: contract.Problem) -> triton.SerialConfig:
    """Of the kernel for few rows, which also runs more than it is chosen for."""
    return _triton_serial.config_for(problem)


def budget(found: machine_code.Kernel, problem: contract.Problem, prefix: str) -> list[float]:
    """Instructions of each loop over words per word, row and activation bit."""
    loops = [loop for loop in found.loops if machine_code.count(loop, "POPC")]
    assert len(loops) == len(problem.code_limbs)
    work = problem.activation_bits * serial_config(problem).block_rows
    return [machine_code.count(loop, prefix) / (4 * machine_code.count(loop, "LDG.E.128") * work) for loop in loops]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("sweep", [False, True], ids=["product", "sweep"])
@pytest.mark.parametrize("problem", SERIAL.values(), ids=SERIAL)
def test_serial(problem, sweep, gpu):
    config = serial_config(problem)
    found = kernel(problem, gpu, sweep, config=config)
    assert found.spill_bytes == 0
    assert not found.uses_local_memory
    assert found.count("POPC") > 0
    # Four channels to a lane: each word of a block is in one load of 16 bytes, and no load of words is narrower.
    wide = found.count("LDG.E.128")
    assert wide == config.block_words * len(problem.code_limbs)
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


INT8 = {
    "w8a8": problem(m=64),
    "w8a16": problem(m=17, activation_bits=16),
    "w8a8, 8 rows of many channels": problem(m=8, k=8192, n=28672),
    "w8a8, 256 rows": problem(m=256, k=8192, n=8192),
    "w8a16, 256 rows": problem(m=256, n=8192, activation_bits=16),
    "w4a8, finished by its program": problem(m=512, n=16384, bits=4),
    "w8a8, groups": problem(m=64, group_size=128),
    "w4a8, 256 rows, groups": problem(m=256, k=14336, bits=4, group_size=256),
    "w8a8, uneven groups": problem(m=70, k=4001, n=4100, group_size=96),
    "w8a16, groups of 3 words": problem(m=64, k=4032, activation_bits=16, group_size=96),
    "w16a16": problem(m=64, bits=16, activation_bits=16),
    "w16a24": problem(m=64, bits=16, activation_bits=24),
    "w16a24, groups": problem(m=64, bits=16, activation_bits=24, group_size=128),
    "w8a24": problem(m=64, activation_bits=24),
    "w8a8, uneven": problem(m=70, k=4001, n=4100),
}
# Instructions of the loop over words for each code, whatever the bitlayers, for all 64 rows together: to unpack, to
# bring codes into the order of the tensor core, to count bits where lower limbs need it, for loads and addresses. An SM
# issues 128 lanes of them per clock, so at 3.55 it makes 36 codes; Hopper's memory delivers 18 of 8 bits in that time.
# Ampere's int8 operands go through shared memory byte by byte.
_INSTRUCTIONS_PER_CODE = {"h200": 3.55, "a100": 8.1}
# Two channels to a lane, 8 bytes, where sums of groups leave no room for more: each row is read for half as many codes.
_INSTRUCTIONS_PER_CODE_OF_TWO_CHANNELS = {"h200": 6.9, "a100": 16.3}
# Beside the loop over words. With groups, the sums of one and of all leave no register on an A100, which has no
# warpgroups, where blocks of rows, channels or words are not full besides.
_SPILLED_BYTES_OF_INT8 = {
    ("a100", "w4a8, 256 rows, groups"): 72,
    ("a100", "w8a8, uneven groups"): 112,
    ("a100", "w8a16, groups of 3 words"): 8,
    ("a100", "w16a24, groups"): 56,
}


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", INT8)
def test_int8(name, gpu):
    problem = INT8[name]
    config = triton.config_for(problem)
    assert isinstance(config, triton.Int8Config)
    found = kernel(problem, gpu, False)
    allowed = _SPILLED_BYTES_OF_INT8.get((gpu, name), 0)
    assert found.spill_bytes <= allowed
    assert allowed or not found.uses_local_memory
    loops = [loop for loop in found.loops if machine_code.count(loop, "IMMA") + machine_code.count(loop, "IGMMA")]
    assert len(loops) == len(problem.code_limbs) * -(-problem.activation_limbs // config.limbs)
    codes = contract.WORD_BITS * config.block_words * config.block_n // (32 * config.num_warps)  # of a lane, in a turn
    passes = len(loops) // len(problem.code_limbs)
    two_channels = config.block_words * config.block_n == 2 * 32 * config.num_warps
    opcode = "LDG.E.64" if two_channels else "LDG.E.128"
    budget = _INSTRUCTIONS_PER_CODE_OF_TWO_CHANNELS if two_channels else _INSTRUCTIONS_PER_CODE
    for i, loop in enumerate(loops):
        first, last = problem.code_limbs[i // passes]
        assert machine_code.count(loop, "LDL") + machine_code.count(loop, "STL") == 0
        # One load of all channels of a lane for each bitlayer, and no narrower one; the others are of activations.
        assert machine_code.count(loop, opcode) >= last - first
        assert machine_code.count(loop, "LDG") == sum(machine_code.count(loop, op) for op in {opcode, "LDG.E.128"})
        assert machine_code.count(loop, "IGMMA") > 0 or gpu == "a100"
        assert len(loop) / codes <= budget[gpu]


# Of one bitlayer: 8 of them take 12 instructions for each weight, beside 3.5 of one product at 8 bitlayers.
_INSTRUCTIONS_PER_BIT_OF_A_SWEEP = {"h200": 1.6, "a100": 6.0}


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", ["w8a8", "w8a16", "w8a24", "w8a8, uneven"])
def test_int8_sweep(name, gpu):
    """One bitlayer to a program, of which each word is read once, 16 bytes at a time."""
    p = INT8[name]
    config = triton.config_for(p)
    found = kernel(p, gpu, True)
    assert "sweep" in found.name
    assert found.spill_bytes == 0
    assert not found.uses_local_memory
    loops = [loop for loop in found.loops if machine_code.count(loop, "IMMA") + machine_code.count(loop, "IGMMA")]
    assert len(loops) == -(-p.activation_limbs // config.limbs)
    codes = contract.WORD_BITS * config.block_words * config.block_n // (32 * config.num_warps)
    for loop in loops:
        assert machine_code.count(loop, "LDG") == machine_code.count(loop, "LDG.E.128") > 0
        assert machine_code.count(loop, "IGMMA") > 0 or gpu == "a100"
        assert len(loop) / codes <= _INSTRUCTIONS_PER_BIT_OF_A_SWEEP[gpu]


# Float activations. The table has few and many rows, of one sum and of groups, and what does not fill blocks.
DOT = {
    "one row": problem(activation_bits=None),
    "one row, groups": problem(activation_bits=None, group_size=128),
    "16 rows, sixteen bits": problem(m=16, bits=16, activation_bits=None),
    "64 rows": problem(m=64, activation_bits=None),
    "64 rows, sixteen bits": problem(m=64, bits=16, activation_bits=None),
    "64 rows, sixteen bits, groups": problem(m=64, bits=16, activation_bits=None, group_size=256),
    "groups of a word": problem(m=8, bits=4, activation_bits=None, group_size=32),
    "groups of 3 words": problem(m=8, k=4032, activation_bits=None, group_size=96),
    "uneven": problem(m=50, k=4001, n=4100, activation_bits=None),
    "uneven, sixteen bits": problem(m=50, k=4001, n=4100, bits=16, activation_bits=None),
    "uneven, groups": problem(m=17, k=4001, n=4100, activation_bits=None, group_size=96),
    "uneven, few rows, groups": problem(m=3, k=4001, n=4100, bits=16, activation_bits=None, group_size=96),
}
# Instructions of a lane for each weight of up to 8 bitlayers, whatever their number, with the dots of up to 64 rows by
# one part of the activations and of up to 32 by three. In the time in which memory delivers a weight of 8 bitlayers, an
# SM of an H200 issues 7, one of an A100 9.6.
_INSTRUCTIONS_PER_CODE_OF_A_DOT = {
    ("h200", "float32"): 6.9,
    ("h200", "bfloat16"): 6.1,
    ("a100", "float32"): 8.1,
    ("a100", "bfloat16"): 6.5,
}
# Of one bitlayer: 8 of them take three or four times what one product takes, and read their words once.
_INSTRUCTIONS_PER_BIT_OF_A_DOT = {
    ("h200", "float32"): 2.8,
    ("h200", "bfloat16"): 2.1,
    ("a100", "float32"): 4.0,
    ("a100", "bfloat16"): 3.2,
}
# Three parts of activations, and rows, channels and words that do not fill blocks: ptxas keeps values of the loop over
# numbers of bitlayers in local memory, around the loops over words.
_SPILLED_BYTES = {("a100", "float32", "uneven, sixteen bits"): 40, ("a100", "float32", "uneven, groups"): 8}


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("sweep", [False, True], ids=["product", "sweep"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", DOT)
def test_dot(name, dtype, sweep, gpu):
    """Each word is loaded once, 16 bytes at a time, unpacked in registers, and multiplied on the tensor core."""
    p = DOT[name]
    config, found = triton.config_for(p, dtype), kernel(p, gpu, sweep, dtype)
    allowed = 0 if sweep else _SPILLED_BYTES.get((gpu, dtype.__name__, name), 0)
    assert found.spill_bytes <= allowed
    assert allowed or not found.uses_local_memory
    loops = [loop for loop in (*found.loops, *found.outer_loops) if tensor_core(loop)]
    codes = contract.WORD_BITS * config.block_words * config.block_n / (32 * config.num_warps)  # of a lane, in a turn
    by_bitlayer = found.name == "bit_matmul_dot_sweep"
    assert by_bitlayer == (sweep and (p.groups == 1 or p.words_per_group >= 16))
    budget = _INSTRUCTIONS_PER_BIT_OF_A_DOT if by_bitlayer else _INSTRUCTIONS_PER_CODE_OF_A_DOT
    spans = [(0, 1)] if by_bitlayer else p.code_limbs
    for loop, (first, last) in zip(loops, spans, strict=True):
        assert machine_code.count(loop, "LDL") + machine_code.count(loop, "STL") == 0
        assert len(loop) / codes <= budget[gpu, dtype.__name__]
        # One load of 16 bytes for each bitlayer; the others are of activations and, one for each lane, of scales.
        assert machine_code.count(loop, "LDG.E.128") >= last - first
        narrow = machine_code.count(loop, "LDG") - machine_code.count(loop, "LDG.E.128")
        assert narrow <= (0 if by_bitlayer or p.groups == 1 else 1)


def tensor_core(opcodes: tuple[str, ...]) -> int:
    return machine_code.count(opcodes, "HMMA") + machine_code.count(opcodes, "HGMMA")


# Many rows of floats, with what does not fill blocks, of one part of the activations and of three.
DOT_ROWS = {
    "256 rows": problem(m=256, activation_bits=None),
    "256 rows, one bitlayer": problem(m=256, bits=1, activation_bits=None),
    "256 rows, sixteen bits": problem(m=256, k=8192, n=8192, bits=16, activation_bits=None),
    "uneven": problem(m=70, k=4001, n=4100, activation_bits=None),
    "uneven, sixteen bits": problem(m=70, k=4001, n=4100, bits=16, activation_bits=None),
}
# Of a lane for each weight and 128 rows. In the time of the tensor core for one part of the activations an SM of an
# H200 issues 8.7, one of an A100 16.
_INSTRUCTIONS_PER_CODE_OF_ROWS = {"h200": 7.0, "a100": 9.6}
_SPILLED_BYTES_OF_ROWS = {("a100", "float32", "256 rows"): 72}  # around the loop over words
# After the start of a dot and before its end, of all in the loop: what is hidden behind the tensor core.
_HIDDEN_FRACTION, _HIDDEN_FRACTION_OF_ONE = 0.7, 0.45  # one bitlayer is little to unpack


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", DOT_ROWS)
def test_dot_of_many_rows(name, dtype, gpu):
    """Unpacked in registers, and on an H200 for most of it while the tensor core multiplies."""
    p = DOT_ROWS[name]
    config, found = triton.config_for(p, dtype), kernel(p, gpu, False, dtype)
    assert found.name == "bit_matmul_dot_rows"
    allowed = _SPILLED_BYTES_OF_ROWS.get((gpu, dtype.__name__, name), 0)
    assert found.spill_bytes <= allowed
    assert allowed or not found.uses_local_memory
    (loop,) = [loop for loop in (*found.loops, *found.outer_loops) if tensor_core(loop)]
    assert machine_code.count(loop, "LDL") + machine_code.count(loop, "STL") == 0
    codes = contract.WORD_BITS * config.block_words * config.block_n / (32 * config.num_warps)  # of a lane, in a turn
    assert len(loop) / codes <= _INSTRUCTIONS_PER_CODE_OF_ROWS[gpu]
    # Each word once: 8 bytes to a lane, which with 8 warps are the 128 channels of 4 words; 16 of activations.
    num = min(p.bits, contract.LIMB_BITS)
    assert machine_code.count(loop, "LDG.E.64") == num
    assert machine_code.count(loop, "LDG") - num == machine_code.count(loop, "LDG.E.128") > 0
    if gpu == "h200":
        begins = next(i for i, opcode in enumerate(loop) if opcode.startswith("WARPGROUP.ARRIVE"))
        ends = next(i for i, opcode in enumerate(loop) if opcode.startswith("WARPGROUP.DEPBAR"))
        assert (ends - begins) / len(loop) >= (_HIDDEN_FRACTION if p.bits > 1 else _HIDDEN_FRACTION_OF_ONE)


# Of all of `_triton_unpack`, which has no loop, and of each weight at 8 bitlayers: it writes 2 bytes for each byte that
# it reads, and at 4.8 TB/s an SM of an H200 has 20 to issue for each.
_INSTRUCTIONS_PER_CODE_OF_UNPACKING = 9.9


@pytest.mark.parametrize("gpu", GPUS)
def test_unpack(gpu):
    """Bitlayers become bfloat16 at 16 bytes a load and a store."""
    p = problem(m=1024, activation_bits=None)
    config, found = triton.config_for(p), kernel(p, gpu, False, jnp.bfloat16)
    assert found.name == "bit_matmul_unpack"
    assert found.spill_bytes == 0
    assert not found.uses_local_memory
    assert found.count("LDG.E.128") == 8
    assert found.count("STG.E.128") > 0
    assert found.count("STG") == found.count("STG.E.128")
    assert found.loops == ()
    codes = contract.WORD_BITS * config.block_words * config.block_n // (32 * config.num_warps)  # of a lane
    assert len(found.opcodes) / codes <= _INSTRUCTIONS_PER_CODE_OF_UNPACKING
