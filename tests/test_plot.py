"""`pbjax.plot`: what the pictures show, that they can be drawn into axes of the caller's, and what they refuse."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import pbjax

ROWS = tuple(
    pbjax.AllocationRow(
        path="stack/kernel",
        index=(i,),
        shape=(64, 64),
        bits=8,
        bitlayers=b,
        nbytes=512 * b,
        cost=512 * b,
        errors={b: 0.1},
    )
    for i, b in enumerate((2, 8, 5))
)
ALLOCATION = pbjax.Allocation(
    rows=ROWS,
    nbytes=7680,
    cost=7680,
    cost_unit="bytes",
    average=5.0,
    predicted_error=0.3,
    measured_error=0.25,
    metric="mse",
    uniform=(),
)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def pixels(ax):
    canvas = FigureCanvasAgg(ax.figure)
    canvas.draw()  # warnings, as of text that does not fit, are errors
    return np.asarray(canvas.buffer_rgba())


def test_curve():
    ax = pbjax.plot.curve(jnp.array([0.5, 0.9, 0.95]), baseline=0.96, ylabel="accuracy", value_format="{:.2f}")
    line, baseline = ax.lines
    np.testing.assert_allclose(line.get_xydata(), [[1, 0.5], [2, 0.9], [3, 0.95]], rtol=1e-6)
    assert set(baseline.get_ydata()) == {0.96}
    assert [text.get_text() for text in ax.texts] == ["0.50", "0.90", "0.95"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("bitlayers used", "accuracy")
    assert pixels(ax).std() > 5


def test_curves_differ_in_color_and_marker():
    figure = Figure()
    ax = figure.subplots()
    assert pbjax.plot.curve({"a": [1, 2], "b": [2, 3]}, [4, 8], ax=ax) is ax
    a, b = ax.lines
    assert a.get_color() != b.get_color()
    assert a.get_marker() != b.get_marker()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    np.testing.assert_array_equal(ax.get_xticks(), [4, 8])


def test_labels_with_an_underscore_are_in_the_legend():
    ax = pbjax.plot.curve({"_head": [1, 2], 3: [2, 3]}, baseline=2, baseline_label="_float")
    assert [text.get_text().strip() for text in ax.get_legend().get_texts()] == ["_head", "3", "_float"]


def test_allocation():
    ax = pbjax.plot.allocation(ALLOCATION)
    stored, used = ax.containers
    assert [bar.get_width() for bar in stored] == [8, 8, 8]
    assert [bar.get_width() for bar in used] == [2, 8, 5]
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"stack/kernel[{i}]" for i in range(3)]
    assert [text.get_text() for text in ax.texts] == ["2", "1.0 kB", "8", "4.1 kB", "5", "2.6 kB"]
    assert ax.get_title(loc="left") == "7.7 kB, mse 0.25"
    assert pixels(ax).std() > 5


def test_many_layers_make_one_shape():
    ax = pbjax.plot.allocation(dataclasses.replace(ALLOCATION, rows=ROWS * 100), title="large")
    assert not ax.texts
    assert ax.figure.get_size_inches()[1] < 10
    assert pixels(ax).std() > 5


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: pbjax.plot.curve([1.0, 2.0], [1, 2, 3]),
            ValueError,
            r"`values` must hold one number for each of 3 numbers of bitlayers, but got shape \(2,\) \(arg",
        ),
        (lambda: pbjax.plot.curve({"a": [[1.0]]}), ValueError, r"but got shape \(1, 1\) \(a\)\. Reduce each point"),
        (
            lambda: pbjax.plot.curve({}),
            ValueError,
            r"`values` must hold a line, but got an empty dict \(argument of cu",
        ),
        (lambda: pbjax.plot.curve([]), ValueError, r"for each of 0 numbers of bitlayers"),
        (
            lambda: pbjax.plot.allocation({"a": 3}),
            TypeError,
            r"`allocation` must be what `pbjax\.allocate` returns, but got dict \(argument of plot\.allocation\)",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_without_matplotlib():
    code = """
import sys
sys.modules["matplotlib"] = None  # an import of it fails
import pbjax
try:
    pbjax.plot
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert "must have Matplotlib, but it cannot be imported. Install it with `pip install" in result.stdout
