"""Compiles a JAX function to the machine code of a GPU that is described, not present, and says what is in it.

    for kernel in machine_code.compile_kernels(fn, x, w, gpu="h200"):
        assert kernel.spill_bytes == 0 and kernel.count("POPC") > 0
    assert len(machine_code.compile_launches(fn, x, w, gpu="h200")) == 3

A CPU run cannot show whether a kernel lowers, spills, or loads 16 bytes at a time; this does. XLA compiles for a
topology made from a text, and writes the PTX of every kernel, of Triton and of Mosaic GPU, into a folder; `ptxas`
and `nvdisasm` do the rest. What it needs are wheels, none of them a driver or a library that runs on a GPU:
jax-cuda13-plugin and jax-cuda13-pjrt (without their dependencies, in the version of jax), nvidia-cuda-nvcc,
nvidia-nvvm, nvidia-cuda-crt, nvidia-cuda-nvdisasm. `unavailable()` names what is missing.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """The facts about a GPU that XLA's compiler asks for; from NVIDIA's data sheets and tuning guides."""

    name: str
    capability: tuple[int, int]
    accelerated: bool  # sm_90a rather than sm_90
    num_sms: int
    clock_ghz: float
    memory_bandwidth: int  # bytes per second
    l2_bytes: int
    shared_per_sm: int
    shared_per_block: int


GPUS = {
    "a100": Gpu(
        name="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        accelerated=False,
        num_sms=108,
        clock_ghz=1.41,
        memory_bandwidth=2_039_000_000_000,
        l2_bytes=40 << 20,
        shared_per_sm=164 << 10,
        shared_per_block=163 << 10,
    ),
    "h200": Gpu(
        name="NVIDIA H200",
        capability=(9, 0),
        accelerated=True,
        num_sms=132,
        clock_ghz=1.98,
        memory_bandwidth=4_800_000_000_000,
        l2_bytes=50 << 20,
        shared_per_sm=228 << 10,
        shared_per_block=227 << 10,
    ),
    "b200": Gpu(
        name="NVIDIA B200",
        capability=(10, 0),
        accelerated=True,
        num_sms=148,
        clock_ghz=1.965,
        memory_bandwidth=8_000_000_000_000,
        l2_bytes=126 << 20,
        shared_per_sm=228 << 10,
        shared_per_block=227 << 10,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel of the compiled function. Opcodes are SASS, modifiers included: `LDG.E.128.CONSTANT`."""

    name: str
    arch: str  # "sm_90a"
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int  # static; what a launch adds is not seen here
    opcodes: tuple[str, ...]
    operands: tuple[str, ...]  # of each of them, as disassembled
    loops: tuple[tuple[str, ...], ...]  # the opcodes of each innermost loop, in order of address
    loop_starts: tuple[int, ...]  # the place in `opcodes` where each innermost loop begins
    outer_loops: tuple[tuple[str, ...], ...]  # those of each loop around others, without what is in these
    sass: str = dataclasses.field(repr=False)

    def count(self, prefix: str) -> int:
        """Number of instructions whose opcode starts with `prefix`."""
        return count(self.opcodes, prefix)

    @property
    def uses_local_memory(self) -> bool:
        """Whether anything lives in local memory: spills, or arrays indexed by a value known only at run time."""
        return self.stack_bytes > 0 or self.count("LDL") + self.count("STL") > 0


def count(opcodes: tuple[str, ...], prefix: str) -> int:
    """Number of opcodes that start with `prefix`."""
    return sum(opcode.startswith(prefix) for opcode in opcodes)


def mix(opcodes: tuple[str, ...]) -> dict[str, int]:
    """Opcodes without modifiers, most frequent first; for messages and reports."""
    return dict(collections.Counter(opcode.split(".")[0] for opcode in opcodes).most_common())


def unavailable() -> str | None:
    """Why nothing can be compiled for a GPU here, or None."""
    if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        return "jax-cuda13-plugin and jax-cuda13-pjrt, which compile for CUDA, are not installed"
    missing = [tool for tool in ("ptxas", "nvdisasm") if _tool(tool) is None]
    return f"{' and '.join(missing)} of the CUDA compiler wheels are not installed" if missing else None


def reason_to_skip() -> str | None:
    """As `unavailable`, but None where PBJAX_EXPECT_CUDA_COMPILERS says that tests are to fail without."""
    return None if os.environ.get("PBJAX_EXPECT_CUDA_COMPILERS") else unavailable()


def compile_kernels(fn: Callable[..., object], *args: object, gpu: str) -> tuple[Kernel, ...]:
    """Compiles `jax.jit(fn)` for the arguments and returns its kernels, those that XLA itself generates included.

    Args:
      fn: the function.
      *args: pytrees of arrays or `jax.ShapeDtypeStruct`; only their shapes and dtypes are looked at, and the shardings
        of the latter, which are over devices of `devices`.
      gpu: a key of `GPUS`.

    Returns:
      The kernels by name.
    """
    with _compiled(fn, args, gpu) as folder:
        return _kernels_in(folder)


def _kernels_in(folder: pathlib.Path) -> tuple[Kernel, ...]:
    kernels = {kernel.name: kernel for path in sorted(folder.rglob("*.ptx")) for kernel in _assemble(path)}
    return tuple(kernels[name] for name in sorted(kernels))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """One step of XLA's schedule: a kernel, or a call of a library."""

    kind: str  # as XLA names it: "kCustomKernel", "kCustomCall"
    name: str
    in_command_buffer: bool  # recorded once as part of a CUDA graph, which is one launch in all
    shared_bytes: int = 0  # that the launch gives to each program; 0 for what is no kernel of XLA's


def compile_launches(
    fn: Callable[..., object], *args: object, gpu: str, options: Mapping[str, object] | None = None
) -> tuple[Launch, ...]:
    """What XLA will launch for one call, in order.

    Args:
      fn: the function.
      *args: as of `compile_kernels`.
      gpu: a key of `GPUS`.
      options: of XLA's compiler, by name.

    Returns:
      The launches; a command buffer itself is none, what is in it is.
    """
    with _compiled(fn, args, gpu, options) as folder:
        return _launches_in(folder)


def compile_all(fn: Callable[..., object], *args: object, gpu: str) -> tuple[tuple[Kernel, ...], tuple[Launch, ...]]:
    """What `compile_kernels` and `compile_launches` return, of one compilation."""
    with _compiled(fn, args, gpu) as folder:
        return _kernels_in(folder), _launches_in(folder)


def _launches_in(folder: pathlib.Path) -> tuple[Launch, ...]:
    # The second file is there only if it differs.
    *_, path = sorted(folder.glob("*.thunk_sequence*.txt"), key=lambda path: "after_thunk_passes" in path.name)
    lines = path.read_text().splitlines()
    launches, buffer_indent = [], None
    for line in lines:
        found = _THUNK.match(line)
        if not found:
            continue
        indent = len(found["indent"])
        if buffer_indent is not None and indent <= buffer_indent:
            buffer_indent = None
        if found["kind"] == "kCommandBuffer":
            buffer_indent = indent
        elif found["kind"] != "kSequential":
            launches.append(
                Launch(
                    kind=found["kind"],
                    name=found["name"],
                    in_command_buffer=buffer_indent is not None,
                    shared_bytes=_number(r"shared_memory: (\d+) bytes", line),
                )
            )
    return tuple(launches)


_THUNK = re.compile(r"(?P<indent>\s*)\d+: (?P<kind>k\w+)\s+\[[^\]]*\] ?(?P<name>\S*)")


@contextlib.contextmanager
def _compiled(
    fn: Callable[..., object], args: tuple[object, ...], gpu: str, options: Mapping[str, object] | None = None
) -> Iterator[pathlib.Path]:
    """The folder into which XLA and Mosaic GPU wrote what they made of `jax.jit(fn)`."""
    one = SingleDeviceSharding(devices(gpu)[0])

    def describe(a):
        sharding = a.sharding if isinstance(a, jax.ShapeDtypeStruct) else None
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding or one)

    described = jax.tree.map(describe, args)
    with tempfile.TemporaryDirectory() as folder:
        # Mosaic GPU assembles its kernels itself, and asks the environment where to leave their PTX. Only these two are
        # put back: when it is first imported, it sets one for itself, where its library lies.
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MOSAIC_GPU_DUMP_TO", folder)
            patch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
            # Autotuning would measure, on the GPU that is not there.
            defaults = {"xla_dump_to": folder, "xla_gpu_autotune_level": 0}
            with jax.sharding.use_abstract_mesh(mesh(gpu)):
                lowered = jax.jit(fn).lower(*described)
            lowered.compile(compiler_options=defaults | dict(options or {}))
        yield pathlib.Path(folder)


@functools.cache
def devices(gpu: str, num: int = 1) -> list[jax.Device]:
    """So many of a GPU, on one host."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=f"{num} {gpu}", topology=f"1x{num}x1", target_config=_target_config(GPUS[gpu])
    )
    return topology.devices


def mesh(gpu: str) -> jax.sharding.AbstractMesh:
    """What JAX 0.11 and later lower Pallas kernels for where there is no GPU."""
    device = jax.sharding.AbstractDevice(device_kind=GPUS[gpu].name, num_cores=GPUS[gpu].num_sms, platform="gpu")
    return jax.sharding.AbstractMesh((), (), abstract_device=device)


def _target_config(gpu: Gpu) -> str:
    """`stream_executor.GpuTargetConfigProto` as text."""
    feature = "ACCELERATED_FEATURES" if gpu.accelerated else "NONE"
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared_per_sm}
  shared_memory_per_block_optin: {gpu.shared_per_block}
  core_count: {gpu.num_sms} fpus_per_core: 128 clock_rate_ghz: {gpu.clock_ghz}
  memory_bandwidth: {gpu.memory_bandwidth} l2_cache_size: {gpu.l2_bytes} device_memory_size: 85899345920
  cuda_compute_capability {{
    major: {gpu.capability[0]} minor: {gpu.capability[1]} feature_extension: {feature}
  }}
  device_vendor: "NVIDIA Corporation" name: "{gpu.name}"
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{gpu.name}"
"""


def _assemble(path: pathlib.Path) -> Iterator[Kernel]:
    ptx = path.read_text(errors="replace")
    if ".entry" not in ptx:
        return
    arch = re.search(r"\.target\s+(sm_\w+)", ptx)[1]
    cubin = path.with_suffix(".cubin")
    report = _run("ptxas", "-v", f"-arch={arch}", path, "-o", cubin).stderr
    texts = _texts(_run("nvdisasm", "-c", cubin).stdout)
    for name, facts in re.findall(r"Function properties for (\S+)\n(.*?)(?=Function properties|\Z)", report, re.DOTALL):
        if name not in texts:  # a function that was inlined or a library stub
            continue
        instructions, loops, outer_loops = _read(texts[name])
        opcodes = tuple(opcode for opcode, _ in instructions)
        yield Kernel(
            name=name,
            arch=arch,
            registers=_number(r"Used (\d+) registers", facts),
            spill_bytes=_number(r"(\d+) bytes spill stores", facts) + _number(r"(\d+) bytes spill loads", facts),
            stack_bytes=_number(r"(\d+) bytes stack frame", facts),
            shared_bytes=_number(r"(\d+) bytes smem", facts),
            opcodes=opcodes,
            operands=tuple(operands for _, operands in instructions),
            loops=tuple(opcodes[start : stop + 1] for start, stop in loops),
            loop_starts=tuple(start for start, _ in loops),
            outer_loops=tuple(tuple(opcodes[i] for i in own) for own in outer_loops),
            sass=texts[name],
        )


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0


def _texts(sass: str) -> dict[str, str]:
    """The code of each function of a disassembled module."""
    parts = re.split(r"^\s*\.section\s+\.text\.([^\s,]+).*$", sass, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


_LABEL = re.compile(r"^\s*(\.L_\w+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


def _read(text: str) -> tuple[list[tuple[str, str]], list[tuple[int, int]], list[list[int]]]:
    """A function's instructions, where each innermost loop starts and stops, and what is in each other loop alone.

    A loop is a jump back, from its target on; it is an innermost one if no other such jump is inside.
    """
    labels: dict[str, int] = {}
    instructions: list[tuple[str, str]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        if (found := _INSTRUCTION.search(line)) and found[1] != "NOP":
            instructions.append((found[1], found[2]))
    loops = set()
    for stop, (opcode, operands) in enumerate(instructions):
        target = _TARGET.search(operands)
        # The jump to itself that ends every kernel is no loop.
        if opcode.startswith("BRA") and target and labels.get(target[1], stop) < stop:
            loops.add((labels[target[1]], stop))
    innermost, outer = [], []
    for start, stop in sorted(loops):
        inside = [loop for loop in loops if loop != (start, stop) and start <= loop[0] and loop[1] <= stop]
        if not inside:
            innermost.append((start, stop))
            continue
        outer.append([i for i in range(start, stop + 1) if not any(first <= i <= last for first, last in inside)])
    return instructions, innermost, outer


def _run(tool: str, *args: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([_tool(tool), *map(str, args)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip()[-2000:]}")
    return done


def _tool(name: str) -> str | None:
    """A program of the CUDA compiler wheels, which lie in the namespace package `nvidia`."""
    spec = importlib.util.find_spec("nvidia")
    folders = [pathlib.Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    return next((str(path) for folder in folders for path in sorted(folder.glob(f"*/bin/{name}"))), None)
