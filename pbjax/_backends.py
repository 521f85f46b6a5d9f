"""Which backend runs a product: one registry, one predicate per backend, and a choice that can be asked for reasons.

An explicit choice (argument, then `use_backend`, then the environment variable PBJAX_BACKEND) runs or raises;
only the automatic choice passes over a backend that cannot. It is made for each platform that a product may be lowered
for, and taken when it is lowered: where the operands lie, or the platforms of an export, may not be known before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import jax
import jax.export

from cpu_kernels import bit_matmul as cpu
from pallas_kernels.bit_matmul import mosaic, reference, triton, xla
from pallas_kernels.bit_matmul.contract import MAX_BITS, Problem, Unsupported
from pbjax import _checks

ENVIRONMENT_VARIABLE = "PBJAX_BACKEND"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
    """One implementation of the contract in `pallas_kernels.bit_matmul.contract`.

    Attributes:
      name: how users name it.
      unsupported: the reason why it cannot run a problem, or None.
      matmul: the product at given numbers of bitlayers.
      prefixes: the product at every number of bitlayers.
      limb_sums: the integers of a fixed-point product, for devices that share k; with None those of `xla` are taken.
      scale_groups: what these devices make of the sums of all groups; None is `epilogue.scale_groups`.
      quantize_rows: fixed-point activations in the form that `matmul` and `prefixes` prefer to codes, or None.
      missing: what it lacks here to run on one of its platforms, or None; asked while tracing, never at import.
      platforms: those it is made for, as JAX names what it lowers for ("cpu", "cuda", ..); None for all.
      automatic: None if automatic choice may take it, or the reason why only those who name it get it.
      slow: the reason why automatic choice passes it over on this machine, or None; asked while tracing.
      whole: its functions take rows of floats as they come and do all of the product: they quantize the rows, multiply
        by their steps, and poison those that are not finite.
      exportable: a program of `jax.export` with it runs where there is no pbjax.
    """

    name: str
    unsupported: Callable[[Problem], str | None]
    matmul: Callable[..., jax.Array]
    prefixes: Callable[..., jax.Array]
    limb_sums: Callable[..., jax.Array] | None = None
    scale_groups: Callable[..., jax.Array] | None = None
    quantize_rows: Callable[..., Any] | None = None
    missing: Callable[[str], str | None] = lambda platform: None
    platforms: tuple[str, ...] | None = None
    automatic: str | None = None
    slow: Callable[[], str | None] = lambda: None
    whole: bool = False
    exportable: bool = True

    def unavailable(self, platform: str) -> str | None:
        """Why it cannot run anything here on a platform, or None."""
        if self.platforms is not None and platform not in self.platforms:
            return f"it runs on {' and '.join(self.platforms)}, but the platform is {platform}"
        return self.missing(platform)

    def refusal(self, problem: Problem, platform: str) -> str | None:
        """Why it cannot run the problem here on a platform, or None."""
        return self.unavailable(platform) or self.unsupported(problem)


def _backend(name: str, module: ModuleType, **options: Any) -> Backend:
    return Backend(
        name=name,
        unsupported=module.unsupported,
        matmul=module.matmul,
        prefixes=module.prefixes,
        limb_sums=getattr(module, "limb_sums", None),
        scale_groups=getattr(module, "scale_groups", None),
        quantize_rows=getattr(module, "quantize_rows", None),
        **options,
    )


def default_platform() -> str:
    """The platform that JAX lowers for where nothing says otherwise."""
    device = jax.config.jax_default_device or jax.local_devices()[0]  # pyright: ignore[reportAttributeAccessIssue] dynamic
    return device if isinstance(device, str) else platform_of(device)


def platform_of(device: Any) -> str:
    """The platform that JAX lowers for where arrays lie on this `jax.Device`: "cpu", "cuda", "rocm", "tpu"."""
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "gfx" in str(getattr(device, "compute_capability", "")) else "cuda"


def _without_nvidia(minimum: tuple[int, int], platform: str) -> str | None:
    """Why there is no NVIDIA GPU of at least this compute capability, or None."""
    needed = f"it needs an NVIDIA GPU of compute capability {minimum[0]}.{minimum[1]} or more"
    try:
        device = jax.local_devices(backend=platform)[0]
    except RuntimeError:
        return f"{needed}, but there is no GPU"
    found = str(getattr(device, "compute_capability", "none"))
    parts = found.split(".")
    if not all(part.isdigit() for part in parts) or tuple(map(int, parts)) < minimum:
        return f"{needed}, but the device has {found}"
    return None


_UNPROVEN = "its kernels have been compiled for GPUs and emulated, but not run on one: name it to use it"

# In order of preference: the automatic choice is the first that supports the problem. `xla` supports every one.
BACKENDS = {
    backend.name: backend
    for backend in (
        _backend(
            "mosaic",
            mosaic,
            missing=functools.partial(_without_nvidia, (9, 0)),
            platforms=("cuda",),
            automatic=_UNPROVEN,
        ),
        _backend(
            "triton",
            triton,
            missing=functools.partial(_without_nvidia, (8, 0)),
            platforms=("cuda",),
            automatic=_UNPROVEN,
        ),
        _backend("cpu", cpu, missing=cpu.missing, platforms=("cpu",), slow=cpu.slow, whole=True, exportable=False),
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


def select_backend(problem: Problem, backend: str | None = None, *, platform: str | None = None) -> Selection:
    """The backend that `pbjax.matmul` runs a problem on, and why.

    Args:
      problem: the static facts of the product.
      backend: the `backend` argument of the product; None asks the context, the environment, and then the
        problem itself.
      platform: where it is to run, as JAX names the platforms it lowers for: "cpu", "cuda", "rocm", "tpu"; None is
        that of the default device.

    Returns:
      Name, reason, and what was rejected and why.

    Raises:
      TypeError: `problem` is no `Problem`, or one of its sizes and widths is no integer.
      ValueError: one of them is out of range, or a name that is no backend or no platform.
      Unsupported: the backend chosen explicitly cannot run the problem.

    Example:
      >>> problem = pbjax.Problem(m=1, k=64, n=10, bits=4, group_size=None, activation_bits=16)
      >>> pbjax.select_backend(problem, platform="tpu").name
      'xla'
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"`problem` must be a `pbjax.Problem`, but got {problem!r}.")
    _check_problem(problem)
    platform = default_platform() if platform is None else _known_platform(platform)
    named = _named(backend)
    if named is None:
        return _select_automatic(problem, platform, BACKENDS.values())
    name, source = named
    if reason := BACKENDS[name].refusal(problem, platform):
        raise Unsupported(_refused(name, source, problem, reason))
    return Selection(name, f"chosen by {source}")


def _check_problem(problem: Problem) -> None:
    """Raises unless it is one that a product could have; sizes may be the symbolic ones of `jax.export`."""
    where = f"of {problem}"
    for name in ("m", "k", "n"):
        if not jax.export.is_symbolic_dim(getattr(problem, name)):
            _checks.integer(name, getattr(problem, name), 0, None, where)
    _checks.integer("bits", problem.bits, 1, MAX_BITS, where)
    _checks.group_size(problem.group_size, where)
    _checks.activation_bits(problem.activation_bits, where)


def _known_platform(platform: str) -> str:
    known = ("cpu", "cuda", "rocm", "tpu")
    if platform not in known and platform != default_platform():
        raise ValueError(f"`platform` must be one of {', '.join(known)}, or this machine's own, but got {platform!r}.")
    return platform


def _refused(name: str, source: str, problem: Problem, reason: str) -> str:
    return (
        f"backend {name!r}, chosen by {source}, cannot run {problem}: {reason}. "
        "Choose another backend, or none for the automatic choice."
    )


def _named(backend: str | None) -> tuple[str, str] | None:
    """The backend chosen explicitly and by what, or None."""
    for name, source in (
        (backend, "the argument `backend`"),
        (_context.value, "`pbjax.use_backend`"),
        (os.environ.get(ENVIRONMENT_VARIABLE) or None, f"the environment variable {ENVIRONMENT_VARIABLE}"),
    ):
        if name is not None:
            check_backend(name, source)
            return name, source
    return None


def _select_automatic(problem: Problem, platform: str, candidates: Iterable[Backend]) -> Selection:
    rejected = []
    for candidate in candidates:
        if reason := candidate.refusal(problem, platform) or candidate.automatic or candidate.slow():
            rejected.append((candidate.name, reason))
        else:
            return Selection(candidate.name, "the first in order of preference that can run it", tuple(rejected))
    raise Unsupported(f"no backend can run {problem}: {rejected}")


@dataclasses.dataclass(frozen=True)
class Choice:
    """The backends of one product, of which the platform picks when the product is lowered.

    Attributes:
      backend: runs on every platform that is not named.
      by_platform: (platform, backend) where another one runs.
      is_named: `backend` was named, and is not the automatic choice.
    """

    backend: Backend
    by_platform: tuple[tuple[str, Backend], ...] = ()
    is_named: bool = False

    def on(self, platform: str, *, exported: bool = False) -> Backend:
        """What runs on a platform; in an export nothing that needs pbjax there, unless it was named."""
        found = dict(self.by_platform).get(platform, self.backend)
        return self.backend if exported and not found.exportable else found


def choose(problem: Problem, backend: str | None) -> Choice:
    """`select_backend` for all platforms that the product may be lowered for."""
    if _named(backend) is not None:
        return Choice(BACKENDS[select_backend(problem, backend).name], is_named=True)
    return _choose_automatic(problem)


def choose_again(choice: Choice, problem: Problem) -> Choice:
    """The choice for what `vmap` has made of a problem, whose rows are those of all examples.

    Raises:
      Unsupported: the backend that was named cannot run it.
    """
    if not choice.is_named:
        return _choose_automatic(problem)
    if reason := choice.backend.unsupported(problem):
        raise Unsupported(_refused(choice.backend.name, "its name", problem, reason))
    return choice


def _choose_automatic(problem: Problem) -> Choice:
    anywhere = [candidate for candidate in BACKENDS.values() if candidate.platforms is None]
    default = BACKENDS[_select_automatic(problem, default_platform(), anywhere).name]
    platforms = {p for candidate in BACKENDS.values() if not candidate.automatic for p in candidate.platforms or ()}
    every = BACKENDS.values()
    chosen = [(platform, BACKENDS[_select_automatic(problem, platform, every).name]) for platform in sorted(platforms)]
    return Choice(default, tuple((platform, found) for platform, found in chosen if found is not default))


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
