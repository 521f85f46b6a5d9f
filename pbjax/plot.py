"""Pictures of sweeps and allocations, with Matplotlib: `pip install "pbjax[plot]"`.

Every function draws into the axes given, or into a new figure of pyplot's, and returns the axes:

    >>> curve = jnp.array([0.61, 0.93, 0.97, 0.98])
    >>> ax = pbjax.plot.curve(curve, baseline=0.981, ylabel="accuracy")
    >>> ax.get_xlabel()
    'bitlayers used'

Colours are those of Okabe and Ito, which colour-blind people tell apart; lines differ in their markers too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pbjax._allocation.outcome import Allocation

try:
    import matplotlib.pyplot as plt
except ImportError as error:
    raise ImportError(
        '`pbjax.plot` must have Matplotlib, but it cannot be imported. Install it with `pip install "pbjax[plot]"`.'
    ) from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BLUE", "COLORS", "DARK", "ORANGE", "allocation", "curve", "tidy"]

BLUE, ORANGE, DARK = "#0072b2", "#d55e00", "#333333"
COLORS = (BLUE, ORANGE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKERS = "os^DvP"
_LIGHT = "#dde5ec"
_MOST_NAMES = 60  # layers whose names and numbers can be read below each other


def curve(
    values: Any,
    bitlayers: Iterable[int] | None = None,
    *,
    baseline: float | None = None,
    baseline_label: str = "float",
    ylabel: str = "",
    title: str = "",
    value_format: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A quantity against the number of bitlayers, as `pbjax.sweep` returns it.

    Args:
      values: float[num], or a dict from labels to several of them, each a line.
      bitlayers: int[num], the numbers of bitlayers; None is 1..num.
      baseline: the value of the float model, a dashed line.
      baseline_label: its label.
      ylabel: label of the vertical axis.
      title: title of the axes.
      value_format: if given, every point is labelled so, as "{:.1f}".
      ax: axes to draw into; None makes a figure.

    Returns:
      The axes.

    Raises:
      ValueError: values that are no row of numbers, or not as many as `bitlayers`; a dict without a line.
    """
    is_labelled = isinstance(values, Mapping)
    lines = values if is_labelled else {"argument of curve": values}
    if not lines:
        raise ValueError("`values` must hold a line, but got an empty dict (argument of curve). Give a sweep.")
    arrays = {label: np.asarray(line, np.float64) for label, line in lines.items()}
    length = max(len(line) if line.ndim else 1 for line in arrays.values())
    numbers = list(range(1, length + 1) if bitlayers is None else bitlayers)
    for label, line in arrays.items():
        if line.shape != (len(numbers),) or not numbers:
            raise ValueError(
                f"`values` must hold one number for each of {len(numbers)} numbers of bitlayers, but got shape "
                f"{line.shape} ({label}). Reduce each point of a sweep to a number."
            )
    ax = _new_axes(6.4, 4.2) if ax is None else ax
    styles = itertools.cycle(zip(COLORS, _MARKERS, strict=True))
    for (label, line), (color, marker) in zip(arrays.items(), styles, strict=False):
        ax.plot(
            numbers,
            line,
            marker + "-",
            color=color,
            linewidth=2,
            markersize=7,
            label=_shown(label) if is_labelled else None,
        )
        if value_format is not None:
            _label_points(ax, numbers, line, value_format, color)
    if baseline is not None:
        ax.axhline(baseline, color=DARK, linestyle="--", label=_shown(baseline_label))
    ax.set_xticks(numbers)
    ax.set_xlabel("bitlayers used")
    ax.set_ylabel(ylabel)
    ax.set_title(title, loc="left")
    ax.margins(x=0.08, y=0.2 if value_format else 0.1)
    if baseline is not None or is_labelled:
        ax.legend(frameon=False)
    return tidy(ax)


def _shown(label: Any) -> str:
    """A label for the legend, from which Matplotlib leaves out those that begin with an underscore."""
    return f" {label}" if str(label).startswith("_") else str(label)


def _label_points(ax: Axes, numbers: list[int], line: np.ndarray, value_format: str, color: str) -> None:
    box = dict(boxstyle="square,pad=0.1", facecolor="white", edgecolor="none")  # keeps the line out of the numbers
    for point in zip(numbers, line, strict=True):
        text = value_format.format(point[1])
        ax.annotate(text, point, (0, -20), textcoords="offset points", ha="center", color=color, bbox=box)


def allocation(allocation: Allocation, *, title: str | None = None, ax: Axes | None = None) -> Axes:
    """The bitlayers that each layer got, of those that it stores, and their kilobytes.

    Args:
      allocation: what `pbjax.allocate` returned.
      title: title of the axes; None says how large the allocation is and how large its error.
      ax: axes to draw into; None makes a figure, as high as it has layers.

    Returns:
      The axes.

    Raises:
      TypeError: not an `Allocation`.
    """
    if not isinstance(allocation, Allocation):
        raise TypeError(
            f"`allocation` must be what `pbjax.allocate` returns, but got {type(allocation).__name__} "
            "(argument of plot.allocation)."
        )
    rows = allocation.rows
    places = range(len(rows))
    named = len(rows) <= _MOST_NAMES
    ax = _new_axes(7.5, 1.6 + 0.3 * len(rows) if named else 8) if ax is None else ax
    gap = 0.25 if named else 0  # bars that are too thin to be told apart make one shape
    ax.barh(places, [row.bits for row in rows], 1 - gap, color=_LIGHT, label="stored")
    ax.barh(places, [row.bitlayers for row in rows], 1 - gap, color=BLUE, label="used")
    ax.axvline(allocation.average, color=ORANGE, linestyle="--", label=f"{allocation.average:.2f} per weight")
    most = max(row.bits for row in rows)
    if named:
        for place, row in zip(places, rows, strict=True):
            ax.text(row.bitlayers - 0.12, place, str(row.bitlayers), ha="right", va="center", color="white")
            ax.text(most + 0.2, place, f"{row.nbytes / 1000:,.1f} kB", ha="left", va="center", color=DARK)
        ax.set_yticks(places, [row.name for row in rows])
    else:
        ax.set_ylabel("layer, in the order of the tree")
    ax.set_xticks(range(most + 1))
    ax.set_xlim(0, most + (1.4 if named else 0))
    ax.spines["bottom"].set_bounds(0, most)
    ax.set_ylim(len(rows) - 0.4, -0.6)  # the first layer on top
    ax.set_xlabel("bitlayers")
    size = f"{allocation.nbytes / 1000:,.1f} kB, {allocation.metric} {allocation.measured_error:.2g}"
    ax.set_title(size if title is None else title, loc="left", pad=28)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0.2)
    return tidy(ax, grid="x")


def tidy(ax: Axes, grid: str = "y") -> Axes:
    """The look of these pictures for any axes: faint lines behind the data, no box around it.

    Args:
      ax: the axes.
      grid: the axis whose ticks have lines, "x", "y" or "both".

    Returns:
      The axes.
    """
    ax.grid(axis=grid, alpha=0.3)  # pyright: ignore[reportArgumentType]
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _new_axes(width: float, height: float) -> Axes:
    return plt.subplots(figsize=(width, height), layout="constrained")[1]
