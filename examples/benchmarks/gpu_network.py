"""What launches cost in a whole network on a GPU: the digits MLP for one image, in CUDA graphs and out of them.

A product of one row takes few microseconds, as long as it takes to launch a kernel or two. XLA records launches that
follow one another as a *command buffer*, a CUDA graph, which is launched as one. Which of them may be recorded is a
flag of its compiler, `xla_gpu_enable_command_buffer`, and how many it takes at least is another,
`xla_gpu_graph_min_graph_size` (5 unless set).
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from facts import Facts

import pbjax
from pallas_kernels import device_time

WITHOUT = "nothing"
GRAPHS: dict[str, dict[str, Any]] = {
    "as XLA decides": {},
    "everything": {"xla_gpu_graph_min_graph_size": 1},
    WITHOUT: {"xla_gpu_enable_command_buffer": ""},
}
FEATURES, HIDDEN, CLASSES = 64, 4096, 10  # of `examples/digits.py`
BITLAYERS = (4, 8)
_CALLS = 200  # for a latency, and for a time from call to call
_TRACED_CALLS = 30  # for times on the device's clock


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row(Facts):
    """One line of the output."""

    method: str  # "f32", "bf16" or "bitlayers"
    bitlayers: int | None
    backend: str
    graphs: str  # a key of GRAPHS
    kernels: int  # 0 where the profiler does not tell those of each call, and with graphs
    us: (
        float | None
    )  # on the device's clock, without graphs, from the start of the first kernel to the end of the last, median
    kernels_us: float | None  # on the device's clock, the kernels alone
    latency_us: float  # on the host's clock, from call to result, median
    queued_us: float  # on the host's clock, from call to call, many queued


def measure(
    facts: Facts,
    *,
    backend: str,
    hidden: int = HIDDEN,
    calls: int = _CALLS,
    done: Collection[tuple[str, int | None, str]] = (),
) -> Iterator[Row]:
    """The network for one image, with weights that stay in the cache if they fit; but for methods that are done."""
    model = nn.Sequential([nn.Dense(hidden), nn.relu, nn.Dense(hidden), nn.relu, nn.Dense(CLASSES)])
    image = jax.random.normal(jax.random.key(1), (1, FEATURES))
    params = model.init(jax.random.key(0), image)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    qparams = pbjax.quantize(params, bits=8)
    methods: list[tuple[str, int | None, str, Callable[..., jax.Array], Any, jax.Array]] = [
        ("f32", None, "dot", model.apply, params, image),
        ("bf16", None, "dot", model.apply, half, image.astype(jnp.bfloat16)),
    ]

    def on_bitlayers(qparams, image):
        with pbjax.use_backend(backend):
            return pbjax.quantized(model.apply)(qparams, image)

    methods += [
        ("bitlayers", used, backend, on_bitlayers, pbjax.with_bitlayers(qparams, used), image) for used in BITLAYERS
    ]
    for name, used, by, fn, weights, x in methods:
        for graphs, options in GRAPHS.items():
            if (name, used, graphs) in done:
                continue
            run = jax.jit(fn, compiler_options=options).lower(weights, x).compile()
            call = functools.partial(run, weights, x)
            device = None
            if graphs == WITHOUT:  # while a profiler records, XLA runs launches of a graph one by one
                (taken,) = device_time.measure(
                    {0: lambda i, call=call: call()}, {"warm": range(min(calls, _TRACED_CALLS))}
                ).values()
                device = taken.device
            yield Row(
                **dataclasses.asdict(facts),
                method=name,
                bitlayers=used,
                backend=by,
                graphs=graphs,
                kernels=device.kernels if device else 0,
                us=round(device.span_us, 3) if device else None,
                kernels_us=round(device.kernels_us, 3) if device else None,
                latency_us=round(_latency_us(call, calls), 3),
                queued_us=round(_queued_us(call, calls), 3),
            )


def _latency_us(call: Callable[[], jax.Array], calls: int) -> float:
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def _queued_us(call: Callable[[], jax.Array], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        last = call()  # results that are kept would move the next ones, and CUDA graphs would be updated in each call
    jax.block_until_ready(last)
    return (time.perf_counter() - start) * 1e6 / calls
