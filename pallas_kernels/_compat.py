"""Every line that depends on the version of JAX: from 0.10, the newest for Python 3.11, to 0.12."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pallas_triton
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

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


def array_type(shape: tuple[int, ...], dtype: DTypeLike, *, like: Any) -> Any:
    """The type of an array that is not cut, and varies over axes of `jax.shard_map` as one of type `like` does."""
    sharding = NamedSharding(like.sharding.mesh, PartitionSpec(*(None for _ in shape)))
    return like.update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False, sharding=sharding)


def lowering_target(ctx: Any) -> tuple[tuple[str, ...], bool]:
    """The platforms that a rule lowers for, "cpu" or "cuda" among them, and whether for `jax.export`."""
    module = ctx.module_context
    return tuple(ctx.platforms or module.platforms), module.lowering_parameters.for_export


def of_one_device(ctx: Any) -> Any:
    """The context of a lowering rule whose operands are the same on all devices of `jax.shard_map`, as far as is known.

    What is traced to be lowered computes on one device, and its types need not say over which axes its values vary.
    """
    avals = [
        aval.update(manual_axis_type=type(aval.manual_axis_type)()) if hasattr(aval, "manual_axis_type") else aval
        for aval in ctx.avals_in
    ]
    return ctx.replace(avals_in=avals)


def triton_call(
    kernel: Callable[..., None],
    *,
    name: str,
    out_shape: Any,
    num_warps: int,
    num_stages: int,
    interpret: bool,
    **arguments,
) -> Callable:
    """`pl.pallas_call` through Triton, or on the CPU with `interpret`.

    The parameters name the compiler: without them a GPU kernel lowers through whatever a version of JAX prefers.
    """
    params = pallas_triton.CompilerParams(num_warps=num_warps, num_stages=num_stages)

    def call(*operands):
        like = jax.typeof(next(leaf for leaf in jax.tree.leaves(operands) if isinstance(leaf, jax.Array)))
        # Inside `jax.shard_map` it has to be said over which axes the result varies.
        out = jax.tree.map(lambda shape: shape.update(manual_axis_type=like.manual_axis_type), out_shape)
        run = pl.pallas_call(kernel, name=name, out_shape=out, compiler_params=params, interpret=interpret, **arguments)
        return run(*operands)

    return call


triton_load = pallas_triton.load
triton_store = pallas_triton.store


def triton_population_count(word: jax.Array) -> jax.Array:
    """Of the signed type: Pallas-Triton gives the unsigned one to `math.ctpop`, which Triton does not lower."""
    return lax.population_count(word.astype(jnp.int32))


def triton_inline_asm(text: str, *words: jax.Array) -> jax.Array:
    """PTX on each element of arrays of one shape, uint32; `$0` is the result, `$1` and on are the arguments.

    Triton has one type of integers, and JAX gives its inline assembly signed ones only.
    """
    signed = [word.astype(jnp.int32) for word in words]
    (out,) = pallas_triton.elementwise_inline_asm(
        text,
        args=signed,
        constraints=",".join(["=r", *["r"] * len(words)]),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(signed[0].shape, jnp.int32)],
    )
    return out.astype(jnp.uint32)


def mosaic_kernel(body: Callable[..., None], *, out_type: Any, scratch_types: Any, **arguments) -> Callable:
    """`plgpu.kernel`, whose results and scratch memory had other names before JAX 0.10.2."""
    from jax.experimental.pallas import mosaic_gpu as plgpu  # where it is used: only products on a GPU need it

    if jax.__version_info__ < (0, 10, 2):
        return plgpu.kernel(body, out_shape=out_type, scratch_shapes=scratch_types, **arguments)
    return plgpu.kernel(body, out_type=out_type, scratch_types=scratch_types, **arguments)
