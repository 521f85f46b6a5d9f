"""What a product is on a GPU beside its own kernel, and what of a network goes into one CUDA graph."""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.bit_matmul import contract
from pbjax import _backends, _partition
from tests.gpu_compile import machine_code

_missing = machine_code.reason_to_skip()
pytestmark = [
    pytest.mark.gpu_compile,
    pytest.mark.skipif(_missing is not None, reason=f"cannot compile for a GPU here: {_missing}"),
    # JAX 0.11 and later say so at every lowering; there is no other lowering of `pallas_call` for a GPU.
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]

CALL = ("kCustomCall", "kCustomCall")  # Mosaic GPU: XLA does not know the name of the kernel
_OF_A_SWEEP = 6  # of XLA's, with 256 rows
_FLOATS = {(64, None): 5, (64, 128): 5, (256, None): 6, (256, 128): 7, (1024, None): 11}  # rows and group size


def in_own_process(fn, *args):
    """Mosaic GPU compiles for the first GPU that a process was asked for, and in other tests come others."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(fn, *args).result()


@pytest.mark.parametrize("sweep", [False, True], ids=["product", "sweep"])
@pytest.mark.parametrize(
    ("backend", "m", "width", "k", "group_size"),
    [("mosaic", m, width, 4096, None) for m, width in ((1, 8), (1, 24), (8, 16), (32, 8))]
    + [("mosaic", 1, 16, 14336, None), ("mosaic", 1, 16, 4096, 128), ("mosaic", 8, 8, 4096, 32)]
    + [("triton", 1, 8, 4096, None), ("triton", 1, 24, 14336, None)]
    + [("triton", 1, 16, 4096, 128), ("triton", 4, 8, 4096, 32)],
)
def test_few_rows_are_three_launches(backend, m, width, k, group_size, sweep):
    """Rows are packed in one kernel and finished in one, groups or not: no loop of XLA's, which waits for the host."""
    problem = contract.Problem(m=m, k=k, n=4096, bits=8, group_size=group_size, activation_bits=width)
    launches = in_own_process(launches_of, backend, problem, sweep)
    if sweep:
        launches = [launch for launch in launches if not launch.name.startswith("loop_")]
    first, product, last = launches
    assert first.name == "bit_matmul_pack"
    assert (product.kind, product.name) == CALL or product.name == "bit_matmul_serial"
    assert last.name == "bit_matmul_epilogue"


@pytest.mark.parametrize("sweep", [False, True], ids=["product", "sweep"])
@pytest.mark.parametrize("group_size", [None, 128])
@pytest.mark.parametrize(("m", "width"), [(8, 8), (64, 8), (64, 16), (65, 8), (256, 16)])
def test_many_rows(m, width, group_size, sweep):
    """Limbs, the order of rows where they are several blocks, the product and its end; of a sweep, XLA's end."""
    problem = contract.Problem(m=m, k=4096, n=4096, bits=8, group_size=group_size, activation_bits=width)
    launches = in_own_process(launches_of, "triton", problem, sweep)
    names = [launch.name for launch in launches]
    ours = ["bit_matmul_int8_sweep" if sweep and group_size is None else "bit_matmul_int8", "bit_matmul_pack"]
    ours += ["bit_matmul_order"] * (m > 64 and not sweep) + ["bit_matmul_epilogue"] * (not sweep and group_size is None)
    assert sorted(name for name in names if name.startswith("bit_matmul")) == sorted(ours)
    assert not {launch.kind for launch in launches} & {"kWhile", "kConditional"}, launches
    assert len(launches) <= len(ours) + _OF_A_SWEEP * sweep, launches


@pytest.mark.parametrize(("m", "group_size"), [(64, None), (64, 128), (256, None), (256, 128), (1024, None)])
def test_float_activations(m, group_size):
    """No loop of XLA's either, whatever the numbers of bitlayers; from 1024 rows on, the dot in between is XLA's."""
    problem = contract.Problem(m=m, k=4096, n=4096, bits=8, group_size=group_size, activation_bits=None)
    launches = in_own_process(launches_of, "triton", problem, False)
    names = [launch.name for launch in launches if "bit_matmul" in launch.name]
    few, many = ["bit_matmul_dot"], ["bit_matmul_dot_rows", "bit_matmul_order"]
    dots = few if m == 64 else [*few, "bit_matmul_order"] if group_size else many
    assert sorted(names) == dots + ["bit_matmul_unpack"] * (m == 1024)
    assert len(launches) <= _FLOATS[m, group_size]
    assert not {launch.kind for launch in launches} & {"kWhile", "kConditional"}, launches


@pytest.mark.parametrize(
    ("backend", "m", "group_size", "kernel"),
    [("mosaic", 1, 128, "mosaic_gpu"), ("triton", 1, None, "serial"), ("triton", 64, 128, "int8")],
)
def test_devices_that_share_k(backend, m, group_size, kernel):
    """Each runs the product's kernel on its part; one all-reduce, and groups are scaled in one kernel behind it."""
    problem = contract.Problem(m=m, k=4096, n=1024, bits=8, group_size=group_size, activation_bits=8)
    kernels, launches = in_own_process(compile_with_k_cut, backend, problem)
    ours = {found.name: found for found in kernels if found.name.startswith("bit_matmul")}
    assert len(ours) == 1 + (group_size is not None)
    assert any(kernel in name for name in ours)
    assert ("bit_matmul_groups" in ours) == (group_size is not None)
    assert not any(found.spill_bytes or found.uses_local_memory for found in ours.values())
    kinds = [launch.kind for launch in launches]
    assert kinds.count("kAllReduce") == 1
    assert not set(kinds) & {"kWhile", "kConditional"}, launches


def compile_with_k_cut(backend: str, problem: contract.Problem):
    """The program of each of four devices."""
    mesh = Mesh(np.array(machine_code.devices("h200", 4)), ("k",))
    x, words, scale, counts = described(problem)
    specs = P(), P(None, "k"), P(None, "k" if problem.groups > 1 else None), P()
    operands = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))
        for a, spec in zip((x, words, scale, counts), specs, strict=True)
    ]
    choice = _backends.Choice(_backends.BACKENDS[backend])
    run = _partition.partitioned(choice, problem=problem, prefixes=False, axes=())
    return machine_code.compile_all(run, *operands, gpu="h200")


def launches_of(backend: str, problem: contract.Problem, sweep: bool) -> tuple[machine_code.Launch, ...]:
    """All of `pbjax.matmul` but its checks."""
    run = functools.partial(_partition._of_rows, _backends.Choice(_backends.BACKENDS[backend]), problem, sweep)
    return machine_code.compile_launches(run, *described(problem, sweep), gpu="h200")


def described(problem: contract.Problem, sweep: bool = False) -> tuple[jax.ShapeDtypeStruct, ...]:
    return (
        jax.ShapeDtypeStruct((problem.m, problem.k), jnp.float32),
        jax.ShapeDtypeStruct((problem.bits, problem.num_words, problem.n), jnp.uint32),
        jax.ShapeDtypeStruct((4, problem.groups, problem.n), jnp.float32),
        jax.ShapeDtypeStruct(() if sweep else (problem.m,), jnp.int32),
    )


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("backend", ["mosaic", "triton"])
def test_a_network_is_one_graph(backend, group_size):
    """Two layers are more launches than XLA's least for a CUDA graph, 5, and nothing of pbjax stays out of it."""
    network, none, layer, small = in_own_process(launches_of_networks, backend, group_size)
    assert len(network) >= 6
    assert all(launch.in_command_buffer for launch in network), network
    assert not any(launch.in_command_buffer for launch in (*none, *layer))
    assert all(launch.in_command_buffer for launch in small), small


def launches_of_networks(backend: str, group_size: int | None) -> list[tuple[machine_code.Launch, ...]]:
    """Two layers with default flags and without graphs, one layer with default flags and with small graphs."""
    problem = contract.Problem(m=1, k=256, n=256, bits=8, group_size=group_size, activation_bits=16)
    run = functools.partial(_partition._of_rows, _backends.Choice(_backends.BACKENDS[backend]), problem, False)

    def network(x, *weights):
        return run(jax.nn.relu(run(x, *weights)), *weights)

    return [
        machine_code.compile_launches(fn, *described(problem), gpu="h200", options=options)
        for fn, options in (
            (network, {}),
            (network, {"xla_gpu_enable_command_buffer": ""}),
            (run, {}),
            (run, {"xla_gpu_graph_min_graph_size": 1}),
        )
    ]


@pytest.mark.parametrize("gpu", ["h200", "a100"])
@pytest.mark.parametrize(
    ("m", "k", "width"), [(1, 4096, 8), (1, 4096, 16), (1, 14336, 16), (1, 28672, 24), (64, 8192, 8), (64, 8192, 24)]
)
def test_packing_in_machine_code(m, k, width, gpu):
    problem = contract.Problem(m=m, k=k, n=4096, bits=8, group_size=None, activation_bits=width)
    name = "triton"
    run = functools.partial(_backends.BACKENDS[name].quantize_rows, problem)
    (found,) = [
        kernel
        for kernel in machine_code.compile_kernels(run, described(problem)[0], gpu=gpu)
        if kernel.name == "bit_matmul_pack"
    ]
    assert found.spill_bytes == 0
    assert not found.uses_local_memory
    assert found.count("LDG.E.128") >= 8  # the row, on the way to its largest magnitude
    # A fraction that came from an unrounded product would round ties to the wrong side.
    assert found.count("FFMA") == 0
