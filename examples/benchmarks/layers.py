"""Times of Flax layers on bitlayers beside the same layers on floats, as rows of CSV.

For each layer, Flax's own on float32 weights and `pbjax.quantized` of it at several numbers of bitlayers of 8 stored
take turns in one loop; each row says how much faster it was than the float layer of that loop. One example at a time:
a step of a recurrent cell, a row through a dense layer, one image through a convolution. The default takes about two
minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import datetime
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import rich.console
import rich.table
from matmul import cpu_model
from timing import interleaved

import pbjax

BITS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer that is timed.

    Attributes:
      name: as it appears in the output.
      module: Flax's layer.
      args: shapes of its arguments.
    """

    name: str
    module: nn.Module
    args: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the output; `bitlayers` is empty for the float layer."""

    date: str
    device: str
    cpu: str
    jax: str
    layer: str
    bits: int | None
    bitlayers: int | None
    activation_bits: int | None
    repeats: int
    median_us: float
    p20_us: float
    p80_us: float
    speedup_over_float: float


def make_layers(hidden: int, image: int) -> list[Layer]:
    """A dense layer and recurrent cells of that width; convolutions on square images with 8 * 224 / size features."""
    state, features = (1, hidden), 8 * 224 // image
    pixels = (1, image, image, features)
    return [
        Layer(name=f"Dense {hidden}", module=nn.Dense(hidden), args=(state,)),
        Layer(name=f"LSTMCell {hidden}", module=nn.LSTMCell(hidden), args=((state, state), state)),
        Layer(name=f"OptimizedLSTMCell {hidden}", module=nn.OptimizedLSTMCell(hidden), args=((state, state), state)),
        Layer(name=f"GRUCell {hidden}", module=nn.GRUCell(hidden), args=(state, state)),
        Layer(name=f"Conv 3x3 {image}x{image}x{features}", module=nn.Conv(features, (3, 3)), args=(pixels,)),
        Layer(name=f"Conv 1x1 {image}x{image}x{features}", module=nn.Conv(4 * features, (1, 1)), args=(pixels,)),
    ]


def make_functions(
    layer: Layer, *, bitlayers: Sequence[int], activation_bits: Sequence[int | None]
) -> dict[tuple[int | None, int | None], Callable[[], Any]]:
    """Everything that is timed of one layer, by (activation bits, bitlayers); (None, 0) is the float layer."""
    is_shape = lambda leaf: isinstance(leaf, tuple) and isinstance(leaf[0], int)  # noqa: E731
    args = jax.tree.map(lambda shape: jax.random.normal(jax.random.key(1), shape), layer.args, is_leaf=is_shape)
    variables = jax.jit(layer.module.init)(jax.random.key(0), *args)
    functions = {(None, 0): functools.partial(jax.jit(layer.module.apply), variables, *args)}
    for width in activation_bits:
        apply = jax.jit(pbjax.quantized(layer.module.apply))  # compiled once for every number of bitlayers
        packed = pbjax.quantize(variables, BITS, fn=layer.module.apply, args=args, activation_bits=width)
        for used in bitlayers:
            functions[width, used] = functools.partial(apply, pbjax.with_bitlayers(packed, jnp.int32(used)), *args)
    return functions


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """The rows of one layer after the other."""
    machine = dict(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        device=jax.devices()[0].device_kind,
        cpu=cpu_model(),
        jax=jax.__version__,
    )
    layers = [layer for image in args.image for layer in make_layers(args.hidden, image)]
    for layer in {layer.name: layer for layer in layers}.values():
        functions = make_functions(layer, bitlayers=args.bitlayers, activation_bits=args.activation_bits)
        times = interleaved(functions, repeats=args.repeats, max_seconds=args.max_seconds, warm=True)
        for (width, used), time in times.items():
            yield Row(
                **machine,
                layer=layer.name,
                bits=BITS if used else None,
                bitlayers=used or None,
                activation_bits=width,
                **{name: round(value, 2) for name, value in dataclasses.asdict(time).items()},
                speedup_over_float=round(times[None, 0].median_us / time.median_us, 3),
            )


def make_table(rows: Sequence[Row]) -> rich.table.Table:
    """Speed-ups over the float layer: a line for each layer and width of the activations."""
    packed = [row for row in rows if row.bitlayers is not None]
    speedups = {(row.layer, row.activation_bits, row.bitlayers): row.speedup_over_float for row in packed}
    floats = {row.layer: row.median_us for row in rows if row.bitlayers is None}
    columns = sorted({row.bitlayers for row in packed if row.bitlayers is not None})
    table = rich.table.Table(
        title="speed relative to Flax's float32 layer (more is faster)",
        caption="float: its time in ms; A: width of the activations; 1, 2, ..: bitlayers",
    )
    table.add_column("layer, batch 1")
    for name in ("float", "A", *map(str, columns)):
        table.add_column(name, justify="right")
    for layer, width in dict.fromkeys((row.layer, row.activation_bits) for row in packed):
        cells = [f"{speedups[layer, width, used]:.2f}" for used in columns]
        table.add_row(layer, f"{floats[layer] / 1000:.2f}", "float" if width is None else str(width), *cells)
    return table


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--hidden", type=int, default=2048, help="width of dense layer and cells (default: %(default)s)")
    add("--image", type=int, nargs="+", default=[56, 14, 7], help="sizes of the images (default: %(default)s)")
    add("--bitlayers", type=int, nargs="+", choices=range(1, BITS + 1), metavar="B", default=[1, 2, 4, 8])
    add("--activation-bits", type=int, nargs="+", default=[8, 16], metavar="A", help="2..24 (default: 8 16)")
    add("--repeats", type=int, default=50, help="times taken of each (default: %(default)s)")
    add("--max-seconds", type=float, default=8.0, help="per layer; may reduce the repeats (default: %(default)s)")
    add("--output", type=Path, metavar="FILE", help="where the CSV goes (default: stdout)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the benchmark with command line arguments, and returns its rows."""
    args = parse(argv)
    rows: list[Row] = []
    with open(args.output, "w", newline="") if args.output else contextlib.nullcontext(sys.stdout) as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        for row in measure(args):
            writer.writerow(dataclasses.asdict(row))
            file.flush()
            rows.append(row)
    rich.console.Console(stderr=True).print(make_table(rows))
    return rows


if __name__ == "__main__":
    main()
