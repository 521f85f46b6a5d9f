"""Proves and times the GPU kernels on the NVIDIA GPU that is there: one command, within a quarter of an hour.

    python examples/benchmarks/gpu.py --output gpu.csv

1. `pytest -m gpu`: the kernels give the bits of the oracle on fresh random inputs. If not, nothing is timed.
2. compute-sanitizer over one product of each kernel, where it is installed.
3. Times on the device's own clock, of pbjax at every number of bitlayers and as a sweep, and of XLA's products: the
   weights cold (copies take turns that are larger than the L2 cache together) and warm (one copy). Shapes come in order
   of interest, few rows first, until the time is used up; what was left out is said.

Writes rows of CSV, prints a summary, and draws a plot beside the CSV. `--smoke` goes through step 3 with tiny shapes on
whatever device there is, to try the program out; its times mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import functools
import importlib.util
import itertools
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import device_time
import jax
import jax.numpy as jnp
import jaxlib
import matplotlib.figure
import rich.console
import rich.table

import pbjax

BITS = 8
ROWS = (1, 8, 64, 16, 2, 4, 32, 256)  # in order of interest
SIZES = ((8192, 8192), (4096, 4096), (8192, 28672), (4096, 14336), (14336, 4096))
WIDTHS = (16, 8, None)
BASELINES = ("f32", "bf16", "int8", "int4")
# Bytes per second, from NVIDIA's data sheets, by what JAX calls the device.
BANDWIDTH = {
    "NVIDIA A100-SXM4-40GB": 1.555e12,
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA H100 80GB HBM3": 3.352e12,
    "NVIDIA H200": 4.8e12,
    "NVIDIA B200": 8e12,
}
COLD_BYTES = 256 << 20  # of all copies of a weight together: twice the L2 cache of a B200, five times that of an H200
WIDTH = 160  # columns that the summary takes
NO_GPU = "this benchmark needs an NVIDIA GPU that JAX can use, and found none; --smoke tries it out without one"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One thing that is timed; None where a field does not apply."""

    name: str  # one of BASELINES, "bitlayers", or "sweep" for every number of them in one call
    bitlayers: int | None = None
    activation_bits: int | None = None
    backend: str = "dot"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the output."""

    date: str
    device: str
    jax: str
    jaxlib: str
    platform_version: str
    m: int
    k: int
    n: int
    l2: str  # "cold" or "warm"
    method: str
    bits: int | None
    bitlayers: int | None
    activation_bits: int | None
    backend: str
    clock: str
    runs: int
    kernels: int
    median_us: float
    p20_us: float
    p80_us: float
    wall_us: float
    bytes: int
    fraction_of_limit: float | None  # of the time that the bytes take at the bandwidth of the data sheet
    speedup_over_bf16: float


Run = Callable[[int], jax.Array]


def make_runs(m: int, k: int, n: int, *, copies: int, backend: str | None) -> Iterator[tuple[Method, Run, int]]:
    """(what, call number i, bytes it must read and write) of everything at one shape."""
    x_key, w_key = jax.random.split(jax.random.key(0))
    x, w = jax.random.normal(x_key, (m, k), jnp.float32), jax.random.normal(w_key, (k, n), jnp.float32)
    rest = 4 * m * (k + n)
    yield from _baselines(x, w, copies, rest)
    packed = _copies(pbjax.quantize({"kernel": w}, BITS)["kernel"], copies, BITS * k * n // 8)
    del w
    for width in WIDTHS:
        problem = pbjax.Problem(m=m, k=k, n=n, bits=BITS, group_size=None, activation_bits=width)
        name = backend or kernel_backend(problem)

        def product(x, packed, used, width=width, name=name):
            return pbjax.matmul(x, packed, bitlayers=used, activation_bits=width, backend=name)

        run, sweep = jax.jit(product), jax.jit(jax.vmap(product, in_axes=(None, None, 0)))
        rows = x.astype(jnp.bfloat16) if width is None else x
        for used in range(1, BITS + 1):
            method = Method(name="bitlayers", bitlayers=used, activation_bits=width, backend=name)
            count = jnp.int32(used)
            yield (
                method,
                lambda i, r=rows, c=count, run=run: run(r, packed[i % len(packed)], c),
                used * k * n // 8 + rest,
            )
        method = Method(name="sweep", bitlayers=BITS, activation_bits=width, backend=name)
        counts = jnp.arange(1, BITS + 1)
        size = BITS * k * n // 8 + rest + 4 * (BITS - 1) * m * n
        yield method, lambda i, r=rows, c=counts, run=sweep: run(r, packed[i % len(packed)], c), size


def _baselines(x: jax.Array, w: jax.Array, copies: int, rest: int) -> Iterator[tuple[Method, Run, int]]:
    k, n = w.shape
    scale = jnp.abs(w).max(axis=0, keepdims=True)
    codes = {bits: jnp.rint(w / scale * (2 ** (bits - 1) - 1)) for bits in (8, 4)}

    @jax.jit
    def float_dot(x, w):
        return jnp.dot(x, w, precision="highest")

    @jax.jit
    def int8_dot(x, w):
        step = jnp.abs(x).max(axis=1, keepdims=True) / 127
        sums = jax.lax.dot(jnp.rint(x / step).astype(jnp.int8), w, preferred_element_type=jnp.int32)
        return sums.astype(jnp.float32) * step * (scale / 127)

    @jax.jit
    def int4_dot(x, w):
        return jnp.dot(x, w.astype(jnp.bfloat16), preferred_element_type=jnp.float32) * (scale / 7)

    half = x.astype(jnp.bfloat16)
    for name, run, rows, weight, size in (
        ("f32", float_dot, x, w, 4 * k * n),
        ("bf16", float_dot, half, w.astype(jnp.bfloat16), 2 * k * n),
        ("int8", int8_dot, x, codes[8].astype(jnp.int8), k * n),
        ("int4", int4_dot, half, codes[4].astype(jnp.int4), k * n // 2),
    ):
        weights = _copies(weight, copies, size)
        yield Method(name=name), lambda i, r=rows, w=weights, run=run: run(r, w[i % len(w)]), size + rest


def _copies(weight, most: int, size: int) -> list:
    """The weight as often as it takes to fill the L2 cache, in memory of its own each time."""
    num = min(most, max(2, math.ceil(COLD_BYTES / size)))
    return [weight, *(jax.tree.map(jnp.copy, weight) for _ in range(num - 1))]


def kernel_backend(problem: pbjax.Problem) -> str:
    """The GPU backend for a problem: the first that can run it."""
    for name in ("mosaic", "triton"):
        try:
            return pbjax.select_backend(problem, name).name
        except pbjax.Unsupported:
            continue
    return pbjax.select_backend(problem).name


def measure(args: argparse.Namespace, deadline: float, skipped: list[str]) -> Iterator[list[Row]]:
    """The rows of one shape after the other, until the deadline."""
    device = jax.devices()[0]
    facts = dict(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        device=device.device_kind,
        jax=jax.__version__,
        jaxlib=jaxlib.__version__,
        platform_version=" ".join(device.client.platform_version.split()),
    )
    bandwidth = args.bandwidth or BANDWIDTH.get(device.device_kind)
    batches = {"cold": range(args.runs), "warm": [0] * args.runs}
    for m, (k, n) in itertools.product(args.m, args.size):
        if time.monotonic() > deadline:
            skipped.append(f"m={m} {k}x{n}")
            continue
        runs = make_runs(m, k, n, copies=args.copies, backend=args.backend)
        times = {
            (method, l2): (taken, size)
            for method, run, size in runs
            for l2, taken in device_time.measure(run, batches).items()
        }
        baselines = {l2: times[Method(name="bf16"), l2][0].median_us for l2 in batches}
        yield [
            Row(
                **facts,
                m=m,
                k=k,
                n=n,
                l2=l2,
                method=method.name,
                bits=None if method.name in BASELINES else BITS,
                bitlayers=method.bitlayers,
                activation_bits=method.activation_bits,
                backend=method.backend,
                **{name: round(v, 3) if isinstance(v, float) else v for name, v in dataclasses.asdict(taken).items()},
                bytes=size,
                fraction_of_limit=round(size / bandwidth * 1e6 / taken.median_us, 4) if bandwidth else None,
                speedup_over_bf16=round(baselines[l2] / taken.median_us, 3),
            )
            for (method, l2), (taken, size) in times.items()
        ]


def make_table(rows: Sequence[Row]) -> rich.table.Table:
    """Speed-up over bf16, and for pbjax the fraction of the memory limit, cold: a line for each shape and width."""
    table = rich.table.Table(
        title="speed relative to XLA's bf16 product, and fraction of the memory limit in %, weights not in the L2 cache"
    )
    for name in ("m", "k x n", *(b for b in BASELINES if b != "bf16"), "A", *map(str, range(1, BITS + 1)), "sweep"):
        table.add_column(name, justify="right")
    cold = [row for row in rows if row.l2 == "cold"]
    for m, k, n in dict.fromkeys((row.m, row.k, row.n) for row in cold):
        shape = [row for row in cold if (row.m, row.k, row.n) == (m, k, n)]
        cells = {(row.method, row.activation_bits, row.bitlayers): row for row in shape}
        others = [f"{cells[name, None, None].speedup_over_bf16:.2f}" for name in BASELINES if name != "bf16"]
        for width in WIDTHS:
            products = [cells["bitlayers", width, used] for used in range(1, BITS + 1)]
            products.append(cells["sweep", width, BITS])
            table.add_row(
                str(m), f"{k} x {n}", *others, "float" if width is None else str(width), *map(_cell, products)
            )
        table.add_section()
    return table


def _cell(row: Row) -> str:
    limit = "" if row.fraction_of_limit is None else f" {100 * row.fraction_of_limit:.0f}%"
    return f"{row.speedup_over_bf16:.2f}{limit}"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Speed-up and fraction of the limit over bitlayers, for the fewest rows, cold: a curve for each size and width."""
    few = min(row.m for row in rows)
    figure = matplotlib.figure.Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    chosen = [row for row in rows if row.m == few and row.l2 == "cold" and row.method == "bitlayers"]
    for k, n, width in dict.fromkeys((row.k, row.n, row.activation_bits) for row in chosen):
        curve = [row for row in chosen if (row.k, row.n, row.activation_bits) == (k, n, width)]
        label = f"{k} x {n}, {'float' if width is None else f'{width}-bit'} activations"
        used = [row.bitlayers for row in curve]
        left.plot(used, [row.speedup_over_bf16 for row in curve], marker="o", label=label)
        right.plot(used, [row.fraction_of_limit or float("nan") for row in curve], marker="o", label=label)
    left.set(xlabel="bitlayers", ylabel="speed relative to XLA's bf16 product", title=f"{rows[0].device}, {few} row(s)")
    left.axhline(1, color="gray", linewidth=1)
    right.set(xlabel="bitlayers", ylabel="fraction of the memory limit", ylim=(0, 1.05))
    right.legend(fontsize="x-small")
    figure.savefig(path, dpi=150)


def check_bits(console: rich.console.Console, seconds: float) -> bool:
    """Step 1, in a process of its own: it may take the GPU's memory, and this one has not touched the GPU yet."""
    tests = Path(__file__).parents[2] / "tests"
    command = [sys.executable, "-m", "pytest", "-q", "-W", "default", "-m", "gpu", str(tests / "test_gpu.py")]
    console.print(" ".join(command))
    try:
        return _run_on_gpu(command, seconds) == 0
    except subprocess.TimeoutExpired:
        console.print(f"the tests did not finish in {seconds:.0f} seconds; give more --minutes")
        return False


def sanitize(console: rich.console.Console, seconds: float) -> bool:
    """Step 2: false if compute-sanitizer found something."""
    tool = find_sanitizer()
    if tool is None:
        console.print("compute-sanitizer is not installed: left out")
        return True
    command = [tool, "--error-exitcode", "9", sys.executable, __file__, "--one-of-each"]
    console.print(" ".join(command))
    try:
        return _run_on_gpu(command, seconds) == 0
    except subprocess.TimeoutExpired:
        console.print(f"compute-sanitizer did not finish in {seconds:.0f} seconds: it has found nothing so far")
        return True


def _run_on_gpu(command: Sequence[str], seconds: float) -> int:
    environment = {**os.environ, "JAX_PLATFORMS": "cuda,cpu"}
    return subprocess.run(command, env=environment, check=False, timeout=seconds).returncode


def find_sanitizer() -> str | None:
    """On the path, or in NVIDIA's wheel."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    wheels = (str(path) for folder in folders for path in sorted(folder.glob("*/bin/compute-sanitizer")))
    return shutil.which("compute-sanitizer") or next(wheels, None)


def run_one_of_each(backend: str | None = None, rows: Sequence[int] = (1, 3, 70, 260)) -> int:
    """One product of every kernel, with shapes that fill no block; returns how many."""
    num = 0
    for m, width, name in itertools.product(rows, (8, 16, None), ("mosaic", "triton")):
        w = pbjax.quantize({"kernel": jax.random.normal(jax.random.key(m), (1000, 132))}, BITS)["kernel"]
        problem = pbjax.Problem(m=m, k=1000, n=132, bits=BITS, group_size=None, activation_bits=width)
        try:
            pbjax.select_backend(problem, backend or name)
        except pbjax.Unsupported:
            continue
        x = jax.random.normal(jax.random.key(1), (m, 1000))
        product = jax.jit(functools.partial(pbjax.matmul, activation_bits=width, backend=backend or name))
        jax.block_until_ready(product(x, w))
        num += 1
    return num


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("gpu.csv"), help="the CSV; the plot lies beside it (default: %(default)s)")
    add(
        "--minutes",
        type=float,
        default=15.0,
        help="after which no shape begins; the checks may take 2/3 (default: %(default)s)",
    )
    add("--m", type=int, nargs="+", default=list(ROWS), help="rows of activations, in order (default: %(default)s)")
    add("--runs", type=int, default=30, help="calls timed of each (default: %(default)s)")
    add("--bandwidth", type=float, help="bytes per second of the memory, for a device that is not known here")
    add("--no-check", action="store_true", help="leaves out steps 1 and 2")
    add("--smoke", action="store_true", help="tiny shapes, on any device")
    add("--one-of-each", action="store_true", help=argparse.SUPPRESS)  # what compute-sanitizer runs
    args = parser.parse_args(argv)
    args.size, args.copies, args.backend = SIZES, 64, None
    if args.smoke:
        args.size, args.copies, args.m, args.no_check = ((64, 16),), 2, args.m[:1], True
    return args


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the benchmark with command line arguments, and returns its rows."""
    started = time.monotonic()
    args, console = parse(argv), rich.console.Console(stderr=True, width=WIDTH)
    if args.one_of_each:
        console.print(f"{run_one_of_each()} products")
        return []
    # Asked in a process of its own: step 1 needs the GPU's memory.
    if not args.smoke and not has_gpu():
        raise SystemExit(NO_GPU)
    if not args.no_check and not (check_bits(console, 30 * args.minutes) and sanitize(console, 10 * args.minutes)):
        raise SystemExit("a check failed: nothing was timed")
    rows: list[Row] = []
    skipped: list[str] = []
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        for shape_rows in measure(args, started + 60 * args.minutes, skipped):
            writer.writerows(map(dataclasses.asdict, shape_rows))
            file.flush()
            rows += shape_rows
            console.print(
                f"{time.monotonic() - started:5.0f} s  m={rows[-1].m} {rows[-1].k}x{rows[-1].n} {rows[-1].l2}"
            )
    if rows:
        console.print(make_table(rows))
        draw(rows, args.output.with_suffix(".png"))
    if skipped:
        console.print(f"not measured within {args.minutes:g} minutes: {', '.join(skipped)}")
    return rows


def has_gpu() -> bool:
    """Whether JAX finds an NVIDIA GPU, without taking it."""
    code = "import jax, sys; sys.exit(jax.default_backend() != 'gpu')"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    return (
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False).returncode == 0
    )


if __name__ == "__main__":
    main()
