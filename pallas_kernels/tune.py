"""Times launch parameters of the GPU kernels on the device that is there, and keeps the fastest.

    python -m pallas_kernels.tune --m 1 8 64 --size 4096x4096 --bits 8 --activation-bits 16 none

writes them where every later process finds them (see `pallas_kernels.bit_matmul.tuned`). Nothing runs this by itself.
Times are the device's own, from a call's first kernel to its last, with weights that are not in the cache. Of
fixed-point products each candidate must give the same bits; one that does not is an error, not a slow candidate.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import functools
import itertools
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _compat, device_time
from pallas_kernels.bit_matmul import contract, limbs, mosaic, triton, tuned

BACKENDS: dict[str, ModuleType] = {"mosaic": mosaic, "triton": triton}

Run = Callable[[int], jax.Array]  # call number i
Timer = Callable[[Mapping[Any, Run]], Mapping[Any, float]]

DTYPES = ("bfloat16", "float32", "float16")  # of float activations
_CALLS = 20


def device_us(runs: Mapping[Any, Run]) -> dict[Any, float]:
    """Microseconds of a call of each, on the device's clock: median from its first kernel to its last.

    Infinity for calls whose kernels the profiler does not tell.
    """
    times = device_time.measure(runs, {"cold": range(_CALLS)})
    return {key: float("inf") if taken.device is None else taken.device.span_us for (key, _), taken in times.items()}


def tune(
    backend: str,
    problem: contract.Problem,
    *,
    dtype: str = "float32",
    timer: Timer = device_us,
    candidates: Sequence[Any] | None = None,
    **options: Any,
) -> dict[Any, float]:
    """The time of each candidate for a problem, the backend's own choice first.

    What is timed is the product as pbjax runs it: rows of floats come in, are quantized if the problem says so, and are
    scaled after it. Weights come from memory, not from the cache: calls take turns with copies of them.

    Args:
      backend: a key of `BACKENDS`.
      problem: the static facts of the product; all bitlayers are used.
      dtype: of the rows, one of `DTYPES`.
      timer: microseconds of one call of each compiled product.
      candidates: configurations, the first of them the default; None for those of the backend.
      **options: passed to the backend, such as `interpret` of `triton`.

    Returns:
      Microseconds by configuration; infinity for one that the compiler refuses or the timer cannot time.

    Raises:
      RuntimeError: inside a trace, or if a candidate of a fixed-point product has other bits than the first.
      Unsupported: the backend cannot run the problem.
    """
    if isinstance(jnp.zeros(()), jax.core.Tracer):
        raise RuntimeError("`tune` must run outside of jit and other transformations, but got a trace. Call it before.")
    module = BACKENDS[backend]
    if reason := module.unsupported(problem):
        raise contract.Unsupported(f"backend {backend!r} cannot run {problem}: {reason}")
    x, words, scale, counts = _operands(problem, dtype)
    stored = device_time.copies(words, words.nbytes)
    times = dict.fromkeys(module.candidates(problem) if candidates is None else candidates, float("inf"))
    lowered = {
        config: jax.jit(functools.partial(_product, module, problem, config, options)).lower(x, words, scale, counts)
        for config in times
    }
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = {config: pool.submit(low.compile) for config, low in lowered.items()}
    runs: dict[Any, Run] = {}
    expected = None
    for config, future in compiled.items():
        try:
            product = future.result()
            y = np.asarray(product(x, words, scale, counts))
        except jax.errors.JaxRuntimeError:  # registers or shared memory that the device does not have
            continue
        expected = y if expected is None else expected
        if problem.activation_bits is not None and not np.array_equal(y, expected):
            raise RuntimeError(f"{config} of {backend!r} gives other results than the first candidate for {problem}")
        runs[config] = lambda i, product=product: product(x, stored[i % len(stored)], scale, counts)
    return times | dict(timer(runs))


def tune_and_store(
    backend: str, problem: contract.Problem, *, kind: str, dtype: str = "float32", **options: Any
) -> tuple[Any, float, float]:
    """Stores the fastest candidate. Returns it, its time, and the time of the backend's own choice.

    Raises:
      RuntimeError: as `tune`, or if no candidate runs.
    """
    times = tune(backend, problem, dtype=dtype, **options)
    default = next(iter(times.values()))
    config, best = min(times.items(), key=lambda entry: entry[1])
    if best == float("inf"):
        raise RuntimeError(f"no candidate of {backend!r} runs, and can be timed, on {kind} for {problem}")
    (kernel,) = [name for name, cls in BACKENDS[backend].CONFIGS.items() if type(config) is cls]
    facts = dict(
        us=round(best, 3),
        default_us=None if default == float("inf") else round(default, 3),
        candidates=len(times),
        jax=_compat.JAX_VERSION,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )
    tuned.store(backend, problem, kernel, config, kind=kind, facts=facts, dtype=dtype)
    return config, best, default


def _product(
    module: ModuleType,
    problem: contract.Problem,
    config: Any,
    options: Mapping[str, Any],
    x: jax.Array,
    *weight: jax.Array,
) -> jax.Array:
    """All that a product of pbjax is on the device. x: float[m, k]."""
    if problem.activation_bits is None:
        return module.matmul(problem, x, *weight, config=config, **options)
    codes, unit, poison = module.quantize_rows(problem, x, config=config, **options)
    if isinstance(codes, limbs.Packed):  # for a kernel, which finishes its rows itself
        return module.matmul(problem, codes._replace(steps=(unit, poison)), *weight, config=config, **options)
    return module.matmul(problem, codes, *weight, config=config, **options) * unit[:, None] + poison[:, None]


def _operands(problem: contract.Problem, dtype: str) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(problem.m, problem.k)), dtype)
    words = rng.integers(0, 2**32, (problem.bits, problem.num_words, problem.n), dtype=np.uint32)
    scale = rng.uniform(0.5, 2, (min(problem.bits, contract.NUM_SCALES), problem.groups, problem.n))
    counts = jnp.full((problem.m,), problem.bits, jnp.int32)
    return x, jnp.asarray(words), jnp.asarray(scale, jnp.float32), counts


def main(argv: Sequence[str] | None = None, *, kind: str | None = None, **options: Any) -> int:
    """The command, for the device that is there or is named by `kind`; `options` are those of `tune`."""
    args = _parse(argv)
    kind = kind or tuned.device_kind()
    if kind is None:
        sys.stderr.write("tune needs an NVIDIA GPU that JAX can use, and found none.\n")
        return 2
    for m, (k, n), width in itertools.product(args.m, args.size, args.activation_bits):
        problem = contract.Problem(m=m, k=k, n=n, bits=args.bits, group_size=args.group_size, activation_bits=width)
        # Fixed-point rows are codes before the product: it does not matter which floats they were.
        for backend, dtype in itertools.product(args.backend, args.dtype if width is None else ["float32"]):
            name = f"{backend} m={m} {k}x{n} bits={args.bits} activation_bits={width}"
            name += f" dtype={dtype}" if width is None else ""
            if reason := BACKENDS[backend].unsupported(problem):
                sys.stdout.write(f"{name}: left out, {reason}\n")
                continue
            config, best, default = tune_and_store(backend, problem, kind=kind, dtype=dtype, **options)
            sys.stdout.write(f"{name}: {best:.1f} us, by default {default:.1f} us: {config}\n")
    sys.stdout.write(f"{tuned.path_for(tuned.user_folder(), kind)}\n")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--m", type=int, nargs="+", default=[1], help="rows of activations (default: 1)")
    add("--size", type=_size, nargs="+", required=True, metavar="KxN", help="sizes of the weight: 4096x14336")
    add("--bits", type=int, default=8, help="bitlayers stored and used (default: 8)")
    add("--group-size", type=int, help="weights that share a scale (default: all k)")
    add("--activation-bits", type=_width, nargs="+", default=[16], metavar="A", help="2..24, or none for floats")
    add("--dtype", nargs="+", choices=DTYPES, default=["bfloat16", "float32"], help="of floats (default: %(default)s)")
    add("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="default: all")
    return parser.parse_args(argv)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be like 4096x14336, but got {text!r}")
    return int(match[1]), int(match[2])


def _width(text: str) -> int | None:
    return None if text == "none" else int(text)


if __name__ == "__main__":
    sys.exit(main())
