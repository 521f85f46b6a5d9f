"""The choice of a backend: who decides, what is refused, and that jit notices."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pbjax
from cpu_kernels import bit_matmul as cpu
from pbjax import _backends
from tests.cases import normal

PROBLEM = pbjax.Problem(m=2, k=40, n=3, bits=4, group_size=None, activation_bits=8)
# What runs on the machine of the tests where nobody chooses.
AUTOMATIC = "cpu" if "avx512" in cpu.instructions() and jax.default_backend() == "cpu" else "xla"
VARIABLE = _backends.ENVIRONMENT_VARIABLE


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def spy(monkeypatch):
    """A backend named `spy`, first in order of preference, that runs anything with k < 100; appends what it traces."""
    traced = []

    def matmul(problem, *operands):
        traced.append(problem)
        return _backends.BACKENDS["reference"].matmul(problem, *operands)

    backend = dataclasses.replace(
        _backends.BACKENDS["reference"],
        name="spy",
        unsupported=lambda problem: None if problem.k < 100 else "k is 100 or more",
        matmul=matmul,
        automatic=None,
    )
    monkeypatch.setattr(_backends, "BACKENDS", {"spy": backend, **_backends.BACKENDS})
    return traced


def weight(k=40):
    return pbjax.quantize({"kernel": normal(k, 3)}, 4, activation_bits=8)["kernel"]


def test_automatic_is_the_first_that_can():
    selection = pbjax.select_backend(PROBLEM)
    assert (selection.name, selection.reason) == (AUTOMATIC, "the first in order of preference that can run it")
    rejected = [name for name, _ in selection.rejected]
    assert rejected == ["mosaic", "triton"] + ["cpu"] * (AUTOMATIC == "xla")


def test_last_automatic_backend_runs_everything():
    """Automatic choice cannot fail: `xla` refuses nothing. And it never takes the oracle."""
    automatic = [backend for backend in _backends.BACKENDS.values() if not backend.automatic]
    assert automatic[-1].name == "xla"
    assert _backends.BACKENDS["reference"].automatic
    for bits, activation_bits, group_size, m in ((1, None, None, 0), (16, 24, 32, 1), (16, None, 4096, 10**6)):
        problem = pbjax.Problem(m=m, k=10**6, n=1, bits=bits, group_size=group_size, activation_bits=activation_bits)
        assert automatic[-1].unsupported(problem) is None


def test_automatic_passes_over_what_is_unsupported(spy):
    assert pbjax.select_backend(PROBLEM).name == "spy"
    selection = pbjax.select_backend(dataclasses.replace(PROBLEM, k=100))
    assert selection.name == AUTOMATIC
    assert selection.rejected[0] == ("spy", "k is 100 or more")


def test_explicit_choice_runs_or_raises(spy, monkeypatch):
    """No fallback, whoever chose; the reason is in the message."""
    large = dataclasses.replace(PROBLEM, k=100)
    message = r"backend 'spy', chosen by {}, cannot run Problem\(.*k=100.*\): k is 100 or more\. Choose another"
    with pytest.raises(pbjax.Unsupported, match=message.format("the argument `backend`")):
        pbjax.select_backend(large, "spy")
    with pbjax.use_backend("spy"), pytest.raises(pbjax.Unsupported, match=message.format("`pbjax.use_backend`")):
        pbjax.select_backend(large)
    monkeypatch.setenv(VARIABLE, "spy")
    with pytest.raises(pbjax.Unsupported, match=message.format("the environment variable PBJAX_BACKEND")):
        pbjax.select_backend(large)
    with pytest.raises(pbjax.Unsupported, match="k is 100 or more"):
        pbjax.matmul(jnp.ones((2, 100)), weight(100), backend="spy")
    assert not spy


def test_cpu_backend_without_its_library(monkeypatch):
    """Whoever names it learns why it is missing; the automatic choice passes it over, for the same reason."""
    reason = "its C++ library was not built: install pbjax where there is a C++17 compiler"
    monkeypatch.setattr(cpu, "_load", lambda: reason)
    selection = pbjax.select_backend(PROBLEM, platform="cpu")
    assert selection.name == "xla"
    assert dict(selection.rejected)["cpu"] == reason
    with pytest.raises(
        pbjax.Unsupported, match=f"backend 'cpu', chosen by the argument `backend`, .*{re.escape(reason)}"
    ):
        pbjax.select_backend(PROBLEM, "cpu", platform="cpu")
    assert cpu.instructions() == ()


def test_cpu_backend_waits_to_be_named_where_it_is_slow(monkeypatch):
    monkeypatch.setattr(cpu, "instructions", lambda: ("avx2", "portable"))
    monkeypatch.setattr(cpu, "_load", lambda: None)
    selection = pbjax.select_backend(PROBLEM, platform="cpu")
    assert selection.name == "xla"
    assert dict(selection.rejected)["cpu"].startswith("without avx512_amx or avx512 it was not measured to be faster")
    assert pbjax.select_backend(PROBLEM, "cpu", platform="cpu").name == "cpu"


def test_nothing_can_run_it(monkeypatch, spy):
    monkeypatch.setattr(_backends, "BACKENDS", {"spy": _backends.BACKENDS["spy"]})
    with pytest.raises(pbjax.Unsupported, match=r"no backend can run Problem\(.*\('spy', 'k is 100 or more'\)"):
        pbjax.select_backend(dataclasses.replace(PROBLEM, k=100))


def test_argument_before_context_before_environment(monkeypatch, spy):
    def name_and_reason(argument=None):
        selection = pbjax.select_backend(PROBLEM, argument)
        return selection.name, selection.reason

    monkeypatch.setenv(VARIABLE, "reference")
    assert name_and_reason() == ("reference", "chosen by the environment variable PBJAX_BACKEND")
    with pbjax.use_backend("xla"):
        assert name_and_reason() == ("xla", "chosen by `pbjax.use_backend`")
        assert name_and_reason("spy") == ("spy", "chosen by the argument `backend`")
        with pbjax.use_backend("spy"):
            assert name_and_reason()[0] == "spy"
        with pbjax.use_backend(None):
            assert name_and_reason()[0] == "reference"
        assert name_and_reason()[0] == "xla"
    monkeypatch.setenv(VARIABLE, "")
    assert name_and_reason()[0] == "spy"


def test_context_is_left_by_an_error():
    with pytest.raises(ZeroDivisionError), pbjax.use_backend("reference"):
        raise ZeroDivisionError
    assert pbjax.select_backend(PROBLEM).name == AUTOMATIC


def test_context_is_part_of_the_key_of_jit(spy):
    """A function jitted and called outside is traced again inside, and not once more outside."""
    f = jax.jit(lambda x, w: pbjax.matmul(x, w))  # a function of its own: jit's cache belongs to the function
    x, w = normal(2, 40, seed=1), weight()
    with pbjax.use_backend("xla"):
        expected = f(x, w)
    assert not spy
    with pbjax.use_backend("spy"):
        np.testing.assert_array_equal(f(x, w), expected)
    num_traced = len(spy)
    assert num_traced > 0
    with pbjax.use_backend("xla"):
        f(x, w)
    with pbjax.use_backend("spy"):
        f(x, w)
    assert len(spy) == num_traced
    assert f._cache_size() == 2


def test_choice_is_settled_where_the_product_is_called(spy):
    """Transforms may run their rules in another context: the one around the call counts."""
    x, w = normal(2, 40, seed=1), weight()

    def product(x):
        with pbjax.use_backend("spy"):
            return pbjax.matmul(x, w)

    with pbjax.use_backend("xla"):
        y = jax.vmap(product)(x)
        grad = jax.grad(lambda x: product(x).sum())(x)
    assert {problem.m for problem in spy} >= {2}
    assert y.shape == (2, 3)
    assert np.all(np.isfinite(grad))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what a machine without a GPU says")
@pytest.mark.parametrize("backend", ["mosaic", "triton"])
def test_gpu_backends_are_refused_without_a_gpu(backend):
    """Whoever names one gets the reason; the automatic choice passes it over, for the same reason."""
    reason = "it runs on cuda, but the platform is cpu"
    with pytest.raises(pbjax.Unsupported, match=f"backend '{backend}', chosen by the argument `backend`, .*{reason}"):
        pbjax.matmul(jnp.ones((2, 40)), weight(), backend=backend)
    assert re.fullmatch(reason, dict(pbjax.select_backend(PROBLEM).rejected)[backend])


def test_gpu_backends_wait_to_be_named(monkeypatch):
    """What has not run on a GPU is not chosen for anybody, even where there is one."""
    mosaic = dataclasses.replace(_backends.BACKENDS["mosaic"], missing=lambda platform: None)
    monkeypatch.setitem(_backends.BACKENDS, "mosaic", mosaic)
    selection = pbjax.select_backend(PROBLEM, platform="cuda")
    assert selection.name == "xla"
    assert "not run on one: name it" in dict(selection.rejected)["mosaic"]
    assert pbjax.select_backend(PROBLEM, "mosaic", platform="cuda").name == "mosaic"


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        (SimpleNamespace(platform="gpu", compute_capability="9.0"), None),
        (SimpleNamespace(platform="gpu", compute_capability="10.0"), None),
        (SimpleNamespace(platform="gpu", compute_capability="8.9"), "needs .* 9.0 or more, but the device has 8.9"),
        (SimpleNamespace(platform="gpu", compute_capability="gfx90a"), "it runs on cuda, but the platform is rocm"),
        (SimpleNamespace(platform="tpu"), "it runs on cuda, but the platform is tpu"),
    ],
)
def test_devices(monkeypatch, device, reason):
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: [device])
    found = _backends.BACKENDS["mosaic"].unavailable(_backends.default_platform())
    assert found is None if reason is None else re.search(reason, found)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what a machine without a GPU says")
def test_no_gpu_to_lower_for():
    found = _backends.BACKENDS["mosaic"].missing("cuda")
    assert found == "it needs an NVIDIA GPU of compute capability 9.0 or more, but there is no GPU"


def test_default_platform_heeds_the_default_device():
    with jax.default_device("tpu"):
        assert _backends.default_platform() == "tpu"
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        assert _backends.default_platform() == "cpu"


@pytest.fixture
def by_platform(monkeypatch):
    """Backends for one platform each, that differ from each other in what they return; xla serves all others."""

    def constant(name, value):
        return dataclasses.replace(
            _backends.BACKENDS["xla"],
            name=name,
            platforms=(name,),
            matmul=lambda problem, *_: jnp.full((problem.m, problem.n), value),
        )

    backends = {"cpu": constant("cpu", 1.0), "cuda": constant("cuda", 2.0)}
    others = {name: backend for name, backend in _backends.BACKENDS.items() if name not in backends}
    monkeypatch.setattr(_backends, "BACKENDS", {**backends, **others})


def test_platform_is_chosen_when_a_product_is_lowered(by_platform):
    """One trace, several platforms: each gets its own backend, also in an export for several."""
    w = weight()
    w = w.replace(activation_bits=None)  # as they are returned
    f = jax.jit(lambda x: pbjax.matmul(x, w))
    x = jnp.ones((2, 40))
    if jax.default_backend() == "cpu":
        np.testing.assert_array_equal(f(x), np.full((2, 3), 1.0))
    traced = f.trace(x)
    texts = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda", "tpu")}
    assert "1.000000e+00" in texts["cpu"]
    assert "2.000000e+00" in texts["cuda"]
    assert "while" in texts["tpu"] or "dot" in texts["tpu"]
    exported = jax.export.export(f, platforms=("cpu", "cuda"))(jax.ShapeDtypeStruct((2, 40), jnp.float32))
    if jax.default_backend() == "cpu":
        np.testing.assert_array_equal(exported.call(x), np.full((2, 3), 1.0))
    assert pbjax.select_backend(PROBLEM, platform="cuda").name == "cuda"
    assert pbjax.select_backend(PROBLEM, platform="tpu").name == "xla"


def test_explicit_choice_is_for_every_platform(by_platform):
    choice = _backends.choose(PROBLEM, "reference")
    assert choice == _backends.Choice(_backends.BACKENDS["reference"], is_named=True)
    assert [name for name, _ in _backends.choose(PROBLEM, None).by_platform] == ["cpu", "cuda"]


@pytest.fixture
def few_rows(monkeypatch):
    """A backend, the first in order of preference, that returns 1 and takes at most 3 rows."""
    backend = dataclasses.replace(
        _backends.BACKENDS["xla"],
        name="few",
        unsupported=lambda problem: f"{problem.m} rows are too many" if problem.m > 3 else None,
        matmul=lambda problem, x, *weight: jnp.ones((problem.m, problem.n)),
        prefixes=lambda problem, x, *weight: jnp.ones((problem.bits, problem.m, problem.n)),
        quantize_rows=None,
        platforms=(_backends.default_platform(),),
    )
    monkeypatch.setattr(_backends, "BACKENDS", {"few": backend, **_backends.BACKENDS})


@pytest.mark.usefixtures("few_rows")
def test_automatic_choice_is_that_of_all_rows_of_a_vmap():
    """What is chosen for one example may not run all of them."""
    w, x = weight(), normal(8, 40, seed=1)
    each = jax.vmap(lambda row: pbjax.matmul(row, w))
    step = np.float32(np.abs(np.asarray(x[:3])).max(axis=1) * 64 / 127)  # what integers are multiplied by
    np.testing.assert_allclose(each(x[:3]), np.repeat(step[:, None], 3, axis=1), rtol=1e-6)
    np.testing.assert_array_equal(each(x), pbjax.matmul(x, w, backend="xla"))
    sweep = jax.vmap(jax.vmap(lambda row, b: pbjax.matmul(row, w, bitlayers=b), (None, 0)), (0, None))
    expected = [pbjax.matmul(x, w, bitlayers=b, backend="xla") for b in (1, 4)]
    np.testing.assert_array_equal(sweep(x, jnp.array([1, 4])), np.stack(expected, axis=1))


@pytest.mark.usefixtures("few_rows")
def test_a_named_backend_that_cannot_run_all_rows_of_a_vmap():
    w, x = weight(), jnp.ones((8, 40))
    with pytest.raises(
        pbjax.Unsupported, match=r"backend 'few', chosen by its name, cannot run Problem\(m=8.*too many"
    ):
        jax.vmap(lambda row: pbjax.matmul(row, w, backend="few"))(x)


def runs_here(backend):
    return backend.unavailable(_backends.default_platform()) is None


@pytest.mark.parametrize("backend", [name for name, b in _backends.BACKENDS.items() if runs_here(b)])
def test_every_backend_can_be_named(backend):
    assert pbjax.select_backend(PROBLEM, backend) == pbjax.Selection(backend, "chosen by the argument `backend`")
    with pbjax.use_backend(backend):
        assert pbjax.select_backend(PROBLEM).name == backend
