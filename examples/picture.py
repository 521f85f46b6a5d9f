"""The picture that `language_model.py` and `inference_nli.py` draw, and a panel of it that `digits.py` has, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.axes
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
    speeds(
        {int(row.bitlayers): (row.speedup, row.num_bytes) for row in uniform},
        baseline_bytes=baseline.num_bytes,
        title="Speed, one example at a time (float32 = 1)",
        axes=right,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def speeds(
    measured: Mapping[int, tuple[float, int]], *, baseline_bytes: int, title: str, axes: matplotlib.axes.Axes
) -> None:
    """Bars of speed.

    Args:
      measured: speed and bytes of all parameters, by the number of bitlayers.
      baseline_bytes: of the float32 model, whose speed is 1.
      title: of the panel.
      axes: where the bars go.
    """
    factors, sizes = zip(*measured.values(), strict=True)
    bars = axes.bar(list(measured), factors, color=ORANGE, width=0.7)
    axes.bar_label(bars, [f"{factor:.1f}x" for factor in factors], padding=2, color=ORANGE)
    axes.axhline(1, color=DARK, linestyle="--", label=f"float32: {baseline_bytes / 1e6:.2g} MB")
    axes.set_title(title, loc="left")
    axes.set_xlabel("bitlayers used, and megabytes of all parameters")
    axes.set_xticks(list(measured), [f"{b}\n{size / 1e6:.2g}" for b, size in zip(measured, sizes, strict=True)])
    axes.margins(y=0.2)
    axes.legend(loc="upper right", frameon=False)
    pbjax.plot.tidy(axes)
