"""Compiles every kernel that the heuristics choose for the benchmark's shapes, without a GPU, into a CSV.

    python -m tests.gpu_compile.survey

writes examples/benchmarks/results/gpu_machine_code.csv and gpu_launches.csv, from which `examples/benchmarks/tables.py`
makes the tables of docs/gpu.md. A row is a product, or a sweep, on one device; shapes whose numbers are all the same
share it. Columns are those of `Row`; their formulas stand in `bounds`.

A kernel is compiled once for all shapes that differ in sizes alone: what its code depends on is `_key`, which the tests
compare. How many programs it is launched with follows from the traced function, without compiling.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import dataclasses
import functools
import itertools
import math
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX is imported
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # of libraries that run on a GPU

import jax
import jax.extend.core
import jax.numpy as jnp

from pallas_kernels.bit_matmul import _mosaic_kernel, _triton_dot, contract, mosaic, triton
from pbjax import _backends, _partition
from tests.gpu_compile import bounds, machine_code

RESULTS = pathlib.Path(__file__).parents[2] / "examples" / "benchmarks" / "results"
ROWS = (1, 2, 4, 8, 16, 32, 64, 256)
SIZES = ((4096, 4096), (8192, 8192), (4096, 14336), (14336, 4096), (8192, 28672))
WIDTHS = (8, 16, None)
FLOAT = jnp.bfloat16  # activations without a width
BITS = tuple(range(1, 9))
STORED = 8  # of which all smaller numbers are taken where the code is the same
BACKENDS: Mapping[str, ModuleType] = {"mosaic": mosaic, "triton": triton}
DEVICES = {"h200": ("mosaic", "triton"), "a100": ("triton",), "b200": ("mosaic",)}
FEATURES, HIDDEN, CLASSES = 64, 4096, 10  # the network of examples/benchmarks/gpu_network.py
GRAPHS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "xla_gpu_graph_min_graph_size=1": {"xla_gpu_graph_min_graph_size": 1},
    "xla_gpu_enable_command_buffer=": {"xla_gpu_enable_command_buffer": ""},
}
UNITS = {"bmma": ("BMMA",), "imma": ("IMMA", "IGMMA"), "hmma": ("HMMA", "HGMMA"), "popc": ("POPC",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A product, or a sweep, of all shapes that have these numbers.

    Attributes:
      device: a key of `machine_code.GPUS`.
      backend: "mosaic" or "triton".
      kernel: that reads the words.
      sweep: whether it returns the product at every number of bitlayers.
      m: rows of activations.
      activation_bits: of fixed-point activations; None are bfloat16 ones.
      bits: stored.
      bitlayers: in use: numbers with spaces between them, as in all columns that depend on it. With 8 stored they are 1
        to 8, with fewer, or in a sweep, all.
      sizes: of the weight, k x n.
      config: launch parameters.
      registers: of a lane.
      shared_bytes: of a program.
      local_bytes: spilled or on the stack, of a lane.
      load_bytes: the narrowest load in the innermost loops over words; without loops, the most frequent one.
      bmma, imma, hmma, popc: instructions in the kernel, those of warpgroups included.
      programs: of the launch.
      warps_per_sm: that fit.
      instructions_per_word: of a lane, in the loops over words; without a loop, of the whole kernel.
      bytes_in_flight: on an SM, as `bounds.Work.bytes_in_flight`.
      covered_ns: the latency up to which they are enough.
      issue: how many times the memory's rate instructions of the loops can be issued.
      program: likewise, of whole programs.
      unit: likewise, of the busiest unit whose rate is known.
      traffic: likewise, if all that kernels and dots read and write beside the words went through the memory, once.
      launches: of one product, XLA's own kernels included.
      other_kernels_local_bytes: spilled or on the stack in the other kernels of the product.
    """

    device: str
    backend: str
    kernel: str
    sweep: bool
    m: int
    activation_bits: int | None
    bits: int
    bitlayers: str
    sizes: str
    config: str
    registers: int
    shared_bytes: int
    local_bytes: int
    load_bytes: int
    bmma: int
    imma: int
    hmma: int
    popc: int
    programs: int
    warps_per_sm: int
    instructions_per_word: str
    bytes_in_flight: int
    covered_ns: int
    issue: str
    program: str
    unit: str
    traffic: str
    launches: int
    other_kernels_local_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """Launches of the digits network for one image, on an H200, under one set of flags."""

    backend: str  # of pbjax, or "dot" for XLA's own
    method: str  # "float32", "bfloat16" or "bitlayers"
    flags: str
    launches: int
    in_graphs: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """One thing to look at."""

    device: str
    backend: str
    problem: contract.Problem
    sweep: bool

    @property
    def config(self) -> Any:
        """That of the heuristics; sweeps of floats are cut in one way."""
        if self.backend == "mosaic":
            return mosaic.config_for(self.problem)
        config = triton.config_for(self.problem, FLOAT)
        if self.sweep and isinstance(config, triton.DotRowsConfig | triton.UnpackConfig):
            return _triton_dot.config_for(self.problem, jnp.dtype(FLOAT))
        return config


def products(devices: Sequence[str] = tuple(DEVICES), bits: Sequence[int] = BITS) -> Iterator[Product]:
    """Everything that the backends of the devices can run."""
    for device, width, m, (k, n) in itertools.product(devices, WIDTHS, ROWS, SIZES):
        for backend, num in itertools.product(DEVICES[device], sorted(bits, reverse=True)):
            problem = contract.Problem(m=m, k=k, n=n, bits=num, group_size=None, activation_bits=width)
            if BACKENDS[backend].unsupported(problem):
                continue
            product = Product(device=device, backend=backend, problem=problem, sweep=False)
            if num == STORED:
                yield from (product, dataclasses.replace(product, sweep=True))
            elif _unrolled(product):
                yield product


def _unrolled(product: Product) -> bool:
    """Whether the kernel has code for each stored bitlayer, and is another one where fewer are stored."""
    return isinstance(product.config, triton.Int8Config | triton.DotConfig | triton.DotRowsConfig | triton.UnpackConfig)


def _key(product: Product) -> tuple[Any, ...]:
    """Of products with one key the kernels have the same instructions, but for constants and a few for addresses."""
    config, problem = product.config, product.problem
    if isinstance(config, triton.Int8Config) and config.parts is not None:
        config = dataclasses.replace(config, parts=1)  # where they begin is read from memory
    return (
        product.device,
        product.backend,
        product.sweep,
        problem.m,
        problem.bits,
        problem.activation_bits,
        config,
        problem.n % getattr(config, "block_n", 1) == 0,
        problem.num_words % getattr(config, "split_words", 1) == 0,
        # How the 1-bit kernel makes addresses depends on the strides; XLA's dot has launches of its own for each shape.
        (problem.k, problem.n) if isinstance(config, mosaic.Config | triton.UnpackConfig) else None,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What was compiled for all products of a key."""

    kernel: machine_code.Kernel
    shared_bytes: int
    launches: int
    other_kernels_local_bytes: int


def compile_product(product: Product) -> Compiled:
    """All that a product of pbjax is on the device."""
    choice = _backends.Choice(_backends.BACKENDS[product.backend])
    run = functools.partial(_partition._of_rows, choice, product.problem, product.sweep)
    kernels, launches = machine_code.compile_all(run, *described(product), gpu=product.device)
    prefix = _FAMILIES[type(product.config)].name
    (kernel,) = [kernel for kernel in kernels if kernel.name.startswith(prefix)]
    given = [launch.shared_bytes for launch in launches if launch.name == kernel.name]
    shared = max([kernel.shared_bytes, *given])
    if product.backend == "mosaic":  # XLA does not know what the launch gives
        plan = _mosaic_kernel.Plan(problem=product.problem, config=product.config, sweep=product.sweep)
        shared = max(shared, 4 * math.prod(plan.scratch_shape) if plan.config.warps_k > 1 else 0)
    return Compiled(
        kernel=kernel,
        shared_bytes=shared,
        launches=len(launches),
        other_kernels_local_bytes=sum(_local_bytes(other) for other in kernels if other is not kernel),
    )


def described(product: Product) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The operands of `_of_rows`."""
    problem = product.problem
    dtype = FLOAT if problem.activation_bits is None else jnp.float32
    return (
        jax.ShapeDtypeStruct((problem.m, problem.k), dtype),
        jax.ShapeDtypeStruct((problem.bits, problem.num_words, problem.n), jnp.uint32),
        jax.ShapeDtypeStruct((min(problem.bits, contract.NUM_SCALES), problem.groups, problem.n), jnp.float32),
        jax.ShapeDtypeStruct(() if product.sweep else (problem.m,), jnp.int32),
    )


def _local_bytes(kernel: machine_code.Kernel) -> int:
    return max(kernel.stack_bytes, kernel.spill_bytes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How the loops of one kernel go through the words.

    Attributes:
      name: the start of the kernel's name, of a product.
      loops: over words, from the kernel, the product, and the words of one bitlayer for each lane of a program.
    """

    name: str
    loops: Callable[[machine_code.Kernel, Product, float], tuple[bounds.Loop, ...]]


def _having(loops: Sequence[tuple[str, ...]], *prefixes: str) -> list[tuple[str, ...]]:
    """Those in which one of the instructions is."""
    return [loop for loop in loops if any(machine_code.count(loop, prefix) for prefix in prefixes)]


def _bitlayer_loops(kernel: machine_code.Kernel, product: Product, words: float) -> tuple[bounds.Loop, ...]:
    """One loop over bitlayers, all of whose 16-byte loads are of words, and perhaps one over blocks around it."""
    (loop,) = _having(kernel.loops, "LDG.E.128")
    of_turn = sum(bounds.width(opcode) for opcode in loop if opcode.startswith("LDG.E.128")) / 4
    called = _called(kernel) if machine_code.count(loop, "CALL") else ()
    inner = bounds.Loop(opcodes=loop, turns=lambda used: words * used / of_turn, called=called)
    if product.sweep:  # bitlayers outside, blocks inside
        outer = [bounds.Loop(opcodes=own, turns=lambda used: used) for own in kernel.outer_loops]
    else:
        outer = [bounds.Loop(opcodes=own, turns=lambda used: words / of_turn) for own in kernel.outer_loops]
    return inner, *outer


def _called(kernel: machine_code.Kernel) -> tuple[str, ...]:
    """The one function that a kernel calls, behind its end; none where no call returns, for those are jumps."""
    ends = [i for i, opcode in enumerate(kernel.opcodes) if opcode.startswith("EXIT")]
    returns = [i for i, opcode in enumerate(kernel.opcodes) if opcode.startswith("RET")]
    if not returns:
        return ()
    (stop,) = returns
    start = max(end for end in ends if end < stop) + 1
    return kernel.opcodes[start : stop + 1]


def _lane_words(product: Product) -> float:
    """Words of one bitlayer in a block of a Triton kernel, for each lane."""
    config = product.config
    return config.block_words * config.block_n / (bounds.LANES * config.num_warps)


def _block_loops(kernel: machine_code.Kernel, product: Product, words: float) -> tuple[bounds.Loop, ...]:
    """A loop over blocks of words for each pass over limbs; its instructions are those of all stored bitlayers."""
    turns = words / _lane_words(product)
    loops = _having(kernel.loops, "IMMA", "IGMMA", "HMMA", "HGMMA")
    bits = product.problem.bits if product.sweep else 1  # a program takes one bitlayer of a sweep
    return tuple(bounds.Loop(opcodes=loop, turns=lambda used: turns * bits) for loop in loops)


def _no_loops(kernel: machine_code.Kernel, product: Product, words: float) -> tuple[bounds.Loop, ...]:
    """All words of a program in straight code."""
    del product, words
    assert not kernel.loops, "a kernel without loops over words has got one"
    return ()


# Where a kernel's loops change, its functions here have to; where there is none for a kernel, that is an error.
_FAMILIES: Mapping[type, Family] = {
    mosaic.Config: Family(name="bit_matmul_mosaic", loops=_bitlayer_loops),
    triton.SerialConfig: Family(name="bit_matmul_serial", loops=_bitlayer_loops),
    triton.Int8Config: Family(name="bit_matmul_int8", loops=_block_loops),
    triton.DotConfig: Family(name="bit_matmul_dot", loops=_block_loops),
    triton.DotRowsConfig: Family(name="bit_matmul_dot_rows", loops=_block_loops),
    triton.UnpackConfig: Family(name="bit_matmul_unpack", loops=_no_loops),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traced:
    """What the traced product says of its launches.

    Attributes:
      programs: of the kernel that reads the words.
      warps: of one of them.
      other_bytes: that kernels and dots read and write, each once, beside the words.
    """

    programs: int
    warps: int
    other_bytes: int


def trace(product: Product) -> Traced:
    """Follows a product as far as its kernels, without compiling."""
    module, problem = BACKENDS[product.backend], product.problem
    run = module.prefixes if product.sweep else module.matmul

    def whole(x, *weight):
        if problem.activation_bits is not None:
            x, _, _ = module.quantize_rows(problem, x)
        return run(problem, x, *weight)

    with jax.sharding.use_abstract_mesh(machine_code.mesh(product.device)):
        jaxpr = jax.make_jaxpr(whole)(*described(product)).jaxpr
    words = (problem.bits, problem.num_words, problem.n)
    found, other = None, 0
    for eqn in _kernels_and_dots(jaxpr):
        avals = [var.aval for var in (*eqn.invars, *eqn.outvars)]
        reads_words = any(aval.shape == words and aval.dtype == jnp.uint32 for aval in avals)
        other += sum(aval.size * aval.dtype.itemsize for aval in avals if aval.shape != words)
        ours = (eqn.params.get("name") or "").startswith(_FAMILIES[type(product.config)].name)
        if reads_words and (ours or product.backend == "mosaic"):
            found = eqn
    assert found is not None, f"no kernel of {product} reads the words"
    if product.backend == "mosaic":
        grid = _mosaic_kernel.Plan(problem=problem, config=product.config, sweep=product.sweep).grid
        return Traced(programs=math.prod(grid), warps=_mosaic_kernel.WARPS, other_bytes=other)
    grid, params = found.params["grid_mapping"].grid, found.params["compiler_params"]
    return Traced(programs=math.prod(grid), warps=params.num_warps, other_bytes=other)


def _kernels_and_dots(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("pallas_call", "mpmd_map", "core_map", "dot_general"):
            yield eqn
            continue
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, jax.extend.core.ClosedJaxpr):
                    yield from _kernels_and_dots(inner.jaxpr)
                elif isinstance(inner, jax.extend.core.Jaxpr):
                    yield from _kernels_and_dots(inner)


def row_blocks(product: Product) -> int:
    """How often the words are read."""
    rows = getattr(product.config, "rows", None) or getattr(product.config, "block_rows", product.problem.m)
    return -(-product.problem.m // rows)


def row_of(product: Product, compiled: Compiled) -> Row:
    """What is known of one product."""
    problem, traced, kernel = product.problem, trace(product), compiled.kernel
    words = problem.num_words * problem.n
    lane_words = words * row_blocks(product) / (traced.programs * traced.warps * bounds.LANES)
    work = bounds.Work(
        kernel=kernel,
        gpu=product.device,
        loops=_FAMILIES[type(product.config)].loops(kernel, product, lane_words),
        programs=traced.programs,
        warps=traced.warps,
        shared_bytes=compiled.shared_bytes,
        words=words,
        tensor_operations=_tensor_operations(product),
    )
    counts = (problem.bits,) if product.sweep or problem.bits < STORED else BITS

    def by_count(value: Callable[[int], float | None]) -> str:
        values = [value(used) for used in counts]
        return " ".join("" if value is None else f"{value:.3g}" for value in values).strip()

    return Row(
        device=product.device,
        backend=product.backend,
        kernel=kernel.name.removeprefix("bit_matmul_").removesuffix("_gpu_kernel"),
        sweep=product.sweep,
        m=problem.m,
        activation_bits=problem.activation_bits,
        bits=problem.bits,
        bitlayers=" ".join(map(str, counts)),
        sizes=f"{problem.k}x{problem.n}",
        config=" ".join(f"{name}={value}" for name, value in dataclasses.asdict(product.config).items()),
        registers=kernel.registers,
        shared_bytes=compiled.shared_bytes,
        local_bytes=_local_bytes(kernel),
        load_bytes=work.load_bytes,
        **{name: sum(kernel.count(prefix) for prefix in prefixes) for name, prefixes in UNITS.items()},
        programs=traced.programs,
        warps_per_sm=work.warps_per_sm,
        instructions_per_word=by_count(lambda used: work.instructions(used) / (lane_words * used)),
        bytes_in_flight=round(work.bytes_in_flight),
        covered_ns=round(work.covered_ns),
        issue=by_count(work.issue),
        program=by_count(lambda used: work.issue(used, whole=True)),
        unit=by_count(work.unit),
        traffic=by_count(lambda used: 4 * words * used / (4 * words * used + traced.other_bytes)),
        launches=compiled.launches,
        other_kernels_local_bytes=compiled.other_kernels_local_bytes,
    )


def _tensor_operations(product: Product) -> tuple[str, float] | None:
    """Of a dense product of all rows, limbs and parts; blocks of rows that are not full count as full."""
    problem, config = product.problem, product.config
    if isinstance(config, triton.Int8Config):
        operands, factor = "int8", problem.activation_limbs
    elif isinstance(config, triton.DotConfig | triton.DotRowsConfig):
        operands, factor = "bf16", 1  # of bfloat16 activations
    else:
        return None
    sums = problem.bits if product.sweep else len(problem.code_limbs)
    return operands, 2.0 * row_blocks(product) * config.block_rows * problem.k * problem.n * factor * sums


def networks() -> list[Network]:
    """The digits network for one image, with the flags that the GPU benchmark times."""
    layers = ((FEATURES, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, CLASSES))

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    def on_floats(weights, x):
        for kernel, bias in weights[:-1]:
            x = jax.nn.relu(x @ kernel + bias)
        return x @ weights[-1][0] + weights[-1][1]

    def on_bitlayers(backend, weights, x):
        for i, (words, scale, bias) in enumerate(weights):
            _, num_words, n = words.shape
            problem = contract.Problem(
                m=1, k=num_words * contract.WORD_BITS, n=n, bits=STORED, group_size=None, activation_bits=16
            )
            counts = jnp.full((1,), STORED, jnp.int32)
            choice = _backends.Choice(_backends.BACKENDS[backend])
            x = (
                _partition._of_rows(choice, problem, False, jax.nn.relu(x) if i else x, words, scale, counts)
                + bias[None]
            )
        return x

    methods: list[tuple[str, str, Callable[..., Any], Any, Any]] = []
    for dtype in (jnp.float32, jnp.bfloat16):
        weights = [(array(dtype, k, n), array(dtype, 1, n)) for k, n in layers]
        methods.append(("dot", dtype.__name__, on_floats, weights, array(dtype, 1, FEATURES)))
    packed = [
        (array(jnp.uint32, STORED, k // contract.WORD_BITS, n), array(jnp.float32, 4, 1, n), array(jnp.float32, n))
        for k, n in layers
    ]
    methods += [
        (name, "bitlayers", functools.partial(on_bitlayers, name), packed, array(jnp.float32, 1, FEATURES))
        for name in BACKENDS
    ]
    found = []
    for (backend, method, fn, weights, x), (flags, options) in itertools.product(methods, GRAPHS.items()):
        launches = machine_code.compile_launches(fn, weights, x, gpu="h200", options=options)
        inside = sum(launch.in_command_buffer for launch in launches)
        found.append(Network(backend=backend, method=method, flags=flags, launches=len(launches), in_graphs=inside))
    return found


def merged(rows: Sequence[Row]) -> list[Row]:
    """Rows that differ in sizes alone as one."""
    sizes: dict[Row, list[str]] = {}
    for row in rows:
        sizes.setdefault(dataclasses.replace(row, sizes=""), []).append(row.sizes)
    return [dataclasses.replace(row, sizes=" ".join(names)) for row, names in sizes.items()]


def survey(devices: Sequence[str], bits: Sequence[int], jobs: int) -> list[Row]:
    """Everything, each key compiled once, side by side; Mosaic GPU takes one device to a process."""
    by_key: dict[tuple[Any, ...], list[Product]] = {}
    for product in products(devices, bits):
        by_key.setdefault(_key(product), []).append(product)
    rows: dict[Product, Row] = {}
    for device in devices:
        groups = [group for key, group in by_key.items() if key[0] == device]
        start = time.monotonic()
        with _pool(jobs) as pool:
            for group_rows in pool.map(_rows_of_group, groups):
                rows.update(group_rows)
        seconds = time.monotonic() - start
        sys.stdout.write(f"{device}: {sum(map(len, groups))} products, {len(groups)} compiled, {seconds:.0f} s\n")
    return merged([rows[product] for product in products(devices, bits)])


def _pool(jobs: int) -> concurrent.futures.ProcessPoolExecutor:
    return concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))


def _rows_of_group(group: Sequence[Product]) -> dict[Product, Row]:
    compiled = compile_product(group[0])
    return {product: row_of(product, compiled) for product in group}


def write(path: pathlib.Path, rows: Sequence[Any]) -> None:
    """A CSV of dataclasses."""
    with path.open("w", newline="") as file:
        lines = csv.DictWriter(file, [field.name for field in dataclasses.fields(rows[0])], lineterminator="\n")
        lines.writeheader()
        lines.writerows(map(dataclasses.asdict, rows))


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_compile.survey", description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS, help="a folder (default: %(default)s)")
    parser.add_argument("--device", nargs="+", choices=DEVICES, default=list(DEVICES), help="(default: all)")
    parser.add_argument("--bits", type=int, nargs="+", choices=BITS, default=[STORED], help="stored (default: 8)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    args = parser.parse_args(argv)
    if reason := machine_code.unavailable():
        sys.exit(f"cannot compile for a GPU here: {reason}")
    rows = survey(args.device, args.bits, args.jobs)
    write(args.output / "gpu_machine_code.csv", rows)
    with _pool(1) as pool:
        write(args.output / "gpu_launches.csv", pool.submit(networks).result())
    sys.stdout.write(f"{len(rows)} rows in {args.output}\n")


if __name__ == "__main__":
    main()
