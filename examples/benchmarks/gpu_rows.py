"""Rows of data: what was timed, by which clock, and the ratios that it makes. A ratio is of times by one clock only."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from facts import Facts
from gpu_baselines import FLOATS, NAMES
from gpu_timing import BITS, Call, Method

from pallas_kernels import device_time

DEVICE, HOST = "device", "host"
R = TypeVar("R", bound=Facts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row(Facts):
    """One line of the output. Times are microseconds of one call.

    Attributes:
      m: rows of activations.
      k: the contraction.
      n: output features.
      l2: "cold" or "warm".
      method: as of `gpu_timing.Method`, like the fields up to `backend`.
      bits: stored.
      bitlayers: used.
      activation_bits: of fixed-point activations.
      backend: of pbjax, or the variant of a baseline.
      clock: "device", or "host" where the profiler does not tell the kernels of each call: then `us` and its
        percentiles are the mean from call to call of many that are queued.
      runs: how many calls.
      kernels: how many a call is; 0 on the host's clock.
      us: median from the start of a call's first kernel to the end of its last, gaps included.
      p20_us: 20th percentile.
      p80_us: 80th percentile.
      kernels_us: median of a call's kernels alone, without the gaps.
      idle_us: median from the end of a call to the start of the next.
      host_us: mean from call to call on the host's clock, whatever `clock` is.
      bytes: that a call must move.
      fraction_of_limit: the time that the bytes take at the bandwidth of the data sheet, over `us`.
      kernels_fraction_of_limit: the same, over `kernels_us`.
      speedup_over_f32_highest: `us` of the fastest variant over that of this row, if both are of one clock.
      speedup_over_f32_default: likewise.
      speedup_over_bf16: likewise.
      kernels_speedup_over_bf16: of `kernels_us`, to compare the kernels alone.
    """

    m: int
    k: int
    n: int
    l2: str
    method: str
    bits: int | None
    bitlayers: int | None
    activation_bits: int | None
    backend: str
    clock: str
    runs: int
    kernels: int
    us: float
    p20_us: float
    p80_us: float
    kernels_us: float | None
    idle_us: float | None
    host_us: float
    bytes: int
    fraction_of_limit: float | None
    kernels_fraction_of_limit: float | None
    speedup_over_f32_highest: float | None
    speedup_over_f32_default: float | None
    speedup_over_bf16: float | None
    kernels_speedup_over_bf16: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(Facts):
    """A step before the times that is over: in a file beside theirs, for `--resume`."""

    step: str
    outcome: str
    seconds: float
    reason: str = ""  # why it did not pass


def rows_of_shape(
    facts: Facts,
    shape: tuple[int, int, int],
    calls: Mapping[Method, Call],
    times: Mapping[tuple[Method, str], device_time.Measured],
    *,
    bandwidth: float | None,
) -> list[Row]:
    """The rows of what was measured at (m, k, n). `bandwidth`: bytes per second of the memory, if it is known."""
    m, k, n = shape

    def ratio(other: str, method: Method, l2: str, name: str) -> float | None:
        """How many times as long the fastest variant of another method takes."""
        own = times[method, l2]
        others = [taken for (method, at), taken in times.items() if (method.name, at) == (other, l2)]
        pairs = [_of_clock(taken, name, own.device is not None) for taken in others]
        if not pairs or not all(pairs):
            return None  # what has no time on this clock might be the fastest
        mine = _of_clock(own, name, own.device is not None)
        return min(us for us in pairs if us) / mine if mine else None

    def row(method: Method, l2: str) -> Row:
        taken, moved = times[method, l2], calls[method].bytes
        us, device = _of_clock(taken, "span_us", taken.device is not None), taken.device
        kernels_us = device.kernels_us if device else None
        limit_us = moved / bandwidth * 1e6 if bandwidth else None
        assert us is not None, "one of the two clocks always has a time"
        return Row(
            **dataclasses.asdict(facts),
            m=m,
            k=k,
            n=n,
            l2=l2,
            method=method.name,
            bits=None if method.name in NAMES else BITS,
            bitlayers=method.bitlayers,
            activation_bits=method.activation_bits,
            backend=method.backend,
            clock=DEVICE if device else HOST,
            runs=taken.runs,
            kernels=device.kernels if device else 0,
            us=round(us, 3),
            p20_us=round(device.p20_us if device else us, 3),
            p80_us=round(device.p80_us if device else us, 3),
            kernels_us=_rounded(kernels_us, 3),
            idle_us=_rounded(device.idle_us if device else None, 3),
            host_us=round(taken.host_us, 3),
            bytes=moved,
            fraction_of_limit=_rounded(limit_us / us if limit_us else None, 4),
            kernels_fraction_of_limit=_rounded(limit_us / kernels_us if limit_us and kernels_us else None, 4),
            **{f"speedup_over_{other}": _rounded(ratio(other, method, l2, "span_us"), 3) for other in FLOATS},
            kernels_speedup_over_bf16=_rounded(ratio("bf16", method, l2, "kernels_us"), 3),
        )

    return [row(method, l2) for method, l2 in times]


def _of_clock(taken: device_time.Measured, name: str, on_device: bool) -> float | None:
    """A time of the device, or that of the host, which knows no kernels; None where there is none."""
    if on_device:
        return None if taken.device is None else getattr(taken.device, name)
    return taken.host_us if name == "span_us" else None


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def read(path: Path, cls: type[R]) -> list[R]:
    """The rows of a CSV that `append` has written; none where there is no file.

    A last line without its end, of a copy that was interrupted, is left out, and said.

    Raises:
      ValueError: the columns are others, of another version of this program, or a line is damaged.
    """
    kinds = {field.name: str(field.type) for field in dataclasses.fields(cls)}

    def value(name: str, text: str) -> Any:
        if not text and kinds[name].endswith("None"):
            return None
        return {"int": int, "float": float, "str": str}[kinds[name].split(" ")[0]](text)

    text = _whole_lines(path)
    if not text:
        return []
    lines = csv.DictReader(io.StringIO(text, newline=""))
    if list(lines.fieldnames or ()) != list(kinds):
        raise ValueError(
            f"`{path}` must have the columns {', '.join(kinds)}, but got {lines.fieldnames}. "
            "Choose another --output, or leave out --resume."
        )
    try:
        return [cls(**{name: value(name, text) for name, text in line.items()}) for line in lines]
    except (csv.Error, KeyError, TypeError, ValueError) as error:  # cells that are missing, too many, or no numbers
        raise ValueError(
            f"`{path}` must have a {cls.__name__} in each line, but line {lines.line_num} is damaged. "
            "Remove the line, choose another --output, or leave out --resume."
        ) from error


def append(path: Path, rows: Sequence[Facts], cls: type[Facts]) -> None:
    """Adds rows to a CSV, with a header if it is new. The file is replaced as a whole: no row of it is in part."""
    before = _whole_lines(path)
    new = io.StringIO(newline="")
    lines = csv.DictWriter(new, [field.name for field in dataclasses.fields(cls)])
    if not before:
        lines.writeheader()
    lines.writerows(map(dataclasses.asdict, rows))
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with unfinished.open("w", newline="") as file:
            file.write(before + new.getvalue())
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _whole_lines(path: Path) -> str:
    """What a file holds, up to the end of its last line."""
    if not path.exists():
        return ""
    with path.open(newline="", errors="replace") as file:
        text = file.read()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        sys.stderr.write(f"{path}: the last line is not complete and is left out: {text[len(whole) :][:80]!r}\n")
    return whole
