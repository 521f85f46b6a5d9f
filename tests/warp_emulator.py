"""The machine of `_mosaic_kernel` in NumPy: a program's 128 lanes in lockstep, every value an array [warps, lanes].

It runs the very program that the GPU's code is made from, and checks what a GPU would not report: indices outside an
array, 32-bit overflow, an output written twice, shared memory read before or overwritten after without a barrier.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from pallas_kernels.bit_matmul import _mosaic_kernel

INT32 = np.iinfo(np.int32)


@dataclasses.dataclass
class Memory:
    """An array and what was done to it."""

    array: np.ndarray  # int64
    shared: bool = False
    max_first_index: int = -1  # of the loads

    def __post_init__(self):
        self.num_stores = np.zeros(self.array.shape, np.int32)
        self.pending: list[tuple[tuple[np.ndarray, ...], np.ndarray]] = []
        self.loaded = np.zeros(self.array.shape, bool)

    def locate(self, index, offset=0):
        index = list(np.broadcast_arrays(*[np.asarray(i, np.int64) for i in index]))
        index[-1] = index[-1] + offset
        for i, size in zip(index, self.array.shape, strict=True):
            assert np.all((i >= 0) & (i < size)), f"index {i.min()}..{i.max()} outside {size}"
        return tuple(index)


class Emulator:
    def __init__(self, program: int, scratch: Memory | None):
        shape = (_mosaic_kernel.WARPS, _mosaic_kernel.LANES)
        self.program = program
        self.warp, self.lane = np.indices(shape)
        self.scratch = scratch

    def load(self, ref: Memory, index, num=1):
        ref.max_first_index = max(ref.max_first_index, int(np.max(index[0])))
        assert num == 1 or np.all(np.asarray(index[-1]) % num == 0), "a misaligned vector load"
        found = []
        for i in range(num):
            at = ref.locate(index, i)
            ref.loaded[at] = True
            found.append(ref.array[at])
        return tuple(found)

    def store(self, ref: Memory, index, value, where):
        index, value = np.broadcast_arrays(*index), np.broadcast_to(value, self.lane.shape)
        where = np.broadcast_to(True if where is None else where, self.lane.shape)
        at = ref.locate([np.broadcast_to(i, self.lane.shape)[where] for i in index])
        if ref.shared:
            assert not ref.loaded[at].any(), "overwritten without a barrier since it was read"
            ref.pending.append((at, value[where]))
            return
        np.add.at(ref.num_stores, at, 1)
        ref.array[at] = value[where]

    def barrier(self):
        for at, value in self.scratch.pending:
            self.scratch.array[at] = value
        self.scratch.pending.clear()
        self.scratch.loaded[:] = False

    def mma(self, a, b, c):
        """PTX ISA, mma.m16n8k256 with .b1: the fragments of every lane, put together, multiplied, taken apart."""
        warps = self.lane.shape[0]
        a, b, c = (np.stack([np.broadcast_to(r, self.lane.shape) for r in registers]) for registers in (a, b, c))
        a_matrix = np.zeros((warps, 16, 8), np.uint32)  # row, word
        b_matrix = np.zeros((warps, 8, 8), np.uint32)  # word, column
        c_matrix = np.zeros((warps, 16, 8), np.int64)
        for lane in range(32):
            group, in_group = lane >> 2, lane % 4
            for i in range(4):
                a_matrix[:, group + 8 * (i % 2), in_group + 4 * (i // 2)] = a[i, :, lane] & 0xFFFFFFFF
                c_matrix[:, group + 8 * (i // 2), 2 * in_group + i % 2] = c[i, :, lane]
            for i in range(2):
                b_matrix[:, in_group + 4 * i, group] = b[i, :, lane] & 0xFFFFFFFF
        both = a_matrix[:, :, :, None] & b_matrix[:, None, :, :]
        c_matrix += np.bitwise_count(both).astype(np.int64).sum(axis=2)
        assert c_matrix.max() <= INT32.max
        out = np.empty_like(c)
        for lane in range(32):
            group, in_group = lane >> 2, lane % 4
            for i in range(4):
                out[i, :, lane] = c_matrix[:, group + 8 * (i // 2), 2 * in_group + i % 2]
        return list(out)

    def shuffle_xor(self, value, distance):
        assert np.all((value >= INT32.min) & (value <= INT32.max))
        return value[:, np.arange(32) ^ distance]

    def select(self, condition, then, otherwise):
        return np.where(condition, then, otherwise)

    def minimum(self, a, b):
        return np.minimum(a, b)

    def maximum(self, a, b):
        return np.maximum(a, b)

    def loop(self, start, stop, step, carry, body):
        for i in range(int(start), int(stop), step):
            carried = body(i, carry)
            assert len(carried) == len(carry)
            carry = carried
        return carry

    def branch(self, condition, then, otherwise):
        return then() if condition else otherwise


def launch(plan: _mosaic_kernel.Plan, words, fragments, counts):
    """Every program of the grid, one after the other. Returns the sums and the memory of the words."""
    operands = [Memory(np.asarray(array).astype(np.int64)) for array in (words, fragments, counts)]
    assert operands[1].array.shape == plan.fragments_shape
    sums = Memory(np.full(plan.sums_shape, 0x55555555, np.int64))
    for program in range(int(np.prod(plan.grid))):
        scratch = None
        if plan.config.warps_k > 1:
            scratch = Memory(np.full(plan.scratch_shape, INT32.min, np.int64), shared=True)
        _mosaic_kernel.run(Emulator(program, scratch), plan, *operands, sums, scratch)
    assert sums.num_stores.max() <= 1, "an output was written twice"
    assert np.all((sums.array >= INT32.min) & (sums.array <= INT32.max))
    return sums, operands[0]
