"""The pages of the documentation: their code runs as it stands, their names and files exist, and tables follow data.

The documentation is built with its cells executed (see CONTRIBUTING.md); here the same cells run as tests, under
JAX at its strictest and with warnings as errors, also where the tools that build pages are not installed.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import jax
import matplotlib as mpl
import pytest

import pbjax

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
CELL = re.compile(r"^```(?:\{code-cell\} )?python\n(?:---\n.*?^---\n|(?::\w+:[^\n]*\n)+)?(.*?)^```$", re.DOTALL | re.MULTILINE)
EXECUTED = [page for page in PAGES if "{code-cell}" in page.read_text()]

mpl.use("Agg")


def cells(page: Path) -> list[str]:
    """The cells of a page, as many lines down as in the page, so that a traceback shows the place."""
    text = page.read_text()
    return ["\n" * text[: match.start(1)].count("\n") + match[1] for match in CELL.finditer(text)]


def run(page: Path) -> None:
    """The cells in order, under JAX's own defaults, which pages are read with."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for cell in cells(page):
            exec(compile(cell, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", EXECUTED, ids=lambda page: page.stem)
def test_cells_run(page):
    if "jax_num_cpu_devices" not in page.read_text():
        return run(page)
    code = f"from tests import test_docs, conftest; test_docs.run(test_docs.ROOT / 'docs' / {page.name!r})"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=300, cwd=ROOT)
