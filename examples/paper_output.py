"""The figure and the short table of `paper.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.figure
import matplotlib.ticker
from quality import Row, quality_text

import pbjax.plot
from pbjax.plot import COLORS, DARK

LINES = {  # (method, activations): label and look
    ("uniform", "8"): ("bitlayers, 8-bit activations", dict(color=COLORS[0], marker="o")),
    ("uniform", "16"): ("bitlayers, 16-bit activations", dict(color=COLORS[1], marker="s")),
    ("uniform", "float"): ("bitlayers, float activations", dict(color=COLORS[2], marker="^")),
    ("allocated", "16"): ("allocated, 16-bit activations", dict(color=COLORS[3], marker="D", linestyle=":")),
    ("original", "float"): ("the paper's format, float activations", dict(color="#777777", marker="x")),
    ("original", "8"): ("the paper's format, 8 bits", dict(color="#bbbbbb", marker="+", linestyle="--")),
}
POINTS = {"bfloat16": "P", "int8 (XLA)": "v", "int8 (qwix)": "<", "int4 (qwix)": ">"}
SHOWN_LOSS = 0.12  # points that lose more lie outside of the figure
README = [  # (method, activations, bitlayers) of the short table
    ("uniform", "8", 2), ("uniform", "8", 3), ("uniform", "8", 4), ("uniform", "8", 8),
    ("uniform", "16", 2), ("uniform", "16", 3), ("uniform", "16", 4), ("uniform", "16", 8),
    ("uniform", "float", 4), ("uniform", "float", 8),
]  # fmt: skip


def draw(rows: Sequence[Row], path: Path) -> None:
    """Quality against bytes (above) and against time (below), a column for each task."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    figure = matplotlib.figure.Figure(figsize=(4.6 * len(tasks), 8.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    grid = figure.subplots(2, len(tasks), squeeze=False)
    for column, task in enumerate(tasks):
        here = [row for row in rows if row.task == task]
        exact = next(row for row in here if row.method == "float32")
        factor, unit = (100, "test accuracy (%)") if exact.metric == "accuracy" else (1, "test perplexity")
        sign = -1 if exact.metric == "accuracy" else 1
        ends = sorted(factor * exact.quality * (1 + sign * loss) for loss in (-0.02, SHOWN_LOSS))
        for line, (axes, x_of, x_label) in enumerate(
            (
                (grid[0][column], lambda row: row.num_bytes / 1e6, "megabytes of all parameters"),
                (grid[1][column], lambda row: row.ms, "milliseconds for one image, token or pair"),
            )
        ):
            for (method, activations), (label, look) in LINES.items():
                points = [
                    (x_of(row), factor * row.quality)
                    for row in here
                    if (row.method, row.activation_bits) == (method, activations) and x_of(row) is not None
                ]
                if points:
                    axes.plot(*zip(*points, strict=True), label=label, markersize=6, linewidth=1.5, **look)
            for method, marker in POINTS.items():
                for row in here:
                    if row.method == method:
                        axes.plot(x_of(row), factor * row.quality, marker, color=DARK, label=method, markersize=7)
            axes.plot(x_of(exact), factor * exact.quality, "*", color="black", label="float32", markersize=12)
            within = factor * exact.quality * (1 + sign * 0.01)
            axes.axhspan(within, factor * exact.quality, color=COLORS[4], alpha=0.25, label="within 1 % of float32")
            axes.set(xscale="log", xlabel=x_label, ylim=ends)
            axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
            axes.set_title(task if line == 0 else "", loc="left", fontweight="bold")
            axes.set_ylabel(unit)
            pbjax.plot.tidy(axes, grid="both")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def markdown(rows: Sequence[Row]) -> str:
    """Quality and speed relative to float32 of the more telling rows, a column for each task."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    of = {task: [row for row in rows if row.task == task] for task in tasks}

    def line(name: str, activations: str, cells: Sequence[Row | None]) -> str:
        texts = [name, activations]
        for row in cells:
            speed = "" if row is None or row.speedup is None else f"{row.speedup:.2g}x"
            texts += ["", "", ""] if row is None else [f"{row.num_bytes / 1e6:.3g}", quality_text(row), speed]
        return f"| {' | '.join(texts)} |"

    def pick(task: str, method: str, activations: str, bitlayers: float | None) -> Row | None:
        matches = (row for row in of[task] if (row.method, row.activation_bits) == (method, activations))
        return next((row for row in matches if row.bitlayers == bitlayers), None)

    names = [f"{task}: MB | {of[task][0].metric} | speed" for task in tasks]
    lines = [f"| bitlayers | activations | {' | '.join(names)} |", "|---" * (2 + 3 * len(tasks)) + "|"]
    baselines = dict.fromkeys(row.method for row in rows if row.bitlayers is None)
    lines += [line(method, "", [pick(task, method, "", None) for task in tasks]) for method in baselines]
    lines += [line(str(b), a, [pick(task, method, a, b) for task in tasks]) for method, a, b in README]
    allocated = {
        task: [row for row in of[task] if row.method == "allocated" and row.activation_bits != "float"]
        for task in tasks
    }
    for place in range(max(map(len, allocated.values()), default=0)):
        cells = [allocated[task][place] if place < len(allocated[task]) else None for task in tasks]
        first = next(row for row in cells if row is not None)
        averages = " / ".join(f"{row.bitlayers:.2f}" for row in cells if row is not None)
        lines.append(line(f"allocated, {averages}", first.activation_bits, cells))
    for stored in (4, 5, 8):
        for activations in ("float", "8"):
            cells = [pick(task, "original", activations, stored) for task in tasks]
            lines.append(line(f"paper's format, {stored} stored", activations, cells))
    return "\n".join(lines) + "\n"
