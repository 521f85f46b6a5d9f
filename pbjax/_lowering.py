"""One operation of a program that is written when the program is lowered, by the backend that its platform asks for.

`jax.lax.platform_dependent` traces every branch, and does not tell a program that runs here from one that is exported:
a backend in C++ would be called by a process that has never heard of it. So a product is a primitive of its own; its
rule has the platforms, knows whether it is an export, and traces the one backend that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from pallas_kernels import _compat
from pbjax._backends import Backend, Choice, platform_of

Implementation = Callable[[Backend], Callable[..., jax.Array]]

bit_matmul_p = Primitive("bit_matmul")


def run_chosen(
    choice: Choice, implementation: Implementation, operands: Sequence[jax.Array], result: jax.ShapeDtypeStruct
) -> jax.Array:
    """implementation(backend)(*operands) by the backend of the platform that this is lowered for.

    Args:
      choice: the backends.
      implementation: what a backend runs. It is traced when the product is lowered, with 32 bits to an integer.
      operands: arrays.
      result: the type of the result, which varies over mesh axes of `jax.shard_map` as the first operand does.

    Returns:
      The result.
    """
    shape, dtype = result.shape, result.dtype
    return bit_matmul_p.bind(*operands, choice=choice, implementation=implementation, shape=shape, dtype=dtype)


@bit_matmul_p.def_abstract_eval
def _type(x: Any, *_: Any, shape: tuple[int, ...], dtype: jnp.dtype, **__: Any) -> Any:
    return _compat.array_type(shape, dtype, like=x)


@bit_matmul_p.def_impl
def _evaluate(*operands: jax.Array, choice: Choice, implementation: Implementation, **_: Any) -> jax.Array:
    """Under `jax.disable_jit`, where nothing is lowered."""
    (platform,) = {platform_of(device) for device in operands[0].devices()}
    return implementation(choice.on(platform))(*operands)


def _lower(ctx: Any, *operands: Any, choice: Choice, implementation: Implementation, **_: Any) -> Any:
    platforms, exported = _compat.lowering_target(ctx)
    chosen = {platform: choice.on(platform, exported=exported) for platform in platforms}
    default, *others = dict.fromkeys(chosen.values())

    def run(*operands):
        with jax.enable_x64(False):  # the contract knows 32 bits; 64 would widen every index and integer sum
            if not others:
                return implementation(default)(*operands)
            branches = {p: implementation(backend) for p, backend in chosen.items() if backend is not default}
            return lax.platform_dependent(*operands, default=implementation(default), **branches)

    return mlir.lower_fun(run, multiple_results=False)(_compat.of_one_device(ctx), *operands)


mlir.register_lowering(bit_matmul_p, _lower)
