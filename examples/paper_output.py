"""The figure and the short table of `paper.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import equal_bytes
import matplotlib.figure
import matplotlib.ticker
from matplotlib.axes import Axes
from quality import Row, quality_text

import pbjax.plot
from pbjax.plot import COLORS, DARK

# By (method, activations): label and look. Markers differ in size, so that all are seen where lines coincide.
LINES = {
    ("uniform", "float"): ("bitlayers, float activations", dict(color=COLORS[2], marker="^", ms=10, mfc="white")),
    ("uniform", "16"): ("bitlayers, 16-bit activations", dict(color=COLORS[1], marker="s", ms=6.5)),
    ("uniform", "8"): ("bitlayers, 8-bit activations", dict(color=COLORS[0], marker="o", ms=4)),
    ("allocated", "16"): ("allocated, 16-bit activations", dict(color=COLORS[3], marker="D", ms=6, linestyle=":")),
    (equal_bytes.METHOD, "16"): (
        "allocated within a uniform number's bytes",
        dict(color=COLORS[3], marker="D", ms=10, mfc="none", linestyle="none", zorder=3),
    ),
    ("original", "float"): ("the paper's format, float activations", dict(color="#555555", marker="x", ms=6)),
    ("original", "8"): ("the paper's format, 8 bits", dict(color="#888888", marker="+", ms=7, linestyle="--")),
}
POINTS = {"bfloat16": "P", "int8 (XLA)": "v", "int8 (qwix)": "<", "int4 (qwix)": ">"}
SHOWN_LOSS = 0.08  # points that lose more lie outside of the figure
README = [  # (method, activations, bitlayers) of the short table
    ("uniform", "8", 2), ("uniform", "8", 3), ("uniform", "8", 4), ("uniform", "8", 8),
    ("uniform", "16", 2), ("uniform", "16", 3), ("uniform", "16", 4), ("uniform", "16", 8),
    ("uniform", "float", 4), ("uniform", "float", 8),
]  # fmt: skip


def draw(rows: Sequence[Row], path: Path) -> None:
    """Quality and divergence against bytes, and quality against time, a column for each task."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    figure = matplotlib.figure.Figure(figsize=(4.6 * len(tasks), 12.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    grid = figure.subplots(3, len(tasks), squeeze=False)
    for task, (quality, divergence, speed) in zip(tasks, grid.T, strict=True):
        here = [row for row in rows if row.task == task]
        quality.set_title(task, loc="left", fontweight="bold")
        for axes in (quality, divergence):
            axes.set_xlabel("megabytes of all parameters")
        speed.set_xlabel("milliseconds for one image, token or pair")
        _draw_quality(quality, here, lambda row: row.num_bytes / 1e6)
        _draw_quality(speed, here, lambda row: row.ms)
        _draw_methods(
            divergence,
            [row for row in here if row.method != "float32"],
            lambda row: row.num_bytes / 1e6,
            lambda row: row.divergence,
        )
        divergence.set(yscale="log", ylabel="KL divergence from float32 (nats)")
        divergence.set_ylim(top=1)
        for axes in (quality, divergence, speed):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
            pbjax.plot.tidy(axes, grid="both")
    pairs = [axes.get_legend_handles_labels() for axes in grid[:, 0]]
    named = {label: handle for handles, labels in pairs for handle, label in zip(handles, labels, strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _draw_quality(axes: Axes, rows: Sequence[Row], x_of: Callable[[Row], float | None]) -> None:
    """The quality near that of float32."""
    exact = next(row for row in rows if row.method == "float32")
    factor, unit = (100, "test accuracy (%)") if exact.metric == "accuracy" else (1, "test perplexity")
    sign = -1 if exact.metric == "accuracy" else 1
    _draw_methods(axes, rows, x_of, lambda row: factor * row.quality)
    axes.plot(x_of(exact), factor * exact.quality, "*", color="black", label="float32", markersize=12)
    within = factor * exact.quality * (1 + sign * 0.01)
    axes.axhspan(within, factor * exact.quality, color=COLORS[4], alpha=0.25, label="within 1 % of float32")
    axes.set_ylim(sorted(factor * exact.quality * (1 + sign * loss) for loss in (-0.02, SHOWN_LOSS)))
    axes.set_ylabel(unit)


def _draw_methods(
    axes: Axes, rows: Sequence[Row], x_of: Callable[[Row], float | None], y_of: Callable[[Row], float]
) -> None:
    """A line for each way of using bitlayers, a point for each baseline."""
    for kind, (label, look) in LINES.items():
        points = [(x_of(row), y_of(row)) for row in rows if (row.method, row.activation_bits) == kind]
        points = [point for point in points if point[0] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1.5, **look)
    for method, marker in POINTS.items():
        for row in rows:
            if row.method == method:
                axes.plot(x_of(row), y_of(row), marker, color=DARK, label=method, markersize=7)


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
