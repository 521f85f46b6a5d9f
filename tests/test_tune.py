"""Launch parameters that are timed, stored and found again: with a timer of the test's own, and kernels interpreted."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pbjax
from pallas_kernels import device_time, tune, tuning_process
from pallas_kernels.bit_matmul import activations, mosaic, reference, triton, tuned
from pallas_kernels.tuning_process import Job, Tried
from tests import oracle

KIND = "NVIDIA Test 100 80GB"
PROBLEM = pbjax.Problem(m=3, k=70, n=5, bits=2, group_size=None, activation_bits=8)
SERIAL = triton.SerialConfig(block_n=128, block_rows=1, block_words=2, num_blocks=1, num_warps=1)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(tuned.ENVIRONMENT_VARIABLE, str(tmp_path))
    return tmp_path


def three_candidates():
    """Of both kernels; the first is the default."""
    found = triton.candidates(PROBLEM)
    assert found[0] == triton.config_for(PROBLEM)
    return [found[0], found[1], found[-1]]


def last_is_fastest():
    """A timer whose times fall from candidate to candidate; it runs what it is given, with any copy of the words."""
    falling = itertools.count(1000.0, -1.0)

    def timer(runs):
        for run in runs.values():
            for i in (0, 1, 1000):
                assert run(i).shape[-2:] == (PROBLEM.m, PROBLEM.n)
        return {config: next(falling) for config in runs}

    return timer


def here(job, **options):
    """`tuning_process.run`, but in this process."""
    options = dict(sweep=job.sweep, dtype=job.dtype, seconds=job.seconds, timer=last_is_fastest()) | options
    return tune.tune(job.backend, job.problem, **options)


JOB = Job(backend="triton", problem=PROBLEM)


@pytest.mark.parametrize("sweep", [False, True])
def test_fastest_is_stored_and_found(folder, sweep):
    candidates = three_candidates()
    config, best, default = tune.tune_and_store(
        dataclasses.replace(JOB, sweep=sweep), kind=KIND, run=here, candidates=candidates, interpret=True
    )
    assert config == candidates[-1]
    assert (default, best) == (1000, 998)
    assert tuned.find("triton", PROBLEM, triton.CONFIGS, kind=KIND, sweep=sweep) == config
    stored = json.loads((folder / "nvidia_test_100_80gb.json").read_text())
    assert stored["version"] == tuned.VERSION
    ((key, entry),) = stored["entries"].items()
    assert ("sweep=True" in key) == sweep
    assert entry["kernel"] == "int8"
    assert (entry["us"], entry["default_us"], entry["jax"]) == (best, default, jax.__version__)


def test_sweeps_are_found_by_themselves():
    """Where no sweep was measured, what was fastest for one product serves; never the other way round."""
    find = functools.partial(tuned.find, "triton", PROBLEM, triton.CONFIGS, kind=KIND)
    other = dataclasses.replace(SERIAL, num_warps=2)
    tuned.store("triton", PROBLEM, "serial", other, kind=KIND, facts={}, sweep=True)
    assert (find(), find(sweep=True)) == (None, other)
    tuned.store("triton", PROBLEM, "serial", SERIAL, kind=KIND, facts={})
    assert (find(), find(sweep=True)) == (SERIAL, other)


def test_a_sweep_of_the_users_product_does_not_hide_a_shipped_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped")
    other = dataclasses.replace(SERIAL, num_warps=2)
    tuned.store("triton", PROBLEM, "serial", SERIAL, kind=KIND, facts={})
    tuned.store("triton", PROBLEM, "serial", other, kind=KIND, facts={}, sweep=True, folder=tuned.SHIPPED)
    assert tuned.find("triton", PROBLEM, triton.CONFIGS, kind=KIND, sweep=True) == other


@pytest.mark.parametrize("width", [8, None])
def test_a_sweep_is_packed_and_run_with_its_own_configuration(monkeypatch, width):
    """Rows are packed for the kernel that takes them: one tuned for a product would have another order."""
    monkeypatch.setattr(tuned, "device_kind", lambda: KIND)
    problem = dataclasses.replace(PROBLEM, activation_bits=width, k=256)
    asked, find = [], tuned.find

    def spy(*args, sweep=False, **options):
        asked.append(sweep)
        return find(*args, sweep=sweep, **options)

    monkeypatch.setattr(tuned, "find", spy)
    x, words, scale, counts = tune._operands(problem, "float32", sweep=True)
    assert counts.shape == ()
    product = functools.partial(tune._product, triton, problem, True, None, dict(interpret=True))
    assert product(x, words, scale, counts).shape == (problem.bits, problem.m, problem.n)
    assert set(asked) == {True}


def test_found_by_device_backend_and_shape():
    tuned.store("triton", PROBLEM, "serial", SERIAL, kind=KIND, facts={})
    find = tuned.find
    rows_of_four = pbjax.Problem(m=4, k=70, n=5, bits=2, group_size=None, activation_bits=8)
    assert find("triton", rows_of_four, triton.CONFIGS, kind=KIND) == SERIAL  # rows are rounded up
    assert find("mosaic", PROBLEM, mosaic.CONFIGS, kind=KIND) is None
    assert find("triton", PROBLEM, triton.CONFIGS, kind="NVIDIA Other") is None
    assert find("triton", PROBLEM, triton.CONFIGS) is None  # there is no GPU here
    other = pbjax.Problem(m=5, k=70, n=5, bits=2, group_size=None, activation_bits=8)
    assert find("triton", other, triton.CONFIGS, kind=KIND) is None


def test_found_by_the_dtype_of_floats():
    """A product takes one part of bfloat16 and three of float32; fixed-point rows are codes, whatever they were."""
    floats = dataclasses.replace(PROBLEM, activation_bits=None)
    one, three = (dataclasses.replace(triton.config_for(floats), num_warps=warps) for warps in (4, 8))
    tuned.store("triton", floats, "dot", one, kind=KIND, facts={}, dtype="bfloat16")
    tuned.store("triton", floats, "dot", three, kind=KIND, facts={}, dtype=jnp.float32)
    find = functools.partial(tuned.find, "triton", configs=triton.CONFIGS, kind=KIND)
    assert find(floats, dtype=jnp.bfloat16) == one
    assert find(floats, dtype="float32") == three
    assert find(floats, dtype=jnp.float16) is None
    with pytest.raises(
        ValueError, match=r"`dtype` must be that of the float activations, but got None. Pass `x.dtype`"
    ):
        find(floats)
    tuned.store("triton", PROBLEM, "serial", SERIAL, kind=KIND, facts={}, dtype="float32")
    assert find(PROBLEM) == find(PROBLEM, dtype="int32") == SERIAL


def test_entries_are_kept_beside_each_other_and_replaced():
    one, two = (
        triton.SerialConfig(block_n=128, block_rows=1, block_words=words, num_blocks=1, num_warps=1) for words in (2, 4)
    )
    other = pbjax.Problem(m=1, k=70, n=5, bits=2, group_size=32, activation_bits=8)
    tuned.store("triton", PROBLEM, "serial", one, kind=KIND, facts={})
    tuned.store("triton", other, "serial", one, kind=KIND, facts={})
    tuned.store("triton", PROBLEM, "serial", two, kind=KIND, facts={})
    assert tuned.find("triton", PROBLEM, triton.CONFIGS, kind=KIND) == two
    assert tuned.find("triton", other, triton.CONFIGS, kind=KIND) == one


def test_processes_that_store_at_once_lose_nothing(folder):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=store_many, args=(n,)) for n in (1, 2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    (path,) = folder.iterdir()
    assert len(json.loads(path.read_text())["entries"]) == 2 * 30


def store_many(n):
    for k in range(1, 31):
        tuned.store("triton", dataclasses.replace(PROBLEM, n=n, k=k), "serial", SERIAL, kind=KIND, facts={})


def test_shipped_measurements_serve_where_the_user_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped")
    tuned.store("triton", PROBLEM, "serial", SERIAL, kind=KIND, facts={}, folder=tuned.SHIPPED)
    assert tuned.find("triton", PROBLEM, triton.CONFIGS, kind=KIND) == SERIAL


def test_shipped_files_can_be_read():
    for path in tuned.SHIPPED.glob("*.json"):
        stored = json.loads(path.read_text())
        assert stored["version"] == tuned.VERSION
        for entry in stored["entries"].values():
            assert {**triton.CONFIGS, **mosaic.CONFIGS}[entry["kernel"]](**entry["config"])


def test_product_takes_what_was_stored(monkeypatch):
    """A configuration that cannot be right is noticed, so it was used; and one that can gives the same bits."""
    monkeypatch.setattr(tuned, "device_kind", lambda: KIND)
    rng = np.random.default_rng(0)
    words = jnp.asarray(rng.integers(0, 2**32, (2, 3, 5), dtype=np.uint32))
    x = jnp.asarray(oracle.activation_codes(rng, 8, 3, 70))
    args = (x, words, jnp.ones((2, 1, 5), jnp.float32), jnp.full((3,), 2, jnp.int32))
    expected = triton.matmul(PROBLEM, *args, interpret=True)
    tuned.store("triton", PROBLEM, "serial", SERIAL, kind=KIND, facts={})
    np.testing.assert_array_equal(triton.matmul(PROBLEM, *args, interpret=True), expected)
    dot = triton.config_for(pbjax.Problem(m=3, k=70, n=5, bits=2, group_size=None, activation_bits=None))
    tuned.store("triton", PROBLEM, "dot", dot, kind=KIND, facts={})
    with pytest.raises(TypeError, match=r"`config` must be that of a kernel for fixed-point activations"):
        triton.matmul(PROBLEM, *args, interpret=True)


def test_entry_of_another_version(folder):
    path = folder / "nvidia_test_100_80gb.json"
    entries = {tuned.key("triton", PROBLEM): {"kernel": "serial", "config": {"gone": 1}}}
    path.write_text(json.dumps({"version": tuned.VERSION, "entries": entries}))
    with pytest.raises(
        ValueError, match=rf"`{re.escape(str(path))}` must hold configurations of this version, but got"
    ):
        tuned.find("triton", PROBLEM, triton.CONFIGS, kind=KIND)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "must hold JSON, but got"),
        (b"\xff", "must hold JSON, but got"),
        (b"[1]", f"must be of version {tuned.VERSION}, but got None"),
        (b'{"version": %d}' % tuned.VERSION, "must have a mapping of entries, but got None"),
        (b'{"version": %d, "entries": [1]}' % tuned.VERSION, r"must have a mapping of entries, but got \[1\]"),
    ],
)
def test_damaged_file(folder, text, message):
    path = folder / "nvidia_test_100_80gb.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=f"`{re.escape(str(path))}` {message}.*Delete .*, and tune again"):
        tuned.find("triton", PROBLEM, triton.CONFIGS, kind=KIND)


@pytest.mark.parametrize("value", ["128", 0, -1, 2.0, None, True])
def test_damaged_entry(folder, value):
    tuned.store("triton", PROBLEM, "serial", dataclasses.replace(SERIAL, block_n=value), kind=KIND, facts={})
    with pytest.raises(ValueError, match="must hold configurations of this version, but got"):
        tuned.find("triton", PROBLEM, triton.CONFIGS, kind=KIND)


def test_file_of_another_version(folder):
    path = folder / "nvidia_test_100_80gb.json"
    path.write_text(json.dumps({tuned.key("triton", PROBLEM): {"kernel": "serial", "config": {}}}))
    with pytest.raises(
        ValueError, match=rf"`{re.escape(str(path))}` must be of version {tuned.VERSION}, but got 1. Delete the file"
    ):
        tuned.find("triton", PROBLEM, triton.CONFIGS, kind=KIND)


def test_product_finds_floats_by_their_dtype(monkeypatch):
    monkeypatch.setattr(tuned, "device_kind", lambda: KIND)
    floats = dataclasses.replace(PROBLEM, activation_bits=None)
    words = jnp.zeros((2, 3, 5), jnp.uint32)
    args = (words, jnp.ones((2, 1, 5), jnp.float32), jnp.full((3,), 2, jnp.int32))
    # A configuration of the wrong kernel: where it is found, it is refused.
    tuned.store("triton", floats, "serial", SERIAL, kind=KIND, facts={}, dtype="bfloat16")
    triton.matmul(floats, jnp.ones((3, 70), jnp.float32), *args, interpret=True)
    with pytest.raises(TypeError, match=r"`config` must be that of a kernel for float activations"):
        triton.matmul(floats, jnp.ones((3, 70), jnp.bfloat16), *args, interpret=True)


def test_never_inside_a_trace():
    @jax.jit
    def traced(x):
        next(tune.tune("triton", PROBLEM, interpret=True))
        return x

    with pytest.raises(
        RuntimeError, match=r"`tune` must run outside of jit and other transformations, but got a trace"
    ):
        traced(jnp.ones(()))


def test_only_what_the_backend_can_run():
    float_problem = pbjax.Problem(m=3, k=70, n=5, bits=2, group_size=None, activation_bits=None)
    with pytest.raises(
        pbjax.Unsupported, match=r"backend 'mosaic' cannot run Problem\(.*1-bit tensor core takes fixed"
    ):
        next(tune.tune("mosaic", float_problem))


def test_candidates_of_other_results_are_an_error(monkeypatch):
    """Bits decide before times do."""
    wrong = iter((1.0, 2.0))
    monkeypatch.setitem(tune.BACKENDS, "triton", _Constant(lambda: next(wrong)))
    with pytest.raises(RuntimeError, match=r"gives other results than the first candidate"):
        list(tune.tune("triton", PROBLEM, timer=last_is_fastest()))


class _Constant:
    def __init__(self, value):
        self.value = value

    def unsupported(self, problem):
        return None

    def candidates(self, problem, dtype, *, sweep):
        return ["first", "second"]

    def quantize_rows(self, problem, x, *, sweep, config):
        return x, jnp.ones(problem.m), jnp.zeros(problem.m)

    def matmul(self, problem, *operands, config):
        return jnp.full((problem.m, problem.n), self.value())


@pytest.mark.parametrize("config", [triton.config_for(PROBLEM), SERIAL], ids=["codes", "packed"])
def test_what_is_timed_is_the_product_of_pbjax(config):
    """Rows of floats in, the result out; each call with another copy of the words, where there are copies."""
    seen = {}

    def timer(runs):
        seen.update(runs)
        return dict.fromkeys(runs, 1.0)

    list(tune.tune("triton", PROBLEM, timer=timer, candidates=[config], interpret=True))
    x, words, scale, counts = tune._operands(PROBLEM, "float32")
    assert x.dtype == jnp.float32
    codes, unit, _ = activations.quantize_rows(x, PROBLEM.activation_bits)
    expected = reference.matmul(PROBLEM, codes, words, scale, counts) * unit[:, None]
    for i in range(3):
        np.testing.assert_array_equal(seen[config](i), expected)


class _Faulty(_Constant):
    """A backend whose candidates are named for what happens to them, and take a minute each."""

    def __init__(self, *names, clock=None):
        self.names, self.clock = names, clock

    def candidates(self, problem, dtype, *, sweep):
        return self.names

    def matmul(self, problem, *operands, config):
        if config == "does not lower":
            raise NotImplementedError("no such operation\non this GPU")

        def run():
            if self.clock:
                self.clock.now += 60
            if config == "does not run":
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: shared memory")
            return np.ones((problem.m, problem.n), np.float32)

        # Raised where such an error is: when the compiled product runs.
        return jax.pure_callback(run, jax.ShapeDtypeStruct((problem.m, problem.n), jnp.float32))


class _Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_candidate_that_fails_has_a_reason_and_the_others_times(monkeypatch):
    names = ("default", "does not lower", "does not run", "is not told apart", "last")
    monkeypatch.setitem(tune.BACKENDS, "triton", _Faulty(*names))
    times = {"default": 3.0, "is not told apart": math.inf, "last": 2.0}
    found = dict(tune.tune("triton", PROBLEM, timer=lambda runs: {config: times[config] for config in runs}))
    assert list(found) == list(names)
    assert (found["default"], found["last"]) == (Tried(us=3.0), Tried(us=2.0))
    assert found["does not lower"] == Tried(reason="NotImplementedError: no such operation")
    assert found["does not run"].reason.startswith("JaxRuntimeError: ")
    assert found["is not told apart"].reason == "its kernels could not be told apart"


def test_a_timer_that_fails_costs_its_candidate(monkeypatch):
    def timer(runs):
        if "second" in runs:
            raise jax.errors.JaxRuntimeError("INTERNAL: profiler")
        return dict.fromkeys(runs, 1.0)

    monkeypatch.setitem(tune.BACKENDS, "triton", _Faulty("first", "second", "third"))
    found = dict(tune.tune("triton", PROBLEM, timer=timer))
    assert [tried.reason for tried in found.values()] == ["", "JaxRuntimeError: INTERNAL: profiler", ""]


def test_no_candidate_begins_when_the_time_is_over(monkeypatch):
    clock = _Clock()
    monkeypatch.setitem(tune.BACKENDS, "triton", _Faulty("first", "second", "third", "fourth", clock=clock))
    found = dict(tune.tune("triton", PROBLEM, timer=lambda runs: dict.fromkeys(runs, 1.0), seconds=100, clock=clock))
    assert [tried.reason for tried in found.values()] == ["", "", "the time was over", "the time was over"]


def test_a_fault_after_which_the_device_is_lost_ends_the_process(monkeypatch):
    def lost():
        raise tuning_process.Lost("the device answers no more in this process")

    monkeypatch.setattr(tuning_process, "check_device", lost)
    monkeypatch.setitem(tune.BACKENDS, "triton", _Faulty("first", "does not run", "third"))
    found = {}
    with pytest.raises(tuning_process.Lost):
        found.update(pair for pair in tune.tune("triton", PROBLEM, timer=lambda runs: dict.fromkeys(runs, 1.0)))


def test_the_fastest_so_far_is_stored_at_once():
    """Whatever ends the tuning, what it found is kept."""
    found = functools.partial(tuned.find, "triton", PROBLEM, triton.CONFIGS, kind=KIND)
    slow, fast = (dataclasses.replace(SERIAL, num_warps=num) for num in (1, 2))

    def run(job):
        yield slow, Tried(us=2.0)
        assert found() == slow
        yield dataclasses.replace(SERIAL, num_warps=4), Tried(reason="it did not end within 120 s")
        yield fast, Tried(us=1.0)
        assert found() == fast
        raise KeyboardInterrupt

    told = []
    with pytest.raises(KeyboardInterrupt):
        tune.tune_and_store(JOB, kind=KIND, run=run, told=told.append)
    assert found() == fast
    (line,) = told
    assert line.endswith("num_stages=1): it did not end within 120 s")


def _work(connection, job, done, reference, seconds):
    """Of a process: the second candidate crashes, the third does not end, the fourth loses the device."""
    for config in [name for name in ("first", "crashes", "hangs", "loses", "last") if name not in done]:
        connection.send(config)
        if config == "crashes":
            os._exit(11)
        if config == "hangs":
            time.sleep(1000)
        lost = config == "loses"
        connection.send((config, Tried(reason="CUDA_ERROR_ILLEGAL_ADDRESS") if lost else Tried(us=float(len(done)))))
        if lost:
            connection.send(tuning_process._AGAIN)
            return
    assert reference == "first"
    connection.send(None)


def _fail(connection, job, done, reference, seconds):
    connection.send(RuntimeError("other results"))


def _die(connection, job, done, reference, seconds):
    os._exit(3)


class TestProcesses:
    """Real ones."""

    def test_each_candidate_costs_itself(self):
        job = dataclasses.replace(JOB, patience=8.0)
        found = list(tuning_process.run(job, work=_work))
        assert found == [
            ("first", Tried(us=0.0)),
            ("crashes", Tried(reason="its process ended with status 11")),
            ("hangs", Tried(reason="it did not end within 8 s")),
            ("loses", Tried(reason="CUDA_ERROR_ILLEGAL_ADDRESS")),
            ("last", Tried(us=4.0)),
        ]

    def test_an_error_of_the_tuner_is_one_here(self):
        with pytest.raises(RuntimeError, match=r"^other results$"):
            list(tuning_process.run(JOB, work=_fail))

    def test_a_process_that_comes_to_nothing(self):
        with pytest.raises(RuntimeError, match=r"candidates of 'triton' cannot be tried for .*ended with status 3"):
            list(tuning_process.run(JOB, work=_die))

    def test_tunes(self):
        """All of it, but for the clock of a device: without one no candidate has a time."""
        problem = dataclasses.replace(PROBLEM, n=3, activation_bits=None)
        with pytest.raises(RuntimeError, match=r"no candidate of 'triton' runs, and can be timed, on NVIDIA Test"):
            tune.tune_and_store(Job(backend="triton", problem=problem), kind=KIND)


def test_a_file_that_is_not_json(folder):
    path = folder / "nvidia_test_100_80gb.json"
    path.write_text('{"version": 2, "entr')
    with pytest.raises(ValueError, match=rf"`{re.escape(str(path))}` must hold JSON, but got Unterminated .* Delete"):
        tuned.find("triton", PROBLEM, triton.CONFIGS, kind=KIND)


def test_a_writer_that_fails_leaves_the_file_as_it_was(folder, monkeypatch):
    path = tuned.store("triton", PROBLEM, "serial", SERIAL, kind=KIND, facts={})
    before = path.read_text()

    def fsync(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tuned.os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        tuned.store("triton", PROBLEM, "serial", dataclasses.replace(SERIAL, num_warps=2), kind=KIND, facts={})
    assert path.read_text() == before
    assert list(folder.iterdir()) == [path]


def test_candidates_fit_their_problems():
    for width in (8, 24):
        problem = pbjax.Problem(m=2, k=4096, n=4096, bits=8, group_size=None, activation_bits=width)
        found = mosaic.candidates(problem)
        assert found[0] == mosaic.config_for(problem)
        assert len(set(found)) == len(found) > 3
    many = pbjax.Problem(m=256, k=4096, n=4096, bits=8, group_size=None, activation_bits=None)
    floats = {triton.DotConfig, triton.DotRowsConfig, triton.UnpackConfig}
    assert {type(config) for config in triton.candidates(many)} == floats
    few = pbjax.Problem(m=2, k=4096, n=4096, bits=8, group_size=128, activation_bits=8)
    int8 = pbjax.Problem(m=64, k=4096, n=4096, bits=8, group_size=None, activation_bits=8)
    assert {type(config) for config in triton.candidates(few)} == {triton.SerialConfig, triton.Int8Config}
    for dtype in ("bfloat16", "float32"):  # whose parts take registers of their own
        for floats in (many, dataclasses.replace(many, m=64)):
            assert triton.candidates(floats, dtype)[0] == triton.config_for(floats, dtype)
    default, other = (triton.candidates(dataclasses.replace(many, m=64), d)[0] for d in ("bfloat16", "float32"))
    assert default != other
    # A sweep cuts int8 products by itself, and floats in one way.
    assert {type(config) for config in triton.candidates(many, sweep=True)} == {triton.DotConfig}
    ways = [dataclasses.replace(c, parts=None) for c in triton.candidates(int8, sweep=True)]
    assert len(set(ways)) == len(ways) < len(triton.candidates(int8))
    assert triton.candidates(int8, sweep=True)[0] == triton.config_for(int8)


def test_candidates_are_those_of_the_dtype(monkeypatch):
    asked = []
    monkeypatch.setattr(triton, "candidates", lambda p, dtype, *, sweep: asked.append((dtype, sweep)) or [])
    floats = dataclasses.replace(PROBLEM, activation_bits=None)
    assert list(tune.tune("triton", floats, dtype="bfloat16", sweep=True)) == []
    assert asked == [("bfloat16", True)]


class TestCommand:
    OPTIONS = ("--size", "70x5", "--bits", "2", "--activation-bits", "8", "--of", "product")

    def test_writes_and_says_where(self, capsys, folder):
        kernel = dict(run=here, candidates=three_candidates(), interpret=True)
        for m, backend in (("33", "mosaic"), ("3", "triton")):
            assert tune.main([*self.OPTIONS, "--m", m, "--backend", backend], kind=KIND, **kernel) == 0
        out = capsys.readouterr().out.splitlines()
        assert "mosaic m=33 70x5 bits=2 activation_bits=8: left out, rows times 8-bit limbs" in out[0]
        assert re.match(r"triton m=3 70x5 bits=2 activation_bits=8: \d+\.\d us, by default 1000\.0 us: Config", out[2])
        assert out[-1] == str(folder / "nvidia_test_100_80gb.json")
        assert len(json.loads((folder / "nvidia_test_100_80gb.json").read_text())["entries"]) == 1

    def test_times_floats_of_each_dtype(self, capsys, folder):
        """One of them alone, with a timer that does not run anything: interpreted kernels for floats are slow."""
        options = ["--size", "70x5", "--bits", "2", "--activation-bits", "none", "--m", "3"]
        options += ["--backend", "triton", "--of", "product"]
        floats = dataclasses.replace(PROBLEM, activation_bits=None)
        kernel = dict(run=here, candidates=[triton.config_for(floats)], interpret=True)
        assert tune.main(options, kind=KIND, timer=lambda runs: dict.fromkeys(runs, 2.0), **kernel) == 0
        assert [line.split(":")[0].rpartition(" ")[2] for line in capsys.readouterr().out.splitlines()[:2]] == [
            "dtype=bfloat16",
            "dtype=float32",
        ]
        assert len(json.loads((folder / "nvidia_test_100_80gb.json").read_text())["entries"]) == 2

    def test_goes_on_behind_a_problem_without_a_candidate(self, capsys):
        def run(job):
            yield triton.config_for(PROBLEM), Tried(us=1.0) if job.sweep else Tried(reason="it did not end")

        options = [*self.OPTIONS, "sweep", "--m", "3", "--backend", "triton"]
        assert tune.main(options, kind=KIND, run=run) == 1
        first, second, third, _ = capsys.readouterr().out.splitlines()
        assert first.endswith(": it did not end")
        assert "no candidate of 'triton' runs, and can be timed" in second
        assert third.startswith("triton m=3 70x5 bits=2 activation_bits=8 sweep: 1.0 us, by default 1.0 us")

    def test_needs_a_gpu(self, capsys):
        assert tune.main(self.OPTIONS) == 2
        assert capsys.readouterr().err == "tune needs an NVIDIA GPU that JAX can use, and found none.\n"

    def test_needs_a_file_that_it_can_store_in(self, capsys, folder, monkeypatch):
        path = folder / "nvidia_test_100_80gb.json"
        path.write_text("{")
        never = dict(kind=KIND, run=lambda job: pytest.fail("timed"))
        assert tune.main(self.OPTIONS, **never) == 2
        assert f"tune cannot store what it would measure: `{path}` must hold JSON" in capsys.readouterr().err
        monkeypatch.setenv(tuned.ENVIRONMENT_VARIABLE, str(path))  # a file, where a folder has to be
        assert tune.main(self.OPTIONS, **never) == 2
        assert "File exists" in capsys.readouterr().err

    def test_refuses_a_size(self, capsys):
        with pytest.raises(SystemExit):
            tune.main(["--size", "4096"])
        assert "must be like 4096x14336, but got '4096'" in capsys.readouterr().err


def test_user_folder(monkeypatch, tmp_path):
    assert tuned.user_folder() == tmp_path
    monkeypatch.delenv(tuned.ENVIRONMENT_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert str(tuned.user_folder()) == "/cache/pbjax/tuned"


def test_without_the_clock_of_a_device_there_are_no_times():
    """The host's clock does not stand in for it."""
    assert tune.device_us({"one": lambda i: jnp.ones(2) + i}) == {"one": float("inf")}
    run = functools.partial(here, timer=tune.device_us, candidates=three_candidates()[:1], interpret=True)
    with pytest.raises(RuntimeError, match=r"no candidate of 'triton' runs, and can be timed, on NVIDIA Test"):
        tune.tune_and_store(JOB, kind=KIND, run=run)


def test_timer_takes_the_time_from_first_kernel_to_last(monkeypatch):
    device = device_time.Times(span_us=7.0, p20_us=6.0, p80_us=8.0, kernels_us=5.0, idle_us=1.0, kernels=2)
    found = {("one", "cold"): device_time.Measured(device=device, host_us=50.0, runs=20)}
    monkeypatch.setattr(device_time, "measure", lambda runs, batches: found)
    assert tune.device_us({"one": None}) == {"one": 7.0}
