"""What `digits.py` shows: a table for the terminal and a picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import matplotlib.figure
import rich.table
from picture import speeds

import pbjax.plot


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
    accuracies = [100 * row.accuracy for row in others]
    figure = matplotlib.figure.Figure(figsize=(10, 4.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12, wspace=0.04)
    figure.suptitle(f"{title}: one stored model, 1 to {others[-1].bitlayers} bitlayers", fontsize=13, fontweight="bold")
    left, right = figure.subplots(1, 2)

    pbjax.plot.curve(
        accuracies,
        baseline=100 * baseline.accuracy,
        baseline_label=f"float32 model: {baseline.accuracy:.1%}",
        title="Test accuracy (%)",
        value_format="{:.1f}",
        ax=left,
    )

    speeds(
        {row.bitlayers: (baseline.ms / row.ms, row.num_bytes) for row in others},
        baseline_bytes=baseline.num_bytes,
        title="Speed, one image at a time (float32 = 1)",
        axes=right,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
