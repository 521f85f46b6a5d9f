"""Times launch parameters of the GPU kernels on the device that is there, and keeps the fastest.

    python -m pallas_kernels.tune --m 1 8 64 --size 4096x4096 --bits 8 --activation-bits 16 none

writes them where every later process finds them (see `pallas_kernels.bit_matmul.tuned`). Nothing runs this by itself.
Of fixed-point products each candidate must give the same bits; one that does not is an error, not a slow candidate.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _compat
from pallas_kernels.bit_matmul import contract, mosaic, triton, tuned

BACKENDS: dict[str, ModuleType] = {"mosaic": mosaic, "triton": triton}

Run = Callable[[], jax.Array]
Timer = Callable[[Run], float]


def device_us(run: Run, *, calls: int = 20, repeats: int = 7) -> float:
    """Microseconds of one call: the median of several times that many calls queued together take."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready([run() for _ in range(calls)])
        times.append((time.perf_counter() - start) * 1e6 / calls)
    return statistics.median(times)


def tune(
    backend: str,
    problem: contract.Problem,
    *,
    timer: Timer = device_us,
    candidates: Sequence[Any] | None = None,
    **options: Any,
) -> Iterator[tuple[Any, float]]:
    """Each candidate for a problem with its time, the backend's own choice first.

    Args:
      backend: a key of `BACKENDS`.
      problem: the static facts of the product; all bitlayers are used.
      timer: microseconds of one call of a compiled product.
      candidates: configurations, the first of them the default; None for those of the backend.
      **options: passed to the backend, such as `interpret` of `triton`.

    Yields:
      (configuration, microseconds); infinity for one that the compiler refuses.

    Raises:
      RuntimeError: inside a trace, or if a candidate of a fixed-point product has other bits than the first.
      Unsupported: the backend cannot run the problem.
    """
    if isinstance(jnp.zeros(()), jax.core.Tracer):
        raise RuntimeError("`tune` must run outside of jit and other transformations, but got a trace. Call it before.")
    module = BACKENDS[backend]
    if reason := module.unsupported(problem):
        raise contract.Unsupported(f"backend {backend!r} cannot run {problem}: {reason}")
    operands = _operands(problem)
    expected = None
    for config in module.candidates(problem) if candidates is None else candidates:
        product = jax.jit(functools.partial(module.matmul, problem, config=config, **options))
        try:
            y = np.asarray(product(*operands))
        except jax.errors.JaxRuntimeError:  # registers or shared memory that the device does not have
            yield config, float("inf")
            continue
        expected = y if expected is None else expected
        if problem.activation_bits is not None and not np.array_equal(y, expected):
            raise RuntimeError(f"{config} of {backend!r} gives other results than the first candidate for {problem}")
        yield config, timer(functools.partial(product, *operands))


def tune_and_store(backend: str, problem: contract.Problem, *, kind: str, **options: Any) -> tuple[Any, float, float]:
    """Stores the fastest candidate. Returns it, its time, and the time of the backend's own choice.

    Raises:
      RuntimeError: as `tune`, or if no candidate runs.
    """
    times = list(tune(backend, problem, **options))
    config, best = min(times, key=lambda entry: entry[1])
    if best == float("inf"):
        raise RuntimeError(f"no candidate of {backend!r} runs on {kind} for {problem}")
    (kernel,) = [name for name, cls in BACKENDS[backend].CONFIGS.items() if type(config) is cls]
    facts = dict(
        us=round(best, 3),
        default_us=None if times[0][1] == float("inf") else round(times[0][1], 3),
        candidates=len(times),
        jax=_compat.JAX_VERSION,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )
    tuned.store(backend, problem, kernel, config, kind=kind, facts=facts)
    return config, best, times[0][1]


def _operands(problem: contract.Problem) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    if problem.activation_bits is None:
        x = jnp.asarray(rng.normal(size=(problem.m, problem.k)), jnp.bfloat16)
    else:
        top = 2 ** (problem.activation_bits - 1) - 1
        x = jnp.asarray(rng.integers(-top, top + 1, (problem.m, problem.k)), jnp.int32)
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
        for backend in args.backend:
            name = f"{backend} m={m} {k}x{n} bits={args.bits} activation_bits={width}"
            if reason := BACKENDS[backend].unsupported(problem):
                sys.stdout.write(f"{name}: left out, {reason}\n")
                continue
            config, best, default = tune_and_store(backend, problem, kind=kind, **options)
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
