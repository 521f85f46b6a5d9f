"""The picture that `language_model.py` and `inference_nli.py` draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.figure
from quality import Row

import pbjax.plot
from pbjax.plot import DARK, ORANGE


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Quality and speed against the number of bitlayers."""
    baseline = rows[0]
    uniform = [row for row in rows if row.method == "uniform"]
    factor = 100 if baseline.metric == "accuracy" else 1
    unit = "Test accuracy (%)" if baseline.metric == "accuracy" else "Test perplexity"
    figure = matplotlib.figure.Figure(figsize=(10, 4.6), layout="constrained")
    figure.suptitle(f"{title}: one stored model, 1 to {len(uniform)} bitlayers", fontsize=12, fontweight="bold")
    left, right = figure.subplots(1, 2)
    pbjax.plot.curve(
        [factor * row.quality for row in uniform],
        baseline=factor * baseline.quality,
        baseline_label="float32",
        title=unit,
        value_format="{:.1f}",
        ax=left,
    )
    if baseline.metric == "perplexity":
        left.set_yscale("log")
        left.yaxis.set_major_formatter("{x:g}")
        left.yaxis.set_minor_formatter("{x:g}")
    bitlayers = [int(row.bitlayers) for row in uniform]
    bars = right.bar(bitlayers, [row.speedup for row in uniform], color=ORANGE, width=0.7)
    right.bar_label(bars, [f"{row.speedup:.1f}x" for row in uniform], padding=2, color=ORANGE)
    right.axhline(1, color=DARK, linestyle="--", label=f"float32: {baseline.num_bytes / 1e6:.2g} MB")
    right.set_title("Speed, one example at a time (float32 = 1)", loc="left")
    right.set_xlabel("bitlayers used, and megabytes of all parameters")
    right.set_xticks(bitlayers, [f"{b}\n{row.num_bytes / 1e6:.2g}" for b, row in zip(bitlayers, uniform, strict=True)])
    right.margins(y=0.2)
    right.legend(loc="upper right", frameon=False)
    pbjax.plot.tidy(right)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
