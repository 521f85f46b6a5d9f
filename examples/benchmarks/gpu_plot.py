"""A picture of the rows: speed-up and fraction of the memory limit over bitlayers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.figure
from gpu_rows import DEVICE, Row

_NAN = float("nan")


def draw(rows: Sequence[Row], path: Path) -> None:
    """For the fewest rows of activations, weights not in the cache: a curve for each size and width.

    Whole calls, gaps included; dotted, the fraction that their kernels alone reach.
    """
    few = min(row.m for row in rows)
    figure = matplotlib.figure.Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    chosen = [row for row in rows if row.m == few and row.l2 == "cold" and row.method == "bitlayers"]
    for k, n, width in dict.fromkeys((row.k, row.n, row.activation_bits) for row in chosen):
        curve = [row for row in chosen if (row.k, row.n, row.activation_bits) == (k, n, width)]
        label = f"{k} x {n}, {'float' if width is None else f'{width}-bit'} activations"
        used = [row.bitlayers for row in curve]
        (line,) = left.plot(used, [row.speedup_over_bf16 or _NAN for row in curve], marker="o", label=label)
        color = line.get_color()
        right.plot(used, [row.fraction_of_limit or _NAN for row in curve], marker="o", label=label, color=color)
        right.plot(used, [row.kernels_fraction_of_limit or _NAN for row in curve], linestyle=":", color=color)
    clock = "device's clock" if all(row.clock == DEVICE for row in chosen) else "host's clock in part"
    left.set(
        xlabel="bitlayers",
        ylabel="speed relative to XLA's fastest bf16 product",
        title=f"{rows[0].device}, {few} row(s), {clock}",
    )
    left.axhline(1, color="gray", linewidth=1)
    right.set(xlabel="bitlayers", ylabel="fraction of the memory limit (dotted: kernels only)", ylim=(0, 1.05))
    right.legend(fontsize="x-small")
    figure.savefig(path, dpi=150)
