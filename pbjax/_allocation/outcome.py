"""`Allocation`: what `pbjax.allocate` chose, as data, as a table, and as what `with_bitlayers` takes."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import rich.table

from pbjax import _tables
from pbjax._allocation.layers import Layer
from pbjax._tables import Tabular


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllocationRow(Layer):
    """One layer: a BitTensor, or one of the weights that it stacks.

    Attributes:
      path: pytree path of the BitTensor.
      index: place in the stack; () without one.
      shape: shape of the weight, without stack axes.
      bits: bitlayers stored.
      bitlayers: bitlayers chosen.
      nbytes: bytes of the bitlayers chosen and of their scales.
      cost: of the bitlayers chosen, in the unit that `pbjax.allocate` was asked to count.
      errors: by number of bitlayers, the measured error with this layer at it and all others at all they store.
    """

    bitlayers: int
    nbytes: int
    cost: float
    errors: dict[int, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniformRow:
    """All layers at one number of bitlayers, or at all they store where that is less.

    Attributes:
      bitlayers: the number.
      nbytes: bytes of these bitlayers and of their scales.
      cost: of these bitlayers.
      average: bitlayers per weight.
      error: the measured error.
    """

    bitlayers: int
    nbytes: int
    cost: float
    average: float
    error: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation(Tabular):
    """A number of bitlayers for each layer, chosen by `pbjax.allocate`; prints as a table.

    Attributes:
      rows: one for each layer, in the order of the tree and of its stacks.
      nbytes: bytes of the bitlayers chosen and of their scales, over all layers.
      cost: of the bitlayers chosen, over all layers.
      cost_unit: "bytes", "seconds" or "cost".
      average: bitlayers per weight: each layer counts with the number of its weights.
      predicted_error: the error that the layers' own errors add up to.
      measured_error: the error of the whole function with this allocation.
      metric: name of the error.
      uniform: the same number of bitlayers everywhere, measured, for comparison.

    `pbjax.with_bitlayers(qparams, allocation.bitlayers)` reads these bitlayers only; to store no others,
    `pbjax.truncate(qparams, allocation.bitlayers)`.
    """

    rows: tuple[AllocationRow, ...]
    nbytes: int
    cost: float
    cost_unit: str
    average: float
    predicted_error: float
    measured_error: float
    metric: str
    uniform: tuple[UniformRow, ...]

    @property
    def bitlayers(self) -> dict[str, int | np.ndarray]:
        """What `pbjax.with_bitlayers` takes: a number for each path, or int32[*stack] where weights are stacked.

        Paths are written as patterns that match themselves and nothing else (`^params/Dense_0/kernel$`), so it serves
        every tree with these paths: the one measured, its float twin quantized anew, one loaded from a file.
        """
        numbers: dict[str, int | np.ndarray] = {}
        for path in dict.fromkeys(row.path for row in self.rows):
            rows = [row for row in self.rows if row.path == path]
            stack_shape = tuple(i + 1 for i in rows[-1].index)
            stacked = np.array([row.bitlayers for row in rows], np.int32).reshape(stack_shape)
            numbers[f"^{re.escape(path)}$"] = stacked if stack_shape else int(stacked)
        return numbers

    def to_dicts(self) -> list[dict[str, Any]]:
        """The rows as plain data."""
        return [dataclasses.asdict(row) for row in self.rows]

    def to_table(self) -> rich.table.Table:
        """The allocation as a rich table."""
        shown = _tables.shown_bitlayers({b for row in self.rows for b in row.errors})
        sizes = {"bytes": ["kB"], "seconds": ["kB", "ms"], "cost": ["kB", "cost"]}[self.cost_unit]
        table = _tables.table_of(
            ["shape", "bits", "bitlayers", *sizes, "error", *(f"{self.metric} {b}" for b in shown)],
            caption=f"{self.metric} b: error with this layer at b bitlayers and the others at all; "
            "under total and uniform, of everything together",
        )

        def size_cells(of: AllocationRow | UniformRow | Allocation) -> list[str]:
            factor = 1000 if self.cost_unit == "seconds" else 1
            return [_tables.kilobytes(of.nbytes), f"{factor * of.cost:.4g}"][: len(sizes)]

        for row in self.rows:
            table.add_row(
                *_tables.weight_cells(row.name, row.shape),
                str(row.bits),
                str(row.bitlayers),
                *size_cells(row),
                f"{row.errors[row.bitlayers]:.2e}",
                *(f"{row.errors[b]:.2e}" if b in row.errors else "" for b in shown),
            )
        table.add_section()
        table.add_row("total", "", "", f"{self.average:.2f}", *size_cells(self), f"{self.measured_error:.2e}")
        table.add_row("predicted", "", "", "", *[""] * len(sizes), f"{self.predicted_error:.2e}")
        table.add_section()
        for row in self.uniform:
            table.add_row("uniform", "", "", f"{row.average:.3g}", *size_cells(row), f"{row.error:.2e}")
        return table
