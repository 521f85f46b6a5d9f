"""Tables of the rows: speed over XLA's bf16, and the fraction of the memory limit, weights not in the cache.

And one of what is asked of an H200, by spans on the device's clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import gpu_baselines
import rich.table
from gpu_rows import DEVICE, HOST, Row
from gpu_timing import BITS, WIDTHS

_OTHERS = [name for name in gpu_baselines.NAMES if name != "bf16"]


def tables(rows: Sequence[Row]) -> Iterator[rich.table.Table]:
    """One of whole calls, and one of their kernels alone if a device told them. An "h" marks the host's clock."""
    yield _table(
        rows, "from a call's first kernel to its last, gaps included", "speedup_over_bf16", "fraction_of_limit"
    )
    if any(row.kernels for row in rows):
        yield _table(rows, "kernels only, without the gaps", "kernels_speedup_over_bf16", "kernels_fraction_of_limit")
    if (asked := targets(rows)) is not None:
        yield asked


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


LARGE = 8192 * 8192  # weights


def targets(rows: Sequence[Row]) -> rich.table.Table | None:
    """What is asked, and the worst that was measured of it, for large weights; None where there is nothing of it."""
    cold = [row for row in rows if row.l2 == "cold" and row.clock == DEVICE and row.k * row.n >= LARGE]
    ours = [row for row in cold if row.method == "bitlayers"]
    few = [row for row in ours if row.m == 1 and row.activation_bits]
    whole = {(row.m, row.k, row.n, row.activation_bits): row.us for row in ours if row.bitlayers == BITS}

    def over_all(row: Row) -> float | None:
        us = whole.get((row.m, row.k, row.n, row.activation_bits))
        return row.us / us if us else None

    def off(row: Row) -> float | None:
        ratio = over_all(row)
        return None if ratio is None or row.bitlayers is None else abs(ratio * BITS / row.bitlayers - 1)

    def slower(row: Row) -> float | None:
        return 1 / row.speedup_over_bf16 if row.speedup_over_bf16 else None

    def speed(row: Row) -> float | None:
        return row.speedup_over_bf16

    many = [row for row in ours if row.m >= 64 and row.bitlayers == BITS]
    asked: list[tuple[str, list[Row], Callable[[Row], float | None], float, bool]] = [
        ("1 row: fraction of the memory limit", few, lambda row: row.fraction_of_limit, 0.75, True),
        ("1 row, 4 bitlayers: speed over bf16", [row for row in few if row.bitlayers == 4], speed, 3, True),
        ("1 row, 2 bitlayers: speed over bf16", [row for row in few if row.bitlayers == 2], speed, 5, True),
        (
            "1 row, 4 bitlayers: speed over f32",
            [row for row in few if row.bitlayers == 4],
            lambda row: row.speedup_over_f32_default,
            6,
            True,
        ),
        (
            "8 rows, 4 bitlayers: speed over bf16",
            [row for row in ours if row.m == 8 and row.activation_bits and row.bitlayers == 4],
            speed,
            2.5,
            True,
        ),
        ("64 rows or more, floats: time over bf16", [r for r in many if r.activation_bits is None], slower, 1.1, False),
        ("64 rows or more, 8 bits: time over bf16", [r for r in many if r.activation_bits == 8], slower, 1.1, False),
        ("64 rows or more, 16 bits: time over bf16", [r for r in many if r.activation_bits == 16], slower, 1.5, False),
        ("1 row: time of b of 8 bitlayers, off b / 8 by", few, off, 0.15, False),
        (
            "1 row: time of a sweep over all bitlayers'",
            [row for row in cold if row.method == "sweep" and row.m == 1 and row.activation_bits],
            over_all,
            1.3,
            False,
        ),
    ]
    table = rich.table.Table(title="what is asked of an H200, and the worst that was measured, cold, gaps included")
    for name in ("asked", "", "measured", "of", "reached"):
        table.add_column(name)
    for text, chosen, value, bound, is_least in asked:
        values = [found for found in map(value, chosen) if found is not None]
        if values:
            worst = min(values) if is_least else max(values)
            reached = worst >= bound if is_least else worst <= bound
            sign = "at least" if is_least else "at most"
            table.add_row(text, f"{sign} {bound:g}", f"{worst:.2f}", f"{len(values)} rows", "yes" if reached else "no")
    return table if table.row_count else None


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
