"""Times the network and shapes, one after the other, in a process that may be lost: see `gpu_worker`.

    echo '{"facts": {..}, "shapes": [[1, 4096, 4096]], ..}' | python examples/benchmarks/gpu_shapes.py

Rows of a shape are in the CSV before the next one begins. What runs is told before it runs, so that a crash has a name.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gpu_network
import gpu_rows
import gpu_timing
import gpu_worker
import jax
from facts import Facts
from gpu_baselines import OPTIONAL

import pbjax
from pallas_kernels import device_time

NETWORK = "network"
Tell = Callable[[Mapping[str, Any]], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What to time; as JSON it is a mapping of the fields.

    Attributes:
      facts: of the run.
      output: the CSV of the shapes.
      network_output: the CSV of the network, or None to leave it out.
      network_seconds: after which no more of the network begins.
      network_sizes: of `gpu_network.measure`, other than its own.
      shapes: m, k, n of each, in order.
      refused: backends of pbjax that are not timed.
      without: kinds (`kind_of`) that are not timed, by shape ("m=1 4096x4096"), or "" for all.
      runs: calls timed of each method.
      copies: of a weight, at most.
      bandwidth: bytes per second of the memory.
    """

    facts: Mapping[str, str]
    output: str
    network_output: str | None
    network_seconds: float
    network_sizes: Mapping[str, int]
    shapes: list[tuple[int, int, int]]
    refused: list[str]
    without: Mapping[str, list[str]]
    runs: int
    copies: int
    bandwidth: float | None


def name_of(m: int, k: int, n: int) -> str:
    """What a shape is called in messages and in `Job.without`."""
    return f"m={m} {k}x{n}"


def kind_of(method: gpu_timing.Method) -> str:
    """What methods of one program have in common."""
    width = "" if method.name in gpu_rows.NAMES else f" A={method.activation_bits}"
    return f"{method.name}{width} {method.backend}"


def run(job: Job, tell: Tell = gpu_worker.tell) -> None:
    """Everything of the job. Tells `begin` and `done` of each step, `trying` of each kind, `missing`, and `rows`."""
    if job.network_output:
        tell(dict(event="begin", step=NETWORK))
        _measure_network(job, tell)
    for m, k, n in job.shapes:
        tell(dict(event="begin", step=name_of(m, k, n)))
        _measure_shape(job, m, k, n, tell)


def _measure_shape(job: Job, m: int, k: int, n: int, tell: Tell) -> None:
    name = name_of(m, k, n)
    left_out = {*job.without.get(name, ()), *job.without.get("", ())}
    calls = gpu_timing.make_calls(m, k, n, copies=job.copies, refused=job.refused)
    calls = {method: call for method, call in calls.items() if kind_of(method) not in left_out}
    tell(dict(event="made", step=name))

    def trying(method: gpu_timing.Method) -> None:
        tell(dict(event="trying", step=name, kind=kind_of(method)))

    compiled, reasons = gpu_timing.compile_all(calls, trying)
    for method, reason in reasons.items():
        optional = method.name in OPTIONAL
        tell(dict(event="missing", step=name, method=str(method), reason=first_line(reason), optional=optional))
    tell(dict(event="trying", step=name, kind=None))
    times = device_time.measure(compiled, {"cold": range(job.runs), "warm": [0] * job.runs})
    rows = gpu_rows.rows_of_shape(Facts(**job.facts), (m, k, n), calls, times, bandwidth=job.bandwidth)
    gpu_rows.append(Path(job.output), rows, gpu_rows.Row)
    tell(dict(event="done", step=name))


def _measure_network(job: Job, tell: Tell) -> None:
    """Leaves out what the CSV has already."""
    assert job.network_output, "checked by `run`"
    facts, path, start = Facts(**job.facts), Path(job.network_output), time.monotonic()
    problem = pbjax.Problem(m=1, k=4096, n=4096, bits=gpu_timing.BITS, group_size=None, activation_bits=16)
    backend = gpu_timing.kernel_backend(problem, job.refused)
    done = {
        (row.method, row.bitlayers, row.graphs)
        for row in gpu_rows.read(path, gpu_network.Row)
        if (row.device, row.code) == (facts.device, facts.code)
    }
    try:
        for row in gpu_network.measure(facts, backend=backend, done=done, **job.network_sizes):
            gpu_rows.append(path, [row], gpu_network.Row)
            tell(dict(event="row", step=NETWORK))
            if time.monotonic() > start + job.network_seconds:
                tell(dict(event="late", step=NETWORK))
                return
    except jax.errors.JaxRuntimeError as error:  # costs this step, and not the times after it
        tell(dict(event="failed", step=NETWORK, reason=f"on {backend}: {first_line(str(error))}"))
        if not gpu_timing.device_works():
            raise gpu_timing.DeviceLost(NETWORK) from error
        return
    tell(dict(event="done", step=NETWORK))


def first_line(text: str) -> str:
    """Of an error, for a message."""
    return next(itertools.chain(text.splitlines(), [""]))


if __name__ == "__main__":
    run(Job(**json.load(sys.stdin)))
