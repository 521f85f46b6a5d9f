"""Every line that depends on the version of JAX: from 0.10, the newest for Python 3.11, to 0.12."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pallas_triton

JAX_VERSION = jax.__version__  # what measurements are stored with

T = TypeVar("T")


def varying_axes(*arrays: jax.Array) -> frozenset[str]:
    """The mesh axes of `jax.shard_map` over which any of the arrays may differ; none without `check_vma`."""
    return frozenset[str]().union(*(jax.typeof(array).manual_axis_type.varying for array in arrays))


def varying_like(tree: T, *arrays: jax.Array) -> T:
    """Marks what is the same everywhere as varying as the arrays do: a loop wants its carry so from the start."""
    return varying_over(tree, varying_axes(*arrays))


def varying_over(tree: T, axes: frozenset[str]) -> T:
    """Marks arrays that are the same everywhere as varying over mesh axes; those that vary stay as they are."""

    def mark(leaf):
        missing = tuple(sorted(axes - varying_axes(leaf)))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, tree) if axes else tree


def triton_call(
    kernel: Callable[..., None], *, name: str, num_warps: int, num_stages: int, interpret: bool, **arguments
) -> Callable:
    """`pl.pallas_call` through Triton, or on the CPU with `interpret`.

    The parameters name the compiler: without them a GPU kernel lowers through whatever a version of JAX prefers.
    """
    params = pallas_triton.CompilerParams(num_warps=num_warps, num_stages=num_stages)
    return pl.pallas_call(kernel, name=name, compiler_params=params, interpret=interpret, **arguments)


triton_load = pallas_triton.load
triton_store = pallas_triton.store
