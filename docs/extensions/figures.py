"""The drawings of the documentation, made by the library that they explain, into docs/_generated.

All are drawn 5 inches wide at 10 points, so that they can be read at a phone's width.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sphinx.application import Sphinx

import pbjax

FOLDER = Path(__file__).parent.parent / "_generated"

STYLE = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "pbjax",  # the same drawing is the same file
}
INK, PAPER, USED, SHADE, ACCENT = "#1b2a41", "#ffffff", "#1f77b4", "#e4e8ee", "#d1495b"


def bits_of(tensor: pbjax.BitTensor) -> np.ndarray:
    """The bitlayers of a weight, unpacked: bool[bits, k, n]."""
    words = np.asarray(tensor.words)
    bits = (words[:, :, None, :] >> np.arange(32, dtype=np.uint32)[None, None, :, None]) & 1
    return bits.reshape(words.shape[0], -1, words.shape[2])[:, : tensor.k].astype(bool)


def bitlayers() -> Figure:
    """A matrix, its first bitlayers, and what they add up to."""
    w = jax.random.normal(jax.random.key(3), (10, 10))
    tensor = pbjax.quantize({"kernel": w}, bits=8)["kernel"]
    bits = bits_of(tensor)
    limit = float(jnp.abs(w).max())
    figure = Figure(figsize=(5, 4.1), layout="constrained")
    axes = figure.subplots(3, 4)
    for axis in axes.flat:
        axis.set_axis_off()

    def show(axis: Axes, value: Any, title: str, binary: bool = False) -> None:
        axis.imshow(value, cmap="gray" if binary else "RdBu", vmin=0 if binary else -limit, vmax=1 if binary else limit)
        axis.set_title(title, fontsize=10)
        axis.add_patch(Rectangle((-0.5, -0.5), 10, 10, fill=False, edgecolor=INK, linewidth=0.8))

    show(axes[0, 0], w, "weights")
    show(axes[0, 1], pbjax.dequantize(tensor), "8 bitlayers")
    for i in range(4):
        show(axes[1, i], bits[i], f"bitlayer {i}", binary=True)
        show(axes[2, i], pbjax.dequantize(pbjax.with_bitlayers(tensor, i + 1)), f"after {i + 1}")
    return figure


def cells() -> Figure:
    """How the interval from -1 to 1 is halved, and the way of one weight through it."""
    value, rows = 0.3, 4
    figure = Figure(figsize=(5, 2.9), layout="constrained")
    axis = figure.subplots()
    code = int(np.floor((value + 1) * 2 ** (rows - 1)))
    for b in range(1, rows + 1):
        width = 2.0 ** (1 - b)
        for cell in range(2**b):
            inside = cell == code >> (rows - b)
            left = -1 + cell * width
            axis.add_patch(
                Rectangle((left, -b - 0.3), width, 0.6, facecolor=USED if inside else SHADE, edgecolor=PAPER, lw=1.5)
            )
            if b < 4 or inside:
                axis.text(
                    left + width / 2,
                    -b,
                    f"{cell:0{b}b}",
                    ha="center",
                    va="center",
                    fontsize=8 if b == 4 else 10,
                    color=PAPER if inside else INK,
                )
    axis.plot([value, value], [-rows - 0.5, -0.62], color=ACCENT, linewidth=1.5)  # not through its label
    axis.text(value, -0.45, f"w / s = {value}", ha="center", color=ACCENT)
    axis.set(xlim=(-1.02, 1.02), ylim=(-rows - 0.5, -0.15), xticks=[-1, -0.5, 0, 0.5, 1], yticks=range(-rows, 0))
    axis.set_yticklabels([f"{b}" for b in range(rows, 0, -1)])
    axis.set_ylabel("bitlayers")
    axis.set_xlabel("weight / scale")
    axis.spines["left"].set_visible(False)
    axis.tick_params(axis="y", length=0)
    return figure


def shift_accumulate() -> Figure:
    """One dot product of 8 activations with a channel of 4 bitlayers, bitlayer by bitlayer."""
    x = np.array([3, -2, 5, 1, -4, 2, 0, 6])
    codes = np.array([9, 14, 3, 6, 0, 11, 7, 12])
    bits = (codes[None] >> np.arange(3, -1, -1)[:, None]) & 1  # [bitlayer, k]
    figure = Figure(figsize=(5, 2.7), layout="constrained")
    axis = figure.subplots()
    axis.set_axis_off()
    for k, value in enumerate(x):
        axis.text(k + 0.5, 0.5, str(value), ha="center", va="center", color=ACCENT, fontweight="bold")
    axis.text(-0.25, 0.5, "x", ha="right", va="center", color=ACCENT, fontweight="bold")
    axis.text(8.8, 0.5, "x . bit", ha="center", va="center")
    axis.text(11.9, 0.5, "acc", ha="center", va="center", fontweight="bold")
    total = 0
    for i, layer in enumerate(bits):
        for k, bit in enumerate(layer):
            axis.add_patch(Rectangle((k, -i - 1), 1, 1, facecolor=INK if bit else PAPER, edgecolor="#9aa5b1"))
            axis.text(k + 0.5, -i - 0.5, str(bit), ha="center", va="center", color=PAPER if bit else INK)
        part = int(x @ layer)
        before, total = total, 2 * total + part
        axis.text(-0.25, -i - 0.5, f"bitlayer {i}", ha="right", va="center")
        axis.text(8.8, -i - 0.5, str(part), ha="center", va="center")
        axis.text(11.9, -i - 0.5, f"2 × {before} + {part} = {total}", ha="center", va="center")
    assert total == int(x @ codes)
    axis.text(11.9, -4.6, f"= x . c = {total}", ha="center", va="center", fontweight="bold")
    axis.set(xlim=(-3.1, 14.2), ylim=(-5, 1))
    return figure


def layout() -> Figure:
    """What lies where in the words of a weight, and which part of it 3 of 8 bitlayers read."""
    num_bits, used, num_words = 8, 3, 2
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axis = figure.subplots()
    axis.set_axis_off()
    for i in range(num_bits):
        axis.add_patch(Rectangle((i, 0), 1, 1, facecolor=USED if i < used else SHADE, edgecolor=INK))
        axis.text(i + 0.5, 1.2, str(i), ha="center")
    axis.text(4, 1.75, "bitlayers of a weight in memory, one after the other", ha="center")
    axis.annotate("", (0, -0.25), (used, -0.25), arrowprops=dict(arrowstyle="<->", color=USED))
    axis.text(used / 2, -0.75, "read by 3 bitlayers", ha="center", color=USED)
    axis.annotate("", (used, -0.25), (num_bits, -0.25), arrowprops=dict(arrowstyle="<->", color="#7b8794"))
    axis.text((used + num_bits) / 2, -0.75, "not touched", ha="center", color="#7b8794")

    # One bitlayer: a row of words for each 32 of k, one word for each output channel.
    left, top, cell = 0.75, -1.75, 0.5
    channels = 8
    for word in range(num_words):
        for channel in range(channels):
            chosen = word == 0 and channel == 2
            axis.add_patch(
                Rectangle(
                    (left + channel * cell * 1.6, top - 0.6 * (word + 1)),
                    cell * 1.6,
                    0.6,
                    facecolor=ACCENT if chosen else PAPER,
                    edgecolor=INK,
                    lw=0.8,
                )
            )
        axis.text(
            left - 0.1, top - 0.6 * word - 0.3, f"k {32 * word}-{32 * word + 31}", ha="right", va="center", fontsize=8
        )
    axis.text(4, top + 0.2, "one bitlayer: output channels from left to right", ha="center")
    word = 0xB25D0E93
    bottom = top - 2.6
    axis.text(4, bottom + 0.75, "one word: 32 weights of one channel, one bit of each", ha="center", color=ACCENT)
    for t in range(32):
        bit = word >> t & 1
        axis.add_patch(
            Rectangle((t / 4, bottom), 0.25, 0.5, facecolor=INK if bit else PAPER, edgecolor="#9aa5b1", lw=0.6)
        )
    axis.text(0, bottom - 0.45, "k = 0", fontsize=8)
    axis.text(8, bottom - 0.45, "k = 31", ha="right", fontsize=8)
    axis.set(xlim=(-0.6, 8.2), ylim=(bottom - 0.6, 2.2))
    return figure


def errors_by_code() -> dict[str, list[float]]:
    """Relative errors of three codes that nest, after 1 to 8 bits, on a Gaussian matrix with a scale per channel."""
    w = jax.random.normal(jax.random.key(0), (4096, 64))
    scale = jnp.abs(w).max(axis=0)
    tensor = pbjax.quantize({"kernel": w}, bits=8)
    twos = jnp.clip(jnp.rint(w / scale * 127), -128, 127).astype(jnp.int32)

    def relative(value: jax.Array) -> float:
        return float(jnp.linalg.norm(value - w) / jnp.linalg.norm(w))

    def plain(b: int) -> jax.Array:
        code = jnp.clip(jnp.floor((w / scale + 1) * 2.0 ** (b - 1)), 0, 2**b - 1)
        return scale * (2 * code + 1 - 2**b) / 2**b

    counts = range(1, 9)
    return {
        "two's complement, cut short": [relative(((twos >> (8 - b)) << (8 - b)) * scale / 127) for b in counts],
        "this code, one scale": [relative(plain(b)) for b in counts],
        "this code, scales fitted at 1 to 3": [
            relative(pbjax.dequantize(pbjax.with_bitlayers(tensor, b))["kernel"]) for b in counts
        ],
    }


def errors() -> Figure:
    """The errors of `errors_by_code`."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.subplots()
    for (label, values), color, marker in zip(errors_by_code().items(), (ACCENT, "#7b8794", USED), "s^o", strict=True):
        axis.semilogy(range(1, 9), values, marker=marker, color=color, label=label)
    axis.set(xlabel="bitlayers", ylabel="relative error of the weights", xticks=range(1, 9))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure


DRAWINGS: tuple[Callable[[], Figure], ...] = (bitlayers, cells, shift_accumulate, layout, errors)


def write(app: Sphinx, config: Any) -> None:
    """All drawings as SVG."""
    del app, config
    FOLDER.mkdir(exist_ok=True)
    with mpl.rc_context(STYLE):
        for draw in DRAWINGS:
            draw().savefig(FOLDER / f"{draw.__name__}.svg", metadata={"Date": None})


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("config-inited", write)
    return {"parallel_read_safe": True}
