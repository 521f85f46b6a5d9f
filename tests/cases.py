"""What is common to the tables of cases: the shape of a product, and how programs that run once are compiled."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import pbjax

# `jax.jit` for kernels as JAX operations and for oracles: tests need a result or two of them, sooner than XLA and LLVM
# would have optimized them. What users compile is tested as they compile it.
jit_once = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def h200():
    """Within it JAX lowers kernels for a GPU where there is none. JAX 0.10 does without being told of a device."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def normal(*shape, seed=0, dtype=jnp.float32):
    """Standard normal numbers, other ones for each shape. NumPy draws them; JAX would compile that for each shape."""
    return jnp.asarray(np.random.default_rng((seed, *shape)).standard_normal(shape), dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    m: int
    k: int
    n: int
    bits: int
    group_size: int | None = None
    activation_bits: int | None = None

    @property
    def problem(self) -> pbjax.Problem:
        return pbjax.Problem(
            m=self.m,
            k=self.k,
            n=self.n,
            bits=self.bits,
            group_size=self.group_size,
            activation_bits=self.activation_bits,
        )
