"""The tables of CONTRIBUTING.md that say what machine code promises: every bound in them holds."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

import jax.numpy as jnp
import pytest

from pallas_kernels.bit_matmul import _triton_dot, contract, mosaic, triton
from pallas_kernels.bit_matmul._mosaic_kernel import WARPS, Plan
from tests.gpu_compile import machine_code, test_mosaic_machine_code, test_triton_machine_code
from tests.gpu_compile.test_launches import in_own_process

_missing = machine_code.reason_to_skip()
pytestmark = [
    pytest.mark.gpu_compile,
    pytest.mark.skipif(_missing is not None, reason=f"cannot compile for a GPU here: {_missing}"),
    # JAX 0.11 and later say so at every lowering; there is no other lowering of `pallas_call` for a GPU.
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]

GPU = machine_code.GPUS["h200"]
LOAD_BYTES = 512  # of a warp: 16 to a lane
REGISTERS_PER_SM, WARPS_PER_SM, PROGRAMS_PER_SM = 65536, 64, 32  # CUDA C++ Programming Guide, compute capability 9.0
TABLE = re.compile(r"^\| `(mosaic|triton)` \| (\d+) \| (\d+) \|(.*)\|$", re.MULTILINE)  # backend, rows, width, numbers
# kernel, rows, activations, instructions per weight
WEIGHTS = re.compile(r"^\| `(_triton_\w+)` \| (\d+) \| (\w+) \| ([\d.]+) \|$", re.MULTILINE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """Of one kernel, for one row of the table."""

    registers: int
    warps: int  # that an SM holds, by registers and shared memory
    instructions: float  # of the inner loop, per word
    instructions_of_a_sweep: float  # likewise
    bytes_in_flight: int  # of words, requested by the warps of an SM before each uses the first

    @property
    def covered_ns(self) -> float:
        """The latency at which these bytes are enough to keep the memory busy: they arrive at its rate."""
        return self.bytes_in_flight / (GPU.memory_bandwidth / GPU.num_sms) * 1e9


def facts_of(backend: str, m: int, width: int) -> Facts:
    problem = problem_of(m, width)
    if backend == "mosaic":
        found, sweep = (test_mosaic_machine_code.kernel(problem, "h200", sweep) for sweep in (False, True))
        plan = Plan(problem=problem, config=mosaic.config_for(problem), sweep=False)
        warps, used = WARPS, "BMMA"
        shared = 4 * plan.scratch_shape[0] * plan.scratch_shape[1] * plan.scratch_shape[2]
    else:
        found, sweep = (test_triton_machine_code.kernel(problem, "h200", sweep) for sweep in (False, True))
        config = triton.config_for(problem)
        assert isinstance(config, triton.SerialConfig)
        warps, used, shared = config.num_warps, "POPC", found.shared_bytes
    (loop,) = [loop for loop in found.loops if machine_code.count(loop, used)]
    (sweep_loop,) = [loop for loop in sweep.loops if machine_code.count(loop, used)]
    first_use = next(i for i, opcode in enumerate(loop) if opcode.startswith(used))
    requested = machine_code.count(loop[:first_use], "LDG.E.128")
    registers = -(-found.registers // 8) * 8  # as they are given out
    programs = min(
        REGISTERS_PER_SM // (registers * 32 * warps),
        WARPS_PER_SM // warps,
        PROGRAMS_PER_SM,
        GPU.shared_per_sm // (shared + 1024),  # of which the system takes 1 KiB for each program
    )
    return Facts(
        registers=found.registers,
        warps=programs * warps,
        instructions=_per_word(loop),
        instructions_of_a_sweep=_per_word(sweep_loop),
        bytes_in_flight=programs * warps * requested * LOAD_BYTES,
    )


def problem_of(m: int, width: int | None) -> contract.Problem:
    return contract.Problem(m=m, k=8192, n=8192, bits=8, group_size=None, activation_bits=width)


def _per_word(loop: tuple[str, ...]) -> float:
    return len(loop) / (4 * machine_code.count(loop, "LDG.E.128"))


def instructions_per_weight(name: str, m: int, activations: str) -> float:
    """Of a lane of a kernel that unpacks words: of its loops over words, or of all of it; for all blocks of rows."""
    width = int(activations) if activations.isdigit() else None
    problem = problem_of(m, width)
    dtype = jnp.int32 if width else jnp.dtype(activations).type
    config = triton.config_for(problem, dtype)
    assert type(config).__module__.endswith(name)
    found = test_triton_machine_code.kernel(problem, "h200", False, dtype)
    words = config.block_words * config.block_n / (32 * config.num_warps)  # of a lane, in a turn of the loop
    if name == "_triton_unpack":
        return len(found.opcodes) / (32 * words)
    if name == "_triton_int8":
        used = [loop for loop in found.loops if machine_code.count(loop, "IGMMA")]
        return sum(map(len, used)) / (32 * words)
    (loop,) = [loop for loop in (*found.loops, *found.outer_loops) if test_triton_machine_code.tensor_core(loop)]
    passes = parts_of_activations(dtype) if name == "_triton_dot_rows" else 1  # of which each unpacks words again
    return len(loop) / (32 * words) * -(-m // config.block_rows) * passes


def parts_of_activations(dtype: Any) -> int:
    return _triton_dot.split(jnp.zeros((1, 1), dtype)).shape[0]


def rows_of_table() -> list[tuple[str, int, int, list[float]]]:
    text = (pathlib.Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    return [
        (backend, int(m), int(width), [float(cell) for cell in cells.split("|")])
        for backend, m, width, cells in TABLE.findall(text)
    ]


def test_the_table_has_every_kernel_for_few_rows():
    assert {(backend, m, width) for backend, m, width, _ in rows_of_table()} == {
        ("mosaic", 1, 8),
        ("mosaic", 1, 16),
        ("mosaic", 8, 8),
        ("triton", 1, 8),
        ("triton", 1, 16),
    }


def rows_of_weights() -> list[tuple[str, int, str, float]]:
    text = (pathlib.Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    return [(kernel, int(m), activations, float(bound)) for kernel, m, activations, bound in WEIGHTS.findall(text)]


def test_the_table_has_every_kernel_that_unpacks():
    assert {(kernel, m, activations) for kernel, m, activations, _ in rows_of_weights()} == {
        ("_triton_int8", 64, "8"),
        ("_triton_int8", 64, "16"),
        ("_triton_dot", 1, "bfloat16"),
        ("_triton_dot", 16, "float32"),
        ("_triton_dot", 64, "float32"),
        ("_triton_dot", 64, "bfloat16"),
        ("_triton_dot_rows", 256, "bfloat16"),
        ("_triton_dot_rows", 256, "float32"),
        ("_triton_unpack", 1024, "bfloat16"),
    }


@pytest.mark.parametrize(("name", "m", "activations", "bound"), rows_of_weights())
def test_bounds_of_weights(name, m, activations, bound):
    assert instructions_per_weight(name, m, activations) <= bound


@pytest.mark.parametrize(("backend", "m", "width", "promised"), rows_of_table())
def test_bounds(backend, m, width, promised):
    facts = in_own_process(facts_of, backend, m, width)
    registers, warps, instructions, of_a_sweep, kilobytes, covered_ns = promised
    assert facts.registers <= registers
    assert facts.warps >= warps
    assert facts.instructions <= instructions
    assert facts.instructions_of_a_sweep <= of_a_sweep
    assert facts.bytes_in_flight >= 1000 * kilobytes
    assert facts.covered_ns >= covered_ns
