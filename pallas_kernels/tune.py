"""Times launch parameters of the GPU kernels on the device that is there, and keeps the fastest.

    python -m pallas_kernels.tune --m 1 8 64 --size 4096x4096 --bits 8 --activation-bits 16 none

writes them where every later process finds them (see `pallas_kernels.bit_matmul.tuned`). Nothing runs this by itself.
Times are the device's own, from a call's first kernel to its last, with weights that are not in the cache. Of
fixed-point products each candidate must give the same bits; one that does not is an error, not a slow candidate.
Products and sweeps are tuned each by themselves.

A candidate that does not compile, crashes or does not end costs itself: what runs on the GPU is in a process that may
be lost (`tuning_process`), and the next one goes on behind it. Whatever was the fastest so far is stored at once.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import functools
import itertools
import math
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _compat, device_time, tuning_process
from pallas_kernels.bit_matmul import contract, limbs, mosaic, triton, tuned
from pallas_kernels.tuning_process import Job, Tried

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
    return {key: math.inf if taken.device is None else taken.device.span_us for (key, _), taken in times.items()}


def tune(
    backend: str,
    problem: contract.Problem,
    *,
    sweep: bool = False,
    dtype: str = "float32",
    timer: Timer = device_us,
    candidates: Sequence[Any] | None = None,
    without: Collection[Any] = (),
    reference: Any = None,
    seconds: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
    trying: Callable[[Any], None] = lambda config: None,
    **options: Any,
) -> Iterator[tuple[Any, Tried]]:
    """What comes of each candidate for a problem, one after the other, the backend's own choice first.

    What is timed is the product as pbjax runs it: rows of floats come in, are quantized if the problem says so, and are
    scaled after it. Weights come from memory, not from the cache: calls take turns with copies of them.

    Args:
      backend: a key of `BACKENDS`.
      problem: the static facts of the product; all bitlayers are used.
      sweep: the product at every number of bitlayers, in place of the one at all of them.
      dtype: of the rows, one of `DTYPES`.
      timer: microseconds of one call of each compiled product.
      candidates: configurations, the first of them the default; None for those of the backend.
      without: candidates that are not tried again.
      reference: one of them that runs once, for its bits; None takes those of the first candidate that runs.
      seconds: after which no candidate begins.
      clock: of these seconds.
      trying: told each candidate before it is waited for: to compile, and to run for the first time.
      **options: passed to the backend, such as `interpret` of `triton`.

    Yields:
      The configuration, and its time, or why it has none: it does not lower, compile or run, the timer cannot tell its
      kernels, or the time is over.

    Raises:
      RuntimeError: inside a trace, or if a candidate of a fixed-point product has other bits than the first that runs.
      Unsupported: the backend cannot run the problem.
      tuning_process.Lost: the last candidate made a fault after which this process cannot use its device.
    """
    if isinstance(jnp.zeros(()), jax.core.Tracer):
        raise RuntimeError("`tune` must run outside of jit and other transformations, but got a trace. Call it before.")
    module, end = BACKENDS[backend], clock() + seconds
    if reason := module.unsupported(problem):
        raise contract.Unsupported(f"backend {backend!r} cannot run {problem}: {reason}")
    configs = list(module.candidates(problem, dtype, sweep=sweep) if candidates is None else candidates)
    configs = [config for config in configs if config not in without]
    configs = configs if reference is None else [reference, *configs]
    operands = x, words, scale, counts = _operands(problem, dtype, sweep)
    stored = device_time.copies(words, words.nbytes)
    expected = None
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = {}
        for config in configs:  # traced one by one, compiled side by side
            try:
                product = jax.jit(functools.partial(_product, module, problem, sweep, config, options))
                compiled[config] = pool.submit(product.lower(*operands).compile)
            except (ValueError, TypeError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
                compiled[config] = _reason(error)
        for i, config in enumerate(configs):
            if clock() > end:
                pool.shutdown(cancel_futures=True)
                yield from ((late, Tried(reason="the time was over")) for late in configs[i:])
                return
            if isinstance(compiled[config], str):
                yield config, Tried(reason=compiled[config])
                continue
            try:
                trying(config)
                product = compiled[config].result()
                y = np.asarray(product(*operands))
            except jax.errors.JaxRuntimeError as error:  # registers or shared memory that the device does not have
                yield config, Tried(reason=_reason(error))
                tuning_process.check_device()
                continue
            expected = y if expected is None else expected
            if problem.activation_bits is not None and not np.array_equal(y, expected):
                raise RuntimeError(
                    f"{config} of {backend!r} gives other results than the first candidate for {problem}"
                )
            if config is reference:
                continue

            def run(i: int, product: Any = product) -> jax.Array:
                return product(x, stored[i % len(stored)], scale, counts)

            try:
                us = timer({config: run})[config]
            except jax.errors.JaxRuntimeError as error:
                yield config, Tried(reason=_reason(error))
                tuning_process.check_device()
                continue
            yield config, Tried(us=us) if us < math.inf else Tried(reason="its kernels could not be told apart")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def tune_and_store(
    job: Job,
    *,
    kind: str,
    told: Callable[[str], object] = lambda line: None,
    run: Callable[..., Iterator[tuple[Any, Tried]]] | None = None,
    **options: Any,
) -> tuple[Any, float, float]:
    """Stores the fastest candidate, and the fastest so far whenever there is a new one.

    Args:
      job: what to tune.
      kind: the device, as JAX calls it.
      told: why a candidate has no time, in a line for each.
      run: gives what comes of the candidates, as `tune` does; None is `tuning_process.run`.
      **options: of `run`.

    Returns:
      The fastest, its time, and the time of the backend's own choice: infinity where it has none.

    Raises:
      RuntimeError: as `tune`, or if no candidate runs.
    """
    times: dict[Any, float] = {}
    best, default, first = math.inf, math.inf, None
    for config, tried in (run or tuning_process.run)(job, **options):
        first = config if first is None else first
        if tried.reason:
            told(f"{config}: {tried.reason}")
            continue
        times[config] = tried.us
        default = tried.us if config == first else default
        if tried.us >= best:
            continue
        best = tried.us
        facts = dict(
            us=round(best, 3),
            default_us=None if default == math.inf else round(default, 3),
            candidates=len(times),
            jax=_compat.JAX_VERSION,
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        )
        (kernel,) = [name for name, cls in BACKENDS[job.backend].CONFIGS.items() if type(config) is cls]
        tuned.store(job.backend, job.problem, kernel, config, kind=kind, facts=facts, dtype=job.dtype, sweep=job.sweep)
    if best == math.inf:
        raise RuntimeError(f"no candidate of {job.backend!r} runs, and can be timed, on {kind} for {job.problem}")
    return min(times, key=lambda config: times[config]), best, default


def _product(
    module: ModuleType,
    problem: contract.Problem,
    sweep: bool,
    config: Any,
    options: Mapping[str, Any],
    x: jax.Array,
    *weight: jax.Array,
) -> jax.Array:
    """All that a product of pbjax is on the device. x: float[m, k]."""
    multiply = functools.partial(module.prefixes if sweep else module.matmul, problem, config=config, **options)
    if problem.activation_bits is None:
        return multiply(x, *weight)
    codes, unit, poison = module.quantize_rows(problem, x, sweep=sweep, config=config, **options)
    if isinstance(codes, limbs.Packed):  # for a kernel, which finishes its rows itself
        return multiply(codes._replace(steps=(unit, poison)), *weight)
    column = (None,) * sweep + (slice(None), None)  # as the result has axes
    return multiply(codes, *weight) * unit[column] + poison[column]


def _operands(problem: contract.Problem, dtype: str, sweep: bool = False) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(problem.m, problem.k)), dtype)
    words = rng.integers(0, 2**32, (problem.bits, problem.num_words, problem.n), dtype=np.uint32)
    scale = rng.uniform(0.5, 2, (min(problem.bits, contract.NUM_SCALES), problem.groups, problem.n))
    counts = jnp.full(() if sweep else (problem.m,), problem.bits, jnp.int32)
    return x, jnp.asarray(words), jnp.asarray(scale, jnp.float32), counts


def main(argv: Sequence[str] | None = None, *, kind: str | None = None, **options: Any) -> int:
    """The command, for the device that is there or is named by `kind`; `options` are those of `tune_and_store`.

    Returns:
      0, 1 if a problem has no candidate that runs or candidates of different results, or 2 without a GPU
      or a file to store in.
    """
    args = _parse(argv)
    kind = kind or tuning_process.device_kind()
    if kind is None:
        sys.stderr.write("tune needs an NVIDIA GPU that JAX can use, and found none.\n")
        return 2
    try:
        tuned.check_storable(kind)  # before anything is timed that would be lost
    except (OSError, ValueError) as error:
        sys.stderr.write(f"tune cannot store what it would measure: {error}\n")
        return 2
    end, status = time.monotonic() + 60 * args.minutes, 0
    for m, (k, n), width in itertools.product(args.m, args.size, args.activation_bits):
        problem = contract.Problem(m=m, k=k, n=n, bits=args.bits, group_size=args.group_size, activation_bits=width)
        # Fixed-point rows are codes before the product: it does not matter which floats they were.
        dtypes = args.dtype if width is None else ["float32"]
        for backend, dtype, what in itertools.product(args.backend, dtypes, args.of):
            name = f"{backend} m={m} {k}x{n} bits={args.bits} activation_bits={width}"
            name += f" dtype={dtype}" if width is None else ""
            name += " sweep" if what == "sweep" else ""
            if reason := BACKENDS[backend].unsupported(problem):
                sys.stdout.write(f"{name}: left out, {reason}\n")
                continue
            job = Job(
                backend=backend,
                problem=problem,
                sweep=what == "sweep",
                dtype=dtype,
                seconds=end - time.monotonic(),
                patience=args.patience,
            )
            told = lambda line, name=name: sys.stdout.write(f"{name}: {line}\n")  # noqa: E731
            try:
                config, best, default = tune_and_store(job, kind=kind, told=told, **options)
            except RuntimeError as error:
                sys.stdout.write(f"{name}: {error}\n")
                status = 1
                continue
            sys.stdout.write(f"{name}: {best:.1f} us, by default {default:.1f} us: {config}\n")
    sys.stdout.write(f"{tuned.path_for(tuned.user_folder(), kind)}\n")
    return status


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
    add("--of", nargs="+", choices=("product", "sweep"), default=["product", "sweep"], help="default: both")
    add("--minutes", type=float, default=math.inf, help="after which no candidate begins (default: no limit)")
    add("--patience", type=float, default=120.0, help="seconds for one candidate (default: %(default)s)")
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
