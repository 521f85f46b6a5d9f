"""The whole benchmark at tiny sizes on the CPU, and processes of it that die."""

from __future__ import annotations

import csv
import dataclasses
import types

import jax
import matplotlib.image
import pytest


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

    @pytest.mark.parametrize("name", ["gpu.csv", "gpu_steps.csv", "gpu_bits.csv", "gpu_network.csv"])
    def test_resume_from_a_damaged_file_ends_before_anything_runs(self, rooms, on_gpu, tmp_path, name):
        arguments = ["--m", "1", "--runs", "1", "--output", str(tmp_path / "gpu.csv")]
        (tmp_path / name).write_text("some,other,columns\n")
        with pytest.raises(SystemExit, match=f"{name}` must have the columns date, commit"):
            rooms.gpu.main([*arguments, "--resume"])
        assert on_gpu.calls == []

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
