"""A plugin of pytest that keeps which tests have passed, so that the next run goes on behind them.

    python -m pytest -p gpu_bits --gpu-bits gpu_bits.csv --gpu-facts '{..}' -m gpu tests/test_gpu.py

A row is written before a test begins and when it is over: a test that crashes the process, or never ends, has begun.
Tests that have passed, failed or begun in the file, under the same code, device and versions, do not run again. Where
the GPU answers no more after a fault, the process ends, for another one to go on.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import gpu_rows
import gpu_timing
import pytest
from facts import Facts, same_run

BEGUN, PASSED, FAILED, SKIPPED = "begun", "passed", "failed", "skipped"
DEVICE_LOST = 9  # exit status


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-bits", type=Path, required=True, help="the CSV")
    parser.addoption("--gpu-facts", type=json.loads, required=True, help="of the run")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Progress(config.option.gpu_bits, Facts(**config.option.gpu_facts)))


def outcomes(path: Path, facts: Facts) -> dict[str, gpu_rows.Step]:
    """The last row of each test of the same run."""
    return {row.step: row for row in gpu_rows.read(path, gpu_rows.Step) if same_run(facts, row)}


class Progress:
    """Of one run of pytest."""

    def __init__(self, path: Path, facts: Facts):
        self.path, self.facts = path, facts
        self.started = 0.0

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = outcomes(self.path, self.facts)
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        items[:] = [item for item in items if item.nodeid not in done]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.started = time.monotonic()
        self._keep(nodeid, BEGUN)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self._keep(report.nodeid, FAILED, str(crash.message if crash else report.longrepr).partition("\n")[0])
            if not gpu_timing.device_works():
                pytest.exit("the GPU answers no more in this process", returncode=DEVICE_LOST)
        elif report.skipped:
            self._keep(report.nodeid, SKIPPED)
        elif report.when == "call":
            self._keep(report.nodeid, PASSED)

    def _keep(self, nodeid: str, outcome: str, reason: str = "") -> None:
        seconds = round(time.monotonic() - self.started, 1)
        row = gpu_rows.Step(**vars(self.facts), step=nodeid, outcome=outcome, seconds=seconds, reason=reason)
        gpu_rows.append(self.path, [row], gpu_rows.Step)
