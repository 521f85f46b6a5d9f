"""Every line that depends on the version of JAX: from 0.10, the newest for Python 3.11, to 0.12."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pallas_triton

JAX_VERSION = jax.__version__  # what measurements are stored with


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
