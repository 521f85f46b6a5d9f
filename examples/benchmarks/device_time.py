"""Times of calls on a GPU's own clock, from JAX's profiler: what kernels ran, without launches and gaps."""

from __future__ import annotations

import dataclasses
import datetime
import pathlib
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jaxlib
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What all rows of a run have in common."""

    date: str
    device: str
    jax: str
    jaxlib: str
    platform_version: str


def facts_of(device: jax.Device) -> dict[str, str]:
    """The fields of `Facts`, of today."""
    return dict(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        device=device.device_kind,
        jax=jax.__version__,
        jaxlib=jaxlib.__version__,
        platform_version=" ".join(device.client.platform_version.split()),
    )


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


Key = TypeVar("Key", bound=Hashable)

_PAUSE_S = 0.02  # between batches in a profile, to tell them apart: no kernel of a batch comes so late


def measure(
    runs: Mapping[Key, Callable[[int], Any]], batches: Mapping[str, Sequence[int]]
) -> dict[tuple[Key, str], Times]:
    """Times batches of calls on the device, after two calls that are not counted; in one profile for all of them.

    Args:
      runs: `run(i)` makes a call with the operands number i, and returns JAX arrays.
      batches: the numbers of each batch, in order: to find the cache cold, they take turns; warm, they are the same.

    Returns:
      The times of each run and batch.
    """
    keys = [(key, name) for key in runs for name in batches]
    wall_us = {}
    for key, name in keys:  # without the profiler, which slows launches down
        if name == next(iter(batches)):
            for i in range(2):
                jax.block_until_ready(runs[key](i))
        start = time.perf_counter()
        jax.block_until_ready([runs[key](i) for i in batches[name]])
        wall_us[key, name] = (time.perf_counter() - start) * 1e6 / len(batches[name])
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for key, name in keys:
                jax.block_until_ready([runs[key](i) for i in batches[name]])
                time.sleep(_PAUSE_S)
        found = split_batches(kernel_events(pathlib.Path(folder)), pause_us=_PAUSE_S * 1e6 / 2)
    durations = found if len(found) == len(keys) else [[]] * len(keys)
    return {
        (key, name): summarize(
            split_calls(taken, len(batches[name])), wall_us=wall_us[key, name], runs=len(batches[name])
        )
        for (key, name), taken in zip(keys, durations, strict=True)
    }


def split_batches(events: Sequence[tuple[float, float]], *, pause_us: float) -> list[list[float]]:
    """Durations of (start, duration) in order, a new list after every pause of the device as long as this."""
    batches: list[list[float]] = []
    idle_since = float("-inf")
    for start, duration in events:
        if start - idle_since > pause_us:
            batches.append([])
        batches[-1].append(duration)
        idle_since = max(idle_since, start + duration)
    return batches


def split_calls(durations: Sequence[float], runs: int) -> np.ndarray | None:
    """[runs, kernels of a call], or None where the profiler saw nothing, or not as many kernels in every call."""
    return np.reshape(durations, (runs, -1)) if durations and len(durations) % runs == 0 else None


def kernel_events(folder: pathlib.Path) -> list[tuple[float, float]]:
    """(start, duration) in microseconds of each kernel in a profile, in order."""
    events: list[tuple[float, float]] = []
    for path in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if plane.name.startswith("/device:GPU"):
                # Other lines of a GPU's plane repeat the same time by module and by operation.
                streams = [line for line in plane.lines if line.name.startswith("Stream")]
                events += [(event.start_ns / 1e3, event.duration_ns / 1e3) for line in streams for event in line.events]
    return sorted(events)


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
