"""Times of calls on a GPU's own clock, from JAX's profiler: what kernels ran, without launches and gaps."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
    """Microseconds of one call.

    Attributes:
      median_us: median of the calls.
      p20_us: 20th percentile.
      p80_us: 80th percentile.
      wall_us: mean time from call to call, with all calls queued: launches included.
      clock: "device" for the sum of the kernels of a call, or "wall" where the profiler saw no kernels.
      runs: how many calls.
      kernels: how many kernels one call is; 0 with the wall clock.
    """

    median_us: float
    p20_us: float
    p80_us: float
    wall_us: float
    clock: str
    runs: int
    kernels: int


def measure(run: Callable[[int], Any], batches: Mapping[str, Sequence[int]]) -> dict[str, Times]:
    """Times batches of calls on the device, after two calls that are not counted.

    Args:
      run: `run(i)` makes a call with the operands number i, and returns JAX arrays.
      batches: the numbers of each batch, in order: to find the cache cold, they take turns; warm, they are the same.

    Returns:
      The times of each batch.
    """
    for i in range(2):
        jax.block_until_ready(run(i))
    wall_us = {}
    for name, numbers in batches.items():  # without the profiler, which slows launches down
        start = time.perf_counter()
        jax.block_until_ready([run(i) for i in numbers])
        wall_us[name] = (time.perf_counter() - start) * 1e6 / len(numbers)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for numbers in batches.values():
                jax.block_until_ready([run(i) for i in numbers])
        durations = kernel_durations(pathlib.Path(folder))
    calls = split_calls(durations, sum(map(len, batches.values())))
    times = {}
    for name, numbers in batches.items():
        taken, calls = (None, None) if calls is None else (calls[: len(numbers)], calls[len(numbers) :])
        times[name] = summarize(taken, wall_us=wall_us[name], runs=len(numbers))
    return times


def split_calls(durations: Sequence[float], runs: int) -> np.ndarray | None:
    """[runs, kernels of a call], or None where the profiler saw nothing, or not as many kernels in every call."""
    return np.reshape(durations, (runs, -1)) if durations and len(durations) % runs == 0 else None


def kernel_durations(folder: pathlib.Path) -> list[float]:
    """Microseconds of each kernel in a profile, in the order of their start."""
    events: list[tuple[float, float]] = []
    for path in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if plane.name.startswith("/device:GPU"):
                # Other lines of a GPU's plane repeat the same time by module and by operation.
                streams = [line for line in plane.lines if line.name.startswith("Stream")]
                events += [(event.start_ns, event.duration_ns / 1e3) for line in streams for event in line.events]
    return [duration for _, duration in sorted(events)]


def summarize(calls: np.ndarray | None, *, wall_us: float, runs: int) -> Times:
    """The times of one batch from the kernels of its calls; of the wall clock without them."""
    sums = np.array([wall_us]) if calls is None else calls.sum(axis=1)
    p20, median, p80 = (float(value) for value in np.percentile(sums, (20, 50, 80)))
    return Times(
        median_us=median,
        p20_us=p20,
        p80_us=p80,
        wall_us=wall_us,
        clock="wall" if calls is None else "device",
        runs=runs,
        kernels=0 if calls is None else calls.shape[1],
    )
