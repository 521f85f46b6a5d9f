"""What backend `cpu` reaches: against the products that XLA, qwix, PyTorch and ONNX Runtime have, and the memory rate.

Prints rows of data as CSV (or writes them to a file, and a plot with --plot) and a table to stderr. PyTorch, ONNX
Runtime and qwix take part where they are installed. Everything of one shape takes turns in one loop, on operands of the
same values, and each row says how much faster it was than the float32 product of XLA in that loop:

    .venv/bin/python examples/benchmarks/cpu.py --output cpu.csv --plot cpu.png

In its turn a method has a pause, in which the threads of other libraries go to sleep; a read of 256 MiB, which wakes
all processors and after which all start alike; and is called for 3 ms, so that weights that fit get into the caches
again. Then it is called for 3 ms more, and the median of these calls is its time of this turn. With --cold it is called
once instead, after the read. Threads of ONNX Runtime stay awake for longer than the pause: reads go on until they
sleep. The rows have the medians and the 20th and 80th percentiles of all turns.

Some rows are timed before the turns, alone. "read" is what the machine takes to read as many bytes as the weights of
pbjax are with 8 bitlayers. Those that end with "repeated" are what XLA's float32 product and products of pbjax take
when nothing runs between their calls, as "read" has it: so they say which part of the memory's rate pbjax reaches.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
from matmul import cpu_model, float_dot, int8_dot

import pbjax

BITS = 8
BITLAYERS = (1, 2, 4, 8)
ACTIVATION_BITS = (8, 16, None)
SWEEP_ROWS = 8  # with more, a sweep is a product for each count
FLUSH_BYTES = 2**28  # more than most caches hold
READ_BYTES = 2**30  # in one call, over and over: it takes milliseconds until threads are spread over the processors
ALONE_REPEATS = 11
ALONE_S = 0.02
PAUSE_S = 0.005
ONNX_SPIN_S = 0.1  # a million pauses
WARM_S = 0.003  # of calls before those that count, and of these: the same time for every method, not the same number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the output; `read_gb_per_s` is the rate at which weights were read, from memory or from a cache."""

    date: str
    cpu: str
    threads: int
    cache: str
    m: int
    k: int
    n: int
    method: str
    version: str
    bitlayers: int | None
    activation_bits: int | None
    repeats: int
    median_us: float
    p20_us: float
    p80_us: float
    speedup_over_f32: float
    read_gb_per_s: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """Something that is timed; a call may do the same several times."""

    name: str
    version: str
    call: Callable[[], Any]
    bitlayers: int | None = None
    activation_bits: int | None = None
    read_bytes: int | None = None
    passes: int = 1
    spin_s: float = 0.0  # how long its threads keep a processor busy after a call


def waited(fn: Callable[..., jax.Array], *args: Any) -> Callable[[], Any]:
    """A call that ends when its result is there."""
    return lambda: jax.block_until_ready(fn(*args))


def xla_methods(x: jax.Array, w: jax.Array) -> list[Method]:
    """XLA's own products."""
    scale = jnp.abs(w).max(axis=0, keepdims=True) / 127
    codes = jnp.rint(w / scale).astype(jnp.int8)
    narrow = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    return [
        Method(name=name, version=jax.__version__, call=waited(*call), read_bytes=call[2].nbytes)
        for name, call in {
            "XLA f32": (float_dot, x, w),
            "XLA bf16": (float_dot, *narrow),
            "XLA int8": (int8_dot, x, codes, scale),
        }.items()
    ]


def pbjax_methods(x: jax.Array, w: jax.Array) -> list[Method]:
    """Numbers of bitlayers by widths of activations, and sweeps."""
    packed = pbjax.quantize({"kernel": w}, BITS)["kernel"]
    methods = []
    for width in ACTIVATION_BITS:
        product = functools.partial(pbjax.matmul, activation_bits=width, backend="cpu")
        run = jax.jit(lambda x, w, b, product=product: product(x, w, bitlayers=b))
        sweep = jax.jit(jax.vmap(run, in_axes=(None, None, 0)))
        common = dict(version=importlib.metadata.version("pbjax"), activation_bits=width)
        for used in BITLAYERS:
            call = waited(run, x, packed, jnp.int32(used))
            read = packed.words.nbytes * used // BITS
            methods.append(Method(name="pbjax", call=call, bitlayers=used, read_bytes=read, **common))
        if len(x) <= SWEEP_ROWS:
            call = waited(sweep, x, packed, jnp.arange(1, BITS + 1))
            read = packed.words.nbytes
            methods.append(Method(name="pbjax sweep", call=call, bitlayers=BITS, read_bytes=read, **common))
    return methods


def qwix_methods(x: jax.Array, w: jax.Array) -> list[Method]:
    """Quantized products of qwix, weights and activations."""
    if importlib.util.find_spec("qwix") is None:
        return []
    import qwix
    from qwix._src.core import dot_general, qarray  # its public entry points take whole models

    methods = []
    for name, dtype in (("qwix int8", jnp.int8), ("qwix int4", jnp.int4)):
        how = functools.partial(qarray.HowToQuantize, calibration_method="absmax", tiled_axes={})
        weight = qarray.quantize(w, how(qtype=dtype, channelwise_axes=(1,)))

        def product(x, weight, how=how):
            rows = qarray.quantize(x, how(qtype=jnp.int8, channelwise_axes=(0,)))
            return dot_general.dot_general(rows, weight, (((1,), (0,)), ((), ())))

        version = getattr(qwix, "__version__", "")
        methods.append(Method(name=name, version=version, call=waited(jax.jit(product), x, weight)))
    return methods


def torch_methods(x: np.ndarray, w: np.ndarray, threads: int) -> list[Method]:
    """PyTorch's float32 product and its dynamic int8 linear layer."""
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    torch.set_num_threads(threads)
    layer = torch.nn.Linear(w.shape[0], w.shape[1], bias=False)
    layer.weight.data = torch.from_numpy(np.array(w.T, order="C"))
    with warnings.catch_warnings(action="ignore"):  # that torchao, a package of its own, is to replace it
        dynamic = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(layer), {torch.nn.Linear}, torch.qint8)
    rows = torch.from_numpy(np.array(x))

    def call(module):
        with torch.inference_mode():
            return module(rows)

    return [
        Method(name=name, version=torch.__version__, call=functools.partial(call, module))
        for name, module in (("PyTorch f32", layer), ("PyTorch dynamic int8", dynamic))
    ]


def onnx_methods(x: np.ndarray, w: np.ndarray, threads: int) -> list[Method]:
    """ONNX Runtime's MatMulNBits: 4 bits in blocks of 32, activations in float32 and in int8."""
    if importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnx") is None:
        return []
    import onnx
    import onnxruntime

    k, n = w.shape
    rng = np.random.default_rng(0)
    packed = rng.integers(0, 256, (n, k // 32, 16), dtype=np.uint8)
    scales = rng.uniform(0.01, 0.02, n * k // 32).astype(np.float32)
    methods = []
    for name, level in (("ONNX Runtime 4-bit, f32", 1), ("ONNX Runtime 4-bit, int8", 4)):
        node = onnx.helper.make_node(
            "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=k, N=n, bits=4, block_size=32,
            accuracy_level=level,
        )  # fmt: skip
        graph = onnx.helper.make_graph(
            [node],
            "product",
            [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
            [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (x.shape[0], n))],
            [onnx.numpy_helper.from_array(packed, "w"), onnx.numpy_helper.from_array(scales, "s")],
        )
        opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        call = functools.partial(session.run, None, {"x": np.asarray(x)})
        methods.append(Method(name=name, version=onnxruntime.__version__, call=call, spin_s=ONNX_SPIN_S))
    return methods


def read_method(size: int, threads: int, passes: int) -> Method:
    """The largest of many int32, a part for each thread: the rate at which that many bytes are read, over and over."""
    parts = np.array_split(np.random.default_rng(0).integers(0, 2**31, size // 4, dtype=np.int32), threads)
    pool = concurrent.futures.ThreadPoolExecutor(threads)

    def read(part):
        for _ in range(passes):
            part.max()

    return Method(
        name="read",
        version=np.__version__,
        call=lambda: list(pool.map(read, parts)),
        read_bytes=size,
        passes=passes,
    )


def is_repeated(method: Method) -> bool:
    """Whether a method is timed alone, too."""
    return method.name == "XLA f32" or (
        method.name == "pbjax" and method.bitlayers > 1 and method.activation_bits is not None
    )


def warm_up(call: Callable[[], Any], seconds: float) -> None:
    """Calls it until a time has passed, once at least."""
    end = time.perf_counter() + seconds
    call()
    while time.perf_counter() < end:
        call()


def timed(call: Callable[[], Any], seconds: float) -> float:
    """The median time of one call in microseconds, of as many as start before a time has passed, one at least."""
    times = []
    start = now = time.perf_counter()
    while not times or now < start + seconds:
        call()
        before, now = now, time.perf_counter()
        times.append(now - before)
    return float(np.median(times)) * 1e6


def measure(m: int, size: int, *, cold: bool, repeats: int, max_seconds: float) -> list[Row]:
    """The rows of one shape."""
    threads = os.cpu_count() or 1
    x_key, w_key = jax.random.split(jax.random.key(0))
    x, w = jax.random.normal(x_key, (m, size)), jax.random.normal(w_key, (size, size)) / size**0.5
    arrays = np.asarray(x), np.asarray(w)
    methods = [*xla_methods(x, w), *qwix_methods(x, w), *torch_methods(*arrays, threads)]
    methods += [*onnx_methods(*arrays, threads), *pbjax_methods(x, w)]
    flush = read_method(FLUSH_BYTES, threads, 1).call
    read = read_method(size * size * BITS // 8, threads, 1 if cold else READ_BYTES // size**2)
    alone = [
        read,
        *(dataclasses.replace(method, name=f"{method.name}, repeated") for method in methods if is_repeated(method)),
    ]
    times = [[] for _ in methods + alone]
    for method, its in zip(alone, times[len(methods) :], strict=True):
        for _ in range(ALONE_REPEATS):
            flush() if cold else warm_up(method.call, ALONE_S)
            its.append(timed(method.call, 0.0 if cold else ALONE_S) / method.passes)
    slow = set()
    for i, method in enumerate(methods):
        method.call()
        start = time.perf_counter()
        method.call()
        if time.perf_counter() - start > 0.05:
            slow.add(i)
    deadline = time.perf_counter() + max_seconds
    for turn in range(repeats):
        if turn >= 5 and time.perf_counter() > deadline:
            break
        for i, method in enumerate(methods):
            if i in slow and turn % 5:
                continue
            time.sleep(PAUSE_S)
            flush()
            if not cold:
                warm_up(method.call, WARM_S)
            times[i].append(timed(method.call, 0.0 if cold else WARM_S))
            if method.spin_s:
                warm_up(flush, method.spin_s)
    methods += alone
    medians = {method.name: float(np.median(t)) for method, t in zip(methods, times, strict=True)}
    rows = []
    for method, t in zip(methods, times, strict=True):
        p20, median, p80 = (float(value) for value in np.percentile(t, (20, 50, 80)))
        rows.append(
            Row(
                date=datetime.datetime.now(datetime.UTC).date().isoformat(),
                cpu=cpu_model(),
                threads=threads,
                cache="cold" if cold else "warm",
                m=m,
                k=size,
                n=size,
                method=method.name,
                version=method.version,
                bitlayers=method.bitlayers,
                activation_bits=method.activation_bits,
                repeats=len(t),
                median_us=round(median, 1),
                p20_us=round(p20, 1),
                p80_us=round(p80, 1),
                speedup_over_f32=round(medians["XLA f32"] / median, 3),
                read_gb_per_s=method.read_bytes and round(method.read_bytes / median / 1e3, 1),
            )
        )
    return rows


def make_table(rows: Sequence[Row]) -> rich.table.Table:
    """Median times and ratios."""
    table = rich.table.Table(title="medians, and speed relative to XLA's float32 product (more is faster)")
    for name in ("m", "k x n", "cache", "method", "bitlayers", "A", "ms", "speed", "GB/s"):
        table.add_column(name, justify="right")
    for row in rows:
        width = ("float" if row.activation_bits is None else str(row.activation_bits)) if row.bitlayers else ""
        table.add_row(
            str(row.m), f"{row.k} x {row.n}", row.cache, row.method, str(row.bitlayers or ""), width,
            f"{row.median_us / 1e3:.3f}", f"{row.speedup_over_f32:.2f}",
            "" if row.read_gb_per_s is None else f"{row.read_gb_per_s:.1f}",
        )  # fmt: skip
    return table


def plot(rows: Sequence[Row], path: Path) -> None:
    """Speeds of one row of activations, a panel for each size and state of the cache."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = sorted({(row.k, row.cache) for row in rows if row.m == 1})
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4.2), squeeze=False, layout="constrained")
    for axis, (size, cache) in zip(axes[0], panels, strict=True):
        here = [row for row in rows if (row.m, row.k, row.cache) == (1, size, cache) and row.method != "read"]
        for width in ACTIVATION_BITS:
            line = [row for row in here if row.method == "pbjax" and row.activation_bits == width]
            label = "pbjax, float activations" if width is None else f"pbjax, {width}-bit activations"
            axis.plot([row.bitlayers for row in line], [row.speedup_over_f32 for row in line], "o-", label=label)
        peers = [row for row in here if not row.method.startswith("pbjax")]
        for row, color in zip(peers, plt.get_cmap("tab20")(np.linspace(0, 1, len(peers))), strict=True):
            axis.axhline(row.speedup_over_f32, linestyle="--", linewidth=1, color=color, label=row.method)
        axis.set(xscale="log", yscale="log", xticks=BITLAYERS, xticklabels=BITLAYERS, xlabel="bitlayers")
        axis.minorticks_off()
        axis.set_title(f"one row, {size} x {size}, {cache} cache")
    axes[0][0].set_ylabel("speed relative to XLA's float32 product")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the benchmark with command line arguments, and returns its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--m", type=int, nargs="+", default=[1, 8, 64, 256], metavar="M", help="rows (default: %(default)s)")
    add("--size", type=int, nargs="+", default=[4096, 8192], help="of square weights (default: %(default)s)")
    add("--repeats", type=int, default=40, help="times taken of each (default: %(default)s)")
    add("--max-seconds", type=float, default=20.0, help="per shape; may reduce the repeats (default: %(default)s)")
    add("--cold", action="store_true", help="read 256 MiB before each call")
    add("--output", type=Path, metavar="FILE", help="where the CSV goes (default: stdout)")
    add("--plot", type=Path, metavar="FILE", help="where a plot goes, if anywhere")
    args = parser.parse_args(argv)
    rows = []
    for size in args.size:
        for m in args.m:
            rows += measure(m, size, cold=args.cold, repeats=args.repeats, max_seconds=args.max_seconds)
    with open(args.output, "w", newline="") if args.output else sys.stdout as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(map(dataclasses.asdict, rows))
        if args.plot:
            plot(rows, args.plot)
        rich.console.Console(stderr=True).print(make_table(rows))
    return rows


if __name__ == "__main__":
    main()
