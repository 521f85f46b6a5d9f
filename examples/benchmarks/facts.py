"""What the rows of a benchmark have in common: the code, the device and the versions that gave them.

    python examples/benchmarks/facts.py

prints them for an NVIDIA GPU as JSON, or fails where JAX finds none: a process of its own leaves the GPU's memory to
others.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jaxlib

ROOT = Path(__file__).parents[2]
SOURCES = ("pallas_kernels", "pbjax", "examples/benchmarks")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """Columns of every CSV of the GPU benchmark.

    Attributes:
      date: of the day on which it began.
      commit: with a "+" where files differ from it; empty outside of a git repository.
      code: a digest of the Python files of pbjax, its kernels and these benchmarks, wherever they lie.
      device: as JAX calls it.
      jax: version.
      jaxlib: version.
      platform_version: of the compiler and the driver.
    """

    date: str
    commit: str
    code: str
    device: str
    jax: str
    jaxlib: str
    platform_version: str


def facts_of(device: jax.Device) -> Facts:
    """As of now."""
    return Facts(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        commit=_commit(),
        code=_digest(),
        device=device.device_kind,
        jax=jax.__version__,
        jaxlib=jaxlib.__version__,
        platform_version=" ".join(device.client.platform_version.split()),
    )


def facts_of_gpu() -> Facts | None:
    """Of the NVIDIA GPU that JAX finds, without taking it; None where there is none."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False, cwd=ROOT
    )
    return None if done.returncode else Facts(**json.loads(done.stdout.splitlines()[-1]))


def same_run(facts: Facts, row: Facts) -> bool:
    """Whether a row comes from the same code, device and versions, on whatever day, under whatever commit."""
    names = [field.name for field in dataclasses.fields(Facts) if field.name not in ("date", "commit")]
    return all(getattr(facts, name) == getattr(row, name) for name in names)


def _commit() -> str:
    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return None if done.returncode else done.stdout.strip()

    head, changes = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain", "--", *SOURCES)
    return "" if head is None else head + "+" * bool(changes)


def _digest() -> str:
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    if jax.default_backend() != "gpu":
        sys.exit("JAX finds no NVIDIA GPU")
    print(json.dumps(dataclasses.asdict(facts_of(jax.devices()[0]))))
