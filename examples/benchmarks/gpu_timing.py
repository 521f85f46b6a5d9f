"""Programs for everything that is timed at one shape, with their operands and the bytes that they must move."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import gpu_baselines
import jax
import jax.numpy as jnp

import pbjax
from pallas_kernels import device_time

BITS = 8
WIDTHS = (16, 8, None)  # of activations
MAX_COPIES = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One thing that is timed; None where a field does not apply."""

    name: str  # one of `gpu_baselines.NAMES`, "bitlayers", or "sweep" for every number of them in one call
    bitlayers: int | None = None
    activation_bits: int | None = None
    backend: str  # of pbjax, or the variant of a baseline


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A program and the operands of its calls, which take turns.

    Attributes:
      program: jitted.
      rows: of activations.
      weights: as many copies as it takes to find them outside of the cache.
      rest: other operands.
      bytes: that one call must read of weights and activations, in their own dtypes, and write of results in theirs.
    """

    program: Any
    rows: jax.Array
    weights: Sequence[Any]
    rest: tuple[jax.Array, ...] = ()
    bytes: int

    def operands(self, i: int) -> tuple[Any, ...]:
        """Of call number i."""
        return self.rows, self.weights[i % len(self.weights)], *self.rest


class DeviceLost(Exception):
    """After a fault in a kernel nothing runs in this process any more."""


def device_works() -> bool:
    """Whether this process can still use its device."""
    try:
        jax.block_until_ready(jnp.ones(8) + 1)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def make_calls(
    m: int, k: int, n: int, *, copies: int = MAX_COPIES, refused: Collection[str] = ()
) -> dict[Method, Call]:
    """Everything at one shape, in the order in which it is timed, but on backends that are refused."""
    x_key, w_key = jax.random.split(jax.random.key(0))
    x, w = jax.random.normal(x_key, (m, k), jnp.float32), jax.random.normal(w_key, (k, n), jnp.float32)
    calls = {}

    def add(method: Method, *, program: Any, weight_bytes: int, rows: jax.Array, **operands: Any) -> None:
        call = Call(program=program, rows=rows, bytes=0, **operands)
        result = jax.eval_shape(program, *call.operands(0))
        moved = weight_bytes + rows.nbytes + result.size * result.dtype.itemsize
        calls[method] = dataclasses.replace(call, bytes=moved)

    stored: dict[tuple[str, bool], list[jax.Array]] = {}  # variants share the copies of a weight
    for way in gpu_baselines.all_of(x, w):
        place = (way.weight.dtype.name, way.variant == "transposed")
        if place not in stored:
            stored[place] = device_time.copies(way.weight, way.weight_bytes, most=copies)
        add(
            Method(name=way.name, backend=way.variant),
            program=jax.jit(way.fn, compiler_options=way.options),
            rows=way.rows,
            weights=stored[place],
            rest=way.rest,
            weight_bytes=way.weight_bytes + sum(array.nbytes for array in way.rest),
        )
    layer_bytes, scale_bytes = k * n // 8, 4 * n
    # By the bytes of one bitlayer, the least that a call reads of a copy: the others leave the cache alone.
    packed = device_time.copies(pbjax.quantize({"kernel": w}, BITS)["kernel"], layer_bytes, most=copies)
    for width in WIDTHS:
        problem = pbjax.Problem(m=m, k=k, n=n, bits=BITS, group_size=None, activation_bits=width)
        name = kernel_backend(problem, refused)

        def product(x, packed, used, width=width, name=name):
            options = dict(activation_bits=width, backend=name, preferred_element_type=jnp.float32)
            return pbjax.matmul(x, packed, bitlayers=used, **options)

        of = functools.partial(Method, activation_bits=width, backend=name)
        rows = x.astype(jnp.bfloat16) if width is None else x
        run, sweep = jax.jit(product), jax.jit(jax.vmap(product, in_axes=(None, None, 0)))
        for used in range(1, BITS + 1):
            add(
                of(name="bitlayers", bitlayers=used),
                program=run,
                rows=rows,
                weights=packed,
                rest=(jnp.int32(used),),
                weight_bytes=used * layer_bytes + scale_bytes,
            )
        add(
            of(name="sweep", bitlayers=BITS),
            program=sweep,
            rows=rows,
            weights=packed,
            rest=(jnp.arange(1, BITS + 1),),
            weight_bytes=BITS * layer_bytes + 4 * scale_bytes,  # scales of 1, 2 and 3 bitlayers, and of more
        )
    return calls


def kernel_backend(problem: pbjax.Problem, refused: Collection[str] = ()) -> str:
    """The GPU backend for a problem: the first that can run it and is not refused; "xla" without one."""
    for name in ("mosaic", "triton"):
        if name in refused:
            continue
        try:
            return pbjax.select_backend(problem, name).name
        except pbjax.Unsupported:
            continue
    return pbjax.select_backend(problem).name


def compile_all(
    calls: Mapping[Method, Call], trying: Callable[[Method], None] = lambda method: None
) -> tuple[dict[Method, Callable[[int], jax.Array]], dict[Method, str]]:
    """Compiles side by side: on a machine with a GPU, most of the time goes here otherwise.

    Args:
      calls: by method.
      trying: told each method before it runs for the first time.

    Returns:
      Call number i of each method that runs, and why each other one does not: what neither compiles nor runs costs its
      own row, and not those of the rest.

    Raises:
      DeviceLost: the method that was tried last made a fault after which this process cannot use its device.
    """
    runs, reasons, lowered = {}, {}, {}
    for method, call in calls.items():
        if call.program not in lowered:
            try:
                lowered[call.program] = call.program.lower(*call.operands(0))
            except (jax.errors.JaxRuntimeError, ValueError, TypeError, NotImplementedError) as error:
                # A kernel that this version of JAX does not lower for this GPU.
                lowered[call.program] = None
                reasons[method] = f"{type(error).__name__}: {error}"
        elif lowered[call.program] is None:
            reasons[method] = "it does not lower, as others of the same program"
    programs = {program: low for program, low in lowered.items() if low is not None}
    with concurrent.futures.ThreadPoolExecutor(min(len(programs), os.cpu_count() or 1) or 1) as pool:
        futures = {program: pool.submit(low.compile) for program, low in programs.items()}
        for method, call in calls.items():
            if method in reasons:
                continue
            try:
                run = futures[call.program].result()
                trying(method)
                jax.block_until_ready(run(*call.operands(0)))
            except jax.errors.JaxRuntimeError as error:
                reasons[method] = str(error)
                if not device_works():
                    raise DeviceLost(f"{method}: {error}") from error
                continue
            runs[method] = lambda i, call=call, run=run: run(*call.operands(i))
    return runs, reasons
