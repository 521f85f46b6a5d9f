"""`pbjax.report`: what quantization did to each weight, as data and as a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.table

from pbjax import _bit_tensor, _interpret, _paths, _quantized, _tables
from pbjax._bit_tensor import BitTensor, is_bit_tensor
from pbjax._packed import Dequantized
from pbjax._tables import Tabular


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportRow:
    """One weight, or the total.

    Attributes:
      path: pytree path; "total" for the total.
      shape: shape of the weight; () for the total.
      bits: bitlayers stored; None for the total.
      bitlayers: bitlayers in use, the smallest and the largest over the stack; None for the total.
      float_bytes: bytes of the float weight.
      packed_bytes: bytes of the words and scales.
      errors: relative error ||w - w_b|| / ||w|| after b = 1, 2, .. bitlayers.
      dequantized_by: primitives that need the weight as floats (with `fn` only).
    """

    path: str
    shape: tuple[int, ...]
    bits: int | None
    bitlayers: tuple[int, int] | None
    float_bytes: int
    packed_bytes: int
    errors: tuple[float, ...]
    dequantized_by: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(Tabular):
    """The outcome of `pbjax.report`; prints as a table.

    Attributes:
      rows: one for each BitTensor, in the order of the tree.
      total: all of them together; its errors are over all weights that store that many bitlayers.
      reference: what errors are relative to: "original" weights, or all "stored" bitlayers.
    """

    rows: tuple[ReportRow, ...]
    total: ReportRow
    reference: str

    def to_dicts(self) -> list[dict[str, Any]]:
        """The rows and the total as plain data."""
        return [dataclasses.asdict(row) for row in (*self.rows, self.total)]

    def to_table(self) -> rich.table.Table:
        """The report as a rich table."""
        most = max((len(row.errors) for row in self.rows), default=0)
        shown = _tables.shown_bitlayers(range(1, most + 1))
        caption = f"err b: relative error of the weights after b bitlayers, against the {self.reference} weights"
        table = _tables.table_of(
            ["shape", "bits", "used", "float kB", "packed kB", *(f"err {b}" for b in shown)],
            caption=caption if shown else None,
        )
        notes = any(row.dequantized_by for row in self.rows)
        if notes:
            table.add_column("as floats for")
        for row in (*self.rows, self.total):
            used = "" if row.bitlayers is None else "-".join(map(str, sorted(set(row.bitlayers))))
            if row is self.total:
                table.add_section()
            table.add_row(
                *_tables.weight_cells(row.path, row.shape),
                "" if row.bits is None else str(row.bits),
                used,
                _tables.kilobytes(row.float_bytes),
                _tables.kilobytes(row.packed_bytes),
                *(f"{row.errors[b - 1]:.4f}" if b <= len(row.errors) else "" for b in shown),
                *([", ".join(row.dequantized_by)] if notes else []),
            )
        return table


def report(
    tree: Any, original: Any = None, *, fn: Callable[..., Any] | None = None, args: tuple[Any, ...] = ()
) -> Report:
    """Sizes and errors of every BitTensor of a tree.

    Args:
      tree: any pytree with BitTensors, with known values.
      original: the tree that was quantized, for errors against the true weights; without it, errors are against the
        value of all stored bitlayers.
      fn: if given, a function of `tree` and `args`, traced to find the weights that `pbjax.quantized(fn)` would have to
        unpack.
      args: the other arguments of `fn`; `jax.ShapeDtypeStruct`s will do.

    Returns:
      A `Report`: print it, or read its rows.

    Raises:
      ValueError: no BitTensor in the tree, or `original` of another structure.

    Cost: dequantizes one weight at a time, once for each number of bitlayers.
    """
    names, leaves, _ = _paths.named_leaves(tree)
    _bit_tensor.check_any(leaves)
    originals = [None] * len(leaves)
    if original is not None:
        originals = jax.tree.leaves(original, is_leaf=is_bit_tensor)
        if any(map(is_bit_tensor, originals)):
            raise ValueError(
                "`original` must hold the float weights, but has BitTensors. Give the tree before `quantize`."
            )
        if len(originals) != len(leaves):
            raise ValueError(
                f"`original` must have the structure of `tree`, but got {len(originals)} leaves against {len(leaves)}."
            )
    needs: dict[str, list[str]] = {}
    for entry in [] if fn is None else _dequantized_by(fn, tree, args):
        needs.setdefault(entry.path, []).append(entry.primitive)
    rows, squares = [], []
    for name, leaf, weight in zip(names, leaves, originals, strict=True):
        if not is_bit_tensor(leaf):
            continue
        if weight is not None and getattr(weight, "shape", None) != leaf.shape:
            found = getattr(weight, "shape", repr(weight))
            raise ValueError(f"`original` must have shape {leaf.shape} at {name}, but got {found}.")
        squares.append(squared_errors(leaf, weight))
        rows.append(row_of(name, leaf, squares[-1], tuple(needs.get(name, ()))))
    return report_of(rows, squares, "stored" if original is None else "original")


Squares = tuple[list[float], float]


def row_of(name: str, tensor: BitTensor, squares: Squares, dequantized_by: tuple[str, ...] = ()) -> ReportRow:
    """The row of one weight; `squares` as `squared_errors` returns them."""
    used = np.ravel(np.asarray(tensor.bitlayers))
    errors, square = squares
    return ReportRow(
        path=name,
        shape=tensor.shape,
        bits=tensor.bits,
        bitlayers=(int(used.min()), int(used.max())),
        float_bytes=_num_elements(tensor) * tensor.dtype.itemsize,
        packed_bytes=tensor.nbytes,
        errors=tuple(_ratio(error, square) for error in errors),
        dequantized_by=dequantized_by,
    )


def report_of(rows: list[ReportRow], squares: list[Squares], reference: str) -> Report:
    """Rows and their total."""
    most = max((len(errors) for errors, _ in squares), default=0)
    totals = []
    for b in range(most):
        stored = [(errors[b], square) for errors, square in squares if b < len(errors)]
        totals.append(_ratio(sum(error for error, _ in stored), sum(square for _, square in stored)))
    total = ReportRow(
        path="total",
        shape=(),
        bits=None,
        bitlayers=None,
        float_bytes=sum(row.float_bytes for row in rows),
        packed_bytes=sum(row.packed_bytes for row in rows),
        errors=tuple(totals),
    )
    return Report(rows=tuple(rows), total=total, reference=reference)


def _dequantized_by(fn: Callable[..., Any], tree: Any, args: tuple[Any, ...]) -> list[Dequantized]:
    found: list[Dequantized] = []

    _interpret.trace(lambda tree, args: found.extend(_quantized.run(fn, (tree, *args), {})[1]), tree, args)
    return found


def squared_errors(tensor: BitTensor, weight: Any) -> Squares:
    """Sums of squares of w - w_b for b = 1..bits, and of w."""

    def values(b: int) -> jax.Array:
        return _values(tensor.replace(bitlayers=jnp.full(tensor.stack_shape, b, jnp.int32)))

    true = values(tensor.bits) if weight is None else jnp.asarray(weight, jnp.float32)
    errors = [float(_square(true - values(b))) for b in range(1, tensor.bits + 1)]
    return errors, float(_square(true))


@jax.jit
def _values(tensor: BitTensor) -> jax.Array:
    return _bit_tensor.unpack_array(tensor.replace(dtype=jnp.dtype(jnp.float32)))


@jax.jit
def _square(values: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(values))


def _ratio(error: float, square: float) -> float:
    return (error / square) ** 0.5 if square else 0.0


def _num_elements(tensor: BitTensor) -> int:
    return math.prod(tensor.shape)
