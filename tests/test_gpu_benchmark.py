"""The benchmark of the GPU kernels without a GPU: tiny shapes on the CPU, checks with programs of the test's own."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import os
import signal
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

import pbjax
from pallas_kernels import device_time
from pallas_kernels.bit_matmul import mosaic, triton

FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"
NAMES = ("baselines", "bits", "checks", "network", "products", "rows", "shapes", "summary", "timing", "worker")
ROOMS = ("gpu", *(f"gpu_{name}" for name in NAMES))


@pytest.fixture
def rooms(monkeypatch):
    """The modules of the benchmark."""
    monkeypatch.syspath_prepend(FOLDER)
    return types.SimpleNamespace(**{name: importlib.import_module(name) for name in (*ROOMS, "facts")})


@pytest.fixture
def on_gpu(rooms, monkeypatch):
    """The benchmark believes in a GPU; its checks pass, what it times is little, and is timed in this process."""
    found = rooms.facts.Facts(
        date="2026-01-01", commit="abc", code="123", device="NVIDIA Test", jax="1", jaxlib="1", platform_version="1"
    )
    monkeypatch.setattr(rooms.facts, "facts_of_gpu", lambda: found)
    monkeypatch.setattr(rooms.gpu, "SIZES", ((64, 16),))
    make_calls = rooms.gpu_timing.make_calls

    def few_calls(m, k, n, *, copies, refused):
        calls = make_calls(m, k, n, copies=2, refused=refused)
        kept = [method for method in calls if method.backend == "xla" or method.bitlayers == 1]
        return {method: calls[method] for method in kept if method.bitlayers in (None, 1)}

    monkeypatch.setattr(rooms.gpu_timing, "make_calls", few_calls)
    passed = rooms.gpu_checks.Outcome(outcome="passed", seconds=1)
    calls = []
    monkeypatch.setattr(rooms.gpu_checks, "check_bits", lambda *args: calls.append("bits") or passed)
    monkeypatch.setattr(
        rooms.gpu_checks, "sanitize", lambda seconds, names: calls.extend(names) or dict.fromkeys(names, passed)
    )
    monkeypatch.setattr(rooms.gpu_network, "measure", lambda facts, **sizes: calls.append("network") or iter(()))

    def events(run, job):
        told = []
        try:
            rooms.gpu_shapes.run(job, told.append)
        except Exception as error:
            yield from told
            raise rooms.gpu_worker.Died("it ended with status 1") from error
        yield from told

    monkeypatch.setattr(rooms.gpu, "_events", events)
    return types.SimpleNamespace(facts=found, calls=calls)


class TestWhole:
    def test_rows_plot_and_summary(self, rooms, tmp_path, capsys):
        output = tmp_path / "new" / "gpu.csv"
        arguments = ["--smoke", "--runs", "2", "--bandwidth", "1e12", "--output", str(output)]
        rows = rooms.gpu.main(arguments)
        assert rooms.gpu_rows.read(output, rooms.gpu_rows.Row) == rows
        lines = list(csv.DictReader(output.read_text().splitlines()))
        assert list(lines[0]) == [field.name for field in dataclasses.fields(rooms.gpu_rows.Row)]
        # six kinds of XLA's in three ways; 8 numbers of bitlayers and a sweep at three widths; cold and warm
        assert len(lines) == len(rows) == 2 * (6 * 3 + 3 * 9)
        assert {row.l2 for row in rows} == {"cold", "warm"}
        assert {(row.clock, row.kernels, row.kernels_us) for row in rows} == {("host", 0, None)}  # no kernels here
        for l2 in ("cold", "warm"):
            assert max(row.speedup_over_bf16 for row in rows if (row.method, row.l2) == ("bf16", l2)) == 1
        for row in rows:
            assert row.us == row.host_us > 0
            assert row.fraction_of_limit == pytest.approx(row.bytes / 1e6 / row.us, rel=0.01, abs=1e-4)
        assert matplotlib.image.imread(output.with_suffix(".png")).ndim == 3
        printed = capsys.readouterr().err
        assert "64 x 16" in printed
        assert "gaps included" in printed
        assert "kernels only" not in printed  # no device told any
        network = list(csv.DictReader((tmp_path / "new" / "gpu_network.csv").read_text().splitlines()))
        assert [line["method"] for line in network] == ["f32"] * 3 + ["bf16"] * 3 + ["bitlayers"] * 6
        assert {line["graphs"] for line in network} == {"as XLA decides", "everything", "nothing"}
        assert all(float(line["latency_us"]) > 0 and line["us"] == "" for line in network)

    def test_resume_repeats_nothing(self, rooms, on_gpu, tmp_path, monkeypatch):
        output = tmp_path / "gpu.csv"
        arguments = ["--m", "1", "--runs", "1", "--output", str(output)]
        rows = rooms.gpu.main(arguments)
        assert on_gpu.calls == ["bits", "memcheck", "racecheck", "initcheck", "network"]
        assert rooms.gpu.main([*arguments, "--resume"]) == rows
        assert len(on_gpu.calls) == 5
        # Other code: nothing of it is done yet, and the rows before it are kept, but not in its summary.
        other = dataclasses.replace(on_gpu.facts, code="456")
        monkeypatch.setattr(rooms.facts, "facts_of_gpu", lambda: other)
        again = rooms.gpu.main([*arguments, "--resume"])
        assert len(on_gpu.calls) == 10
        assert {row.code for row in again} == {"456"}
        assert rooms.gpu_rows.read(output, rooms.gpu_rows.Row) == rows + again
        rooms.gpu.main(arguments)  # from the beginning
        assert len(on_gpu.calls) == 15
        assert {row.code for row in rooms.gpu_rows.read(output, rooms.gpu_rows.Row)} == {"456"}

    def test_resume_repeats_what_did_not_pass(self, rooms, on_gpu, tmp_path, monkeypatch, capsys):
        late = rooms.gpu_checks.Outcome(outcome="out of time", seconds=9, text="done: 7 products\n")
        sanitize = rooms.gpu_checks.sanitize
        monkeypatch.setattr(
            rooms.gpu_checks, "sanitize", lambda s, names: sanitize(s, names) | dict(racecheck=late) if names else {}
        )
        arguments = ["--m", "1", "--minutes", "0", "--output", str(tmp_path / "gpu.csv")]
        assert rooms.gpu.main(arguments) == []
        assert "done: 7 products" in capsys.readouterr().err
        rooms.gpu.main([*arguments, "--resume"])
        # No time was left for the network either.
        assert on_gpu.calls == ["bits", "memcheck", "racecheck", "initcheck", "racecheck"]

    def test_a_finding_is_told_at_the_end(self, rooms, on_gpu, tmp_path, monkeypatch):
        found = rooms.gpu_checks.Outcome(outcome="failed", seconds=9, text="========= Invalid __global__ read\n")
        monkeypatch.setattr(rooms.gpu_checks, "sanitize", lambda seconds, names: dict(memcheck=found))
        with pytest.raises(SystemExit, match=r"memcheck found something"):
            rooms.gpu.main(["--m", "1", "--runs", "1", "--output", str(tmp_path / "gpu.csv")])
        assert len(rooms.gpu_rows.read(tmp_path / "gpu.csv", rooms.gpu_rows.Row)) == 2 * (6 + 3)

    def test_a_network_that_does_not_run_costs_its_own_times_only(self, rooms, on_gpu, tmp_path, monkeypatch):
        def measure(facts, **sizes):
            raise jax.errors.JaxRuntimeError("INTERNAL: no such kernel")

        monkeypatch.setattr(rooms.gpu_network, "measure", measure)
        with pytest.raises(SystemExit, match=r"network does not run on \w+: INTERNAL: no such kernel"):
            rooms.gpu.main(["--m", "1", "--runs", "1", "--output", str(tmp_path / "gpu.csv")])
        assert len(rooms.gpu_rows.read(tmp_path / "gpu.csv", rooms.gpu_rows.Row)) == 2 * (6 + 3)

    def test_a_backend_of_wrong_bits_is_not_timed(self, rooms, on_gpu, tmp_path, monkeypatch, capsys):
        failed = ("tests/test_gpu.py::test_fixed_point_is_exact[w1a8-mosaic]",)
        wrong = rooms.gpu_checks.Outcome(outcome="failed", seconds=9, text="1 failed\n", failed=failed)
        monkeypatch.setattr(rooms.gpu_checks, "check_bits", lambda *args: wrong)
        jobs, events = [], rooms.gpu._events
        monkeypatch.setattr(rooms.gpu, "_events", lambda run, job: jobs.append(job) or events(run, job))
        with pytest.raises(SystemExit, match=r"^1 tests of bits failed: mosaic was not timed$"):
            rooms.gpu.main(["--m", "1", "--runs", "1", "--output", str(tmp_path / "gpu.csv")])
        assert [job.refused for job in jobs] == [["mosaic"]]
        assert len(rooms.gpu_rows.read(tmp_path / "gpu.csv", rooms.gpu_rows.Row)) == 2 * (6 + 3)

    @pytest.mark.parametrize("tests", [("test_a[mosaic]", "test_b[triton]"), ("test_a",)])
    def test_nothing_is_timed_without_a_backend_of_right_bits(self, rooms, on_gpu, tmp_path, monkeypatch, tests):
        wrong = rooms.gpu_checks.Outcome(outcome="failed", seconds=9, failed=tests)
        monkeypatch.setattr(rooms.gpu_checks, "check_bits", lambda *args: wrong)
        with pytest.raises(SystemExit, match=r"did not pass or did not run: nothing was timed"):
            rooms.gpu.main(["--output", str(tmp_path / "gpu.csv")])
        assert not (tmp_path / "gpu.csv").exists()

    def test_refuses_without_a_gpu(self, rooms, monkeypatch, tmp_path):
        monkeypatch.setattr(rooms.facts, "facts_of_gpu", lambda: None)
        with pytest.raises(SystemExit, match=r"needs an NVIDIA GPU that JAX can use, and found none"):
            rooms.gpu.main(["--output", str(tmp_path / "gpu.csv")])

    def test_stops_in_time(self, rooms, tmp_path, capsys):
        arguments = ["--smoke", "--no-check", "--minutes", "0", "--output", str(tmp_path / "gpu.csv")]
        assert rooms.gpu.main(arguments) == []
        assert "not measured within 0 minutes: m=1 64x16" in capsys.readouterr().err

    def test_refuses_more_calls_than_can_wait(self, rooms, capsys):
        with pytest.raises(SystemExit):
            rooms.gpu.main(["--runs", "32"])
        assert "must be in 1..31, as many as can wait for a GPU, but got 32" in capsys.readouterr().err


class TestLosses:
    """Processes that die while they time: what that costs."""

    @pytest.fixture
    def lose(self, rooms, on_gpu, tmp_path, monkeypatch):
        """Runs three shapes with a worker that dies where the test says; returns the steps each job did."""
        monkeypatch.setattr(rooms.gpu, "SIZES", ((64, 16),))

        def run(dies, *more):
            jobs = []

            def events(run, job):
                jobs.append(job)
                for step in [*(["network"] * bool(job.network_output)), *(f"m={m} {k}x{n}" for m, k, n in job.shapes)]:
                    yield dict(event="begin", step=step)
                    yield from dies(step, job, rooms.gpu_worker.Died)
                    yield dict(event="done", step=step)

            monkeypatch.setattr(rooms.gpu, "_events", events)
            arguments = ["--m", "1", "8", "64", "--output", str(tmp_path / "gpu.csv"), *more]
            try:
                rooms.gpu.main(arguments)
            except SystemExit as error:
                told = str(error)
            else:
                told = ""
            steps = rooms.gpu_rows.read(tmp_path / "gpu_steps.csv", rooms.gpu_rows.Step)
            notes = [(s.step, s.outcome, s.reason) for s in steps if s.step not in ("bits", *rooms.gpu_checks.TOOLS)]
            return jobs, notes, told

        return run

    def test_a_shape_without_a_name_for_what_crashed_is_given_up(self, lose):
        def dies(step, job, died):
            if step == "m=8 64x16":
                yield dict(event="trying", step=step, kind=None)
                raise died("it ended with signal SIGSEGV")

        jobs, notes, told = lose(dies)
        assert [job.shapes for job in jobs] == [[(1, 64, 16), (8, 64, 16), (64, 64, 16)], [(64, 64, 16)]]
        assert notes == [("network", "passed", ""), ("m=8 64x16", "failed", "it ended with signal SIGSEGV")]
        assert told == "m=8 64x16: it ended with signal SIGSEGV"

    def test_what_crashed_by_name_is_left_out_of_its_shape(self, lose):
        kind = "bitlayers A=8 mosaic"

        def dies(step, job, died):
            if step == "m=8 64x16" and kind not in job.without.get(step, ()):
                yield dict(event="trying", step=step, kind=kind)
                raise died("it ended with status 1")

        jobs, _, told = lose(dies)
        assert [len(job.shapes) for job in jobs] == [3, 2]  # the shape again, without it
        assert jobs[1].without == {"m=8 64x16": [kind]}
        assert told == f"m=8 64x16: it ended with status 1 during {kind}"

    def test_what_crashes_everywhere_is_left_out_of_all(self, lose):
        kind = "sweep A=16 mosaic"

        def dies(step, job, died):
            left_out = [*job.without.get(step, ()), *job.without.get("", ())]
            if step != "network" and kind not in left_out:
                yield dict(event="trying", step=step, kind=kind)
                raise died("it told nothing for 120 s")

        jobs, _, told = lose(dies)
        assert [len(job.shapes) for job in jobs] == [3, 3, 2, 1]
        assert jobs[-1].without[""] == [kind]
        assert told.count(kind) == 3

    def test_a_network_that_crashes_costs_itself(self, lose):
        def dies(step, job, died):
            if step == "network":
                raise died("it ended with signal SIGABRT")
            yield from ()

        jobs, notes, told = lose(dies)
        assert [(bool(job.network_output), len(job.shapes)) for job in jobs] == [(True, 3), (False, 3)]
        assert notes == [("network", "failed", "it ended with signal SIGABRT")]
        assert told == "network: it ended with signal SIGABRT"

    def test_a_process_that_does_not_come_to_a_step_ends_it(self, rooms, on_gpu, tmp_path, monkeypatch):
        def events(run, job):
            raise rooms.gpu_worker.Died("it ended with status 1")
            yield

        monkeypatch.setattr(rooms.gpu, "_events", events)
        with pytest.raises(SystemExit, match=r"^nothing was timed any more: it ended with status 1$"):
            rooms.gpu.main(["--output", str(tmp_path / "gpu.csv")])

    def test_what_runs_when_the_time_is_over_is_said(self, rooms, lose, monkeypatch, capsys):
        clock = types.SimpleNamespace(now=0.0)
        monkeypatch.setattr(rooms.gpu.time, "monotonic", lambda: clock.now)

        def dies(step, job, died):
            if step == "m=8 64x16":
                clock.now = 900.0
                raise died("the time is over")
            yield from ()

        jobs, notes, told = lose(dies)
        assert len(jobs) == 1
        assert notes[-1] == ("m=8 64x16", "out of time", "the time is over")
        assert told == ""  # no fault
        assert "not measured within 15 minutes: m=8 64x16, m=64 64x16" in capsys.readouterr().err


class TestShapes:
    """The process that times, in this one."""

    @pytest.fixture
    def job(self, rooms, on_gpu, tmp_path):
        return rooms.gpu_shapes.Job(
            facts=dataclasses.asdict(on_gpu.facts),
            output=str(tmp_path / "gpu.csv"),
            network_output=None,
            network_seconds=1e9,
            network_sizes={},
            shapes=[(1, 64, 16), (2, 64, 16)],
            refused=[],
            without={},
            runs=1,
            copies=2,
            bandwidth=None,
        )

    def test_is_json(self, rooms, job):
        assert rooms.gpu_shapes.Job(**json.loads(json.dumps(dataclasses.asdict(job)))).refused == []

    def test_a_fault_after_which_the_device_is_lost_has_a_name(self, rooms, job, monkeypatch):
        make_calls, told = rooms.gpu_timing.make_calls, []

        class Broken:
            def lower(self, *operands):
                return self

            def compile(self):
                return self

            def __call__(self, *operands):
                monkeypatch.setattr(rooms.gpu_timing, "device_works", lambda: False)
                raise jax.errors.JaxRuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

        def with_a_broken_one(m, k, n, **options):
            calls = make_calls(m, k, n, **options)
            return {
                method: dataclasses.replace(call, program=Broken()) if method.activation_bits == 8 and m == 2 else call
                for method, call in calls.items()
            }

        monkeypatch.setattr(rooms.gpu_timing, "make_calls", with_a_broken_one)
        with pytest.raises(rooms.gpu_timing.DeviceLost, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
            rooms.gpu_shapes.run(job, told.append)
        kind = told[-1]["kind"]
        assert told[-1] == dict(event="trying", step="m=2 64x16", kind=kind)
        assert kind.startswith("bitlayers A=8 ")
        # The shape before it is on the disk.
        assert {row.m for row in rooms.gpu_rows.read(Path(job.output), rooms.gpu_rows.Row)} == {1}
        # Another process leaves that kind out, and has the rest.
        monkeypatch.setattr(rooms.gpu_timing, "device_works", lambda: True)
        again = dataclasses.replace(job, shapes=job.shapes[1:], without={"m=2 64x16": [kind]})
        rooms.gpu_shapes.run(again, told.append)
        assert told[-1] == dict(event="done", step="m=2 64x16")
        rows = [row for row in rooms.gpu_rows.read(Path(job.output), rooms.gpu_rows.Row) if row.m == 2]
        assert {row.activation_bits for row in rows if row.method == "bitlayers"} == {16, None}

    def test_a_network_goes_on_where_it_ended(self, rooms, job, tmp_path, monkeypatch):
        row = rooms.gpu_network.Row(
            **job.facts, method="f32", bitlayers=None, backend="dot", graphs="nothing", kernels=0, us=None,
            kernels_us=None, latency_us=1.0, queued_us=1.0,
        )  # fmt: skip
        told, seen = [], []

        def measure(facts, *, backend, done, **sizes):
            seen.append(done)
            yield row
            yield dataclasses.replace(row, method="bf16")

        monkeypatch.setattr(rooms.gpu_network, "measure", measure)
        job = dataclasses.replace(job, shapes=[], network_output=str(tmp_path / "network.csv"))
        rooms.gpu_shapes.run(dataclasses.replace(job, network_seconds=-1), told.append)
        assert [event["event"] for event in told] == ["begin", "row", "late"]
        rooms.gpu_shapes.run(job, told.append)
        assert seen == [set(), {("f32", None, "nothing")}]
        assert told[-1]["event"] == "done"

    def test_a_program_that_does_not_lower_costs_its_own_rows(self, rooms):
        calls = rooms.gpu_timing.make_calls(1, 64, 16, copies=2)

        class Refused:
            def lower(self, *operands):
                raise NotImplementedError("no such operation on this GPU")

        refused, kept = Refused(), {}
        for method, call in list(calls.items())[-12:]:  # three at 16 bits are of one program, and nine of floats
            kept[method] = dataclasses.replace(call, program=refused) if method.bitlayers in (1, 2) else call
        runs, reasons = rooms.gpu_timing.compile_all(kept)
        assert set(runs) | set(reasons) == set(kept)
        assert "NotImplementedError: no such operation on this GPU" in reasons.values()


class TestWorker:
    """A real process, of a few lines of Python."""

    @pytest.fixture
    def run(self, rooms, tmp_path):
        def start(body, *, seconds=60.0, patience=60.0):
            program = tmp_path / "program.py"
            program.write_text(f"import gpu_worker, json, os, sys, time\njob = json.load(sys.stdin)\n{body}")
            env = {**os.environ, "PYTHONPATH": str(FOLDER)}
            deadline = time.monotonic() + seconds
            return rooms.gpu_worker.run(
                [sys.executable, str(program)], dict(words=["a", None]), deadline=deadline, patience=patience, env=env
            )

        return start

    def test_events_and_other_output(self, run, capsys):
        body = "print('a message of a library')\ngpu_worker.tell(dict(event='begin', job=job))"
        assert list(run(body)) == [dict(event="begin", job=dict(words=["a", None]))]
        assert capsys.readouterr().err == "a message of a library\n"

    @pytest.mark.parametrize(
        ("end", "how"), [("sys.exit(3)", "status 3"), ("os.abort()", "signal SIGABRT"), ("1 / 0", "status 1")]
    )
    def test_a_crash_is_told_after_what_came_before_it(self, rooms, run, end, how):
        events = run(f"gpu_worker.tell(dict(event='begin'))\n{end}")
        assert next(events) == dict(event="begin")
        with pytest.raises(rooms.gpu_worker.Died, match=f"^it ended with {how}$"):
            next(events)

    def test_silence_ends_it(self, rooms, run):
        events = run("gpu_worker.tell(dict(pid=os.getpid()))\ntime.sleep(1000)", patience=3)
        pid = next(events)["pid"]
        with pytest.raises(rooms.gpu_worker.Died, match=r"^it told nothing for 3 s$"):
            next(events)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)

    def test_its_time_ends_it(self, rooms, run):
        body = "while True:\n    gpu_worker.tell(dict(event='row'))\n    time.sleep(0.1)"
        with pytest.raises(rooms.gpu_worker.Died, match=r"^the time is over$"):
            list(run(body, seconds=3))


class TestFiles:
    @pytest.fixture
    def step(self, rooms, on_gpu):
        return lambda name: rooms.gpu_rows.Step(
            **dataclasses.asdict(on_gpu.facts), step=name, outcome="passed", seconds=1.5
        )

    def test_a_line_in_part_is_left_out_and_said(self, rooms, step, tmp_path, capsys):
        path, rows = tmp_path / "steps.csv", [step("one"), step("two")]
        rooms.gpu_rows.append(path, rows, rooms.gpu_rows.Step)
        whole = path.read_bytes()
        second = whole.index(b"\n", whole.index(b"\n") + 1) + 1
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            header = whole.index(b"\n") + 1
            expected = [] if size < second else rows[:1]
            assert rooms.gpu_rows.read(path, rooms.gpu_rows.Step) == expected, size
            incomplete = size not in (0, header, second)
            assert ("the last line is not complete" in capsys.readouterr().err) == incomplete, size
            rooms.gpu_rows.append(path, [step("three")], rooms.gpu_rows.Step)  # goes on behind what is whole
            assert rooms.gpu_rows.read(path, rooms.gpu_rows.Step) == [*expected, step("three")]
            capsys.readouterr()

    def test_a_writer_that_fails_leaves_the_file_as_it_was(self, rooms, step, tmp_path, monkeypatch):
        path = tmp_path / "steps.csv"
        rooms.gpu_rows.append(path, [step("one")], rooms.gpu_rows.Step)

        def fsync(number):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(rooms.gpu_rows.os, "fsync", fsync)
        with pytest.raises(OSError, match="No space"):
            rooms.gpu_rows.append(path, [step("two")], rooms.gpu_rows.Step)
        assert rooms.gpu_rows.read(path, rooms.gpu_rows.Step) == [step("one")]
        assert list(tmp_path.iterdir()) == [path]


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


class TestFacts:
    def test_gpu_is_asked_for_in_a_process_of_its_own(self, rooms):
        assert (rooms.facts.facts_of_gpu() is not None) == (jax.default_backend() == "gpu")

    def test_the_same_run_is_that_of_the_same_code(self, rooms):
        facts = rooms.facts.facts_of(jax.devices()[0])
        assert len(facts.code) == 12
        assert rooms.facts.same_run(facts, dataclasses.replace(facts, date="2020-01-01", commit="other"))
        for name in ("code", "device", "jax", "jaxlib", "platform_version"):
            assert not rooms.facts.same_run(facts, dataclasses.replace(facts, **{name: "other"}))


class TestTiming:
    def test_bytes_are_those_of_each_dtype(self, rooms):
        m, k, n = 3, 64, 16
        calls = rooms.gpu_timing.make_calls(m, k, n, copies=2)
        moved = {}
        for method, call in calls.items():
            if method.backend != "cublas":
                moved[method.name, method.activation_bits, method.bitlayers] = call.bytes
        assert moved["f32_highest", None, None] == moved["f32_default", None, None] == 4 * (m * k + k * n + m * n)
        assert moved["bf16", None, None] == 2 * (m * k + k * n + m * n)
        assert moved["int8", None, None] == 4 * m * k + k * n + 4 * n + 4 * m * n
        assert moved["int8_weights", None, None] == 2 * m * k + k * n + 4 * n + 2 * m * n
        assert moved["int4_weights", None, None] == 2 * m * k + k * n // 2 + 4 * n + 2 * m * n
        for used in range(1, 9):
            assert moved["bitlayers", 16, used] == 4 * m * k + used * k * n // 8 + 4 * n + 4 * m * n
            assert moved["bitlayers", None, used] == 2 * m * k + used * k * n // 8 + 4 * n + 4 * m * n
        assert moved["sweep", 8, 8] == 4 * m * k + 8 * (k * n // 8) + 4 * 4 * n + 8 * 4 * m * n

    @pytest.mark.parametrize("m", [1, 3])
    def test_baselines_are_products(self, rooms, m):
        x_key, w_key = jax.random.split(jax.random.key(0))
        x, w = jax.random.normal(x_key, (m, 64)), jax.random.normal(w_key, (64, 16))
        exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
        # A step of the coarser operand, half of it at most per factor, of random signs: well above what rounding adds.
        bound = {"f32_highest": 1e-5, "f32_default": 1e-2, "bf16": 0.1, "int8": 0.4, "int8_weights": 0.4}
        bound["int4_weights"] = 8
        ways = list(rooms.gpu_baselines.all_of(x, w))
        assert {way.name for way in ways} == set(bound) == set(rooms.gpu_baselines.NAMES)
        assert len(ways) == 6 * (3 if m == 1 else 2)
        for way in ways:
            y = jax.jit(way.fn)(way.rows, way.weight, *way.rest)
            assert y.shape == (m, 16)
            assert np.abs(np.asarray(y, np.float64) - exact).max() < bound[way.name], way.name
        stored = {way.name: way.weight.dtype for way in ways}
        assert stored["int8"] == stored["int8_weights"] == jnp.int8
        assert stored["int4_weights"] == jnp.int4

    def test_what_does_not_run_costs_its_own_row_only(self, rooms, monkeypatch):
        calls = rooms.gpu_timing.make_calls(1, 64, 16, copies=2)
        broken = next(method for method in calls if method.name == "int8")

        class Broken:
            def lower(self, *operands):
                return self

            def compile(self):
                raise jax.errors.JaxRuntimeError("INTERNAL: no such product")

        calls[broken] = dataclasses.replace(calls[broken], program=Broken())
        runs, reasons = rooms.gpu_timing.compile_all(calls)
        assert reasons == {broken: "INTERNAL: no such product"}
        assert set(runs) == set(calls) - {broken}


def measured(span_us=None, kernels_us=None, host_us=100.0):
    device = None
    if span_us is not None:
        device = device_time.Times(
            span_us=span_us, p20_us=span_us, p80_us=span_us, kernels_us=kernels_us, idle_us=1.0, kernels=2
        )
    return device_time.Measured(device=device, host_us=host_us, runs=3)


class TestRatios:
    @pytest.fixture
    def rows(self, rooms, on_gpu):
        """Rows by name of what took these times."""

        def make(**times):
            methods = {
                rooms.gpu_timing.Method(name=name.split("__")[0], backend=name): taken for name, taken in times.items()
            }
            calls = {method: types.SimpleNamespace(bytes=4000) for method in methods}
            by_l2 = {(method, "cold"): taken for method, taken in methods.items()}
            found = rooms.gpu_rows.rows_of_shape(on_gpu.facts, (1, 2, 3), calls, by_l2, bandwidth=1e9)
            return {row.backend: row for row in found}

        return make

    def test_are_of_spans_and_of_kernels_apart(self, rows):
        """A product of two kernels whose gap is as long as they are: no faster than a product of one."""
        found = rows(bf16=measured(20, 20), bitlayers=measured(20, 10))
        row = found["bitlayers"]
        assert (row.us, row.kernels_us, row.clock) == (20, 10, "device")
        assert (row.speedup_over_bf16, row.kernels_speedup_over_bf16) == (1, 2)
        assert (row.fraction_of_limit, row.kernels_fraction_of_limit) == (0.2, 0.4)

    def test_are_over_the_fastest_variant(self, rows):
        found = rows(bf16__xla=measured(30, 10), bf16__cublas=measured(20, 20), bitlayers=measured(5, 5))
        row = found["bitlayers"]
        assert (row.speedup_over_bf16, row.kernels_speedup_over_bf16) == (4, 2)
        assert found["bf16__xla"].speedup_over_bf16 == pytest.approx(2 / 3, abs=1e-3)

    def test_are_of_one_clock(self, rows):
        """The host's clock does not stand in for the device's, in either place."""
        found = rows(bf16=measured(host_us=50.0), bitlayers=measured(10, 10, host_us=100.0))
        assert found["bitlayers"].speedup_over_bf16 is None
        assert found["bf16"].speedup_over_bf16 == 1
        found = rows(bf16=measured(10, 10, host_us=50.0), bitlayers=measured(host_us=100.0))
        row = found["bitlayers"]
        assert (row.clock, row.us, row.speedup_over_bf16) == ("host", 100, 0.5)
        assert (row.kernels_us, row.kernels_speedup_over_bf16) == (None, None)

    def test_in_the_summary(self, rooms, rows, capsys):
        found = rows(
            bf16=measured(20, 20), f32_default=measured(40, 40), f32_highest=measured(), bitlayers=measured(10, 5)
        )
        cell = rooms.gpu_summary._cell
        assert cell(found["bitlayers"], "speedup_over_bf16", "fraction_of_limit") == "2.00 40%"
        assert cell(found["bitlayers"], "kernels_speedup_over_bf16", "kernels_fraction_of_limit") == "4.00 80%"
        assert cell(found["f32_highest"], "speedup_over_bf16", None) == "1.00h"
        assert cell(None, "speedup_over_bf16", None) == ""
        assert len(list(rooms.gpu_summary.tables(list(found.values())))) == 2

    def test_what_is_asked_and_what_was_measured(self, rooms, on_gpu):
        """The worst of all rows counts; of the host's clock, small weights and a warm cache none do."""
        method, times_of = rooms.gpu_timing.Method, device_time.Times

        def make(shape, bf16_us, times, bandwidth=1e12):
            taken = {
                method(name=name, bitlayers=used, activation_bits=width, backend="b"): us
                for (name, used, width), us in {("bf16", None, None): bf16_us, **times}.items()
            }
            found = {
                (key, "cold"): device_time.Measured(
                    device=times_of(span_us=us, p20_us=us, p80_us=us, kernels_us=us, idle_us=0.0, kernels=1),
                    host_us=us,
                    runs=1,
                )
                for key, us in taken.items()
            }
            calls = {key: types.SimpleNamespace(bytes=int(8e7)) for key in taken}  # 80 us at this bandwidth
            return rooms.gpu_rows.rows_of_shape(on_gpu.facts, shape, calls, found, bandwidth=bandwidth)

        large, small = (1, 8192, 8192), (1, 4096, 4096)
        rows = make(
            large,
            400.0,
            {("bitlayers", 4, 8): 100.0, ("bitlayers", 8, 8): 160.0, ("sweep", 8, 8): 200.0, ("bitlayers", 2, 8): 81.0},
        )
        rows += make(small, 1.0, {("bitlayers", 4, 8): 1000.0})
        rows += make((64, 8192, 8192), 100.0, {("bitlayers", 8, None): 105.0, ("bitlayers", 8, 16): 160.0})
        table = rooms.gpu_summary.targets(rows)
        cells = list(zip(*(column.cells for column in table.columns), strict=True))
        assert [(text, value, reached) for text, _, value, _, reached in cells] == [
            ("1 row: fraction of the memory limit", "0.50", "no"),
            ("1 row, 4 bitlayers: speed over bf16", "4.00", "yes"),
            ("1 row, 2 bitlayers: speed over bf16", "4.94", "no"),
            ("64 rows or more, floats: time over bf16", "1.05", "yes"),
            ("64 rows or more, 16 bits: time over bf16", "1.60", "no"),
            ("1 row: time of b of 8 bitlayers, off b / 8 by", "1.02", "no"),
            ("1 row: time of a sweep over all bitlayers'", "1.25", "yes"),
        ]
        host = [dataclasses.replace(row, clock="host") for row in rows]
        assert rooms.gpu_summary.targets(host) is None

    def test_columns_of_another_version_are_refused(self, rooms, tmp_path):
        path = tmp_path / "old.csv"
        path.write_text("date,wall_us\n1,2\n")
        with pytest.raises(ValueError, match=r"must have the columns date, .*, but got \['date', 'wall_us'\]"):
            rooms.gpu_rows.read(path, rooms.gpu_rows.Row)


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


class TestProducts:
    def test_cover_what_kernels_can_do(self, rooms):
        products = rooms.gpu_products.PRODUCTS
        assert len(set(products)) == len(products)
        for width in (8, 16, None):
            some = [p for p in products if p.activation_bits == width]
            for condition in ("by_row", "sweep"):
                assert {getattr(p, condition) for p in some} == {True, False}, (width, condition)
            assert {p.m for p in some} >= {1, rooms.gpu_products.MANY}
        assert {p.bits for p in products} == {8, 16}
        assert {p.group_size for p in products if p.sweep} >= {64, 128}

    def test_reach_every_kernel(self, rooms):
        """Each with sweeps, rows of different numbers of bitlayers, groups and 16 bitlayers, but for what it cannot."""
        found = {}
        for p in rooms.gpu_products.PRODUCTS:
            problem = pbjax.Problem(
                m=p.m, k=1000, n=132, bits=p.bits, group_size=p.group_size, activation_bits=p.activation_bits
            )
            for module in (mosaic, triton):
                if module.unsupported(problem) is None:
                    kernel = type(module.config_for(problem)).__module__.rpartition(".")[2]
                    traits = dict(sweep=p.sweep, by_row=p.by_row, groups=p.group_size is not None, bits16=p.bits == 16)
                    found.setdefault(kernel, {"plain"}).update(name for name, has in traits.items() if has)
        everything = {"plain", "sweep", "by_row", "groups", "bits16"}
        assert found == {
            **dict.fromkeys(("_mosaic_kernel", "_triton_serial", "_triton_int8", "_triton_dot"), everything),
            "_triton_unpack": {"plain", "by_row", "bits16"},  # sweeps and groups go to others
        }

    def test_run(self, rooms, capsys):
        """Everything but the kernels: on the backend that is here."""
        products = [
            rooms.gpu_products.Product(m=3, activation_bits=8, by_row=True),
            rooms.gpu_products.Product(m=1, activation_bits=16, group_size=128, sweep=True),
            rooms.gpu_products.Product(m=3, activation_bits=None, bits=16, dtype="bfloat16"),
        ]
        assert rooms.gpu_products.run_all(products, ["xla"]) == 3
        assert capsys.readouterr().out.count("done: xla") == 3
