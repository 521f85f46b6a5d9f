"""Tables of the rows: speed over XLA's bf16, and the fraction of the memory limit, weights not in the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import gpu_baselines
import rich.table
from gpu_rows import HOST, Row
from gpu_timing import BITS, WIDTHS

_OTHERS = [name for name in gpu_baselines.NAMES if name != "bf16"]


def tables(rows: Sequence[Row]) -> Iterator[rich.table.Table]:
    """One of whole calls, and one of their kernels alone if a device told them. An "h" marks the host's clock."""
    yield _table(
        rows, "from a call's first kernel to its last, gaps included", "speedup_over_bf16", "fraction_of_limit"
    )
    if any(row.kernels for row in rows):
        yield _table(rows, "kernels only, without the gaps", "kernels_speedup_over_bf16", "kernels_fraction_of_limit")


def _table(rows: Sequence[Row], what: str, speedup: str, fraction: str) -> rich.table.Table:
    """A line for each shape and width of activations."""
    table = rich.table.Table(
        title=f"speed over XLA's fastest bf16 product, and fraction of the memory limit in %, cold: {what}"
    )
    for name in ("m", "k x n", *_OTHERS, "A", *map(str, range(1, BITS + 1)), "sweep"):
        table.add_column(name, justify="right")
    cold = [row for row in rows if row.l2 == "cold"]
    for m, k, n in dict.fromkeys((row.m, row.k, row.n) for row in cold):
        shape = [row for row in cold if (row.m, row.k, row.n) == (m, k, n)]
        cells = {(row.method, row.activation_bits, row.bitlayers): row for row in shape}
        others = [max(_known(row for row in shape if row.method == name), key=_speed, default=None) for name in _OTHERS]
        for width in WIDTHS:
            products = [cells.get(("bitlayers", width, used)) for used in range(1, BITS + 1)]
            products.append(cells.get(("sweep", width, BITS)))
            table.add_row(
                str(m),
                f"{k} x {n}",
                *(_cell(row, speedup, None) for row in others),
                "float" if width is None else str(width),
                *(_cell(row, speedup, fraction) for row in products),
            )
        table.add_section()
    return table


def _known(rows: Iterator[Row]) -> list[Row]:
    return [row for row in rows if row.speedup_over_bf16 is not None]


def _speed(row: Row) -> float:
    assert row.speedup_over_bf16 is not None, "filtered by `_known`"
    return row.speedup_over_bf16


def _cell(row: Row | None, speedup: str, fraction: str | None) -> str:
    """Empty for what does not run here, a dash where no ratio of one clock can be made."""
    if row is None:
        return ""
    speed, limit = getattr(row, speedup), getattr(row, fraction) if fraction else None
    text = "-" if speed is None else f"{speed:.2f}"
    return text + "h" * (row.clock == HOST) + ("" if limit is None else f" {100 * limit:.0f}%")
