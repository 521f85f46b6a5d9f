"""Wall times of several functions, measured side by side so that whatever slows the machine down slows all of them."""

from __future__ import annotations

import dataclasses
import platform
import re
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

Key = TypeVar("Key", bound=Hashable)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
    """Wall times of one call in microseconds: median, 20th and 80th percentile, and how many were taken."""

    median_us: float
    p20_us: float
    p80_us: float
    repeats: int


def interleaved(
    functions: Mapping[Key, Callable[[], Any]],
    *,
    repeats: int,
    max_seconds: float = float("inf"),
    calls: int = 1,
    warm: bool = False,
) -> dict[Key, Times]:
    """Times functions in turn, round after round: in each round every function runs once, then the next round starts.

    Each result is waited for. Two rounds of warming up come first and are not counted (the first compiles).

    Args:
      functions: what to time, without arguments; they return JAX arrays.
      repeats: rounds.
      max_seconds: no further round starts after this many seconds, except that three always run.
      calls: calls queued for one time, which is divided by their number. On a GPU more than one hides the wait for the
        device; it does not hide the launch of each call, so products of a few microseconds need a profiler instead.
      warm: each time follows a call of the same function, which is not counted. So caches hold what fits into them, as
        where a model answers one request after the other; else they hold what the function before has left.

    Returns:
      The times of each function, by its key.
    """
    for _ in range(2):
        for function in functions.values():
            jax.block_until_ready(function())
    microseconds: dict[Key, list[float]] = {key: [] for key in functions}
    deadline = time.perf_counter() + max_seconds
    for done in range(repeats):
        if done >= 3 and time.perf_counter() > deadline:
            break
        for key, function in functions.items():
            if warm:
                jax.block_until_ready(function())
            start = time.perf_counter()
            jax.block_until_ready([function() for _ in range(calls)])
            microseconds[key].append((time.perf_counter() - start) * 1e6 / calls)
    return {key: _summarize(times) for key, times in microseconds.items()}


def _summarize(times: list[float]) -> Times:
    p20, median, p80 = (float(value) for value in np.percentile(times, (20, 50, 80)))
    return Times(median_us=median, p20_us=p20, p80_us=p80, repeats=len(times))


def cpu_model() -> str:
    """The model name of the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return match.group(1) if match else platform.processor() or platform.machine()
