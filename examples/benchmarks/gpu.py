"""Proves and times the GPU kernels on the NVIDIA GPU that is there: one command, within a quarter of an hour.

    python examples/benchmarks/gpu.py --output gpu.csv

1. `pytest -m gpu`: the kernels give the bits of the oracle on fresh random inputs. A backend of which a test fails is
   not timed; if none is left, nothing is. At most half of the time.
2. compute-sanitizer's memcheck, racecheck and initcheck over small products of every kind (`gpu_products`), side by
   side, where it is installed. At most a sixth of the time; what was covered by then is shown. What it finds is told
   again at the end, with an exit status of 1.
3. A whole network for one image, in CUDA graphs and out of them (`gpu_network`): some seconds, a tenth of the time at
   most.
4. Times on the device's own clock, of pbjax at every number of bitlayers and as a sweep, and of XLA's products as one
   would tune them (`gpu_baselines`): the weights cold (copies take turns that are larger than the L2 cache together)
   and warm (one copy). Shapes come in order of interest, few rows first, until the time is used up.

That is some 3,200 times of 40 shapes. Programs of a shape are compiled side by side, and its times are taken in one
profile and written at once; what was left out is said. Everything on the GPU is in a process that may be lost
(`gpu_worker`): a kernel that crashes it costs its own times, at worst those of its shape, and one that does not end is
stopped. So is what runs when the time is over. What is on the disk is whole at any moment. `--resume` goes on: it
leaves out the tests, steps and shapes that are done, if code, device and versions are the same. Then it prints a
summary, and draws a plot beside the CSV. `--smoke` goes through steps 3 and 4 with tiny shapes on whatever device there
is, to try the program out; its times mean nothing.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import facts
import gpu_checks
import gpu_network
import gpu_plot
import gpu_rows
import gpu_shapes
import gpu_summary
import gpu_timing
import gpu_worker
import jax
import rich.console
import rich.table

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
BITS_SHARE, SANITIZER_SHARE, NETWORK_SHARE = 1 / 2, 1 / 6, 1 / 10  # of the minutes, at most
MAX_LOSSES = 3  # processes that one shape may cost; a kind of program that has cost as many is left out of all others
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
        help="after which what runs is stopped; the checks may take 2/3 (default: %(default)s)",
    )
    add("--m", type=int, nargs="+", default=list(ROWS), help="rows of activations, in order (default: %(default)s)")
    add("--runs", type=_runs, default=30, help="calls timed of each, up to 31 (default: %(default)s)")
    add("--bandwidth", type=float, help="bytes per second of the memory, for a device that is not known here")
    add(
        "--patience",
        type=float,
        default=120.0,
        help="seconds in which a compilation, a first call or a profile must end (default: %(default)s)",
    )
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
    refused: list[str]  # backends whose bits are wrong

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return 60 * self.args.minutes

    def path(self, name: str) -> Path:
        """Of a file beside the output."""
        return self.args.output.with_name(f"{self.args.output.stem}_{name}.csv")

    def files(self) -> dict[Path, type[facts.Facts]]:
        """All that the command writes rows to, and what they are."""
        beside = dict(steps=gpu_rows.Step, bits=gpu_rows.Step, network=gpu_network.Row)
        return {self.args.output: gpu_rows.Row, **{self.path(name): cls for name, cls in beside.items()}}

    def passed(self) -> set[str]:
        """The steps that earlier runs of the same code, device and versions have passed."""
        steps = gpu_rows.read(self.path("steps"), gpu_rows.Step) if self.args.resume else []
        return {s.step for s in steps if s.outcome == gpu_checks.PASSED and facts.same_run(self.facts, s)}

    def note(self, step: str, outcome: str, seconds: float, reason: str = "") -> None:
        """Says how a step went, and keeps it for `--resume`."""
        said = f"{step}: {outcome} in {seconds:.0f} s{': ' if reason else ''}{reason}"
        self.console.print(said, markup=False, highlight=False)
        times = dict(outcome=outcome, seconds=round(seconds, 1), reason=reason)
        gpu_rows.append(
            self.path("steps"), [gpu_rows.Step(**dataclasses.asdict(self.facts), step=step, **times)], gpu_rows.Step
        )


def check(run: Run) -> None:
    """Steps 1 and 2."""
    passed = run.passed()
    if "bits" not in passed:
        done = gpu_checks.check_bits(BITS_SHARE * run.seconds, run.facts, run.path("bits"))
        run.note("bits", done.outcome, done.seconds)
        run.console.print(done.text, markup=False, highlight=False)
        run.refused.extend(gpu_checks.refused_backends(done.failed))
        if done.outcome == gpu_checks.NOT_RUN or len(run.refused) == len(gpu_checks.BACKENDS):
            raise SystemExit("the tests of the kernels' bits did not pass or did not run: nothing was timed")
        if done.failed:
            run.problems.append(f"{len(done.failed)} tests of bits failed: {', '.join(run.refused)} was not timed")
        if done.outcome == gpu_checks.OUT_OF_TIME:
            run.console.print("not all bits are checked; --resume goes on behind those that passed")
    tools = [tool for tool in gpu_checks.TOOLS if tool not in passed]
    for tool, done in gpu_checks.sanitize(SANITIZER_SHARE * run.seconds, tools).items():
        run.note(tool, done.outcome, done.seconds)
        if done.outcome != gpu_checks.PASSED:
            run.console.print(done.text, markup=False, highlight=False)
        if done.outcome == gpu_checks.FAILED:
            run.problems.append(f"{tool} found something: see above")


def measure(run: Run, done: Collection[tuple[int, int, int]]) -> list[str]:
    """Steps 3 and 4: the network, then one shape after the other, but for what is done. Returns what was left out."""
    wanted = [shape for shape in _shapes(run.args) if shape not in done]
    network = not run.args.no_check and gpu_shapes.NETWORK not in run.passed()
    lost: dict[str, list[str]] = collections.defaultdict(list)  # kinds that crashed, by shape, and "" for all
    losses: collections.Counter[str] = collections.Counter()
    while (wanted or network) and time.monotonic() < run.started + run.seconds:
        job = _job(run, wanted, network, lost)
        step, kind, began = None, None, time.monotonic()
        try:
            for event in _events(run, job):
                if event["event"] == "begin":
                    step, kind, began = event["step"], None, time.monotonic()
                kind = event["kind"] if event["event"] == "trying" else kind
                seconds = time.monotonic() - began
                if event["event"] == "missing":
                    text = f"{step}: {event['method']} does not run: {event['reason']}"
                    run.console.print(text, markup=False, highlight=False)
                    if not event["optional"]:
                        run.problems.append(text)
                if event["event"] in _ENDS:
                    _note_end(run, event, seconds)
                    network = network and step != gpu_shapes.NETWORK
                    wanted = [shape for shape in wanted if gpu_shapes.name_of(*shape) != step]
        except gpu_worker.Died as error:
            late = time.monotonic() >= run.started + run.seconds
            if step is None:  # it has not come as far as a first step
                run.problems.append(f"nothing was timed any more: {error}")
                break
            losses.update([step, *filter(None, [kind])])
            during = f" during {kind}" if kind else ""
            run.note(step, _LATE if late else gpu_checks.FAILED, time.monotonic() - began, f"{error}{during}")
            if late:
                break
            run.problems.append(f"{step}: {error}{during}")
            if step == gpu_shapes.NETWORK:
                network = False
            elif kind and losses[step] < MAX_LOSSES:
                lost["" if losses[kind] >= MAX_LOSSES else step].append(kind)  # the shape again, without it
            else:
                wanted = [shape for shape in wanted if gpu_shapes.name_of(*shape) != step]
        else:
            break
    return [*([gpu_shapes.NETWORK] if network else []), *(gpu_shapes.name_of(*shape) for shape in wanted)]


_ENDS = {"done": gpu_checks.PASSED, "late": gpu_checks.OUT_OF_TIME, "failed": gpu_checks.FAILED}
_LATE = gpu_checks.OUT_OF_TIME


def _note_end(run: Run, event: gpu_worker.Event, seconds: float) -> None:
    """A shape that is done is in the CSV, and needs no note."""
    reason = event.get("reason", "")
    if event["step"] == gpu_shapes.NETWORK or reason:
        run.note(event["step"], _ENDS[event["event"]], seconds, reason)
    else:
        run.console.print(f"{time.monotonic() - run.started:5.0f} s  {event['step']}")
    if reason:
        run.problems.append(f"{event['step']} does not run {reason}")


def _shapes(args: argparse.Namespace) -> list[tuple[int, int, int]]:
    return [(m, k, n) for m, (k, n) in itertools.product(args.m, args.size)]


def _job(run: Run, shapes: list[tuple[int, int, int]], network: bool, lost: dict[str, list[str]]) -> gpu_shapes.Job:
    args = run.args
    return gpu_shapes.Job(
        facts=dataclasses.asdict(run.facts),
        output=str(args.output.absolute()),
        network_output=str(run.path("network").absolute()) if network else None,
        network_seconds=NETWORK_SHARE * run.seconds,
        network_sizes=dict(hidden=32, calls=3) if args.smoke else {},
        shapes=shapes,
        refused=run.refused,
        without=dict(lost),
        runs=args.runs,
        copies=args.copies,
        bandwidth=args.bandwidth or BANDWIDTH.get(run.facts.device),
    )


def _events(run: Run, job: gpu_shapes.Job) -> Iterator[gpu_worker.Event]:
    """Of a new process."""
    return gpu_worker.run(
        [sys.executable, gpu_shapes.__file__],
        dataclasses.asdict(job),
        deadline=run.started + run.seconds,
        patience=run.args.patience,
        env=dict(os.environ) if run.args.smoke else gpu_checks.environment(),
    )


def _network_table(rows: Sequence[gpu_network.Row]) -> rich.table.Table:
    table = rich.table.Table(
        title="the digits MLP for one image, microseconds: from first kernel to last, kernels alone, and by the host"
    )
    for name in ("method", "bitlayers", "CUDA graphs", "kernels", "first to last", "alone", "latency", "call to call"):
        table.add_column(name, justify="right")
    for row in rows:
        device = ("" if us is None else f"{us:.1f}" for us in (row.us, row.kernels_us))
        times = (*device, f"{row.latency_us:.1f}", f"{row.queued_us:.1f}")
        table.add_row(row.method, str(row.bitlayers or ""), row.graphs, str(row.kernels), *times)
    return table


def main(argv: Sequence[str] | None = None) -> list[gpu_rows.Row]:
    """Runs the benchmark with command line arguments, and returns the rows of this code, device and versions."""
    started, args = time.monotonic(), parse(argv)
    found = facts.facts_of(jax.devices()[0]) if args.smoke else facts.facts_of_gpu()
    if found is None:
        raise SystemExit(NO_GPU)
    console = rich.console.Console(stderr=True, width=WIDTH)
    run = Run(args=args, facts=found, started=started, console=console, problems=[], refused=[])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for path, cls in run.files().items():
        if not args.resume:
            path.unlink(missing_ok=True)
        try:
            gpu_rows.read(path, cls)  # before anything runs that would be lost
        except ValueError as error:
            raise SystemExit(str(error)) from error
    if not args.no_check and not args.smoke:
        check(run)
    skipped = measure(run, {(row.m, row.k, row.n) for row in _of_run(run, args.output, gpu_rows.Row)})
    network = _of_run(run, run.path("network"), gpu_network.Row)
    if network:
        console.print(_network_table(network))
    rows = _of_run(run, args.output, gpu_rows.Row)
    for table in gpu_summary.tables(rows):
        console.print(table)
    if rows:
        gpu_plot.draw(rows, args.output.with_suffix(".png"))
    if skipped:
        console.print(f"not measured within {args.minutes:g} minutes: {', '.join(skipped)}")
    if run.problems:
        sys.exit("\n".join(run.problems))
    return rows


def _of_run(run: Run, path: Path, cls: type[gpu_rows.R]) -> list[gpu_rows.R]:
    """The rows of this code, device and versions."""
    return [row for row in gpu_rows.read(path, cls) if facts.same_run(run.facts, row)]


if __name__ == "__main__":
    main()
