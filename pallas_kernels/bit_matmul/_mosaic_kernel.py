"""The program of the 1-bit tensor core, written once for two machines: a GPU (`_mosaic_gpu`) and a plain emulation.

One program of four warps takes 32 * warps_n channels, one run of k, a block of rows and one limb of up to 8 bitlayers.

`mma.sync.m16n8k256 .b1 .and.popc` (PTX ISA, "Matrix Fragments for mma.m16n8k256") adds popc(row AND column) over 256
bits for 16 rows and 8 columns. In lane 4 * r + q the registers are
    A: a0 (row r, word q), a1 (row r + 8, word q), a2 (row r, word q + 4), a3 (row r + 8, word q + 4)
    B: b0 (word q, column r), b1 (word q + 4, column r)
    C: c0, c1 (row r, columns 2q and 2q + 1), c2, c3 (row r + 8, the same columns)
The rows are weights, and may be any 16 channels; so may the words be any 8, as long as A and B agree. The 8 columns
are the 8 bits of one limb of one activation row, to be weighted by powers of two at the end.

So a lane loads 4 consecutive channels, 4r..4r + 3, of word q and of word q + 4, 16 bytes each, and has the A fragments
of two products: channels 4r, 4r + 1 in rows r, r + 8 of the first, 4r + 2, 4r + 3 in those of the second. Nothing is
moved between lanes, and the 8 lanes of one q read 128 consecutive bytes. Where n is no multiple of 4, words are not
aligned to 16 bytes: then these come in two loads of 8 bytes, or in four of 4, of channels 8 lanes apart, so that each
of them still reads consecutive bytes.

The activations of a warp's run of k stay in registers for all bitlayers, and the words of several bitlayers are
requested before the first of them are used.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from pallas_kernels.bit_matmul import contract

WARPS = 4  # Mosaic GPU launches programs of whole warpgroups; more warps on a multiprocessor are more programs
LANES = 32
STEP_WORDS = 8  # 256 bits: what one mma sums over
WARP_CHANNELS = 32  # two mma of 16 rows
LANE_CHANNELS = 4  # 16 bytes
LANE_ROWS = 8  # lanes of one q, that have the same words of k

Value = Any  # an integer of the machine: of each lane, or the same in all of them. Python's operators work on it.
Ref = Any  # an array in the machine's memory


class Machine(Protocol):
    """What the program asks for beyond integer arithmetic. Control flow is the same in all lanes of a program."""

    program: Value  # number of the program
    warp: Value
    lane: Value

    def load(self, ref: Ref, index: Sequence[Value], num: int = 1) -> tuple[Value, ...]:
        """`num` consecutive elements along the last axis, in one access."""
        ...

    def store(self, ref: Ref, index: Sequence[Value], value: Value, where: Value | None) -> None:
        """Writes one element, in the lanes for which `where` holds."""
        ...

    def mma(self, a: Sequence[Value], b: Sequence[Value], c: Sequence[Value]) -> list[Value]:
        """C + popc(A AND B) of one warp, in fragments as above."""
        ...

    def shuffle_xor(self, value: Value, distance: int) -> Value:
        """The value of lane `lane ^ distance`."""
        ...

    def select(self, condition: Value, then: Value, otherwise: Value) -> Value:
        """Lane by lane."""
        ...

    def minimum(self, a: Value, b: Value) -> Value:
        """Signed."""
        ...

    def maximum(self, a: Value, b: Value) -> Value:
        """Signed."""
        ...

    def loop(
        self,
        start: Value,
        stop: Value,
        step: int,
        carry: list[Value],
        body: Callable[[Value, list[Value]], list[Value]],
    ) -> list[Value]:
        """carry = body(i, carry) for i in range(start, stop, step)."""
        ...

    def branch(self, condition: Value, then: Callable[[], list[Value]], otherwise: list[Value]) -> list[Value]:
        """`then()` where the condition, the same in all lanes, holds."""
        ...

    def barrier(self) -> None:
        """All warps of the program have come here, and see each other's scratch memory."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the work is cut."""

    rows: int  # rows of activations per program
    steps: int  # of 256 k, per warp
    depth: int  # bitlayers whose words are requested together: 1, 2 or 4
    warps_k: int  # warps that share channels and split k; the others split channels

    @property
    def warps_n(self) -> int:
        return WARPS // self.warps_k

    def registers(self, row_limbs: int) -> int:
        """Registers per lane for sums, activations, words: 128 in all leave room for 16 warps on a multiprocessor."""
        return 8 * row_limbs + 2 * self.steps * row_limbs + 8 * self.steps * self.depth

    @property
    def split_words(self) -> int:
        """Words of k per program."""
        return self.warps_k * self.steps * STEP_WORDS

    @property
    def block_n(self) -> int:
        """Channels per program."""
        return self.warps_n * WARP_CHANNELS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """All static facts of one launch."""

    problem: contract.Problem
    config: Config
    sweep: bool  # write the sums after every bitlayer, not after every limb of bitlayers

    @property
    def row_blocks(self) -> int:
        return -(-self.problem.m // self.config.rows)

    @property
    def row_limbs(self) -> int:
        """Limbs of activations per program: the columns of as many mma."""
        return self.config.rows * self.problem.activation_limbs

    @property
    def load_channels(self) -> int:
        """Channels of one load: 4, or what the alignment of a word of k leaves of that."""
        return math.gcd(self.problem.n, LANE_CHANNELS)

    @property
    def n_blocks(self) -> int:
        return -(-self.problem.n // self.config.block_n)

    @property
    def segment_words(self) -> int:
        """Words from the start of one segment to the start of the next; the last segment may be short."""
        return self.problem.segments[0][2]

    @property
    def segment_splits(self) -> int:
        """Programs along k per segment; those past the end of a short segment add zeros."""
        return -(-self.segment_words // self.config.split_words)

    @property
    def splits(self) -> int:
        return len(self.problem.segments) * self.segment_splits

    @property
    def is_even(self) -> bool:
        """Every split of k is full."""
        return self.problem.num_words == self.splits * self.config.split_words

    @property
    def slots(self) -> int:
        """Sums written per output: after every bitlayer, or of every limb of bitlayers."""
        return self.problem.bits if self.sweep else len(self.problem.code_limbs)

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """Blocks of n, splits of k, blocks of rows, limbs of bitlayers; the first runs fastest."""
        return self.n_blocks, self.splits, self.row_blocks, len(self.problem.code_limbs)

    @property
    def fragments_shape(self) -> tuple[int, ...]:
        config = self.config
        steps = config.warps_k * config.steps
        return self.row_blocks, self.splits, steps, self.row_limbs, LANES, 2

    @property
    def sums_shape(self) -> tuple[int, ...]:
        return self.slots, self.splits, self.row_blocks * self.row_limbs, self.problem.n

    @property
    def scratch_shape(self) -> tuple[int, ...]:
        return self.config.warps_k, self.row_limbs, self.config.block_n

    @property
    def rows_differ(self) -> bool:
        """Rows of one program may use different numbers of bitlayers."""
        return self.config.rows > 1 and not self.sweep


def run(
    machine: Machine,
    plan: Plan,
    words: Ref,  # uint32[bits, num_words, n]
    fragments: Ref,  # uint32[row blocks, splits, warps_k * steps, row limbs, 32, 2]
    counts: Ref,  # int32[row blocks, rows], bitlayers used
    sums: Ref,  # int32[slots, splits, row blocks * row limbs, n], written
    scratch: Ref,  # int32[warps_k, row limbs, block_n], shared by the program's warps; None for warps_k = 1
) -> None:
    """One program."""
    n_block, split, row_block, code_limb = _unravel(machine.program, plan.grid)
    warp_k, warp_n = machine.warp // plan.config.warps_n, machine.warp % plan.config.warps_n
    limits = [machine.load(counts, (row_block, row))[0] for row in range(plan.config.rows)]
    first = code_limb * contract.LIMB_BITS
    stop = first
    for limit in limits:
        stop = machine.maximum(stop, limit)
    stop = machine.minimum(stop, first + contract.LIMB_BITS)

    unused = None  # bitlayers of this limb that a row does not use, up to `stop`
    if plan.rows_differ:
        unused = [stop - machine.minimum(machine.maximum(limit, first), stop) for limit in limits]
    read = _word_reader(machine, plan, words, split, n_block, warp_k, warp_n)
    emit = _writer(machine, plan, sums, scratch, (n_block, split, row_block), warp_k, warp_n)
    zero = [machine.lane * 0] * (plan.row_limbs * 8)

    def accumulate():
        held = _fragments(machine, plan, fragments, row_block, split, warp_k)

        def add(bitlayer, acc, num):
            blocks = [read(bitlayer + i) for i in range(num)]  # all requested before the first is used
            for i, block in enumerate(blocks):
                acc = _add_bitlayer(machine, plan, bitlayer + i, limits, acc, block, held)
                if plan.sweep:
                    emit(bitlayer + i, acc, unused)
            return acc

        depth, count = plan.config.depth, stop - first
        acc = machine.loop(first, stop - count % depth, depth, zero, lambda i, acc: add(i, acc, depth))
        while depth > 1:  # what is left, in halves: reads nothing past the last bitlayer
            left = count % depth
            depth //= 2
            acc = machine.branch(
                (left & depth) != 0, lambda acc=acc, left=left, depth=depth: add(stop - left, acc, depth), acc
            )
        return acc

    acc = machine.branch(first < stop, accumulate, zero)
    if not plan.sweep:
        emit(code_limb, acc, unused)


def _unravel(number: Value, grid: Sequence[int]) -> list[Value]:
    index = []
    for size in grid[:-1]:
        index.append(number % size)
        number = number // size
    return [*index, number]


def _word_reader(
    machine: Machine,
    plan: Plan,
    words: Ref,
    split: Value,
    n_block: Value,
    warp_k: Value,
    warp_n: Value,
) -> Callable[[Value], list[Value]]:
    """Reads a warp's words of one bitlayer: for each step 4 channels of word q, then of word q + 4.

    The 4 channels of a lane are those of `_channel`.

    Outside a segment the activations are zero, and outside n nothing is written, so there any words will do: an index
    past the end is replaced by the last, which costs no branch and, being in the same lines, no traffic.
    """
    config = plan.config
    row, quad, width = machine.lane // 4, machine.lane % 4, plan.load_channels
    first = (n_block * config.warps_n + warp_n) * (WARP_CHANNELS // width) + row
    loads = [first, *(first + LANE_ROWS * i for i in range(1, LANE_CHANNELS // width))]
    if plan.problem.n % config.block_n:
        loads = [machine.minimum(load, plan.problem.n // width - 1) for load in loads]
    channels = [load * width for load in loads]  # multiplied last: so the compiler sees that they are aligned
    segment, part = split // plan.segment_splits, split % plan.segment_splits
    start = segment * plan.segment_words + part * config.split_words + warp_k * (config.steps * STEP_WORDS) + quad
    positions = [start + half * (STEP_WORDS // 2) for half in range(2 * config.steps)]
    if not plan.is_even:
        last = machine.minimum((segment + 1) * plan.segment_words, plan.problem.num_words) - 1
        positions = [machine.minimum(position, last) for position in positions]

    def read(bitlayer: Value) -> list[Value]:
        loaded = [machine.load(words, (bitlayer, p, channel), width) for p in positions for channel in channels]
        return [word for words in loaded for word in words]

    return read


def _channel(machine: Machine, plan: Plan) -> Value:
    """The channel, of a warp's 32, that a lane has after `_reduce_columns`: that of its word number q."""
    width = plan.load_channels
    if width == LANE_CHANNELS:
        return machine.lane
    row, quad = machine.lane // 4, machine.lane % 4
    return (quad // width * LANE_ROWS + row) * width + quad % width


def _fragments(
    machine: Machine, plan: Plan, fragments: Ref, row_block: Value, split: Value, warp_k: Value
) -> list[list[tuple[Value, ...]]]:
    """B of each step and limb of activations."""
    steps = plan.config.steps
    return [
        [
            machine.load(fragments, (row_block, split, warp_k * steps + step, i, machine.lane, 0), 2)
            for i in range(plan.row_limbs)
        ]
        for step in range(steps)
    ]


def _add_bitlayer(
    machine: Machine,
    plan: Plan,
    bitlayer: Value,
    limits: list[Value],
    acc: list[Value],
    block: list[Value],
    held: list[list[tuple[Value, ...]]],
) -> list[Value]:
    """acc <- 2 * acc + x . bit; 8 sums for each limb of activations.

    A row that does not use the bitlayer adds nothing, but is doubled like the others; `_writer` takes that back. The
    doubling is exact: 512 k and 8 bitlayers need 18 bits.
    """
    acc = [c + c for c in acc]
    for step, fragments in enumerate(held):
        low, high = block[8 * step : 8 * step + 4], block[8 * step + 4 : 8 * step + 8]
        for i, fragment in enumerate(fragments):
            b = fragment
            if plan.rows_differ:
                used = bitlayer < limits[i // plan.problem.activation_limbs]
                b = [machine.select(used, word, 0) for word in fragment]
            for pair in range(2):
                a = (*low[2 * pair : 2 * pair + 2], *high[2 * pair : 2 * pair + 2])
                at = 8 * i + 4 * pair
                acc[at : at + 4] = machine.mma(a, b, acc[at : at + 4])
    return acc


def _writer(
    machine: Machine,
    plan: Plan,
    sums: Ref,
    scratch: Ref,
    place: tuple[Value, Value, Value],
    warp_k: Value,
    warp_n: Value,
) -> Callable[[Value, list[Value], list[Value] | None], None]:
    """Writes the sums of a program: columns weighted and added, and the splits of k among its warps added."""
    config, n = plan.config, plan.problem.n
    n_block, split, row_block = place

    def store(slot: Value, row_limb: Value, column: Value, value: Value, where: Value | None) -> None:
        channel = n_block * config.block_n + column
        if n % config.block_n:
            where = channel < n if where is None else where & (channel < n)
        machine.store(sums, (slot, split, row_block * plan.row_limbs + row_limb, channel), value, where)

    def emit(slot: Value, acc: list[Value], unused: list[Value] | None) -> None:
        column = warp_n * WARP_CHANNELS + _channel(machine, plan)
        values = [
            _reduce_columns(machine, acc[8 * i : 8 * i + 8], signed=i % plan.problem.activation_limbs == 0)
            for i in range(plan.row_limbs)
        ]
        if unused is not None:  # zeros were shifted in, so this is exact
            values = [value >> unused[i // plan.problem.activation_limbs] for i, value in enumerate(values)]
        if config.warps_k == 1:
            for i, value in enumerate(values):
                store(slot, i, column, value, None)
            return
        for i, value in enumerate(values):
            machine.store(scratch, (warp_k, i, column), value, None)
        machine.barrier()
        num, threads = plan.row_limbs * config.block_n, WARPS * LANES
        for start in range(0, num, threads):
            item = machine.warp * LANES + machine.lane + start
            inside = None if start + threads <= num else item < num
            if inside is not None:
                item = machine.minimum(item, num - 1)
            i, column = item // config.block_n, item % config.block_n
            total = machine.load(scratch, (0, i, column))[0]
            for warp in range(1, config.warps_k):
                total = total + machine.load(scratch, (warp, i, column))[0]
            store(slot, i, column, total, inside)
        if plan.sweep:  # the scratch memory is written again
            machine.barrier()

    return emit


def _reduce_columns(machine: Machine, acc: list[Value], *, signed: bool) -> Value:
    """sum_j +-2**j * column j of a warp's 32 channels: in each lane that of its word number q.

    The lane has columns 2q and 2q + 1 of its 4 channels. Of the 4 lanes of one r each ends with one channel, so
    in two exchanges it gives away what others collect: 3 shuffles instead of 8.
    """
    quad = machine.lane % 4
    even = (quad * 0 + 1) << (quad * 2)
    odd = even + even
    if signed:  # column 7 is the sign of the limb
        odd = machine.select(quad == 3, 0 - odd, odd)
    values = [acc[2 * c] * even + acc[2 * c + 1] * odd for c in range(4)]
    for distance in (2, 1):
        upper = (quad & distance) != 0
        half = len(values) // 2
        kept = [machine.select(upper, values[half + c], values[c]) for c in range(half)]
        given = [machine.select(upper, values[c], values[half + c]) for c in range(half)]
        values = [k + machine.shuffle_xor(g, distance) for k, g in zip(kept, given, strict=True)]
    return values[0]
