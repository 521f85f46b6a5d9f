"""Watches what Triton kernels load and store in interpret mode: every element lies inside of its array, or is masked.

Interpret mode moves an index that is outside of an array to its end, and what comes of it may be right; a GPU reads
whatever lies there, or stops. So kernels get references of which each use is followed by a check.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import _compat


@dataclasses.dataclass
class Place:
    """A part of an array, to be loaded or stored."""

    array: Any
    index: tuple[Any, ...]

    @property
    def dtype(self) -> Any:
        return self.array.dtype


@dataclasses.dataclass
class At:
    """What `ref.at` is."""

    array: Any

    def __getitem__(self, index: Any) -> Place:
        return Place(self.array, index if isinstance(index, tuple) else (index,))


class Array:
    """What a kernel takes for a reference."""

    def __init__(self, ref: Any, found: list[str]):
        self.ref, self.found = ref, found
        self.shape, self.dtype, self.at = ref.shape, ref.dtype, At(self)

    def __getitem__(self, index: Any) -> jax.Array:
        self.check("read", self.at[index].index)
        return self.ref[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.check("written", self.at[index].index)
        self.ref[index] = value

    def check(self, what: str, index: tuple[Any, ...], mask: Any = True) -> None:
        """Adds to `found` when the kernel runs."""
        jax.debug.callback(functools.partial(_check, self.found, what, self.shape), mask, *_indices(index))


def _indices(index: tuple[Any, ...]) -> list[jax.Array]:
    """Numbers along each axis, of shapes that broadcast: each range has an axis of its own."""
    if not any(isinstance(i, pl.Slice) for i in index):
        return [jnp.asarray(i) for i in index]
    rank, axis, numbers = sum(isinstance(i, pl.Slice) for i in index), 0, []
    for i in index:
        if not isinstance(i, pl.Slice):
            numbers.append(jnp.asarray(i))
            continue
        assert i.stride in (None, 1)
        shape = [1] * rank
        shape[axis] = i.size
        numbers.append((i.start + jnp.arange(i.size, dtype=jnp.int32)).reshape(shape))
        axis += 1
    return numbers


def _check(found: list[str], what: str, shape: tuple[int, ...], mask: Any, *index: Any) -> None:
    mask, *index = np.broadcast_arrays(mask, *index)
    for axis, (i, size) in enumerate(zip(index, shape, strict=True)):
        outside = i[mask & ((i < 0) | (i >= size))]
        if outside.size:
            found.append(f"{outside.min()}..{outside.max()} of axis {axis} of {shape} is {what}")


@contextlib.contextmanager
def watch() -> Iterator[None]:
    """Fails at its end if kernels that were traced and run inside touched what is in no array.

    What they return has to be waited for inside: JAX does not know that these kernels have effects.
    """
    found: list[str] = []
    call, load, store = _compat.triton_call, _compat.triton_load, _compat.triton_store

    def triton_call(kernel, *, interpret, **options):
        def watched(*refs):
            return kernel(*jax.tree.map(lambda ref: Array(ref, found), refs))

        return call(watched if interpret else kernel, interpret=interpret, **options)

    def triton_load(place, *, mask=None, other=None):
        if isinstance(place, Place):
            place.array.check("read", place.index, True if mask is None else mask)
            place = place.array.ref.at[place.index]
        return load(place, mask=mask, other=other)

    def triton_store(place, value, *, mask=None):
        if isinstance(place, Place):
            place.array.check("written", place.index, True if mask is None else mask)
            place = place.array.ref.at[place.index]
        return store(place, value, mask=mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_compat, "triton_call", triton_call)
        patch.setattr(_compat, "triton_load", triton_load)
        patch.setattr(_compat, "triton_store", triton_store)
        yield
    assert not found, "\n".join(dict.fromkeys(found))
