"""The product on the 1-bit tensor core, in a Pallas Mosaic GPU kernel: for few rows of fixed-point activations.

One `mma` counts the bits that 16 channels of one bitlayer and the 8 bits of one limb of one row have in common, over
256 k. Native on Hopper (sm_90); sm_100 and later emulate it, still exactly. The kernel (`_mosaic_kernel`) returns exact
integers. Rows are quantized and packed into the registers' order before it, in one kernel (`_triton_pack`, or by XLA
where codes are given); after it another one adds the splits of k and makes floats of them (`_triton_epilogue`).

k is split among the 4 warps of a program, which add their sums in shared memory, and among programs, whose sums are
added after them: integers, so exact in any order, without atomics or a zeroed output. What this writes and reads again
is 8 * rows * limbs bytes per channel and split, beside 4 * bitlayers * (words of the split) bytes of weights: with one
row of 16 bits and 2 bitlayers 3 %.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.bit_matmul import _triton_epilogue, _triton_pack, contract, epilogue, limbs, tuned
from pallas_kernels.bit_matmul._mosaic_kernel import LANES, STEP_WORDS, WARPS, Config, Plan

# Cost grows with rows * limbs and bitlayers: beyond this `triton` unpacks the weights for the int8 tensor core instead,
# whose cost hardly does. An estimate, from 0.54 BMMA per clock and multiprocessor and the instructions of that kernel.
_MAX_ROW_LIMBS = 32
CONFIGS = {"bmma": Config}
_PROGRAM_ROW_LIMBS = 8  # per program: 64 registers of sums
_MAX_REGISTERS = 96  # of `Config.registers`, where a choice is left; addresses and the rest take up to 32
_MIN_PROGRAMS = 256  # about two for each of Hopper's 132 multiprocessors


def unsupported(problem: contract.Problem) -> str | None:
    """Why the kernel cannot run the problem, or None. Whether there is such a GPU is not asked here."""
    if reason := _impossible(problem):
        return reason
    row_limbs = problem.m * problem.activation_limbs
    if row_limbs > _MAX_ROW_LIMBS:
        return (
            f"rows times 8-bit limbs of activations must be at most {_MAX_ROW_LIMBS}, but got {problem.m} * "
            f"{problem.activation_limbs}: beyond that, unpacked weights on the int8 tensor core should be faster"
        )
    return None


def _impossible(problem: contract.Problem) -> str | None:
    """Why the kernel cannot run the problem, fast or slow, or None."""
    if problem.activation_bits is None:
        return "`activation_bits` must be an integer, but got None: the 1-bit tensor core takes fixed-point activations"
    words = problem.segments[0][2] if problem.segments else 0
    if any(start != i * words for i, (_, start, _) in enumerate(problem.segments)):
        return (
            f"`group_size` above {contract.MAX_EXACT_K} must be a multiple of it, so that k is cut into segments of "
            f"equal length, but got {problem.group_size}"
        )
    return None


def config_for(problem: contract.Problem) -> Config:
    """A choice by the problem's shape: enough programs to fill the GPU, then enough k for each."""
    max_rows = max(1, _PROGRAM_ROW_LIMBS // problem.activation_limbs)
    rows = -(-problem.m // -(-problem.m // max_rows)) if problem.m else 1
    segment = max((stop - start for _, start, stop in problem.segments), default=0)
    warps_k = WARPS
    while warps_k > 1 and (warps_k // 2) * STEP_WORDS >= segment:
        warps_k //= 2

    def with_steps(steps: int) -> Config:
        depths = [Config(rows=rows, steps=steps, depth=depth, warps_k=warps_k) for depth in (4, 2, 1)]
        row_limbs = rows * problem.activation_limbs
        return next((config for config in depths if config.registers(row_limbs) <= _MAX_REGISTERS), depths[-1])

    config = with_steps(2)
    plan = Plan(problem=problem, config=config, sweep=False)
    enough = plan.n_blocks * plan.splits * plan.row_blocks >= _MIN_PROGRAMS
    return config if enough and config.split_words <= segment else with_steps(1)


def candidates(problem: contract.Problem, dtype: DTypeLike = jnp.float32, *, sweep: bool = False) -> list[Config]:
    """Configurations worth timing, of rows of any dtype, products and sweeps; the first is that of `config_for`."""
    del dtype, sweep
    default = config_for(problem)
    found = [
        dataclasses.replace(default, steps=steps, depth=depth, warps_k=warps_k)
        for steps, depth, warps_k in itertools.product((1, 2, 3), (1, 2, 4), (1, 2, 4))
    ]
    row_limbs = default.rows * problem.activation_limbs
    return list(dict.fromkeys([default, *(c for c in found if c.registers(row_limbs) <= _MAX_REGISTERS)]))


def quantize_rows(
    problem: contract.Problem,
    x: jax.Array,
    *,
    sweep: bool = False,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[limbs.Packed, jax.Array, jax.Array]:
    """`activations.quantize_rows` in one kernel. x: float[m, k]; `sweep` and `config` must be those of the product.

    Returns:
      packed: for `matmul` and `prefixes`, in place of the codes.
      unit: f32[m].
      poison: f32[m], NaN for rows that are not finite, 0 for others.
    """
    plan = _plan(problem, config, sweep=sweep)
    steps, row_limbs, num = plan.splits * plan.config.warps_k * plan.config.steps, plan.row_limbs, plan.config.rows

    def offset(row, bit, word):
        limb = problem.activation_limbs - 1 - bit // contract.LIMB_BITS
        step, half, quad = word // STEP_WORDS, word // (STEP_WORDS // 2) % 2, word % (STEP_WORDS // 2)
        fragment = (row // num * steps + step) * row_limbs + row % num * problem.activation_limbs + limb
        return (fragment * LANES + bit % contract.LIMB_BITS * (STEP_WORDS // 2) + quad) * 2 + half

    layout = _triton_pack.Layout(
        shape=plan.fragments_shape,
        rows=plan.row_blocks * num,
        num_words=plan.splits * plan.config.split_words,
        source=_source(plan),
        offset=offset,
        bits=problem.activation_limbs * contract.LIMB_BITS,
    )
    return _triton_pack.quantize_rows(problem, x, layout, interpret=interpret)


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
    """The product of the contract. `config` never shows in it; it defaults to what was measured, or `config_for`.

    `interpret` runs what Triton compiles on the CPU, as JAX operations, but not the kernel of this module.
    """
    if 0 in (problem.m, problem.k, problem.n):
        return jnp.zeros((problem.m, problem.n), jnp.float32)
    plan = _plan(problem, config, sweep=False)
    packed = _pack(plan, x)
    sums = _launch(plan, packed.bits, words, bitlayers)
    return _finish(plan, packed, sums, scale, bitlayers, interpret)


def prefixes(
    problem: contract.Problem,
    x: jax.Array | limbs.Packed,
    words: jax.Array,
    scale: jax.Array,
    limit: jax.Array,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The product at every number of bitlayers up to `limit`, from one pass over the words. Options as of `matmul`."""
    if 0 in (problem.m, problem.k, problem.n):
        return jnp.zeros((problem.bits, problem.m, problem.n), jnp.float32)
    plan = _plan(problem, config, sweep=True)
    limit = jnp.clip(limit, 0, problem.bits).astype(jnp.int32)
    packed = _pack(plan, x)
    sums = _launch(plan, packed.bits, words, jnp.full((problem.m,), limit))
    return _finish(plan, packed, sums, scale, None, interpret)


def limb_sums(
    problem: contract.Problem,
    x: jax.Array,
    words: jax.Array,
    bitlayers: jax.Array,
    *,
    config: Config | None = None,
) -> jax.Array:
    """The integers of the contract, of any number of rows: a sweep asks for those of every number of bitlayers."""
    shape = len(problem.segments), problem.activation_limbs, len(problem.code_limbs), problem.m, problem.n
    if 0 in shape:
        return jnp.zeros(shape, jnp.int32)
    plan = _plan(problem, config, sweep=False, any_rows=True)
    packed = _pack(plan, x)
    sums = _launch(plan, packed.bits, words, bitlayers)
    sums = sums.reshape(plan.slots, len(problem.segments), plan.segment_splits, -1, problem.activation_limbs, problem.n)
    sums = jnp.transpose(sums[:, :, :, : problem.m].sum(axis=2), (1, 3, 0, 2, 4))
    return epilogue.centre(problem, sums, packed.row_sums, bitlayers)


scale_groups = _triton_epilogue.scale_groups


def _plan(problem: contract.Problem, config: Config | None, *, sweep: bool, any_rows: bool = False) -> Plan:
    if reason := _impossible(problem) if any_rows else unsupported(problem):
        raise contract.Unsupported(reason)
    config = config or tuned.find("mosaic", problem, CONFIGS, sweep=sweep) or config_for(problem)
    return Plan(problem=problem, config=config, sweep=sweep)


def _pack(plan: Plan, x: jax.Array | limbs.Packed) -> limbs.Packed:
    if isinstance(x, limbs.Packed):
        return x
    bits = fragments(plan, x)
    return limbs.Packed(bits=bits, row_sums=_row_sums(plan, bits))


def _launch(plan: Plan, packed: jax.Array, words: jax.Array, bitlayers: jax.Array) -> jax.Array:
    """x . code of each slot, split of k, row and limb. int32[slots, splits, row blocks * row limbs, n]."""
    from pallas_kernels.bit_matmul import _mosaic_gpu  # Mosaic GPU is imported where it is used, and nowhere else

    return _mosaic_gpu.launch(plan, words, packed, counts(plan, bitlayers))


def _finish(
    plan: Plan,
    packed: limbs.Packed,
    sums: jax.Array,
    scale: jax.Array,
    bitlayers: jax.Array | None,
    interpret: bool,
) -> jax.Array:
    num_limbs = plan.problem.activation_limbs
    return _triton_epilogue.finish(
        plan.problem,
        sums,
        packed.row_sums,
        scale,
        bitlayers,
        steps=packed.steps,
        parts=plan.segment_splits,
        place=lambda slot, part, limb, row, channels: (slot, part, row * num_limbs + limb, channels),
        interpret=interpret,
    )


def counts(plan: Plan, bitlayers: jax.Array) -> jax.Array:
    """Bitlayers used by each row; none by those that fill up a block. int32[row blocks, rows]."""
    rows = plan.row_blocks * plan.config.rows
    padded = jnp.pad(bitlayers.astype(jnp.int32), (0, rows - plan.problem.m))
    return padded.reshape(plan.row_blocks, plan.config.rows)


def fragments(plan: Plan, x: jax.Array) -> jax.Array:
    """The B fragments of all mma, in the order in which lanes load them. uint32[`plan.fragments_shape`].

    Codes are put into order before their bits are packed: so packing is one reduction, of which quantizing the
    activations can be a part, and nothing is transposed after it.
    """
    problem, config = plan.problem, plan.config
    padding = (0, plan.row_blocks * config.rows - problem.m), (0, problem.num_words * contract.WORD_BITS - problem.k)
    codes = limbs.split(jnp.pad(x, padding), problem.activation_limbs).astype(jnp.uint32)
    codes = _split(plan, codes.reshape(*codes.shape[:2], -1, contract.WORD_BITS))
    codes = codes.reshape(
        problem.activation_limbs,
        plan.row_blocks,
        config.rows,
        plan.splits,
        config.warps_k * config.steps,
        2,  # words q and q + 4
        STEP_WORDS // 2,
        contract.WORD_BITS,
    )
    # -> row block, split, step, row, limb, q, half, position: lane 4 * column + q has b0 and b1 side by side
    codes = jnp.expand_dims(jnp.transpose(codes, (1, 3, 4, 2, 0, 6, 5, 7)), 5)
    column = jnp.arange(contract.LIMB_BITS, dtype=jnp.uint32).reshape(-1, 1, 1, 1)
    position = jnp.arange(contract.WORD_BITS, dtype=jnp.uint32)
    # A sign-extended top limb has its sign in bit 7, whatever its width.
    bits = jax.lax.broadcast_in_dim(column, (*codes.shape[:5], *column.shape), (5, 6, 7, 8))
    bits = ((codes >> bits) & jnp.uint32(1)) << jnp.broadcast_to(position, codes.shape)
    return jnp.sum(bits, axis=-1, dtype=jnp.uint32).reshape(plan.fragments_shape)


def _split(plan: Plan, words: jax.Array) -> jax.Array:
    """[.., num_words, 32] -> [.., splits * split words, 32], with zeros where a split is not full."""
    source = _source(plan)
    if source is None:
        return words
    inside = jnp.array(source >= 0)[:, None]
    return jnp.where(inside, jnp.take(words, np.maximum(source, 0), axis=-2), jnp.zeros((), words.dtype))


def _source(plan: Plan) -> np.ndarray | None:
    """int32[splits * split words], the word of k that each is, -1 where a split is not full; None if all in order."""
    source = np.full((len(plan.problem.segments), plan.segment_splits * plan.config.split_words), -1, np.int32)
    for i, (_, start, stop) in enumerate(plan.problem.segments):
        source[i, : stop - start] = np.arange(start, stop)
    return None if np.array_equal(source.ravel(), np.arange(plan.problem.num_words)) else source.ravel()


def _row_sums(plan: Plan, packed: jax.Array) -> jax.Array:
    """sum_k q of each segment and limb, from the fragments. int32[segments, activation limbs, m]."""
    problem = plan.problem
    weights = np.full((problem.activation_limbs, contract.LIMB_BITS), 1) << np.arange(contract.LIMB_BITS)
    weights[0, -1] *= -1  # the sign
    ones = (
        jax.lax.population_count(packed)
        .astype(jnp.int32)
        .reshape(plan.row_blocks, len(problem.segments), -1, plan.config.rows, *weights.shape, STEP_WORDS)
    )  # [row blocks, segments, splits and steps, rows, limbs, columns, words]
    sums = jnp.sum(ones * weights.astype(np.int32).reshape(1, 1, 1, 1, *weights.shape, 1), axis=(2, 5, 6))
    sums = jnp.transpose(sums, (1, 3, 0, 2)).reshape(len(problem.segments), problem.activation_limbs, -1)
    return sums[..., : problem.m]
