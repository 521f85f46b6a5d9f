"""Candidates of the tuner in processes of their own: one that crashes or does not end costs itself and no other.

After a fault in a kernel a process can use its GPU no more, and a kernel that does not end cannot be interrupted. So
the process that asks leaves the GPU alone; the one that times is ended when it has said nothing for too long, and a new
one goes on behind the candidate that it was at.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bit_matmul import contract, tuned

_SPAWN = multiprocessing.get_context("spawn")  # a fork would share what JAX holds
_MAX_LOSSES = 8  # processes that one problem may cost


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tried:
    """What came of one candidate.

    Attributes:
      us: microseconds of one call; infinity without a time.
      reason: why there is none, or empty.
    """

    us: float = math.inf
    reason: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What to tune; the fields are arguments of `tune.tune`.

    Attributes:
      backend: its name.
      problem: the product.
      sweep: at every number of bitlayers.
      dtype: of the rows.
      seconds: after which no candidate begins.
      patience: seconds for one candidate to compile, or to run and be timed, with the start of a process.
    """

    backend: str
    problem: contract.Problem
    sweep: bool = False
    dtype: str = "float32"
    seconds: float = math.inf
    patience: float = 120.0


class Lost(RuntimeError):
    """After a fault in a kernel nothing runs in this process any more."""


def check_device() -> None:
    """Raises `Lost` where this process can use its device no more."""
    try:
        jax.block_until_ready(jnp.ones(8) + 1)
    except jax.errors.JaxRuntimeError as error:
        raise Lost("the device answers no more in this process") from error


Work = Callable[[Connection, Job, list[Any], Any, float], None]
_AGAIN = "again"  # said by a process that has lost its device after it told what came of the candidate


def run(job: Job, *, work: Work | None = None) -> Iterator[tuple[Any, Tried]]:
    """What `tune.tune` yields, from processes that may be lost.

    Args:
      job: what to tune.
      work: what a process does, with the candidates that are done, one of them that has a time, and the seconds left;
        None is to tune. It sends a configuration when it begins with it, pairs with what came of it, and at its end an
        exception or None.

    Raises:
      RuntimeError: as `tune.tune`, or if processes end before they come to a candidate.
    """
    end = time.monotonic() + job.seconds
    done: list[Any] = []
    reference = None
    for _ in range(_MAX_LOSSES):
        lost, trying = "", None
        seconds = end - time.monotonic()
        with _Process(work or _tune, job, done, reference, seconds) as (process, connection):
            while not lost:
                try:
                    if not connection.poll(job.patience):
                        lost = f"it did not end within {job.patience:.0f} s"
                        break
                    said = connection.recv()
                except EOFError:
                    process.join()
                    lost = f"its process ended with status {process.exitcode}"
                    break
                if said is None:
                    return
                if isinstance(said, BaseException):
                    raise said
                if isinstance(said, tuple):
                    config, tried = said
                    done.append(config)
                    if reference is None and not tried.reason:
                        reference = config
                    yield config, tried
                lost = _AGAIN if said == _AGAIN else ""
                trying = None if isinstance(said, tuple) or lost else said
        if lost == _AGAIN:
            continue
        if trying is None or trying in done:
            raise RuntimeError(f"candidates of {job.backend!r} cannot be tried for {job.problem}: {lost}")
        done.append(trying)
        yield trying, Tried(reason=lost)


def device_kind() -> str | None:
    """`tuned.device_kind`, asked in a process of its own: this one would take the GPU's memory."""
    parent, child = _SPAWN.Pipe(duplex=False)
    process = _SPAWN.Process(target=_tell_kind, args=(child,), daemon=True)
    process.start()
    child.close()
    try:
        return parent.recv()
    except EOFError:
        return None
    finally:
        process.join()
        parent.close()


class _Process:
    """A process and the end of its pipe; it is gone afterwards."""

    def __init__(self, work: Work, job: Job, done: list[Any], reference: Any, seconds: float):
        self.connection, child = _SPAWN.Pipe(duplex=False)
        self.process = _SPAWN.Process(target=work, args=(child, job, list(done), reference, seconds), daemon=True)
        self.process.start()
        child.close()

    def __enter__(self) -> tuple[Any, Connection]:
        return self.process, self.connection

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.connection.close()


def _tune(connection: Connection, job: Job, done: list[Any], reference: Any, seconds: float) -> None:
    from pallas_kernels import tune  # which imports this module

    try:
        for pair in tune.tune(
            job.backend,
            job.problem,
            sweep=job.sweep,
            dtype=job.dtype,
            without=done,
            reference=reference,
            seconds=seconds,
            trying=connection.send,
        ):
            connection.send(pair)
    except Lost:
        connection.send(_AGAIN)
    except RuntimeError as error:
        connection.send(RuntimeError(str(error)))
    else:
        connection.send(None)


def _tell_kind(connection: Connection) -> None:
    connection.send(tuned.device_kind())
