"""What `digits.py` shows: a table for the terminal and a picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import matplotlib.figure
import rich.table

import pbjax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured with a number of bitlayers, or with the float model (None)."""

    bitlayers: int | None
    num_bytes: int  # of all parameters, with the bitlayers in use only
    accuracy: float  # on the test images
    agreement: float  # part of the test images on which it says what the float model says
    ms: float  # median time for one image


def make_table(rows: list[Row], title: str) -> rich.table.Table:
    """The rows, the float model first."""
    table = rich.table.Table(title=title, caption="accuracy on the test images, median time for one image")
    for name in ("bitlayers", "weight bytes", "accuracy", "loss", "agreement", "ms", "speed-up"):
        table.add_column(name, justify="right")
    baseline, *others = rows
    table.add_row("float32", f"{baseline.num_bytes:,}", f"{baseline.accuracy:.2%}", "", "", f"{baseline.ms:.3f}", "")
    table.add_section()
    for row in others:
        table.add_row(
            str(row.bitlayers),
            f"{row.num_bytes:,}",
            f"{row.accuracy:.2%}",
            f"{baseline.accuracy - row.accuracy:.2%}",
            f"{row.agreement:.2%}",
            f"{row.ms:.3f}",
            f"{baseline.ms / row.ms:.1f}x",
        )
    return table


def draw(rows: list[Row], title: str, path: Path) -> None:
    """Accuracy and speed against the number of bitlayers, as a picture."""
    baseline, *others = rows
    bitlayers = [row.bitlayers for row in others]
    accuracies = [100 * row.accuracy for row in others]
    speedups = [baseline.ms / row.ms for row in others]
    megabytes = [f"{row.num_bytes / 1e6:.2g}" for row in others]
    figure = matplotlib.figure.Figure(figsize=(10, 4.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12, wspace=0.04)
    figure.suptitle(f"{title}: one stored model, 1 to {bitlayers[-1]} bitlayers", fontsize=13, fontweight="bold")
    left, right = figure.subplots(1, 2)

    pbjax.plot.curve(
        accuracies,
        baseline=100 * baseline.accuracy,
        baseline_label=f"float32 model: {baseline.accuracy:.1%}",
        title="Test accuracy (%)",
        value_format="{:.1f}",
        ax=left,
    )

    bars = right.bar(bitlayers, speedups, color=pbjax.plot.ORANGE, width=0.7)
    right.bar_label(bars, [f"{speedup:.1f}x" for speedup in speedups], padding=2, color=pbjax.plot.ORANGE)
    right.axhline(1, color=pbjax.plot.DARK, linestyle="--", label=f"float32 model: {baseline.num_bytes / 1e6:.2g} MB")
    right.set_title("Speed, one image at a time (float32 = 1)", loc="left")
    right.set_xlabel("bitlayers used, and megabytes they take")
    right.set_xticks(bitlayers, [f"{b}\n{size}" for b, size in zip(bitlayers, megabytes, strict=True)])
    right.margins(y=0.2)
    right.legend(loc="upper right", frameon=False)

    pbjax.plot.tidy(right)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
