"""What comes before the times: bits, and tools that look for faults, here programs of the test's own."""

from __future__ import annotations

import os
import sys

import jax
import pytest

from tests.gpu_benchmark import FOLDER

TESTS_OF_BITS = """
import os, time, pytest
pytestmark = pytest.mark.gpu

def test_right(): pass
def test_wrong(): assert 1 == 2, "one is not two"
@pytest.mark.skipif(True, reason="not here")
def test_skipped(): pass
def test_crash(): {crash}
def test_after(): {after}
"""


class TestBits:
    """Step 1 with tests of the test's own, in real processes of pytest."""

    @pytest.fixture
    def check(self, rooms, on_gpu, tmp_path, monkeypatch):
        monkeypatch.undo()  # of `on_gpu`, which has no checks
        monkeypatch.syspath_prepend(FOLDER)
        root = tmp_path / "root"
        (root / "tests").mkdir(parents=True)
        (root / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmarkers = ['gpu']\n")
        monkeypatch.setattr(rooms.gpu_checks, "ROOT", root)
        monkeypatch.setattr(
            rooms.gpu_checks,
            "environment",
            lambda: {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(FOLDER), os.getcwd()])},
        )

        def run(seconds=200.0, patience=200.0, **bodies):
            (root / "tests" / "test_gpu.py").write_text(TESTS_OF_BITS.format(**bodies))
            progress = tmp_path / "bits.csv"
            done = rooms.gpu_checks.check_bits(seconds, on_gpu.facts, progress, patience=patience)
            rows = rooms.gpu_bits.outcomes(progress, on_gpu.facts)
            return done, {name.rpartition("::")[2]: (row.outcome, row.reason) for name, row in rows.items()}

        return run

    def test_a_crash_costs_its_test_and_resume_goes_on(self, check):
        done, tests = check(crash="os.abort()", after="pass")
        assert tests == {
            "test_right": ("passed", ""),
            "test_wrong": ("failed", "AssertionError: one is not two"),
            "test_skipped": ("skipped", ""),
            "test_crash": ("failed", "its process crashed (-6)"),
            "test_after": ("passed", ""),
        }
        assert done.outcome == "failed"
        assert done.text.startswith("2 tests passed, 2 failed\n")
        assert [name.rpartition("::")[2] for name in done.failed] == ["test_wrong", "test_crash"]
        # Again: only what failed.
        done, tests = check(crash="pass", after="assert False")
        assert tests["test_crash"] == ("passed", "")
        assert tests["test_after"] == ("passed", "")  # as before: it did not run
        assert tests["test_wrong"][0] == done.outcome == "failed"

    def test_a_test_that_does_not_end(self, check):
        done, tests = check(patience=8, crash="time.sleep(1000)", after="pass")
        assert tests["test_crash"] == ("failed", "it did not end within 8 s (hung)")
        assert tests["test_after"] == ("passed", "")
        assert done.outcome == "failed"

    def test_out_of_time(self, check, rooms):
        done, tests = check(seconds=9, crash="time.sleep(1000)", after="pass")
        assert tests["test_crash"][0] == "begun"  # no fault: it runs again
        assert [name.rpartition("::")[2] for name in done.failed] == ["test_wrong"]
        assert "test_after" not in tests


TOOL = """#!{python}
import sys, time
if "--help" in sys.argv:
    print("--tool --kernel-regex arg")
    sys.exit()
tool = sys.argv[sys.argv.index("--tool") + 1]
{body}
"""


class TestChecks:
    @pytest.fixture
    def sanitizer(self, rooms, tmp_path, monkeypatch):
        """A program that stands for compute-sanitizer."""

        def make(body):
            path = tmp_path / "compute-sanitizer"
            path.write_text(TOOL.format(python=sys.executable, body=body))
            path.chmod(0o755)
            monkeypatch.setattr(rooms.gpu_checks, "find_sanitizer", lambda: str(path))
            return rooms.gpu_checks

        return make

    def test_outcomes_of_tools(self, sanitizer):
        checks = sanitizer(
            """
if tool == "initcheck":
    print("Device not supported"); sys.exit(9)
print("the device answers", sys.argv[2:], flush=True)
sys.exit(dict(memcheck=0, racecheck=9)[tool])
"""
        )
        done = checks.sanitize(60)
        assert {tool: each.outcome for tool, each in done.items()} == {
            "memcheck": "passed",
            "racecheck": "failed",
            "initcheck": "not run",
        }
        assert "Device not supported" in done["initcheck"].text
        # Kernels of ours alone, by the name of the option that this version has.
        assert "'--kernel-regex', 'kernel_substring=bit_matmul'" in done["racecheck"].text

    def test_a_crash_is_a_finding(self, sanitizer):
        checks = sanitizer('print("the device answers", flush=True); sys.exit(1)')
        assert checks.sanitize(60, ["memcheck"])["memcheck"].outcome == "failed"

    def test_ends_with_its_time(self, sanitizer):
        checks = sanitizer('print("the device answers", flush=True); print("done: one", flush=True); time.sleep(100)')
        (done,) = checks.sanitize(2, ["memcheck"]).values()
        assert done.outcome == "out of time"
        assert "done: one" in done.text
        assert done.seconds < 30

    def test_not_installed(self, rooms, monkeypatch):
        monkeypatch.setattr(rooms.gpu_checks, "find_sanitizer", lambda: None)
        done = rooms.gpu_checks.sanitize(1)
        assert {each.outcome for each in done.values()} == {"not run"}
        assert "is not installed" in done["memcheck"].text

    def test_bits_without_a_gpu_are_skipped_tests(self, rooms, on_gpu, tmp_path, monkeypatch):
        """The command is right: pytest finds the file, and skips what is in it."""
        if jax.default_backend() == "gpu":
            pytest.skip("there is a GPU: its tests take minutes")
        monkeypatch.undo()  # of `on_gpu`, which has no checks
        monkeypatch.syspath_prepend(FOLDER)
        done = rooms.gpu_checks.check_bits(240, on_gpu.facts, tmp_path / "bits.csv")
        assert done.outcome == "passed"
        assert done.text == "0 tests passed, 0 failed\n"
        assert len(rooms.gpu_bits.outcomes(tmp_path / "bits.csv", on_gpu.facts)) >= 100
