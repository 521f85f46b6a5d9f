"""Launch parameters that are timed, stored and found again: with a timer of the test's own, and kernels interpreted."""

from __future__ import annotations

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pbjax
from pallas_kernels import device_time, tune
from pallas_kernels.bit_matmul import activations, mosaic, reference, triton, tuned
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


def last_is_fastest(runs):
    """A timer whose times fall from candidate to candidate; it runs what it is given, with any copy of the words."""
    for run in runs.values():
        for i in (0, 1, 1000):
            assert run(i).shape == (PROBLEM.m, PROBLEM.n)
    return {config: 1000.0 - i for i, config in enumerate(runs)}


def test_fastest_is_stored_and_found(folder):
    candidates = three_candidates()
    config, best, default = tune.tune_and_store(
        "triton", PROBLEM, kind=KIND, timer=last_is_fastest, candidates=candidates, interpret=True
    )
    assert config == candidates[-1]
    assert (default, best) == (1000, 998)
    assert tuned.find("triton", PROBLEM, triton.CONFIGS, kind=KIND) == config
    stored = json.loads((folder / "nvidia_test_100_80gb.json").read_text())
    assert stored["version"] == tuned.VERSION
    (entry,) = stored["entries"].values()
    assert entry["kernel"] == "int8"
    assert (entry["us"], entry["default_us"], entry["jax"]) == (best, default, jax.__version__)


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


def test_file_of_another_version(folder):
    path = folder / "nvidia_test_100_80gb.json"
    path.write_text(json.dumps({tuned.key("triton", PROBLEM): {"kernel": "serial", "config": {}}}))
    with pytest.raises(ValueError, match=rf"`{re.escape(str(path))}` must be of version 2, but got 1. Delete the file"):
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
        tune.tune("triton", PROBLEM, interpret=True)
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
        tune.tune("mosaic", float_problem)


def test_candidates_of_other_results_are_an_error(monkeypatch):
    """Bits decide before times do."""
    wrong = iter((1.0, 2.0))
    monkeypatch.setitem(tune.BACKENDS, "triton", _Constant(lambda: next(wrong)))
    with pytest.raises(RuntimeError, match=r"gives other results than the first candidate"):
        tune.tune("triton", PROBLEM, timer=last_is_fastest)


class _Constant:
    def __init__(self, value):
        self.value = value

    def unsupported(self, problem):
        return None

    def candidates(self, problem):
        return ["first", "second"]

    def quantize_rows(self, problem, x, *, config):
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

    tune.tune("triton", PROBLEM, timer=timer, candidates=[config], interpret=True)
    x, words, scale, counts = tune._operands(PROBLEM, "float32")
    assert x.dtype == jnp.float32
    codes, unit, _ = activations.quantize_rows(x, PROBLEM.activation_bits)
    expected = reference.matmul(PROBLEM, codes, words, scale, counts) * unit[:, None]
    for i in range(3):
        np.testing.assert_array_equal(seen[config](i), expected)


def test_a_candidate_that_the_compiler_refuses_is_infinitely_slow(monkeypatch):
    def matmul(problem, *operands, config):
        if config == "second":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: shared memory")
        return jnp.ones((problem.m, problem.n))

    constant = _Constant(None)
    # Raised where such an error is: when the compiled product runs.
    constant.matmul = lambda problem, *operands, config: jax.pure_callback(
        lambda: matmul(problem, config=config), jax.ShapeDtypeStruct((problem.m, problem.n), jnp.float32)
    )
    monkeypatch.setitem(tune.BACKENDS, "triton", constant)
    times = tune.tune("triton", PROBLEM, timer=last_is_fastest)
    assert times == {"first": 1000.0, "second": float("inf")}


def test_candidates_fit_their_problems():
    for width in (8, 24):
        problem = pbjax.Problem(m=2, k=4096, n=4096, bits=8, group_size=None, activation_bits=width)
        found = mosaic.candidates(problem)
        assert found[0] == mosaic.config_for(problem)
        assert len(set(found)) == len(found) > 3
    many = pbjax.Problem(m=256, k=4096, n=4096, bits=8, group_size=None, activation_bits=None)
    assert {type(config) for config in triton.candidates(many)} == {triton.DotConfig, triton.UnpackConfig}
    few = pbjax.Problem(m=2, k=4096, n=4096, bits=8, group_size=128, activation_bits=8)
    assert {type(config) for config in triton.candidates(few)} == {triton.SerialConfig, triton.Int8Config}


class TestCommand:
    OPTIONS = ("--size", "70x5", "--bits", "2", "--activation-bits", "8")

    def test_writes_and_says_where(self, capsys, folder):
        options = [*self.OPTIONS, "--m", "3", "--backend", "mosaic", "triton"]
        kernel = dict(candidates=three_candidates(), interpret=True)
        assert tune.main(options, kind=KIND, timer=last_is_fastest, **kernel) == 0
        out = capsys.readouterr().out.splitlines()
        assert "mosaic m=3 70x5 bits=2 activation_bits=8: left out, `n` must be a multiple of 4" in out[0]
        assert re.match(r"triton m=3 70x5 bits=2 activation_bits=8: \d+\.\d us, by default 1000\.0 us: Config", out[1])
        assert out[-1] == str(folder / "nvidia_test_100_80gb.json")
        assert len(json.loads((folder / "nvidia_test_100_80gb.json").read_text())["entries"]) == 1

    def test_times_floats_of_each_dtype(self, capsys, folder):
        """One of them alone, with a timer that does not run anything: interpreted kernels for floats are slow."""
        options = ["--size", "70x5", "--bits", "2", "--activation-bits", "none", "--m", "3", "--backend", "triton"]
        floats = dataclasses.replace(PROBLEM, activation_bits=None)
        kernel = dict(candidates=[triton.config_for(floats)], interpret=True)
        assert tune.main(options, kind=KIND, timer=lambda runs: dict.fromkeys(runs, 2.0), **kernel) == 0
        assert [line.split(":")[0].rpartition(" ")[2] for line in capsys.readouterr().out.splitlines()[:2]] == [
            "dtype=bfloat16",
            "dtype=float32",
        ]
        assert len(json.loads((folder / "nvidia_test_100_80gb.json").read_text())["entries"]) == 2

    def test_needs_a_gpu(self, capsys):
        assert tune.main(self.OPTIONS) == 2
        assert capsys.readouterr().err == "tune needs an NVIDIA GPU that JAX can use, and found none.\n"

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
    with pytest.raises(RuntimeError, match=r"no candidate of 'triton' runs, and can be timed, on NVIDIA Test"):
        tune.tune_and_store("triton", PROBLEM, kind=KIND, candidates=three_candidates()[:1], interpret=True)


def test_timer_takes_the_time_from_first_kernel_to_last(monkeypatch):
    device = device_time.Times(span_us=7.0, p20_us=6.0, p80_us=8.0, kernels_us=5.0, idle_us=1.0, kernels=2)
    found = {("one", "cold"): device_time.Measured(device=device, host_us=50.0, runs=20)}
    monkeypatch.setattr(device_time, "measure", lambda runs, batches: found)
    assert tune.device_us({"one": None}) == {"one": 7.0}
