"""The product through Pallas-Triton: NVIDIA GPUs from Ampere on, none of the 1-bit tensor core needed.

Few rows of fixed point go to `_triton_serial`, which works on the words themselves, many to `_triton_int8`, which
unpacks words for the int8 tensor core; both sum the same integers, so which one runs never shows. Float activations go
to `_triton_dot`, which unpacks words for the bfloat16 tensor core, many rows to `_triton_dot_rows`, which does so while
it multiplies, very many to `_triton_unpack`, which unpacks words once for a dot of XLA's. Sweeps of many rows go to
`_triton_int8_sweep` and `_triton_dot_sweep`. `matmul` and `prefixes` are those of the contract; `interpret` runs their
kernels on the CPU, as JAX operations.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels.bit_matmul import (
    _triton_dot,
    _triton_dot_rows,
    _triton_dot_sweep,
    _triton_epilogue,
    _triton_int8,
    _triton_int8_sweep,
    _triton_pack,
    _triton_serial,
    _triton_unpack,
    contract,
    limbs,
    tuned,
)

SerialConfig = _triton_serial.Config
Int8Config = _triton_int8.Config
DotConfig = _triton_dot.Config
DotRowsConfig = _triton_dot_rows.Config
UnpackConfig = _triton_unpack.Config
Config = SerialConfig | Int8Config | DotConfig | DotRowsConfig | UnpackConfig
CONFIGS = {
    "serial": SerialConfig,
    "int8": Int8Config,
    "dot": DotConfig,
    "dot_rows": DotRowsConfig,
    "unpack": UnpackConfig,
}
_FLOAT_CONFIGS = (DotConfig, DotRowsConfig, UnpackConfig)
_UNGROUPED = (DotRowsConfig, UnpackConfig)  # kernels that take one scale for each channel

_MAX_SUMS = 2**29  # integers that the kernels leave to XLA: 2 GiB
_MAX_CODES = 2**31  # Pallas counts in 64 bits where an array has more than 2**32 bytes, in signed 32 bits else
# Rows * activation bits up to which the words themselves are faster. An estimate from machine code, not measured: a
# word of one bitlayer costs 0.63 population counts for each row and activation bit, of which an SM of an H200 does 16
# per clock; to unpack 32 codes of up to 8 bitlayers costs 4 instructions each, of which it issues 128 per clock. With 4
# bitlayers these meet below 8; that the other kernel has barriers in its loop, unknown in cost, speaks for more.
_SERIAL_WORK = 32
_MAX_SERIAL_WORK = 256  # beyond which it is not worth timing
# Rows of float activations beyond which `_triton_dot` would unpack again; `_triton_dot_rows` does for every 128.
_DOT_ROWS = 64
# Rows of float activations from which it pays to write unpacked weights for a dot of XLA's: an estimate from machine
# code, not measured. In units of the time in which the memory of an H200 delivers 8 bitlayers, that dot takes 1.2 for
# every 128 rows, and to unpack first takes 3. `_triton_dot_rows` issues for 1.0 beside each 1.2: it takes no longer if
# all of that is hidden behind the tensor core, and 3 more at 400 rows if none is. If half is, they meet at 800; by the
# order of its instructions, of which four fifths stand behind the start of a dot, at 2000. This is in between.
_XLA_DOT_ROWS = 1024


def unsupported(problem: contract.Problem) -> str | None:
    """Why the kernels cannot run a problem, or None."""
    if problem.k == 0:
        return "k is 0, so there are no words to load"
    if problem.activation_bits is not None:
        config = config_for(problem)
        if isinstance(config, Int8Config):
            num_codes = problem.activation_limbs * problem.m * problem.k
            if num_codes >= _MAX_CODES:
                return f"the activations are {num_codes} codes of one byte, more than Triton's 32-bit addresses reach"
            num_sums = _triton_int8.num_sums(problem, config)
        else:
            num_sums = len(problem.segments) * problem.bits * problem.activation_limbs * problem.m * problem.n
        if num_sums > _MAX_SUMS:
            return f"the sums of all groups, rows and bitlayers are {num_sums} integers, more than {_MAX_SUMS}"
    return None


def config_for(problem: contract.Problem, dtype: DTypeLike = jnp.float32) -> Config:
    """How a problem is cut into programs, by its shape and the dtype of float activations.

    The type says which kernel runs it. Of a problem without rows or channels it is that of one with them.
    """
    problem = dataclasses.replace(problem, m=max(problem.m, 1), n=max(problem.n, 1))
    if problem.activation_bits is None:
        if problem.groups > 1 or problem.m <= _DOT_ROWS:
            return _triton_dot.config_for(problem, jnp.dtype(dtype))
        return (_triton_unpack if problem.m >= _XLA_DOT_ROWS else _triton_dot_rows).config_for(problem)
    few = problem.m * problem.activation_bits <= _SERIAL_WORK
    return (_triton_serial if few else _triton_int8).config_for(problem)


def candidates(problem: contract.Problem, dtype: DTypeLike = jnp.float32, *, sweep: bool = False) -> list[Config]:
    """Configurations worth timing, of every kernel that can run the problem; the first is that of `config_for`.

    Of a sweep but for those that it does not tell apart: it cuts int8 products by itself, floats as `_triton_dot` does.
    """
    found: list[Config] = [config_for(problem, dtype)]
    if problem.activation_bits is None:
        dot = _triton_dot.config_for(problem, jnp.dtype(dtype))
        rows = [dot.block_rows, 64][: 1 + (problem.m > dot.block_rows)]
        found += _variants(dot, block_rows=rows, num_warps=(4, 8), block_n=(128, 256))
        if problem.groups == 1:
            rows = _triton_dot_rows.config_for(problem)
            blocks = _triton_dot_rows.count_blocks(problem, rows)
            found += _variants(rows, num_blocks=sorted({pl.cdiv(blocks, parts) for parts in (1, 2, 4)}))
            found += _variants(_triton_unpack.config_for(problem), num_warps=(4, 8))
    else:
        serial = _triton_serial.config_for(problem)
        if problem.m * problem.activation_bits <= _MAX_SERIAL_WORK:
            blocks = sorted({max(1, serial.num_blocks // 2), serial.num_blocks, 2 * serial.num_blocks})
            found += _variants(serial, num_blocks=blocks, block_words=(2, 4, 8))
        int8 = _triton_int8.config_for(problem)
        parts = (None,) if problem.groups > 1 else (None, 1, 2, 4, 8, 16)
        found += _variants(int8, parts=parts, block_rows=(64, 128)[: 1 + (problem.m > 64)])
        found += _variants(int8, parts=parts, num_warps=(8,), block_words=(8,))
    if sweep:
        found = [config for config in found if not isinstance(config, _UNGROUPED)] or found
        ways = [dataclasses.replace(c, parts=None) if isinstance(c, Int8Config) else c for c in found]
        found = list(dict(zip(reversed(ways), reversed(found), strict=True)).values())[::-1]
    return list(dict.fromkeys(found))


def _variants(config: Any, **choices: Iterable[int | None]) -> list[Any]:
    return [
        dataclasses.replace(config, **dict(zip(choices, values, strict=True)))
        for values in itertools.product(*choices.values())
    ]


def quantize_rows(
    problem: contract.Problem,
    x: jax.Array,
    *,
    sweep: bool = False,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[limbs.Packed, jax.Array, jax.Array]:
    """`activations.quantize_rows`, in one kernel. x: float[m, k]; the rest as of the product.

    Returns:
      codes: for `matmul` and `prefixes`.
      unit: f32[m].
      poison: f32[m], NaN for rows that are not finite, 0 for others.
    """
    config = _check(problem, config, x, sweep=sweep)
    if isinstance(config, SerialConfig):
        return _triton_serial.quantize_rows(problem, x, config=config, interpret=interpret)
    return _triton_pack.quantize_rows(problem, x, None, interpret=interpret)


def matmul(
    problem: contract.Problem,
    x: jax.Array | limbs.Packed,
    words: jax.Array,
    scale: jax.Array,
    bitlayers: jax.Array,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The product of the contract."""
    if problem.m == 0 or problem.n == 0:
        return jnp.zeros((problem.m, problem.n), jnp.float32)
    x, config = _pad(problem, x), _check(problem, config, x)
    return _matmul(problem, x, words, scale, bitlayers, config, interpret)


def _matmul(
    problem: contract.Problem,
    x: Any,
    words: jax.Array,
    scale: jax.Array,
    bitlayers: jax.Array,
    config: Config,
    interpret: bool,
) -> jax.Array:
    if isinstance(config, Int8Config):
        return _triton_int8.matmul(problem, x, words, scale, bitlayers, config=config, interpret=interpret)
    if isinstance(config, SerialConfig):
        return _triton_serial.matmul(
            problem, x, words, scale, bitlayers, sweep=False, config=config, interpret=interpret
        )
    if isinstance(config, DotRowsConfig):
        return _triton_dot_rows.matmul(problem, x, words, scale, bitlayers, config=config, interpret=interpret)
    if isinstance(config, UnpackConfig):
        return _triton_unpack.matmul(problem, x, words, scale, bitlayers, config=config, interpret=interpret)
    return _triton_dot.matmul(problem, x, words, scale, bitlayers, config=config, interpret=interpret)


def prefixes(
    problem: contract.Problem,
    x: Any,
    words: jax.Array,
    scale: jax.Array,
    limit: jax.Array,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The product at every number of bitlayers up to `limit`, in one pass over the words.

    x may be what `quantize_rows` returns. Not in one pass go many rows with groups: the sums of every group and
    bitlayer would be written, where a product at one count adds up groups in its program. So each count has programs.
    """
    if problem.m == 0 or problem.n == 0:
        return jnp.zeros((problem.bits, problem.m, problem.n), jnp.float32)
    x, config = _pad(problem, x), _check(problem, config, x, sweep=True)
    limit = jnp.clip(limit, 0, problem.bits).astype(jnp.int32)
    if isinstance(config, SerialConfig):
        limits = jnp.full((problem.m,), limit, jnp.int32)
        return _triton_serial.matmul(problem, x, words, scale, limits, sweep=True, config=config, interpret=interpret)
    if isinstance(config, _FLOAT_CONFIGS):
        if isinstance(config, _UNGROUPED):  # multiply by all bitlayers at once
            config = _triton_dot.config_for(problem, x.dtype)
        long = problem.groups == 1 or problem.words_per_group >= _triton_dot_sweep.MIN_WORDS
        run = _triton_dot_sweep.prefixes if long else _triton_dot.matmul
        return run(problem, x, words, scale, limit, config=config, interpret=interpret)
    one_pass = problem.groups == 1 and _triton_int8_sweep.num_sums(problem, config) <= _MAX_SUMS
    run = (_triton_int8_sweep if one_pass else _triton_int8).prefixes
    return run(problem, x, words, scale, limit, config=config, interpret=interpret)


def limb_sums(
    problem: contract.Problem,
    x: jax.Array,
    words: jax.Array,
    bitlayers: jax.Array,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The integers of the contract, of any number of rows: a sweep asks for those of every number of bitlayers."""
    shape = len(problem.segments), problem.activation_limbs, len(problem.code_limbs), problem.m, problem.n
    if 0 in shape:
        return jnp.zeros(shape, jnp.int32)
    x, config = _whole_words(problem, x), _check(problem, config, x)
    if isinstance(config, SerialConfig):
        return _triton_serial.limb_sums(problem, x, words, bitlayers, config=config, interpret=interpret)
    assert isinstance(config, Int8Config)
    num_sums = _triton_int8.num_sums(problem, dataclasses.replace(config, parts=config.parts or 1))
    num_codes = problem.activation_limbs * x.size
    at_once = max(1, min(problem.m * _MAX_SUMS // num_sums, problem.m * (_MAX_CODES - 1) // num_codes))
    blocks = [slice(first, min(first + at_once, problem.m)) for first in range(0, problem.m, at_once)]
    sums = [
        _triton_int8.limb_sums(
            dataclasses.replace(problem, m=block.stop - block.start),
            x[block],
            words,
            bitlayers[block],
            config=config,
            interpret=interpret,
        )
        for block in blocks
    ]
    return sums[0] if len(sums) == 1 else jnp.concatenate(sums, axis=3)


scale_groups = _triton_epilogue.scale_groups


def _check(problem: contract.Problem, config: Config | None, x: Any, *, sweep: bool = False) -> Config:
    dtype = getattr(x, "dtype", None)
    config = config or tuned.find("triton", problem, CONFIGS, dtype=dtype, sweep=sweep)
    config = config or config_for(problem, jnp.float32 if dtype is None else dtype)
    is_float = problem.activation_bits is None
    if isinstance(config, _FLOAT_CONFIGS) != is_float:
        raise TypeError(
            f"`config` must be that of a kernel for {'float' if is_float else 'fixed-point'} activations, but got "
            f"{config}. `config_for` returns one."
        )
    if isinstance(config, _UNGROUPED) and problem.groups > 1:
        raise ValueError(
            f"`config` must be a DotConfig for {problem.groups} groups, but got {config}. `config_for` returns one."
        )
    return config


def _pad(problem: contract.Problem, x: jax.Array | limbs.Packed) -> jax.Array | limbs.Packed:
    return x if isinstance(x, limbs.Packed) else _whole_words(problem, x)


def _whole_words(problem: contract.Problem, x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, problem.num_words * contract.WORD_BITS - problem.k)))
