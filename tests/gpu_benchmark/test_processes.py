"""The process that times, how it is watched, and the files that it leaves."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import pytest

from tests.gpu_benchmark import FOLDER


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

    @pytest.mark.parametrize(
        "line", [b"2026-01-01,abc\r\n", b"1,2,3,4,5,6,7,8,9,10,11,12\r\n", b"1,2,3,4,5,6,7,8,9,x,\r\n", b"\0\r\n"]
    )
    def test_a_damaged_line_has_a_number(self, rooms, step, tmp_path, line):
        path = tmp_path / "steps.csv"
        rooms.gpu_rows.append(path, [step("one")], rooms.gpu_rows.Step)
        path.write_bytes(path.read_bytes() + line)
        with pytest.raises(
            ValueError, match=r"steps.csv` must have a Step in each line, but line 3 is damaged. Remove"
        ):
            rooms.gpu_rows.read(path, rooms.gpu_rows.Step)

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
