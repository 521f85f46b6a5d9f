"""Times of calls on a GPU's own clock, from JAX's profiler.

A call is one or more kernels. Its *span* is from the start of the first to the end of the last, with the gaps between
them; the time of its *kernels* is theirs alone. Neither has the launch of the call in it: before each batch of calls a
GPU gets work of some milliseconds (`hold`), so that all of them are queued when the first begins. `Times.idle_us`
shows whether that was so. The host's clock is kept beside, and never stands in for the device's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

COLD_BYTES = 256 << 20  # of all copies of a weight together: twice the L2 cache of a B200, five times that of an H200

Event = tuple[float, float]  # start and duration of a kernel, microseconds
Key = TypeVar("Key", bound=Hashable)
Tree = TypeVar("Tree")

_PAUSE_S = 0.02  # between batches in a profile, to tell them apart: no kernel of a batch comes so late
_HOLD_SIZE, _HOLD_PRODUCTS = 8192, 5  # 5.5e12 operations: 7 ms of an H200, in which some 100 calls can be queued
_ATTEMPTS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
    """Microseconds of one call on the device's clock; medians of all calls of a batch.

    Attributes:
      span_us: from the start of its first kernel to the end of its last.
      p20_us: 20th percentile of the spans.
      p80_us: 80th percentile of the spans.
      kernels_us: of its kernels alone, without the gaps.
      idle_us: from the end of a call to the start of the next, which is little while calls wait in the queue.
      kernels: how many a call is.
    """

    span_us: float
    p20_us: float
    p80_us: float
    kernels_us: float
    idle_us: float
    kernels: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What is known of the calls of one batch.

    Attributes:
      device: times on the device's clock, or None where the profiler does not tell the kernels of each call.
      host_us: mean from call to call on the host's clock, with all of them queued, in microseconds.
      runs: how many calls.
    """

    device: Times | None
    host_us: float
    runs: int


def measure(
    runs: Mapping[Key, Callable[[int], Any]],
    batches: Mapping[str, Sequence[int]],
    *,
    record: Callable[[Callable[[], None]], list[Event]] | None = None,
    before: Callable[[], Any] | None = None,
) -> dict[tuple[Key, str], Measured]:
    """Times batches of calls, after two calls of each that are not counted; in one profile for all of them.

    Args:
      runs: `run(i)` makes a call with the operands number i, and returns JAX arrays.
      batches: the numbers of each batch, in order: to find the cache cold, they take turns (`copies`); warm, they are
        the same. At most 31: JAX lets the host be 32 calls ahead of a GPU.
      record: runs a function and returns the kernels that it ran; None is `profile`.
      before: queues work ahead of each batch; None is `hold`, on a GPU.

    Returns:
      The times of each run and batch.
    """
    record, before = record or profile, before or hold()
    keys = [(key, name) for key in runs for name in batches]
    host_us = {}
    for key, name in keys:  # without the profiler, which slows launches down
        if name == next(iter(batches)):
            for i in range(2):
                jax.block_until_ready(runs[key](i))
        start = time.perf_counter()
        jax.block_until_ready([runs[key](i) for i in batches[name]])
        host_us[key, name] = (time.perf_counter() - start) * 1e6 / len(batches[name])

    def run_all() -> None:
        if before is not None:
            jax.block_until_ready(before())  # alone, to see how many kernels it is
            time.sleep(_PAUSE_S)
        for key, name in keys:
            held = None if before is None else before()
            jax.block_until_ready((held, [runs[key](i) for i in batches[name]]))
            time.sleep(_PAUSE_S)

    if before is not None:
        jax.block_until_ready(before())  # compiles
    found: list[list[Event]] = []
    held = 0
    for _ in range(_ATTEMPTS):
        found = split_batches(record(run_all), pause_us=_PAUSE_S * 1e6 / 2)
        held = 0 if before is None or not found else len(found.pop(0))
        if len(found) == len(keys) or not found:
            break
    events = [batch[held:] for batch in found] if len(found) == len(keys) else [[]] * len(keys)
    return {
        (key, name): Measured(
            device=summarize(split_calls(batch, len(batches[name]))),
            host_us=host_us[key, name],
            runs=len(batches[name]),
        )
        for (key, name), batch in zip(keys, events, strict=True)
    }


def copies(tree: Tree, size: int, *, most: int = 128) -> list[Tree]:
    """The arrays of a tree as often as it takes to find each out of the L2 cache when its turn comes again.

    Args:
      tree: of arrays.
      size: bytes of it that a call reads at least: what it leaves alone stays out of the cache by itself.
      most: how many at most.

    Returns:
      The tree, and copies of it in memory of their own; two or more.
    """
    num = min(most, max(2, math.ceil(COLD_BYTES / size)))
    return [tree, *(jax.tree.map(jnp.copy, tree) for _ in range(num - 1))]


@functools.cache
def hold() -> Callable[[], jax.Array] | None:
    """Keeps a GPU busy for some milliseconds, and takes the place of whatever is in its cache; None without a GPU."""
    if jax.default_backend() != "gpu":
        return None
    # Products of such a matrix have entries of the same size again.
    scale = jnp.bfloat16(_HOLD_SIZE**-0.5)
    matrix = scale * jax.random.normal(jax.random.key(0), (_HOLD_SIZE, _HOLD_SIZE), jnp.bfloat16)

    @jax.jit
    def multiply(matrix):
        product = matrix
        for _ in range(_HOLD_PRODUCTS):
            product = product @ matrix
        return product

    return functools.partial(multiply, matrix)


def profile(run: Callable[[], None]) -> list[Event]:
    """The kernels of all GPUs while `run` ran, in order of time."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # each call of Python would be traced too, and slow launches down
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        return kernel_events(pathlib.Path(folder))


def kernel_events(folder: pathlib.Path) -> list[Event]:
    """The kernels of all GPUs in a profile, in order of time."""
    events: list[Event] = []
    for path in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if plane.name.startswith("/device:GPU"):
                # Other lines of a GPU's plane repeat the same time by module and by operation.
                streams = [line for line in plane.lines if line.name.startswith("Stream")]
                events += [(event.start_ns / 1e3, event.duration_ns / 1e3) for line in streams for event in line.events]
    return sorted(events)


def split_batches(events: Sequence[Event], *, pause_us: float) -> list[list[Event]]:
    """Kernels in order, a new list after every pause of the device as long as this."""
    batches: list[list[Event]] = []
    idle_since = float("-inf")
    for start, duration in events:
        if start - idle_since > pause_us:
            batches.append([])
        batches[-1].append((start, duration))
        idle_since = max(idle_since, start + duration)
    return batches


def split_calls(events: Sequence[Event], runs: int) -> np.ndarray | None:
    """[runs, kernels of a call, 2], or None where the profiler saw nothing, or not as many kernels in every call."""
    return np.reshape(events, (runs, -1, 2)) if events and len(events) % runs == 0 else None


def summarize(calls: np.ndarray | None) -> Times | None:
    """The times of one batch from the (start, duration) of the kernels of its calls."""
    if calls is None:
        return None
    starts, durations = calls[..., 0], calls[..., 1]
    first, last = starts.min(axis=1), (starts + durations).max(axis=1)
    p20, median, p80 = (float(value) for value in np.percentile(last - first, (20, 50, 80)))
    return Times(
        span_us=median,
        p20_us=p20,
        p80_us=p80,
        kernels_us=float(np.median(durations.sum(axis=1))),
        idle_us=float(np.median(first[1:] - last[:-1])) if len(first) > 1 else 0.0,
        kernels=calls.shape[1],
    )
