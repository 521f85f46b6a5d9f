"""The survey of machine code: its arithmetic on code of the test's own, and its keys on compiled kernels."""

from __future__ import annotations

import dataclasses

import pytest

from pallas_kernels.bit_matmul import contract
from tests.gpu_compile import bounds, machine_code, survey
from tests.gpu_compile.test_launches import in_own_process

_missing = machine_code.reason_to_skip()
needs_compiler = pytest.mark.skipif(_missing is not None, reason=f"cannot compile for a GPU here: {_missing}")
# JAX 0.11 and later say so at every lowering; there is no other lowering of `pallas_call` for a GPU.
quiet = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

LOOP = (
    ("LDG.E.128.CONSTANT", " R4, desc[UR4][R2.64]"),
    ("LDG.E.128.CONSTANT", " R8, desc[UR4][R2.64+0x200]"),
    ("IADD3", " R2, R2, 0x10, RZ"),
    ("LOP3.LUT", " R12, R6, R20, RZ, 0xc0, !PT"),  # the first of the first load
    ("POPC", " R13, R12"),
    ("LOP3.LUT", " R12, R11, R20, RZ, 0xc0, !PT"),  # the last of the second
    ("POPC", " R14, R12"),
    ("BRA", " `(.L_x_1)"),
)
STRAIGHT = (("S2R", " R0, SR_TID.X"), ("EXIT", ""))


def kernel(loop=LOOP):
    code = (*STRAIGHT[:1], *loop, *STRAIGHT[1:])
    return machine_code.Kernel(
        name="bit_matmul_serial",
        arch="sm_90a",
        registers=100,
        spill_bytes=0,
        stack_bytes=0,
        shared_bytes=0,
        opcodes=tuple(opcode for opcode, _ in code),
        operands=tuple(operands for _, operands in code),
        loops=(tuple(opcode for opcode, _ in loop),),
        loop_starts=(1,),
        outer_loops=(),
        sass="",
    )


def work(**more):
    found = kernel()
    loops = (bounds.Loop(opcodes=found.loops[0], turns=lambda used: 10.0 * used),)
    defaults = dict(kernel=found, gpu="h200", loops=loops, programs=132, warps=4, shared_bytes=0, words=132 * 128 * 80)
    return bounds.Work(**(defaults | more))


class TestBounds:
    def test_issue(self):
        """By hand: 8 instructions for 8 words of a lane, beside 28 that an SM issues while one arrives."""
        gpu = machine_code.GPUS["h200"]
        per_word = 4 * 32 * gpu.num_sms * gpu.clock_ghz * 1e9 / (gpu.memory_bandwidth / 4)
        assert per_word == pytest.approx(27.9, abs=0.1)
        for used in (1, 8):
            assert work().issue(used) == pytest.approx(per_word / 1)
            # Of 10 turns for each bitlayer and 2 more instructions.
            assert work().issue(used, whole=True) == pytest.approx(per_word * 80 * used / (80 * used + 2))

    def test_units(self):
        """Two population counts for 8 words, of which 16 are made in a clock, and 4.6 words arrive."""
        gpu = machine_code.GPUS["h200"]
        words = gpu.memory_bandwidth / 4 / (gpu.num_sms * gpu.clock_ghz * 1e9)
        assert work().unit(3) == pytest.approx(16 / (words * 2 / 8))
        operations = 989e12 * work().least_seconds(3) * 2  # twice as long as the words take
        assert work(tensor_operations=("bf16", operations)).unit(3) == pytest.approx(0.5)
        none = bounds.Loop(opcodes=("IADD3", "BRA"), turns=lambda used: used)
        assert work(loops=(none,)).unit(3) is None

    def test_called_functions_count_where_they_are_called(self):
        loop = bounds.Loop(
            opcodes=("CALL.REL.NOINC", "IADD3", "CALL.REL.NOINC"), turns=lambda used: 1, called=("IMMA",) * 5
        )
        assert len(loop.issued) == 3 + 2 * 5

    def test_occupancy(self):
        # 104 registers of 128 lanes are 4.9 times in 65536.
        assert work().warps_per_sm == 16
        assert work(shared_bytes=100 << 10).warps_per_sm == 8
        assert work(warps=1, kernel=dataclasses.replace(kernel(), registers=8)).warps_per_sm == 32  # programs

    def test_bytes_in_flight(self):
        """Both loads before the first use; from there the second one only."""
        found = kernel()
        assert bounds.requested(found.loops[0], found.operands[1:-1]) == 32
        assert work().bytes_in_flight == 4 * 32 * 32  # one program on each SM, though 4 would fit
        assert work(programs=10000).bytes_in_flight == 16 * 32 * 32
        # As many bytes as an SM's share of the rate brings in that time.
        assert work().covered_ns == pytest.approx(4096 / (4.8e12 / 132) * 1e9)

    def test_loads_of_the_turn_before(self):
        """A load that the next turn uses waits over the end of the loop."""
        loop = (("FFMA", " R1, R4, R4, R1"), ("LDG.E", " R4, desc[UR4][R2.64]"), ("BRA", " `(.L_x_1)"))
        assert bounds.requested(*zip(*loop, strict=True)) == 4

    @pytest.mark.parametrize(
        ("opcode", "operands"),
        [
            ("BMMA.168256.AND.POPC", " R12, R4.ROW, R20.COL, R12"),
            ("BMMA.168256.AND.POPC", " R12, R30.ROW, R6.COL, R12"),
            ("STG.E.128", " desc[UR4][R2.64], R4"),
            ("IMAD.WIDE", " R30, R31, 0x4, R6.64"),
        ],
    )
    def test_operands_of_several_registers(self, opcode, operands):
        assert 7 in bounds._read(opcode, operands)

    def test_load_bytes(self):
        assert work().load_bytes == 16
        assert [bounds.width(opcode) for opcode in ("LDG.E.64", "LDG.E.U8", "LDG.E", "LDG.E.128.CONSTANT")] == [
            8,
            1,
            4,
            16,
        ]


class TestSurvey:
    def test_has_every_shape_of_the_benchmark(self):
        seen = {(p.problem.m, p.problem.k, p.problem.n, p.problem.activation_bits) for p in survey.products(["h200"])}
        assert len(seen) == len(survey.ROWS) * len(survey.SIZES) * len(survey.WIDTHS)
        assert {p.problem.bits for p in survey.products(["h200"])} == set(range(1, 9))
        assert {p.backend for p in survey.products(["a100"])} == {"triton"}
        assert {p.backend for p in survey.products(["b200"])} == {"mosaic"}

    def test_programs_follow_from_the_traced_product(self):
        few = product("triton", 1, 8)
        traced = survey.trace(few)
        assert traced.warps == few.config.num_warps
        assert traced.programs == 8192 // few.config.block_n * (256 // (few.config.block_words * few.config.num_blocks))
        assert survey.trace(product("mosaic", 1, 8)).warps == 4

    def test_rows_of_the_same_numbers_are_one(self):
        row = dict.fromkeys((field.name for field in dataclasses.fields(survey.Row)), 1)
        rows = [survey.Row(**row | dict(sizes=size, m=m)) for m, size in ((1, "2x3"), (1, "4x5"), (2, "2x3"))]
        assert [(found.m, found.sizes) for found in survey.merged(rows)] == [(1, "2x3 4x5"), (2, "2x3")]


def product(backend, m, width, *, k=8192, n=8192, sweep=False, bits=8):
    problem = contract.Problem(m=m, k=k, n=n, bits=bits, group_size=None, activation_bits=width)
    return survey.Product(device="h200", backend=backend, problem=problem, sweep=sweep)


def pairs():
    """The smallest and the largest product of one key, of each kernel."""
    found = {}
    for each in survey.products(["h200"], [survey.STORED]):
        found.setdefault(survey._key(each), []).append(each)
    families = {}
    for group in found.values():
        size = [each.problem.k * each.problem.n for each in group]
        if len(group) > 1 and not group[0].sweep:
            one = group[size.index(min(size))], group[size.index(max(size))]
            families.setdefault(survey._FAMILIES[type(group[0].config)].name, one)
    return families


@pytest.mark.gpu_compile
@needs_compiler
@quiet
@pytest.mark.parametrize("pair", pairs().values(), ids=pairs())
def test_kernels_of_one_key_have_the_same_instructions(pair):
    """But for constants, and a few that make addresses."""
    (one, loops), (other, of_other) = in_own_process(_kernels, pair)
    assert one == other
    for loop, of_the_other in zip(loops, of_other, strict=True):
        for prefix in ("LDG", "BMMA", "IGMMA", "HGMMA", "POPC", "LOP3", "LDS", "STS"):
            assert machine_code.count(loop, prefix) == machine_code.count(of_the_other, prefix)
        assert len(loop) == pytest.approx(len(of_the_other), rel=0.03)


def _kernels(pair):
    found = [survey.compile_product(each) for each in pair]
    return [((c.kernel.registers, c.kernel.stack_bytes, c.launches, c.shared_bytes), c.kernel.loops) for c in found]


@pytest.mark.gpu_compile
@needs_compiler
@quiet
@pytest.mark.parametrize("backend", ["mosaic", "triton"])
def test_a_row(backend):
    """The numbers of the CSV are those of the kernels as they are."""
    row = in_own_process(_row, product(backend, 1, 8))
    assert row.load_bytes == 16
    assert row.local_bytes == row.other_kernels_local_bytes == 0
    assert row.launches == 3
    assert (row.bmma > 0, row.popc > 0) == ((True, False) if backend == "mosaic" else (False, True))
    issue, program = ([float(value) for value in text.split()] for text in (row.issue, row.program))
    assert len(issue) == len(program) == 8
    assert all(of_program <= of_loops for of_program, of_loops in zip(program, issue, strict=True))
    assert program == sorted(program)  # what is outside of the loop weighs less with more bitlayers


def _row(each):
    return survey.row_of(each, survey.compile_product(each))
