"""What comes before times: the kernels have the bits of the oracle, and compute-sanitizer finds nothing in them.

Each check is a process of its own, since it may take the GPU's memory, and has a time after which it is ended.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import gpu_products
from facts import ROOT

PASSED, FAILED, OUT_OF_TIME, NOT_RUN = "passed", "failed", "out of time", "not run"
_FOUND = 9  # the exit status of a program in which a tool found something
_POLL_S = 0.2
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


def check_bits(seconds: float) -> Outcome:
    """`pytest -m gpu`: every kernel against the oracle, on new inputs in each run; the first fault ends it."""
    tests = str(ROOT / "tests" / "test_gpu.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-W", "default", "-m", "gpu", tests]
    start = time.monotonic()
    try:
        status = subprocess.run(command, env=_environment(), check=False, timeout=seconds, cwd=ROOT).returncode
    except subprocess.TimeoutExpired:
        return Outcome(outcome=OUT_OF_TIME, seconds=time.monotonic() - start)
    return Outcome(outcome=FAILED if status else PASSED, seconds=time.monotonic() - start)


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
    environment = _environment(XLA_PYTHON_CLIENT_ALLOCATOR="platform")
    with log.open("wb") as file:
        return subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
        )


def _outcome(status: int, log: Path) -> str:
    if gpu_products.READY not in log.read_text(errors="replace"):
        return NOT_RUN  # the tool, or JAX under it, does not come as far as a first operation
    return FAILED if status else PASSED


def _environment(**more: str) -> dict[str, str]:
    """JAX finds the GPU, and everything finds the packages of this checkout."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "JAX_PLATFORMS": "cuda,cpu", "PYTHONPATH": os.pathsep.join(paths), **more}
