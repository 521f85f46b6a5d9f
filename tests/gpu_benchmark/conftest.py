"""What every test of the benchmark runs under: its modules, and a GPU that it believes in."""

from __future__ import annotations

import importlib
import types

import pytest

from tests.gpu_benchmark import FOLDER

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
