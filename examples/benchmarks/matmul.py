"""Times of `pbjax.matmul` beside XLA's own products of the same shape, as rows of CSV.

For each shape, XLA's float32, bfloat16 and int8 products, pbjax at several numbers of bitlayers out of 8 stored, and
pbjax's sweep (`jax.vmap` over all 8) take turns in one loop; each row says how much faster it was than the float32
product of that loop. The default is 4 numbers of rows times the 4 square sizes: about five minutes on two cores. With
--all it is all 16 pairs of 512, 1024, 2048 and 4096: some twenty minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import datetime
import functools
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import rich.console
import rich.progress
import rich.table
from timing import cpu_model, interleaved

import pbjax

BITS = 8
SIZES = (512, 1024, 2048, 4096)  # of the paper
ROWS = (1, 8, 32, 128)
BASELINES = ("f32", "bf16", "int8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One thing that is timed.

    Attributes:
      method: one of `BASELINES`, "bitlayers", or "sweep" for every number of bitlayers in one pass.
      bitlayers: how many are used; None for baselines.
      activation_bits: width of fixed-point activations; None for float ones.
      backend: what runs it: "dot" for baselines, or the backend that pbjax chose.
    """

    method: str
    bitlayers: int | None = None
    activation_bits: int | None = None
    backend: str = "dot"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the output; m, k, n: rows of activations, contraction, output channels."""

    date: str
    device: str
    cpu: str
    jax: str
    m: int
    k: int
    n: int
    method: str
    bits: int | None
    bitlayers: int | None
    activation_bits: int | None
    backend: str
    repeats: int
    median_us: float
    p20_us: float
    p80_us: float
    speedup_over_f32: float


@jax.jit
def float_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """The product in the dtype of the operands."""
    return x @ w


@jax.jit
def int8_dot(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
    """float32 activations quantized to int8 row by row, times int8 weights with a scale for each channel."""
    step = jnp.abs(x).max(axis=1, keepdims=True) / 127
    sums = jax.lax.dot(jnp.rint(x / step).astype(jnp.int8), codes, preferred_element_type=jnp.int32)
    return sums.astype(jnp.float32) * step * scale


def make_functions(
    m: int,
    k: int,
    n: int,
    *,
    bitlayers: Sequence[int],
    activation_bits: Sequence[int | None],
    backend: str | None,
) -> dict[Case, Callable[[], jax.Array]]:
    """Everything that is timed at one shape, on the same operands."""
    x_key, w_key = jax.random.split(jax.random.key(0))
    x, w = jax.random.normal(x_key, (m, k)), jax.random.normal(w_key, (k, n))
    scale = jnp.abs(w).max(axis=0, keepdims=True) / 127
    codes = jnp.rint(w / scale).astype(jnp.int8)
    functions = {
        Case(method="f32"): functools.partial(float_dot, x, w),
        Case(method="bf16"): functools.partial(float_dot, x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)),
        Case(method="int8"): functools.partial(int8_dot, x, codes, scale),
    }
    packed = pbjax.quantize({"kernel": w}, BITS)["kernel"]
    for width in activation_bits:

        def product(x, packed, used, width=width):
            return pbjax.matmul(x, packed, bitlayers=used, activation_bits=width, backend=backend)

        problem = pbjax.Problem(m=m, k=k, n=n, bits=BITS, group_size=None, activation_bits=width)
        case = Case(method="bitlayers", activation_bits=width, backend=pbjax.select_backend(problem, backend).name)
        run = jax.jit(product)  # compiled once for every number of bitlayers
        for used in bitlayers:
            functions[dataclasses.replace(case, bitlayers=used)] = functools.partial(run, x, packed, jnp.int32(used))
        sweep = jax.jit(jax.vmap(product, in_axes=(None, None, 0)))
        functions[dataclasses.replace(case, method="sweep", bitlayers=BITS)] = functools.partial(
            sweep, x, packed, jnp.arange(1, BITS + 1)
        )
    return functions


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    """The rows of one shape after the other."""
    machine = dict(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        device=jax.devices()[0].device_kind,
        cpu=cpu_model(),
        jax=jax.__version__,
    )
    for m, (k, n) in itertools.product(args.m, args.size):
        functions = make_functions(
            m, k, n, bitlayers=args.bitlayers, activation_bits=args.activation_bits, backend=args.backend
        )
        times = interleaved(functions, repeats=args.repeats, max_seconds=args.max_seconds, calls=args.calls)
        baseline = times[Case(method="f32")].median_us
        yield [
            Row(
                **machine,
                m=m,
                k=k,
                n=n,
                bits=None if case.method in BASELINES else BITS,
                **dataclasses.asdict(case),
                **{name: round(value, 2) for name, value in dataclasses.asdict(times[case]).items()},
                speedup_over_f32=round(baseline / times[case].median_us, 3),
            )
            for case in functions
        ]


def make_table(rows: Sequence[Row]) -> rich.table.Table:
    """Speed-ups over the float32 product: a line for each shape and width of the activations."""
    baselines = {(row.m, row.k, row.n, row.method): row.speedup_over_f32 for row in rows if row.method in BASELINES}
    speedups = {
        (row.m, row.k, row.n, row.activation_bits, row.method, row.bitlayers): row.speedup_over_f32
        for row in rows
        if row.method not in BASELINES
    }
    lines = list(dict.fromkeys(key[:4] for key in speedups))
    columns = sorted({key[4:] for key in speedups})
    table = rich.table.Table(
        title="speed relative to XLA's float32 product of the same shape (more is faster)",
        caption="bf16, int8: XLA; A: width of the activations; 1, 2, ..: bitlayers; sweep: all bitlayers in one pass",
    )
    for name in ("m", "k x n", "bf16", "int8", "A", *(name if name == "sweep" else str(b) for name, b in columns)):
        table.add_column(name, justify="right")
    for i, (m, k, n, width) in enumerate(lines):
        shape = [str(m), f"{k} x {n}", *(f"{baselines[m, k, n, name]:.2f}" for name in ("bf16", "int8"))]
        table.add_row(
            *(shape if i == 0 or lines[i - 1][:3] != (m, k, n) else [""] * len(shape)),
            "float" if width is None else str(width),
            *(f"{speedups[m, k, n, width, *column]:.2f}" for column in columns),
            end_section=i + 1 == len(lines) or lines[i + 1][:3] != (m, k, n),
        )
    return table


def size(text: str) -> tuple[int, int]:
    """The type of `--size`: 4096, or 512x4096 for k x n."""
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be like 4096 or 512x4096, but got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def activation_bits(text: str) -> int | None:
    """The type of `--activation-bits`."""
    return None if text == "none" else int(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--m", type=int, nargs="+", default=list(ROWS), metavar="M", help="rows of activations (default: %(default)s)")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--size",
        type=size,
        nargs="+",
        default=[(size, size) for size in SIZES],
        metavar="KxN",
        help="sizes of the weight: 4096 for a square one, 512x4096 for k x n (default: 512 1024 2048 4096)",
    )
    sizes.add_argument(
        "--all", dest="size", action="store_const", const=list(itertools.product(SIZES, SIZES)), help="all 16 sizes"
    )
    add(
        "--bitlayers",
        type=int,
        nargs="+",
        choices=range(1, BITS + 1),
        metavar="B",
        default=[1, 2, 4, 8],
        help="bitlayers used, 1..8 (default: %(default)s)",
    )
    add(
        "--activation-bits",
        type=activation_bits,
        nargs="+",
        default=[8, 16, None],
        metavar="A",
        help="widths of the fixed-point activations, 2..24, or none for float ones (default: 8 16 none)",
    )
    add("--backend", help="backend of pbjax (default: the one that it chooses)")
    add("--repeats", type=int, default=50, help="times taken of each (default: %(default)s)")
    add("--max-seconds", type=float, default=8.0, help="per shape; may reduce the repeats (default: %(default)s)")
    add("--calls", type=int, default=1, help="calls queued for each time; 20 suits a GPU (default: %(default)s)")
    add("--output", type=Path, metavar="FILE", help="where the CSV goes, with a progress bar (default: stdout)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the benchmark with command line arguments, and returns its rows."""
    args = parse(argv)
    console = rich.console.Console(stderr=True)
    rows: list[Row] = []
    shapes = rich.progress.track(
        measure(args), "shapes", total=len(args.m) * len(args.size), console=console, disable=args.output is None
    )
    with open(args.output, "w", newline="") if args.output else contextlib.nullcontext(sys.stdout) as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        for shape_rows in shapes:
            writer.writerows(map(dataclasses.asdict, shape_rows))
            file.flush()
            rows += shape_rows
    console.print(make_table(rows))
    return rows


if __name__ == "__main__":
    main()
