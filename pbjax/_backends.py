"""Which backend runs a product: one registry, one predicate per backend, and a choice that can be asked for reasons.

An explicit choice (argument, then `use_backend`, then the environment variable PBJAX_BACKEND) runs or raises;
only the automatic choice passes over a backend that cannot.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax

from pallas_kernels.bit_matmul import mosaic, reference, triton, xla
from pallas_kernels.bit_matmul.contract import Problem, Unsupported

ENVIRONMENT_VARIABLE = "PBJAX_BACKEND"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
    """One implementation of the contract in `pallas_kernels.bit_matmul.contract`.

    Attributes:
      name: how users name it.
      unsupported: the reason why it cannot run a problem, or None.
      matmul: the product at given numbers of bitlayers.
      prefixes: the product at every number of bitlayers.
      unavailable: the reason why it cannot run on the default device, or None; asked while tracing, never at import.
      automatic: None if automatic choice may take it, or the reason why only those who name it get it.
    """

    name: str
    unsupported: Callable[[Problem], str | None]
    matmul: Callable[..., jax.Array]
    prefixes: Callable[..., jax.Array]
    unavailable: Callable[[], str | None] = lambda: None
    automatic: str | None = None

    def refusal(self, problem: Problem) -> str | None:
        """Why it cannot run the problem here, or None."""
        return self.unavailable() or self.unsupported(problem)


def _backend(name: str, module: ModuleType, **options: Any) -> Backend:
    return Backend(name=name, unsupported=module.unsupported, matmul=module.matmul, prefixes=module.prefixes, **options)


def _without_nvidia(minimum: tuple[int, int]) -> str | None:
    """Why the default device is no NVIDIA GPU of at least this compute capability, or None."""
    device = jax.local_devices()[0]
    needed = f"it needs an NVIDIA GPU of compute capability {minimum[0]}.{minimum[1]} or more"
    if device.platform != "gpu":
        return f"{needed}, but the default device is a {device.platform}"
    found = str(getattr(device, "compute_capability", "none"))
    parts = found.split(".")
    if not all(part.isdigit() for part in parts) or tuple(map(int, parts)) < minimum:
        return f"{needed}, but the default device has {found}"
    return None


_UNPROVEN = "its kernels have been compiled for GPUs and emulated, but not run on one: name it to use it"

# In order of preference: the automatic choice is the first that supports the problem. `xla` supports every one.
BACKENDS = {
    backend.name: backend
    for backend in (
        _backend("mosaic", mosaic, unavailable=lambda: _without_nvidia((9, 0)), automatic=_UNPROVEN),
        _backend("triton", triton, unavailable=lambda: _without_nvidia((8, 0)), automatic=_UNPROVEN),
        _backend("xla", xla),
        _backend("reference", reference, automatic="it is the oracle, written to be read and not to be fast"),
    )
}

# A user context is part of the key of jit's caches; a plain context variable would reuse the stale trace.
_context = jax.make_user_context(default_value=None)


@dataclasses.dataclass(frozen=True)
class Selection:
    """The outcome of `select_backend`.

    Attributes:
      name: the backend that runs.
      reason: why it was taken.
      rejected: (name, reason) of each backend that was passed over, in the order of preference.
    """

    name: str
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()


def select_backend(problem: Problem, backend: str | None = None) -> Selection:
    """The backend that `pbjax.matmul` runs a problem on, and why.

    Args:
      problem: the static facts of the product.
      backend: the `backend` argument of the product; None asks the context, the environment, and then the
        problem itself.

    Returns:
      Name, reason, and what was rejected and why.

    Raises:
      ValueError: a name that is no backend.
      Unsupported: the backend chosen explicitly cannot run the problem.

    Example:
      >>> problem = pbjax.Problem(m=1, k=64, n=10, bits=4, group_size=None, activation_bits=16)
      >>> pbjax.select_backend(problem).name
      'xla'
    """
    for name, source in (
        (backend, "the argument `backend`"),
        (_context.value, "`pbjax.use_backend`"),
        (os.environ.get(ENVIRONMENT_VARIABLE) or None, f"the environment variable {ENVIRONMENT_VARIABLE}"),
    ):
        if name is None:
            continue
        check_backend(name, source)
        if reason := BACKENDS[name].refusal(problem):
            raise Unsupported(
                f"backend {name!r}, chosen by {source}, cannot run {problem}: {reason}. "
                "Choose another backend, or none for the automatic choice."
            )
        return Selection(name, f"chosen by {source}")
    rejected = []
    for candidate in BACKENDS.values():
        if reason := candidate.refusal(problem) or candidate.automatic:
            rejected.append((candidate.name, reason))
        else:
            return Selection(candidate.name, "the first in order of preference that can run it", tuple(rejected))
    raise Unsupported(f"no backend can run {problem}: {rejected}")


def check_backend(name: str, source: str) -> None:
    """Raises ValueError unless `name` is a backend; `source` says where it was given."""
    if name not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, but got {name!r} from {source}.")


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Context in which products run on one backend; functions jitted outside are traced again inside.

    Args:
      name: a backend, or None for the automatic choice.

    Raises:
      ValueError: a name that is no backend.

    Example:
      >>> with pbjax.use_backend("reference"):
      ...     pbjax.select_backend(pbjax.Problem(m=1, k=8, n=2, bits=4, group_size=None, activation_bits=8)).name
      'reference'
    """
    if name is not None:
        check_backend(name, "`pbjax.use_backend`")
    with _context(name):
        yield
