"""Proves and times the GPU kernels on the NVIDIA GPU that is there: one command, within a quarter of an hour.

    python examples/benchmarks/gpu.py --output gpu.csv

1. `pytest -m gpu`: the kernels give the bits of the oracle on fresh random inputs. If not, nothing is timed. At most
   half of the time.
2. compute-sanitizer's memcheck, racecheck and initcheck over small products of every kind (`gpu_products`), side by
   side, where it is installed. At most a sixth of the time; what was covered by then is shown. What it finds is told
   again at the end, with an exit status of 1.
3. A whole network for one image, in CUDA graphs and out of them (`gpu_network`): some seconds.
4. Times on the device's own clock, of pbjax at every number of bitlayers and as a sweep, and of XLA's products as one
   would tune them (`gpu_baselines`): the weights cold (copies take turns that are larger than the L2 cache together)
   and warm (one copy). Shapes come in order of interest, few rows first, until the time is used up.

That is some 3,200 times of 40 shapes. Programs of a shape are compiled side by side, and its times are taken in one
profile and written at once; what was left out is said. `--resume` goes on: it leaves out the steps that passed and the
shapes that are in the CSV, if code, device and versions are the same. Then it prints a summary, and draws a plot beside
the CSV. `--smoke` goes through steps 3 and 4 with tiny shapes on whatever device there is, to try the program out; its
times mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import facts
import gpu_baselines
import gpu_checks
import gpu_network
import gpu_plot
import gpu_rows
import gpu_summary
import gpu_timing
import jax
import rich.console
import rich.table

import pbjax
from pallas_kernels import device_time

ROWS = (1, 8, 64, 16, 2, 4, 32, 256)  # in order of interest
SIZES = ((8192, 8192), (4096, 4096), (8192, 28672), (4096, 14336), (14336, 4096))
# Bytes per second, from NVIDIA's data sheets, by what JAX calls the device.
BANDWIDTH = {
    "NVIDIA A100-SXM4-40GB": 1.555e12,
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA H100 80GB HBM3": 3.352e12,
    "NVIDIA H200": 4.8e12,
    "NVIDIA B200": 8e12,
}
BITS_SHARE, SANITIZER_SHARE = 1 / 2, 1 / 6  # of the minutes, at most
WIDTH = 190  # columns that the summary takes
NO_GPU = "this benchmark needs an NVIDIA GPU that JAX can use, and found none; --smoke tries it out without one"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("gpu.csv"), help="the CSV; others lie beside it (default: %(default)s)")
    add(
        "--minutes",
        type=float,
        default=15.0,
        help="after which no shape begins; the checks may take 2/3 (default: %(default)s)",
    )
    add("--m", type=int, nargs="+", default=list(ROWS), help="rows of activations, in order (default: %(default)s)")
    add("--runs", type=_runs, default=30, help="calls timed of each, up to 31 (default: %(default)s)")
    add("--bandwidth", type=float, help="bytes per second of the memory, for a device that is not known here")
    add("--resume", action="store_true", help="goes on where --output ends")
    add("--no-check", action="store_true", help="leaves out steps 1 to 3")
    add("--smoke", action="store_true", help="tiny shapes, on any device")
    args = parser.parse_args(argv)
    args.size, args.copies = SIZES, gpu_timing.MAX_COPIES
    if args.smoke:
        args.size, args.copies, args.m = ((64, 16),), 2, args.m[:1]
    return args


def _runs(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 31:
        raise argparse.ArgumentTypeError(f"must be in 1..31, as many as can wait for a GPU, but got {value}")
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the command: its options, what it runs on, when it began, and where it talks."""

    args: argparse.Namespace
    facts: facts.Facts
    started: float
    console: rich.console.Console
    problems: list[str]  # told at the end, with an exit status of 1

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return 60 * self.args.minutes

    def path(self, name: str) -> Path:
        """Of a file beside the output."""
        return self.args.output.with_name(f"{self.args.output.stem}_{name}.csv")

    def passed(self) -> set[str]:
        """The steps that earlier runs of the same code, device and versions have passed."""
        steps = gpu_rows.read(self.path("steps"), gpu_rows.Step) if self.args.resume else []
        return {s.step for s in steps if s.outcome == gpu_checks.PASSED and facts.same_run(self.facts, s)}

    def note(self, step: str, outcome: str, seconds: float) -> None:
        """Says how a step went, and keeps it for `--resume`."""
        self.console.print(f"{step}: {outcome} in {seconds:.0f} s")
        row = gpu_rows.Step(**dataclasses.asdict(self.facts), step=step, outcome=outcome, seconds=round(seconds, 1))
        gpu_rows.append(self.path("steps"), [row], gpu_rows.Step)


def check(run: Run) -> None:
    """Steps 1 and 2; this process has not touched the GPU yet."""
    passed = run.passed()
    if "bits" not in passed:
        done = gpu_checks.check_bits(BITS_SHARE * run.seconds)
        run.note("bits", done.outcome, done.seconds)
        if done.outcome == gpu_checks.FAILED:
            raise SystemExit("the tests of the kernels' bits did not pass or did not run: nothing was timed")
        if done.outcome == gpu_checks.OUT_OF_TIME:
            run.console.print("not all bits are checked; give more --minutes")
    tools = [tool for tool in gpu_checks.TOOLS if tool not in passed]
    for tool, done in gpu_checks.sanitize(SANITIZER_SHARE * run.seconds, tools).items():
        run.note(tool, done.outcome, done.seconds)
        if done.outcome != gpu_checks.PASSED:
            run.console.print(done.text, markup=False, highlight=False)
        if done.outcome == gpu_checks.FAILED:
            run.problems.append(f"{tool} found something: see above")


def measure_network(run: Run) -> None:
    """Step 3, into a CSV of its own beside the other."""
    if "network" in run.passed():
        return
    start = time.monotonic()
    backend = gpu_timing.kernel_backend(
        pbjax.Problem(m=1, k=4096, n=4096, bits=gpu_timing.BITS, group_size=None, activation_bits=16)
    )
    sizes = dict(hidden=32, calls=3) if run.args.smoke else {}
    table = rich.table.Table(
        title="the digits MLP for one image, microseconds: from first kernel to last, kernels alone, and by the host"
    )
    for name in ("method", "bitlayers", "CUDA graphs", "kernels", "first to last", "alone", "latency", "call to call"):
        table.add_column(name, justify="right")
    outcome = gpu_checks.PASSED
    try:
        for row in gpu_network.measure(run.facts, backend=backend, **sizes):
            gpu_rows.append(run.path("network"), [row], gpu_network.Row)
            device = ("" if us is None else f"{us:.1f}" for us in (row.us, row.kernels_us))
            times = (*device, f"{row.latency_us:.1f}", f"{row.queued_us:.1f}")
            table.add_row(row.method, str(row.bitlayers or ""), row.graphs, str(row.kernels), *times)
    except jax.errors.JaxRuntimeError as error:  # costs this step, and not the times after it
        outcome = gpu_checks.FAILED
        run.problems.append(f"the network does not run on {backend}: {str(error).splitlines()[0]}")
    run.console.print(table)
    run.note("network", outcome, time.monotonic() - start)


def measure(run: Run, done: Collection[tuple[int, int, int]], skipped: list[str]) -> Iterator[list[gpu_rows.Row]]:
    """Step 4: the rows of one shape after the other, but for those that are done, until the time is over."""
    args = run.args
    bandwidth = args.bandwidth or BANDWIDTH.get(run.facts.device)
    batches = {"cold": range(args.runs), "warm": [0] * args.runs}
    for m, (k, n) in itertools.product(args.m, args.size):
        if (m, k, n) in done:
            continue
        if time.monotonic() > run.started + run.seconds:
            skipped.append(f"m={m} {k}x{n}")
            continue
        calls = gpu_timing.make_calls(m, k, n, copies=args.copies)
        compiled, reasons = gpu_timing.compile_all(calls)
        for method, reason in reasons.items():
            text = f"m={m} {k}x{n}: {method} does not run: {reason.splitlines()[0]}"
            run.console.print(text, markup=False, highlight=False)
            if method.name not in gpu_baselines.OPTIONAL:
                run.problems.append(text)
        times = device_time.measure(compiled, batches)
        yield gpu_rows.rows_of_shape(run.facts, (m, k, n), calls, times, bandwidth=bandwidth)
        run.console.print(f"{time.monotonic() - run.started:5.0f} s  m={m} {k}x{n}")


def main(argv: Sequence[str] | None = None) -> list[gpu_rows.Row]:
    """Runs the benchmark with command line arguments, and returns the rows of this code, device and versions."""
    started, args = time.monotonic(), parse(argv)
    found = facts.facts_of(jax.devices()[0]) if args.smoke else facts.facts_of_gpu()
    if found is None:
        raise SystemExit(NO_GPU)
    console = rich.console.Console(stderr=True, width=WIDTH)
    run = Run(args=args, facts=found, started=started, console=console, problems=[])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        for path in (args.output, run.path("steps"), run.path("network")):
            path.unlink(missing_ok=True)
    rows = [row for row in gpu_rows.read(args.output, gpu_rows.Row) if facts.same_run(found, row)]
    if not args.no_check and not args.smoke:
        check(run)
    if not args.no_check:
        measure_network(run)
    skipped: list[str] = []
    for shape_rows in measure(run, {(row.m, row.k, row.n) for row in rows}, skipped):
        gpu_rows.append(args.output, shape_rows, gpu_rows.Row)
        rows += shape_rows
    for table in gpu_summary.tables(rows):
        console.print(table)
    if rows:
        gpu_plot.draw(rows, args.output.with_suffix(".png"))
    if skipped:
        console.print(f"not measured within {args.minutes:g} minutes: {', '.join(skipped)}")
    if run.problems:
        sys.exit("\n".join(run.problems))
    return rows


if __name__ == "__main__":
    main()
