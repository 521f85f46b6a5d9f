"""What the machine code of a product bounds: instructions, units and requests for each word. Nothing here is a time.

A GPU can read its words at the memory's rate only if each of its multiprocessors (SMs) issues, counts and requests as
fast as they arrive. Three ratios say how many times faster it could, if nothing else were in the way; below 1, the
product cannot reach the memory's rate, and above 1, that alone does not keep it from it:

    least       = bytes of the words in use / memory rate
    issue       = least / (instructions of all warps / (4 * SMs * clock))       an SM issues 4 in a clock
    unit        = least / (work of the busiest unit / its rate)
    covered     = bytes that the warps of an SM have requested and not used / (memory rate / SMs), in seconds

Instructions of the loops over words are counted as often as the loops turn: a lower bound of what is issued, so that
`issue` is an upper bound. `program` counts the rest of each program once as well, branches that are not taken included:
more than is issued, so that the truth lies between `program` and `issue`. Latency under load, stalls, conflicts, the
memory's own efficiency, launches and the gaps between them are in none of it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

from tests.gpu_compile.machine_code import GPUS, Kernel, count

ISSUES_PER_CLOCK = 4  # warp schedulers of an SM: CUDA C++ Programming Guide, compute capability 8.0, 9.0, 10.0
LANES = 32
# CUDA C++ Programming Guide, occupancy and throughput of native arithmetic instructions, 8.0 to 10.0.
REGISTERS_PER_SM, WARPS_PER_SM, PROGRAMS_PER_SM, SYSTEM_SHARED_BYTES = 65536, 64, 32, 1024
POPC_PER_CLOCK = 16  # of lanes
# BMMA.168256 per clock and SM. A100: 4992e12 operations per second of its data sheet. H200: NVIDIA states none; it is
# what is taken from measurements of a GH200 in the literature, as in `mosaic`.
BMMA_PER_CLOCK = {"a100": 0.5, "h200": 0.54}
# Dense operations per second of the data sheets.
TENSOR_RATE = {
    "a100": {"bf16": 312e12, "int8": 624e12},
    "h200": {"bf16": 989e12, "int8": 1979e12},
    "b200": {"bf16": 2250e12, "int8": 4500e12},
}

_LOADS = ("LDG", "LDGSTS")
_REGISTER = re.compile(r"\bR(\d+)(\.64)?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """A loop over words.

    Attributes:
      opcodes: of one turn, without loops inside of it.
      turns: of a program, by the number of bitlayers in use.
      called: of the function that it calls, as where an instruction is emulated.
    """

    opcodes: tuple[str, ...]
    turns: Callable[[int], float]
    called: tuple[str, ...] = ()

    @property
    def issued(self) -> tuple[str, ...]:
        """In one turn, those of the called function included."""
        return self.opcodes + self.called * count(self.opcodes, "CALL")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one launch of a kernel does with the words.

    Attributes:
      kernel: its machine code.
      gpu: a key of `GPUS`.
      loops: over words; none where all words of a program are in straight code.
      programs: of the launch.
      warps: of a program.
      shared_bytes: of a program, static or given by the launch.
      words: of one bitlayer, in the whole weight.
      tensor_operations: multiplications and additions on a tensor core by its operands, "bf16" or "int8".
    """

    kernel: Kernel
    gpu: str
    loops: tuple[Loop, ...]
    programs: int
    warps: int
    shared_bytes: int
    words: int
    tensor_operations: tuple[str, float] | None = None

    def least_seconds(self, bitlayers: int) -> float:
        """In which the memory of the data sheet delivers the words of so many bitlayers."""
        return 4 * self.words * bitlayers / GPUS[self.gpu].memory_bandwidth

    def instructions(self, bitlayers: int, *, whole: bool = False) -> float:
        """Of one warp: of its loops over words, or with `whole` of all of its program too."""
        turned = sum(len(loop.issued) * loop.turns(bitlayers) for loop in self.loops)
        rest = len(self.kernel.opcodes) - sum(len(loop.opcodes) for loop in self.loops)
        return turned + (rest if whole or not self.loops else 0)

    def issue(self, bitlayers: int, *, whole: bool = False) -> float:
        """How many times faster than the words arrive their instructions could be issued."""
        gpu = GPUS[self.gpu]
        issued = self.instructions(bitlayers, whole=whole) * self.programs * self.warps
        return self.least_seconds(bitlayers) * ISSUES_PER_CLOCK * gpu.num_sms * gpu.clock_ghz * 1e9 / issued

    def unit(self, bitlayers: int) -> float | None:
        """How many times faster than the words arrive the busiest unit could be, of those whose rate is known."""
        least = self.least_seconds(bitlayers)
        ratios = [least / seconds for seconds in self._unit_seconds(bitlayers) if seconds]
        return min(ratios, default=None)

    def _unit_seconds(self, bitlayers: int) -> list[float]:
        gpu = GPUS[self.gpu]
        clocks = gpu.num_sms * gpu.clock_ghz * 1e9

        def executed(prefix: str) -> float:
            turned = sum(count(loop.issued, prefix) * loop.turns(bitlayers) for loop in self.loops)
            return turned * self.programs * self.warps

        seconds = [executed("POPC") * LANES / POPC_PER_CLOCK / clocks]
        if self.gpu in BMMA_PER_CLOCK:
            seconds.append(executed("BMMA") / BMMA_PER_CLOCK[self.gpu] / clocks)
        if self.tensor_operations:
            operands, operations = self.tensor_operations
            seconds.append(operations / TENSOR_RATE[self.gpu][operands])
        return seconds

    @property
    def warps_per_sm(self) -> int:
        """That fit on an SM, by registers and shared memory."""
        registers = -(-self.kernel.registers // 8) * 8  # as they are given out
        return self.warps * min(
            REGISTERS_PER_SM // (registers * LANES * self.warps),
            WARPS_PER_SM // self.warps,
            PROGRAMS_PER_SM,
            GPUS[self.gpu].shared_per_sm // (self.shared_bytes + SYSTEM_SHARED_BYTES),
        )

    @property
    def bytes_in_flight(self) -> float:
        """That the warps on an SM have requested before they use the first; of as many warps as there are programs."""
        warps = min(self.warps_per_sm, self.programs * self.warps / GPUS[self.gpu].num_sms)
        return warps * LANES * max(self._requested(), default=0)

    def _requested(self) -> list[int]:
        """Bytes of a lane in each innermost loop that loads, or in the whole kernel where there is none."""
        kernel = self.kernel
        ours = [loop.opcodes for loop in self.loops]
        spans = [
            slice(start, start + len(opcodes))
            for start, opcodes in zip(kernel.loop_starts, kernel.loops, strict=True)
            if opcodes in ours
        ] or [slice(None)]
        return [requested(kernel.opcodes[span], kernel.operands[span]) for span in spans]

    @property
    def covered_ns(self) -> float:
        """The latency at which the bytes in flight are enough to keep the memory busy."""
        gpu = GPUS[self.gpu]
        return self.bytes_in_flight / (gpu.memory_bandwidth / gpu.num_sms) * 1e9

    @property
    def load_bytes(self) -> int:
        """Of the narrowest load from memory in the innermost loops; where there is no loop, of most loads."""
        innermost = [opcode for loop in self.loops if loop.opcodes in self.kernel.loops for opcode in loop.opcodes]
        widths = [width(opcode) for opcode in innermost or self.kernel.opcodes if opcode.startswith(_LOADS)]
        if self.loops:
            return min(widths, default=0)
        return max(set(widths), key=widths.count, default=0)


def width(opcode: str) -> int:
    """Bytes that a lane loads or stores."""
    parts = opcode.split(".")
    return next((size for name, size in (("128", 16), ("64", 8), ("U8", 1), ("U16", 2)) if name in parts), 4)


def requested(opcodes: Sequence[str], operands: Sequence[str]) -> int:
    """Bytes of a lane that are loaded and not yet used, at most, if loads take until they are used; a loop turns."""
    size = len(opcodes)
    waiting = [0] * size
    for start, opcode in enumerate(opcodes):
        if not opcode.startswith("LDG") or opcode.startswith("LDGSTS"):
            continue
        loaded = _written(opcode, operands[start])
        for step in range(size):
            at = (start + step) % size
            if step and loaded & _read(opcodes[at], operands[at]):
                break
            waiting[at] += width(opcode)
    return max(waiting, default=0)


def _written(opcode: str, operands: str) -> set[int]:
    found = _REGISTER.search(operands.split(",")[0])
    return set() if found is None else set(range(int(found[1]), int(found[1]) + -(-width(opcode) // 4)))


def _read(opcode: str, operands: str) -> set[int]:
    """Registers, of which an operand of a tensor core or of a wide store names the first only."""
    stores = opcode.startswith(("ST", "RED", "ATOM"))
    read: set[int] = set()
    for place, operand in enumerate(operands.split(",")):
        if place == 0 and not stores:
            continue
        for found in _REGISTER.finditer(operand):
            size = 2 if found[2] else 1
            if "MMA" in opcode:
                size = 4 if place == 1 else 2
            elif stores and "[" not in operand:
                size = -(-width(opcode) // 4)
            read.update(range(int(found[1]), int(found[1]) + size))
    return read
