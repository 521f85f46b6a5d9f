"""Proves and times the GPU kernels on the NVIDIA GPU that is there: one command, within a quarter of an hour.

    python examples/benchmarks/gpu.py --output gpu.csv

1. `pytest -m gpu`: the kernels give the bits of the oracle on fresh random inputs. If not, nothing is timed.
2. compute-sanitizer over one product of each kernel, where it is installed.
3. A whole network for one image, in CUDA graphs and out of them (`gpu_network`).
4. Times on the device's own clock, of pbjax at every number of bitlayers and as a sweep, and of XLA's products as one
   would tune them (`gpu_baselines`): the weights cold (copies take turns that are larger than the L2 cache together)
   and warm (one copy). Shapes come in order of interest, few rows first, until the time is used up.

That is some 2,700 times of 40 shapes. Programs of a shape are compiled side by side, and its times are taken in one
profile and written at once; what was left out is said, and `--resume` goes on where the CSV ends. Then it prints a
summary, and draws a plot beside the CSV. `--smoke` goes through steps 3 and 4 with tiny shapes on whatever device there
is, to try the program out; its times mean nothing.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import device_time
import gpu_baselines
import gpu_network
import jax
import jax.numpy as jnp
import matplotlib.figure
import rich.console
import rich.table

import pbjax

BITS = 8
ROWS = (1, 8, 64, 16, 2, 4, 32, 256)  # in order of interest
SIZES = ((8192, 8192), (4096, 4096), (8192, 28672), (4096, 14336), (14336, 4096))
WIDTHS = (16, 8, None)
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

    name: str  # one of `gpu_baselines.NAMES`, "bitlayers", or "sweep" for every number of them in one call
    bitlayers: int | None = None
    activation_bits: int | None = None
    backend: str  # of pbjax, or the variant of a baseline


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row(device_time.Facts):
    """One line of the output."""

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
    speedup_over_f32: float  # over the fastest of its variants
    speedup_over_bf16: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A program and the operands of its calls, which take turns.

    Attributes:
      program: jitted.
      rows: of activations.
      weights: as many copies as it takes to find them outside of the cache.
      rest: other operands.
      bytes: that one call must read and write.
    """

    program: Any
    rows: jax.Array
    weights: Sequence[Any]
    rest: tuple[jax.Array, ...] = ()
    bytes: int

    def operands(self, i: int) -> tuple[Any, ...]:
        """Of call number i."""
        return self.rows, self.weights[i % len(self.weights)], *self.rest


def make_calls(m: int, k: int, n: int, *, copies: int, backend: str | None) -> dict[Method, Call]:
    """Everything at one shape."""
    x_key, w_key = jax.random.split(jax.random.key(0))
    x, w = jax.random.normal(x_key, (m, k), jnp.float32), jax.random.normal(w_key, (k, n), jnp.float32)
    rest = 4 * m * (k + n)
    calls = {}
    for way in gpu_baselines.all_of(x, w):
        calls[Method(name=way.name, backend=way.variant)] = Call(
            program=jax.jit(way.fn, compiler_options=way.options),
            rows=way.rows,
            weights=_copies(way.weight, copies, way.weight_bytes),
            bytes=way.weight_bytes + rest,
        )
    # By the bytes of one bitlayer, the least that a call reads of a copy: the others leave the cache alone.
    packed = _copies(pbjax.quantize({"kernel": w}, BITS)["kernel"], copies, k * n // 8)
    for width in WIDTHS:
        problem = pbjax.Problem(m=m, k=k, n=n, bits=BITS, group_size=None, activation_bits=width)
        name = backend or kernel_backend(problem)

        def product(x, packed, used, width=width, name=name):
            return pbjax.matmul(x, packed, bitlayers=used, activation_bits=width, backend=name)

        of = functools.partial(Method, activation_bits=width, backend=name)
        rows = x.astype(jnp.bfloat16) if width is None else x
        run, sweep = jax.jit(product), jax.jit(jax.vmap(product, in_axes=(None, None, 0)))
        for used in range(1, BITS + 1):
            calls[of(name="bitlayers", bitlayers=used)] = Call(
                program=run, rows=rows, weights=packed, rest=(jnp.int32(used),), bytes=used * k * n // 8 + rest
            )
        size = BITS * k * n // 8 + rest + 4 * (BITS - 1) * m * n
        counts = jnp.arange(1, BITS + 1)
        calls[of(name="sweep", bitlayers=BITS)] = Call(
            program=sweep, rows=rows, weights=packed, rest=(counts,), bytes=size
        )
    return calls


def compile_all(calls: Mapping[Method, Call]) -> dict[Method, Callable[[int], jax.Array]]:
    """Call number i of each, compiled side by side: on a machine with a GPU, most of the time goes here otherwise."""
    lowered = {call.program: call.program.lower(*call.operands(0)) for call in calls.values()}
    with concurrent.futures.ThreadPoolExecutor(min(len(lowered), os.cpu_count() or 1)) as pool:
        futures = {program: pool.submit(low.compile) for program, low in lowered.items()}
    compiled = {}
    for method, call in calls.items():
        try:
            run = futures[call.program].result()
        except jax.errors.JaxRuntimeError as error:
            if method.name not in gpu_baselines.OPTIONAL:
                raise
            print(
                f"{method.name} ({method.backend}) is left out, XLA does not compile it here: {error}", file=sys.stderr
            )
            continue
        compiled[method] = lambda i, call=call, run=run: run(*call.operands(i))
    return compiled


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


def measure(
    args: argparse.Namespace, deadline: float, done: Collection[tuple[int, int, int]], skipped: list[str]
) -> Iterator[list[Row]]:
    """The rows of one shape after the other, but for those that are done, until the deadline."""
    device = jax.devices()[0]
    facts = device_time.facts_of(device)
    bandwidth = args.bandwidth or BANDWIDTH.get(device.device_kind)
    batches = {"cold": range(args.runs), "warm": [0] * args.runs}
    for m, (k, n) in itertools.product(args.m, args.size):
        if (m, k, n) in done:
            continue
        if time.monotonic() > deadline:
            skipped.append(f"m={m} {k}x{n}")
            continue
        calls = make_calls(m, k, n, copies=args.copies, backend=args.backend)
        times = device_time.measure(compile_all(calls), batches)
        best = {
            (name, l2): min(times[method, l2].median_us for method in calls if method.name == name)
            for name, l2 in itertools.product(gpu_baselines.COMPARED, batches)
        }
        yield [
            Row(
                **facts,
                m=m,
                k=k,
                n=n,
                l2=l2,
                method=method.name,
                bits=None if method.name in gpu_baselines.NAMES else BITS,
                bitlayers=method.bitlayers,
                activation_bits=method.activation_bits,
                backend=method.backend,
                **{name: round(v, 3) if isinstance(v, float) else v for name, v in dataclasses.asdict(taken).items()},
                bytes=calls[method].bytes,
                fraction_of_limit=(
                    round(calls[method].bytes / bandwidth * 1e6 / taken.median_us, 4) if bandwidth else None
                ),
                speedup_over_f32=round(best["f32", l2] / taken.median_us, 3),
                speedup_over_bf16=round(best["bf16", l2] / taken.median_us, 3),
            )
            for (method, l2), taken in times.items()
        ]


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV that this has written."""
    kinds = {field.name: str(field.type) for field in dataclasses.fields(Row)}

    def value(name: str, text: str) -> Any:
        if not text and kinds[name].endswith("None"):
            return None
        return {"int": int, "float": float, "str": str}[kinds[name].split(" ")[0]](text)

    with path.open(newline="") as file:
        return [Row(**{name: value(name, text) for name, text in line.items()}) for line in csv.DictReader(file)]


def make_table(rows: Sequence[Row]) -> rich.table.Table:
    """Speed-up over bf16, and for pbjax the fraction of the memory limit, cold: a line for each shape and width."""
    table = rich.table.Table(
        title="speed over XLA's fastest bf16 product, and fraction of the memory limit in %; weights not in the cache"
    )
    others = [name for name in gpu_baselines.NAMES if name != "bf16"]
    for name in ("m", "k x n", *others, "A", *map(str, range(1, BITS + 1)), "sweep"):
        table.add_column(name, justify="right")
    cold = [row for row in rows if row.l2 == "cold"]
    for m, k, n in dict.fromkeys((row.m, row.k, row.n) for row in cold):
        shape = [row for row in cold if (row.m, row.k, row.n) == (m, k, n)]
        cells = {(row.method, row.activation_bits, row.bitlayers): row for row in shape}
        fastest = [max(row.speedup_over_bf16 for row in shape if row.method == name) for name in others]
        for width in WIDTHS:
            products = [cells["bitlayers", width, used] for used in range(1, BITS + 1)]
            products.append(cells["sweep", width, BITS])
            table.add_row(
                str(m),
                f"{k} x {n}",
                *(f"{speed:.2f}" for speed in fastest),
                "float" if width is None else str(width),
                *map(_cell, products),
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
    left.set(
        xlabel="bitlayers",
        ylabel="speed relative to XLA's fastest bf16 product",
        title=f"{rows[0].device}, {few} row(s)",
    )
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
        console.print(
            f"the tests did not finish in {seconds:.0f} seconds: not all bits are checked; give more --minutes"
        )
        return True


def sanitize(console: rich.console.Console, seconds: float) -> bool:
    """Step 2: false if compute-sanitizer found something."""
    tool = find_sanitizer()
    if tool is None:
        console.print("compute-sanitizer is not installed: left out")
        return True
    command = [tool, "--error-exitcode", "9", sys.executable, __file__, "--one-of-each"]
    console.print(" ".join(command))
    try:
        # Every array an allocation of its own: an access beyond one in XLA's pool would not be seen.
        return _run_on_gpu(command, seconds, XLA_PYTHON_CLIENT_ALLOCATOR="platform") == 0
    except subprocess.TimeoutExpired:
        console.print(
            f"compute-sanitizer did not finish in {seconds:.0f} seconds: what it has found so far stands above"
        )
        return True


def _run_on_gpu(command: Sequence[str], seconds: float, **more: str) -> int:
    environment = {**os.environ, "JAX_PLATFORMS": "cuda,cpu", **more}
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
    add("--resume", action="store_true", help="keeps the rows of --output and leaves out their shapes")
    add("--no-check", action="store_true", help="leaves out steps 1 to 3")
    add("--smoke", action="store_true", help="tiny shapes, on any device")
    add("--one-of-each", action="store_true", help=argparse.SUPPRESS)  # what compute-sanitizer runs
    args = parser.parse_args(argv)
    args.size, args.copies, args.backend = SIZES, 128, None
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
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if args.smoke or not args.no_check:
        measure_network(args, console)
    rows = read_rows(args.output) if args.resume and args.output.exists() else []
    skipped: list[str] = []
    with args.output.open("a" if rows else "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        if not rows:
            writer.writeheader()
        done = {(row.m, row.k, row.n) for row in rows}
        for shape_rows in measure(args, started + 60 * args.minutes, done, skipped):
            writer.writerows(map(dataclasses.asdict, shape_rows))
            file.flush()
            rows += shape_rows
            console.print(f"{time.monotonic() - started:5.0f} s  m={rows[-1].m} {rows[-1].k}x{rows[-1].n}")
    if rows:
        console.print(make_table(rows))
        draw(rows, args.output.with_suffix(".png"))
    if skipped:
        console.print(f"not measured within {args.minutes:g} minutes: {', '.join(skipped)}")
    return rows


def measure_network(args: argparse.Namespace, console: rich.console.Console) -> None:
    """Step 3, into a CSV of its own beside the other."""
    path = args.output.with_name(f"{args.output.stem}_network.csv")
    backend = args.backend or kernel_backend(
        pbjax.Problem(m=1, k=4096, n=4096, bits=BITS, group_size=None, activation_bits=16)
    )
    sizes = dict(hidden=32, calls=3) if args.smoke else {}
    table = rich.table.Table(title="the digits MLP for one image, microseconds")
    for name in ("method", "bitlayers", "CUDA graphs", "kernels", "on the device", "latency", "call to call"):
        table.add_column(name, justify="right")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(gpu_network.Row)])
        writer.writeheader()
        for row in gpu_network.measure(device_time.facts_of(jax.devices()[0]), backend=backend, **sizes):
            writer.writerow(dataclasses.asdict(row))
            file.flush()
            used, device_us = row.bitlayers or "", "" if row.device_us is None else f"{row.device_us:.1f}"
            times = (f"{row.latency_us:.1f}", f"{row.queued_us:.1f}")
            table.add_row(row.method, str(used), row.graphs, str(row.kernels), device_us, *times)
    console.print(table)


def has_gpu() -> bool:
    """Whether JAX finds an NVIDIA GPU, without taking it."""
    code = "import jax, sys; sys.exit(jax.default_backend() != 'gpu')"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    return (
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False).returncode == 0
    )


if __name__ == "__main__":
    main()
