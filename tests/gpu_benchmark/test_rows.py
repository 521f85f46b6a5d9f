"""What the rows say: of which machine and code, of which products, how fast beside which."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pbjax
from pallas_kernels import device_time
from pallas_kernels.bit_matmul import mosaic, triton


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
            "_triton_dot_rows": {"plain", "sweep", "by_row", "bits16"},  # groups go to another, and its sweeps do
            "_triton_unpack": {"plain", "by_row", "bits16"},  # likewise
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
