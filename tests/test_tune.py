"""Launch parameters that are timed, stored and found again: with a timer of the test's own, and kernels interpreted."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pbjax
from pallas_kernels import tune
from pallas_kernels.bit_matmul import mosaic, triton, tuned
from tests import oracle

KIND = "NVIDIA Test 100 80GB"
PROBLEM = pbjax.Problem(m=3, k=70, n=5, bits=2, group_size=None, activation_bits=8)


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
    """A timer whose times fall from call to call; it runs what it is given."""
    times = iter(range(1000, 0, -1))

    def timer(run):
        assert run().shape == (PROBLEM.m, PROBLEM.n)
        return float(next(times))

    return timer


def test_fastest_is_stored_and_found(folder):
    candidates = three_candidates()
    config, best, default = tune.tune_and_store(
        "triton", PROBLEM, kind=KIND, timer=last_is_fastest(), candidates=candidates, interpret=True
    )
    assert config == candidates[-1]
    assert (default, best) == (1000, 998)
    assert tuned.find("triton", PROBLEM, triton.CONFIGS, kind=KIND) == config
    (entry,) = json.loads((folder / "nvidia_test_100_80gb.json").read_text()).values()
    assert entry["kernel"] == "int8"
    assert (entry["us"], entry["default_us"], entry["jax"]) == (best, default, jax.__version__)


def test_found_by_device_backend_and_shape():
    config = triton.SerialConfig(block_n=128, block_rows=1, block_words=2, num_blocks=1, num_warps=1)
    tuned.store("triton", PROBLEM, "serial", config, kind=KIND, facts={})
    find = tuned.find
    rows_of_four = pbjax.Problem(m=4, k=70, n=5, bits=2, group_size=None, activation_bits=8)
    assert find("triton", rows_of_four, triton.CONFIGS, kind=KIND) == config  # rows are rounded up
    assert find("mosaic", PROBLEM, mosaic.CONFIGS, kind=KIND) is None
    assert find("triton", PROBLEM, triton.CONFIGS, kind="NVIDIA Other") is None
    assert find("triton", PROBLEM, triton.CONFIGS) is None  # there is no GPU here
    other = pbjax.Problem(m=5, k=70, n=5, bits=2, group_size=None, activation_bits=8)
    assert find("triton", other, triton.CONFIGS, kind=KIND) is None


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
    config = triton.SerialConfig(block_n=128, block_rows=1, block_words=2, num_blocks=1, num_warps=1)
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped")
    tuned.store("triton", PROBLEM, "serial", config, kind=KIND, facts={}, folder=tuned.SHIPPED)
    assert tuned.find("triton", PROBLEM, triton.CONFIGS, kind=KIND) == config


def test_shipped_files_can_be_read():
    for path in tuned.SHIPPED.glob("*.json"):
        for entry in json.loads(path.read_text()).values():
            assert {**triton.CONFIGS, **mosaic.CONFIGS}[entry["kernel"]](**entry["config"])


def test_product_takes_what_was_stored(monkeypatch):
    """A configuration that cannot be right is noticed, so it was used; and one that can gives the same bits."""
    monkeypatch.setattr(tuned, "device_kind", lambda: KIND)
    rng = np.random.default_rng(0)
    words = jnp.asarray(rng.integers(0, 2**32, (2, 3, 5), dtype=np.uint32))
    x = jnp.asarray(oracle.activation_codes(rng, 8, 3, 70))
    args = (x, words, jnp.ones((2, 1, 5), jnp.float32), jnp.full((3,), 2, jnp.int32))
    expected = triton.matmul(PROBLEM, *args, interpret=True)
    config = triton.SerialConfig(block_n=128, block_rows=1, block_words=2, num_blocks=1, num_warps=1)
    tuned.store("triton", PROBLEM, "serial", config, kind=KIND, facts={})
    np.testing.assert_array_equal(triton.matmul(PROBLEM, *args, interpret=True), expected)
    dot = triton.config_for(pbjax.Problem(m=3, k=70, n=5, bits=2, group_size=None, activation_bits=None))
    tuned.store("triton", PROBLEM, "dot", dot, kind=KIND, facts={})
    with pytest.raises(TypeError, match=r"`config` must be that of a kernel for fixed-point activations"):
        triton.matmul(PROBLEM, *args, interpret=True)


def test_entry_of_another_version(folder):
    path = folder / "nvidia_test_100_80gb.json"
    path.write_text(json.dumps({tuned.key("triton", PROBLEM): {"kernel": "serial", "config": {"gone": 1}}}))
    with pytest.raises(
        ValueError, match=rf"`{re.escape(str(path))}` must hold configurations of this version, but got"
    ):
        tuned.find("triton", PROBLEM, triton.CONFIGS, kind=KIND)


def test_never_inside_a_trace():
    @jax.jit
    def traced(x):
        list(tune.tune("triton", PROBLEM, interpret=True))
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
        list(tune.tune("triton", PROBLEM, timer=lambda run: 1.0))


class _Constant:
    def __init__(self, value):
        self.value = value

    def unsupported(self, problem):
        return None

    def candidates(self, problem):
        return ["first", "second"]

    def matmul(self, problem, *operands, config):
        return jnp.full((problem.m, problem.n), self.value())


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
        assert tune.main(options, kind=KIND, timer=last_is_fastest(), **kernel) == 0
        out = capsys.readouterr().out.splitlines()
        assert "mosaic m=3 70x5 bits=2 activation_bits=8: left out, `n` must be a multiple of 4" in out[0]
        assert re.match(r"triton m=3 70x5 bits=2 activation_bits=8: \d+\.\d us, by default 1000\.0 us: Config", out[1])
        assert out[-1] == str(folder / "nvidia_test_100_80gb.json")
        assert len(json.loads((folder / "nvidia_test_100_80gb.json").read_text())) == 1

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


def test_timer_waits_for_the_device():
    assert tune.device_us(lambda: jnp.ones((2, 2)) @ jnp.ones((2, 2)), calls=2, repeats=2) > 0
