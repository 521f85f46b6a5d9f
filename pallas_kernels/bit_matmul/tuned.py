"""Launch parameters that were measured: files of JSON, one for each kind of device, {"version": 3, "entries": {..}}.

An entry is found by what its choice depends on: backend, static facts of the product, rows rounded up to a power of
two, the dtype of float activations, of which a product takes one to three parts, and whether it is a sweep over all
numbers of bitlayers, which has kernels or loops of its own. Fixed-point rows are codes before the product, whatever
floats they were. Numbers that change from call to call, how many bitlayers are used, are no part. Where no sweep was
measured, the entry of the product serves.

Two folders are looked through: the user's, which `pallas_kernels.tune` writes, and the one of this package, for devices
whose measurements are shipped (none yet). Without an entry, the backend's own `config_for` decides by shape. Parameters
change times, never results.

The user's folder is $PBJAX_TUNED_DIR, or pbjax/tuned in $XDG_CACHE_HOME or ~/.cache. Files are read once in a process,
when a product for a GPU is first traced; what is tuned later holds for functions that are traced after it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.bit_matmul import contract

ENVIRONMENT_VARIABLE = "PBJAX_TUNED_DIR"
SHIPPED = pathlib.Path(__file__).parent / "measured"
PLATFORM = "cuda"
# Of the files: 1 had entries alone, keys without dtypes, and times of the host's clock; 2 was of another kernel `dot`.
VERSION = 3

Config = TypeVar("Config")


def user_folder() -> pathlib.Path:
    """Where the user's measurements are."""
    if folder := os.environ.get(ENVIRONMENT_VARIABLE):
        return pathlib.Path(folder)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "pbjax" / "tuned"


def device_kind() -> str | None:
    """What JAX calls the GPU of this process, or None without one. Asked while tracing, never at import."""
    try:
        return jax.local_devices(backend=PLATFORM)[0].device_kind
    except RuntimeError:
        return None


def find(
    backend: str,
    problem: contract.Problem,
    configs: Mapping[str, type[Config]],
    *,
    dtype: DTypeLike | None = None,
    sweep: bool = False,
    kind: str | None = None,
) -> Config | None:
    """The measured configuration for a problem on this device, or None.

    Args:
      backend: its name.
      problem: rows are rounded up to a power of two, as they were when it was stored.
      configs: the classes of configurations that the backend takes, by the names under which they are stored.
      dtype: of float activations; no part of the key with fixed-point ones.
      sweep: whether the product at every number of bitlayers is asked for.
      kind: of device; None asks for the one that is there.

    Raises:
      ValueError: a file of another version, an entry that the backend cannot read, or float activations without dtype.
    """
    kind = kind or device_kind()
    if kind is None:
        return None
    paths = [path_for(folder, kind) for folder in (user_folder(), SHIPPED)]
    for of_sweep, path in itertools.product((True, False) if sweep else (False,), paths):
        entry = _read(path).get(key(backend, problem, dtype, sweep=of_sweep))
        if entry is None:
            continue
        try:
            return _checked(configs[entry["kernel"]](**entry["config"]))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"`{path}` must hold configurations of this version, but got {entry} for {problem}. "
                "Delete the file, or tune again."
            ) from error
    return None


def _checked(config: Config) -> Config:
    """Raises TypeError unless all fields are positive integers, or None where that is one of their values."""
    for field in dataclasses.fields(config):  # pyright: ignore[reportArgumentType] every configuration is a dataclass
        value = getattr(config, field.name)
        if not (type(value) is int and value > 0) and not (value is None and "None" in str(field.type)):
            raise TypeError(f"{field.name}={value!r}")
    return config


def store(
    backend: str,
    problem: contract.Problem,
    kernel: str,
    config: Any,
    *,
    kind: str,
    facts: Mapping[str, Any],
    dtype: DTypeLike | None = None,
    sweep: bool = False,
    folder: pathlib.Path | None = None,
) -> pathlib.Path:
    """Writes one entry, beside the others of the device, and returns the file.

    Args:
      backend: its name.
      problem: what was timed.
      kernel: the name of the class of the configuration.
      config: a dataclass of numbers.
      kind: the device.
      facts: how it was measured: times, versions, date.
      dtype: of float activations.
      sweep: whether a sweep was timed.
      folder: the user's, unless given.
    """
    path = path_for(folder or user_folder(), kind)
    entry = {"kernel": kernel, "config": dataclasses.asdict(config), **facts}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    with _alone(path.parent):
        _read.cache_clear()
        entries = {**_read(path), key(backend, problem, dtype, sweep=sweep): entry}
        try:
            with unfinished.open("w") as file:
                file.write(json.dumps({"version": VERSION, "entries": entries}, indent=1, sort_keys=True) + "\n")
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)  # so that nobody ever reads half of it
        finally:
            unfinished.unlink(missing_ok=True)
    _read.cache_clear()
    return path


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
    """No other process is in here for this folder: each would write what it had read before the other wrote."""
    import fcntl  # which Windows does not have, where JAX has no NVIDIA GPUs to tune for

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def check_storable(kind: str) -> None:
    """Raises OSError or ValueError unless the user's file of a device can be written, and read before that."""
    path = path_for(user_folder(), kind)
    _read.cache_clear()
    _read(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def path_for(folder: pathlib.Path, kind: str) -> pathlib.Path:
    """The file of a kind of device."""
    return folder / f"{re.sub(r'[^a-z0-9]+', '_', kind.lower()).strip('_')}.json"


def key(backend: str, problem: contract.Problem, dtype: DTypeLike | None = None, *, sweep: bool = False) -> str:
    """What an entry is stored under."""
    rows = 1 << max(problem.m - 1, 0).bit_length()
    fields = {**dataclasses.asdict(problem), "m": rows}
    if problem.activation_bits is None:
        if dtype is None:
            raise ValueError("`dtype` must be that of the float activations, but got None. Pass `x.dtype`.")
        fields["dtype"] = jnp.dtype(dtype).name
    if sweep:
        fields["sweep"] = True
    return " ".join([backend, *(f"{name}={value}" for name, value in fields.items())])


@functools.cache
def _read(path: pathlib.Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        stored = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"`{path}` must hold JSON, but got {error}. Delete the file, and tune again.") from error
    version = stored.get("version", 1) if isinstance(stored, dict) else None
    if version != VERSION:
        raise ValueError(f"`{path}` must be of version {VERSION}, but got {version}. Delete the file, and tune again.")
    entries = stored.get("entries")
    if not isinstance(entries, dict):
        raise ValueError(
            f"`{path}` must have a mapping of entries, but got {entries!r}. Delete the file, and tune again."
        )
    return entries
