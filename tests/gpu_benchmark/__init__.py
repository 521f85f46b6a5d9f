"""The benchmark of the GPU kernels without a GPU."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"
