"""What comes before times: the kernels have the bits of the oracle, and compute-sanitizer finds nothing in them.

Each check is a process of its own, since it may take the GPU's memory, and has a time after which it is ended.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import gpu_bits
import gpu_products
import gpu_rows
from facts import ROOT, Facts, same_run

PASSED, FAILED, OUT_OF_TIME, NOT_RUN = "passed", "failed", "out of time", "not run"
HUNG = "hung"
_PYTEST_IS_OVER = (0, 1, 5)  # all passed, some failed, none is left
_MAX_RESTARTS = 8
_PATIENCE_S = 180.0  # the slowest test compiles some 20 candidates
_FOUND = 9  # the exit status of a program in which a tool found something
_POLL_S = 0.2
BACKENDS = gpu_products.BACKENDS
# initcheck has to see what all kernels write; the others look at ours alone.
TOOLS: Mapping[str, tuple[str, ...]] = {
    "memcheck": ("--padding", "512", "--report-api-errors", "no"),
    "racecheck": (),
    "initcheck": (),
}
_OURS_ALONE = ("memcheck", "racecheck")
_FILTERS = ("--kernel-name", "--kernel-regex")  # the option's name in newer and in older versions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one check."""

    outcome: str
    seconds: float
    text: str = ""  # what it printed, if that is not shown already
    failed: tuple[str, ...] = ()  # of tests, the names


def check_bits(seconds: float, facts: Facts, progress: Path, *, patience: float = _PATIENCE_S) -> Outcome:
    """`pytest -m gpu`: every kernel against the oracle, on new inputs in each run.

    A test that fails, crashes its process or does not end within `patience` seconds costs itself; the others go on, in
    a new process where the old one is lost. The file `progress` has each of them (`gpu_bits`), and those in it that
    passed before do not run again.
    """
    start, restarts = time.monotonic(), 0
    _forget_failures(progress, facts)
    tests = str(ROOT / "tests" / "test_gpu.py")
    command = [sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "gpu_bits", "-m", "gpu", tests]
    command += ["--gpu-bits", str(progress.absolute()), "--gpu-facts", json.dumps(dataclasses.asdict(facts))]
    while True:
        status = _watch(command, progress, start + seconds, patience)
        found = gpu_bits.outcomes(progress, facts)
        if status in _PYTEST_IS_OVER or status == OUT_OF_TIME:
            break
        begun = [row for row in found.values() if row.outcome == gpu_bits.BEGUN]
        for row in begun:
            how = "its process crashed" if status != HUNG else f"it did not end within {patience:.0f} s"
            failed = dataclasses.replace(row, outcome=gpu_bits.FAILED, reason=f"{how} ({status})")
            gpu_rows.append(progress, [failed], gpu_rows.Step)
        restarts += 1
        if restarts > _MAX_RESTARTS or not (begun or status == gpu_bits.DEVICE_LOST):
            break
    found = gpu_bits.outcomes(progress, facts)
    failed = {name: row.reason for name, row in found.items() if row.outcome == gpu_bits.FAILED}
    passed = sum(row.outcome == gpu_bits.PASSED for row in found.values())
    outcome = FAILED if failed else OUT_OF_TIME if status == OUT_OF_TIME else PASSED
    if outcome == PASSED and status not in _PYTEST_IS_OVER:
        outcome = NOT_RUN
    lines = [f"{name}: {reason}\n" for name, reason in failed.items()]
    return Outcome(
        outcome=outcome,
        seconds=time.monotonic() - start,
        text=f"{passed} tests passed, {len(failed)} failed\n" + "".join(lines),
        failed=tuple(failed),
    )


def refused_backends(failed: Sequence[str]) -> list[str]:
    """Those whose tests are among the failed ones; a test that names none speaks of all."""
    named = {name: [backend for backend in BACKENDS if backend in name] for name in failed}
    return [b for b in BACKENDS if any(b in found or not found for found in named.values())]


def _watch(command: Sequence[str], progress: Path, deadline: float, patience: float) -> int | str:
    """The exit status of pytest, OUT_OF_TIME, or HUNG where it has written nothing for so long."""
    process = subprocess.Popen(command, env=environment(), cwd=ROOT, start_new_session=True)
    last, stamp = time.monotonic(), _stamp(progress)
    while process.poll() is None:
        now = time.monotonic()
        if (new := _stamp(progress)) != stamp:
            last, stamp = now, new
        if now > deadline or now > last + patience:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return OUT_OF_TIME if now > deadline else HUNG
        time.sleep(_POLL_S)
    return process.returncode


def _stamp(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def _forget_failures(progress: Path, facts: Facts) -> None:
    """What did not pass runs again."""
    kept = [
        row
        for row in gpu_rows.read(progress, gpu_rows.Step)
        if row.outcome in (gpu_bits.PASSED, gpu_bits.SKIPPED) and same_run(facts, row)
    ]
    progress.unlink(missing_ok=True)
    if kept:
        gpu_rows.append(progress, kept, gpu_rows.Step)


def sanitize(seconds: float, names: Sequence[str] = tuple(TOOLS)) -> dict[str, Outcome]:
    """compute-sanitizer's tools over `gpu_products`, side by side, since most of their time is the host's.

    A tool that the device does not let run, or that is not installed, is "not run"; the text says why.
    """
    program = find_sanitizer()
    if program is None:
        return {
            name: Outcome(outcome=NOT_RUN, seconds=0, text="compute-sanitizer is not installed\n") for name in names
        }
    start, outcomes = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as folder:
        logs = {name: Path(folder) / name for name in names}
        running = {name: _start(command_of(program, name), logs[name]) for name in names}
        while running:
            taken = time.monotonic() - start
            for name, process in list(running.items()):
                if process.poll() is None and taken < seconds:
                    continue
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # the tool, and the program under it
                    process.wait()
                    outcome = OUT_OF_TIME
                else:
                    outcome = _outcome(process.returncode, logs[name])
                outcomes[name] = Outcome(outcome=outcome, seconds=taken, text=logs[name].read_text(errors="replace"))
                del running[name]
            time.sleep(_POLL_S)
    return outcomes


def command_of(program: str, tool: str) -> list[str]:
    """A tool over every product."""
    options = list(TOOLS[tool])
    if tool in _OURS_ALONE:
        text = subprocess.run([program, "--help"], capture_output=True, text=True, check=False).stdout
        options += next(([name, "kernel_substring=bit_matmul"] for name in _FILTERS if name in text), [])
    found = ["--error-exitcode", str(_FOUND)]
    return [program, "--tool", tool, *found, *options, sys.executable, gpu_products.__file__]


def find_sanitizer() -> str | None:
    """On the path, or in NVIDIA's wheel."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    wheels = (str(path) for folder in folders for path in sorted(folder.glob("*/bin/compute-sanitizer")))
    return shutil.which("compute-sanitizer") or next(wheels, None)


def _start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    # Every array an allocation of its own: an access beyond one in XLA's pool would not be seen.
    alone = environment(XLA_PYTHON_CLIENT_ALLOCATOR="platform")
    with log.open("wb") as file:
        return subprocess.Popen(
            command, env=alone, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
        )


def _outcome(status: int, log: Path) -> str:
    if gpu_products.READY not in log.read_text(errors="replace"):
        return NOT_RUN  # the tool, or JAX under it, does not come as far as a first operation
    return FAILED if status else PASSED


def environment(**more: str) -> dict[str, str]:
    """JAX finds the GPU, and everything finds the packages of this checkout and these modules."""
    paths = [str(ROOT), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "JAX_PLATFORMS": "cuda,cpu", "PYTHONPATH": os.pathsep.join(paths), **more}
