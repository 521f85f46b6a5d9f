"""Times from the kernels of a profile: with events of the test's own, since there is no GPU here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device_time


class FakeGpu:
    """A device whose calls append kernels to a profile: (gap before it, duration) of each, in microseconds."""

    def __init__(self):
        self.now, self.events, self.recording = 0.0, [], False

    def call(self, *kernels):
        def run(i):
            for gap, duration in kernels:
                self.now += gap
                if self.recording:
                    self.events.append((self.now, duration))
                self.now += duration
            return i

        return run

    def record(self, run):
        self.events, self.recording = [], True
        run()
        self.recording = False
        return sorted(self.events)

    def measure(self, runs, batches, **options):
        return device_time.measure(runs, batches, record=self.record, **options)


@pytest.fixture
def gpu(monkeypatch):
    """Pauses of the host are pauses of this device."""
    device = FakeGpu()

    def sleep(seconds):
        device.now += seconds * 1e6

    monkeypatch.setattr(device_time.time, "sleep", sleep)
    return device


def test_spans_hold_gaps_and_kernels_do_not(gpu):
    runs = {"one": gpu.call((1, 10)), "three": gpu.call((1, 2), (3, 4), (5, 6))}
    times = gpu.measure(runs, {"cold": range(5), "warm": [0] * 4})
    assert set(times) == {(name, l2) for name in runs for l2 in ("cold", "warm")}
    assert {key: taken.runs for key, taken in times.items()} == {key: 5 if key[1] == "cold" else 4 for key in times}
    one, three = times["one", "cold"].device, times["three", "warm"].device
    assert (one.span_us, one.kernels_us, one.kernels, one.idle_us) == pytest.approx((10, 10, 1, 1))
    assert (three.span_us, three.kernels_us, three.kernels, three.idle_us) == pytest.approx((20, 12, 3, 1))
    assert all(taken.host_us > 0 for taken in times.values())


def test_what_goes_before_a_batch_is_not_counted(gpu):
    runs = {"one": gpu.call((1, 10)), "two": gpu.call((1, 2), (0, 3))}
    before = gpu.call((0, 5000), (0, 5000), (0, 5000))
    times = gpu.measure(runs, {"cold": range(3), "warm": [0] * 3}, before=lambda: before(0))
    assert [taken.device.span_us for taken in times.values()] == pytest.approx([10, 10, 5, 5])
    assert [taken.device.kernels for taken in times.values()] == [1, 1, 2, 2]


def test_a_batch_that_was_torn_is_profiled_again(gpu):
    torn = iter([True])

    def run(i):
        gpu.now += 30_000 if gpu.recording and next(torn, False) else 0
        return gpu.call((1, 10))(i)

    times = gpu.measure({"one": run}, {"cold": range(3)})
    assert times["one", "cold"].device.span_us == pytest.approx(10)


def test_where_batches_cannot_be_told_apart_there_are_no_times_of_the_device(gpu):
    def run(i):
        gpu.now += 30_000
        return gpu.call((1, 10))(i)

    taken = gpu.measure({"one": run, "two": gpu.call((1, 1))}, {"cold": range(3)})["two", "cold"]
    assert taken.device is None
    assert taken.host_us > 0


def test_calls_of_other_numbers_of_kernels_have_no_times_of_the_device(gpu):
    count = iter(range(100))
    runs = {"odd": lambda i: gpu.call(*[(1, 1)] * (1 + (next(count) == 6)))(i), "one": gpu.call((1, 10))}
    times = gpu.measure(runs, {"cold": range(3)})  # 2 to warm up, 3 by the host's clock, 3 in the profile
    assert times["odd", "cold"].device is None
    assert times["one", "cold"].device.span_us == pytest.approx(10)


def test_percentiles():
    calls = np.array([[[100.0 * i, float(i)]] for i in range(1, 12)])
    times = device_time.summarize(calls)
    assert (times.p20_us, times.span_us, times.p80_us) == (3, 6, 9)
    overlapping = device_time.summarize(np.array([[[0.0, 10.0], [2.0, 4.0]]]))
    assert (overlapping.span_us, overlapping.kernels_us) == (10, 14)
    assert device_time.summarize(None) is None


def test_profile_without_a_gpu_has_no_kernels():
    ran = []
    events = device_time.profile(lambda: ran.append(jax.block_until_ready(jnp.ones(3) + 1)))
    assert events == []
    assert ran
    assert device_time.hold() is None


def test_profile_is_read(tmp_path):
    with jax.profiler.trace(tmp_path):
        jax.block_until_ready(jnp.ones(3) + 1)
    assert list(tmp_path.rglob("*.xplane.pb"))
    assert device_time.kernel_events(tmp_path) == []


def test_copies_fill_more_than_the_cache():
    weight = {"w": jnp.ones((4, 8))}
    assert len(device_time.copies(weight, device_time.COLD_BYTES // 4)) == 4
    assert len(device_time.copies(weight, 4 * device_time.COLD_BYTES)) == 2
    found = device_time.copies(weight, 1, most=3)
    assert len({tree["w"].unsafe_buffer_pointer() for tree in found}) == 3
    for tree in found:
        np.testing.assert_array_equal(tree["w"], weight["w"])
