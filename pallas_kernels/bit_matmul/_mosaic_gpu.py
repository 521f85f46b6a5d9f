"""The machine of `_mosaic_kernel` that is a GPU: each operation emits MLIR, inside one Pallas Mosaic GPU kernel.

Pallas itself has neither the 1-bit mma nor a way to say which lane loads what, so the body of the kernel is one
`inline_mgpu` block. It runs under lane semantics: what is emitted is what one thread executes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, memref, scf, vector

from pallas_kernels import _compat
from pallas_kernels.bit_matmul import _mosaic_kernel

# .and.popc, not .xor.popc: the first is one BMMA on sm_80 to sm_90, the second is emulated on sm_90.
_MMA = (
    "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc"
    " {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
)
_MMA_OPERANDS = ",".join(["=r"] * 4 + ["r"] * 10)


def launch(plan: _mosaic_kernel.Plan, words: jax.Array, fragments: jax.Array, counts: jax.Array) -> jax.Array:
    """Runs the program over its grid; the operands and the result are those of `_mosaic_kernel.run`."""
    scratch = () if plan.config.warps_k == 1 else (plgpu.SMEM(plan.scratch_shape, jnp.int32),)

    def bit_matmul(*refs):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def body(context, words, fragments, counts, sums, scratch=None):
            del context
            _mosaic_kernel.run(_Gpu(), plan, words, fragments, counts, sums, scratch)

        body(*refs)

    return _compat.mosaic_kernel(
        bit_matmul,
        out_type=jax.ShapeDtypeStruct(plan.sums_shape, jnp.int32),
        scratch_types=scratch,
        grid=(math.prod(plan.grid),),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(words, fragments, counts)


class _Int:
    """A 32-bit integer, or a condition, with Python's operators. Division and remainder are for values >= 0."""

    def __init__(self, value: ir.Value):
        self.value = value

    def _apply(self, op: Callable[[ir.Value, ir.Value], ir.Value], other: _Int | int) -> _Int:
        return _Int(op(self.value, _value(other, self.value.type)))

    def __add__(self, other: _Int | int) -> _Int:
        return self._apply(arith.addi, other)

    def __sub__(self, other: _Int | int) -> _Int:
        return self._apply(arith.subi, other)

    def __rsub__(self, other: int) -> _Int:
        return _Int(arith.subi(_value(other, self.value.type), self.value))

    def __mul__(self, other: _Int | int) -> _Int:
        return self._apply(arith.muli, other)

    def __floordiv__(self, other: _Int | int) -> _Int:
        return self._apply(arith.divui, other)

    def __mod__(self, other: _Int | int) -> _Int:
        return self._apply(arith.remui, other)

    def __and__(self, other: _Int | int) -> _Int:
        return self._apply(arith.andi, other)

    def __lshift__(self, other: _Int | int) -> _Int:
        return self._apply(arith.shli, other)

    def __rshift__(self, other: _Int | int) -> _Int:
        return self._apply(arith.shrsi, other)

    def __lt__(self, other: _Int | int) -> _Int:
        return self._compare(arith.CmpIPredicate.slt, other)

    def __eq__(self, other: _Int | int) -> _Int:  # type: ignore[override]
        return self._compare(arith.CmpIPredicate.eq, other)

    def __ne__(self, other: _Int | int) -> _Int:  # type: ignore[override]
        return self._compare(arith.CmpIPredicate.ne, other)

    __hash__ = None  # type: ignore[assignment]

    def _compare(self, predicate: arith.CmpIPredicate, other: _Int | int) -> _Int:
        return self._apply(lambda a, b: arith.cmpi(predicate, a, b), other)


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _value(number: _Int | int, dtype: ir.Type | None = None) -> ir.Value:
    if isinstance(number, _Int):
        return number.value
    dtype = dtype or _i32()
    return arith.constant(dtype, ir.IntegerAttr.get(dtype, operator.index(number)))


def _index(index: Sequence[_Int | int]) -> list[ir.Value]:
    # Unsigned: no index is negative, and widening costs no sign.
    return [arith.index_castui(ir.IndexType.get(), _value(i)) for i in index]


class _Gpu:
    """The machine; see `_mosaic_kernel.Machine`."""

    def __init__(self):
        thread = _Int(arith.index_cast(_i32(), gpu.thread_id(gpu.Dimension.x)))
        self.program = _Int(arith.index_cast(_i32(), gpu.block_id(gpu.Dimension.x)))
        self.lane = thread % _mosaic_kernel.LANES
        self.warp = _Int(mgpu.warp_idx())  # broadcast, so that the compiler sees one value per warp

    def load(self, ref: ir.Value, index: Sequence[_Int | int], num: int = 1) -> tuple[_Int, ...]:
        if num == 1:
            return (_Int(memref.load(ref, _index(index))),)
        # The alignment makes it one load; every index along the last axis is a multiple of `num`.
        loaded = vector.load(ir.VectorType.get((num,), _i32()), ref, _index(index), alignment=4 * num)
        return tuple(_Int(vector.extract(loaded, dynamic_position=[], static_position=[i])) for i in range(num))

    def store(self, ref: ir.Value, index: Sequence[_Int | int], value: _Int, where: _Int | None) -> None:
        if where is None:
            memref.store(value.value, ref, _index(index))
            return
        with mgpu.when(where.value):
            memref.store(value.value, ref, _index(index))
        mgpu.utils.warp_barrier()  # mma and shuffles need all lanes back together

    def mma(self, a: Sequence[_Int], b: Sequence[_Int], c: Sequence[_Int]) -> list[_Int]:
        result = ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>")
        operands = [register.value for register in (*a, *b, *c)]
        # A side effect as far as LLVM knows: a warp-wide instruction must not move under a condition.
        mma = llvm.InlineAsmOp(result, operands, _MMA, _MMA_OPERANDS, has_side_effects=True)
        return [_Int(llvm.extractvalue(_i32(), mma.results[0], [i])) for i in range(4)]

    def shuffle_xor(self, value: _Int, distance: int) -> _Int:
        return _Int(mgpu.utils.shfl_bfly(value.value, distance))

    def select(self, condition: _Int, then: _Int | int, otherwise: _Int | int) -> _Int:
        return _Int(arith.select(condition.value, _value(then), _value(otherwise)))

    def minimum(self, a: _Int | int, b: _Int | int) -> _Int:
        return _Int(arith.minsi(_value(a), _value(b)))

    def maximum(self, a: _Int | int, b: _Int | int) -> _Int:
        return _Int(arith.maxsi(_value(a), _value(b)))

    def loop(
        self, start: _Int, stop: _Int, step: int, carry: list[_Int], body: Callable[[_Int, list[_Int]], list[_Int]]
    ) -> list[_Int]:
        loop = scf.ForOp(start.value, stop.value, _value(step), [c.value for c in carry])
        with ir.InsertionPoint(loop.body):
            carried = body(_Int(loop.induction_variable), [_Int(c) for c in loop.inner_iter_args])
            scf.yield_([c.value for c in carried])
        return [_Int(c) for c in loop.results]

    def branch(self, condition: _Int, then: Callable[[], list[_Int]], otherwise: list[_Int]) -> list[_Int]:
        branch = scf.IfOp(condition.value, [c.value.type for c in otherwise], has_else=True)
        with ir.InsertionPoint(branch.then_block):
            scf.yield_([c.value for c in then()])
        assert branch.else_block is not None
        with ir.InsertionPoint(branch.else_block):
            scf.yield_([c.value for c in otherwise])
        return [_Int(c) for c in branch.results]

    def barrier(self) -> None:
        mgpu.warpgroup_barrier()
