"""The product through Pallas-Triton: NVIDIA GPUs from Ampere on, none of the 1-bit tensor core needed.

Fixed point goes to `_triton_serial`, which works on the words themselves, for any number of rows; float activations
to `_triton_dot`, which unpacks words for the tensor core. `matmul` and `prefixes` are those of the contract;
`interpret` runs their kernels on the CPU, as JAX operations.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.bit_matmul import _triton_dot, _triton_serial, contract, epilogue

Config = _triton_serial.Config
DotConfig = _triton_dot.Config

_MAX_SUMS = 2**29  # integers that the kernels leave to XLA: 2 GiB
_MIN_FLOAT_GROUP = 512  # k of one dot's 16 words; shorter groups would leave most of it empty


def unsupported(problem: contract.Problem) -> str | None:
    """Why the kernels cannot run a problem, or None."""
    if problem.k == 0:
        return "k is 0, so there are no words to load"
    if problem.activation_bits is None and (problem.group_size or _MIN_FLOAT_GROUP) < _MIN_FLOAT_GROUP:
        return (
            f"with float activations a group has at least {_MIN_FLOAT_GROUP} weights here, but has {problem.group_size}"
        )
    if problem.activation_bits is not None:
        num_sums = len(problem.segments) * problem.bits * problem.activation_limbs * problem.m * problem.n
        if num_sums > _MAX_SUMS:
            return f"the sums of all groups, rows and bitlayers are {num_sums} integers, more than {_MAX_SUMS}"
    return None


def config_for(problem: contract.Problem) -> Config | DotConfig:
    """How a problem is cut into programs, by its shape alone."""
    return (_triton_dot if problem.activation_bits is None else _triton_serial).config_for(problem)


def matmul(
    problem: contract.Problem,
    x: jax.Array,
    words: jax.Array,
    scale: jax.Array,
    bitlayers: jax.Array,
    *,
    config: Config | DotConfig | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The product of the contract."""
    if problem.m == 0 or problem.n == 0:
        return jnp.zeros((problem.m, problem.n), jnp.float32)
    x, config = _pad(problem, x), _check(problem, config)
    if isinstance(config, DotConfig):
        return _float_matmul(problem, x, words, scale, bitlayers, config, interpret)
    sums = _triton_serial.limb_sums(problem, x, words, bitlayers, sweep=False, config=config, interpret=interpret)
    return _scale(problem, sums, scale, bitlayers)


def prefixes(
    problem: contract.Problem,
    x: jax.Array,
    words: jax.Array,
    scale: jax.Array,
    limit: jax.Array,
    *,
    config: Config | DotConfig | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The product at every number of bitlayers up to `limit`; fixed point in one pass, floats in one for each."""
    if problem.m == 0 or problem.n == 0:
        return jnp.zeros((problem.bits, problem.m, problem.n), jnp.float32)
    x, config = _pad(problem, x), _check(problem, config)
    limit = jnp.clip(limit, 0, problem.bits).astype(jnp.int32)
    if isinstance(config, Config):
        limits = jnp.full((problem.m,), limit, jnp.int32)
        sums = _triton_serial.limb_sums(problem, x, words, limits, sweep=True, config=config, interpret=interpret)
        counts = jnp.repeat(jnp.arange(1, problem.bits + 1, dtype=jnp.int32), problem.m)
        return _scale(problem, sums, scale, counts).reshape(problem.bits, problem.m, problem.n)

    def fill(i, out):
        y = _float_matmul(problem, x, words, scale, jnp.full((problem.m,), i + 1, jnp.int32), config, interpret)
        return lax.dynamic_update_index_in_dim(out, y, i, 0)

    return lax.fori_loop(jnp.int32(0), limit, fill, jnp.zeros((problem.bits, problem.m, problem.n), jnp.float32))


def _check(problem: contract.Problem, config: Config | DotConfig | None) -> Config | DotConfig:
    default = config_for(problem)
    if config is not None and type(config) is not type(default):
        raise TypeError(f"`config` must be of the type that `config_for` returns for the problem, but got {config}.")
    return config or default


def _pad(problem: contract.Problem, x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, problem.num_words * contract.WORD_BITS - problem.k)))


def _scale(problem: contract.Problem, sums: jax.Array, scale: jax.Array, counts: jax.Array) -> jax.Array:
    """int32[segments, activation limbs, code limbs, m, n] -> f32[m, n], in the order that the contract fixes."""
    assert problem.activation_bits is not None
    values = epilogue.sum_segments(problem, jax.vmap(epilogue.combine_limbs, in_axes=(0, None))(sums, counts))
    return epilogue.scale_groups(values, scale, counts, problem.activation_bits)


def _float_matmul(
    problem: contract.Problem,
    x: jax.Array,
    words: jax.Array,
    scale: jax.Array,
    bitlayers: jax.Array,
    config: DotConfig,
    interpret: bool,
) -> jax.Array:
    sums = _triton_dot.group_sums(problem, x, words, bitlayers, config=config, interpret=interpret)
    return jnp.sum(sums * jax.vmap(epilogue.scale_rows, in_axes=(1, None))(scale, bitlayers), axis=0)
