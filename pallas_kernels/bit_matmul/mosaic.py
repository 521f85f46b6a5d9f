"""The product on the 1-bit tensor core, in a Pallas Mosaic GPU kernel: for few rows of fixed-point activations.

One `mma` counts the bits that 16 channels of one bitlayer and the 8 bits of one limb of one row have in common, over
256 k. Native on Hopper (sm_90); sm_100 and later emulate it, still exactly. The kernel (`_mosaic_kernel`) returns exact
integers; what surrounds it here is XLA: activations are packed into the registers' order before, and after it the
splits of k are added, and limbs become floats as in every backend (`epilogue`).

k is split among the 4 warps of a program, which add their sums in shared memory, and among programs, whose sums XLA
adds: integers, so exact in any order, without atomics or a zeroed output. What this writes and reads again is
8 * rows * limbs bytes per channel and split, beside 4 * bitlayers * (words of the split) bytes of weights: with one
row of 16 bits and 2 bitlayers 3 %.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bit_matmul import contract, epilogue, limbs, tuned
from pallas_kernels.bit_matmul._mosaic_kernel import LOAD_CHANNELS, STEP_WORDS, WARPS, Config, Plan

# Cost grows with rows * limbs and bitlayers: beyond this `triton` unpacks the weights for the int8 tensor core instead,
# whose cost hardly does. An estimate, from 0.54 BMMA per clock and multiprocessor and the instructions of that kernel.
_MAX_ROW_LIMBS = 32
CONFIGS = {"bmma": Config}
_PROGRAM_ROW_LIMBS = 8  # per program: 64 registers of sums
_MAX_REGISTERS = 96  # of `Config.registers`, where a choice is left; addresses and the rest take up to 32
_MIN_PROGRAMS = 256  # about two for each of Hopper's 132 multiprocessors


def unsupported(problem: contract.Problem) -> str | None:
    """Why the kernel cannot run the problem, or None. Whether there is such a GPU is not asked here."""
    if problem.activation_bits is None:
        return "`activation_bits` must be an integer, but got None: the 1-bit tensor core takes fixed-point activations"
    if problem.n % LOAD_CHANNELS:
        return (
            f"`n` must be a multiple of {LOAD_CHANNELS}, so that words are read 16 bytes at a time, but got {problem.n}"
        )
    words = problem.segments[0][2] if problem.segments else 0
    if any(start != i * words for i, (_, start, _) in enumerate(problem.segments)):
        return (
            f"`group_size` above {contract.MAX_EXACT_K} must be a multiple of it, so that k is cut into segments of "
            f"equal length, but got {problem.group_size}"
        )
    row_limbs = problem.m * problem.activation_limbs
    if row_limbs > _MAX_ROW_LIMBS:
        return (
            f"rows times 8-bit limbs of activations must be at most {_MAX_ROW_LIMBS}, but got {problem.m} * "
            f"{problem.activation_limbs}: beyond that, unpacked weights on the int8 tensor core should be faster"
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


def candidates(problem: contract.Problem) -> list[Config]:
    """Configurations worth timing; the first is that of `config_for`."""
    default = config_for(problem)
    found = [
        dataclasses.replace(default, steps=steps, depth=depth, warps_k=warps_k)
        for steps, depth, warps_k in itertools.product((1, 2, 3), (1, 2, 4), (1, 2, 4))
    ]
    row_limbs = default.rows * problem.activation_limbs
    return list(dict.fromkeys([default, *(c for c in found if c.registers(row_limbs) <= _MAX_REGISTERS)]))


def matmul(
    problem: contract.Problem,
    x: jax.Array,
    words: jax.Array,
    scale: jax.Array,
    bitlayers: jax.Array,
    *,
    config: Config | None = None,
) -> jax.Array:
    """The product of the contract. `config` never shows in it; it defaults to what was measured, or `config_for`."""
    _check(problem)
    if 0 in (problem.m, problem.k, problem.n):
        return jnp.zeros((problem.m, problem.n), jnp.float32)
    plan = Plan(
        problem=problem, config=config or tuned.find("mosaic", problem, CONFIGS) or config_for(problem), sweep=False
    )
    packed = pack(problem, x)
    sums = _sums(plan, packed, words, bitlayers)  # [code limbs, segments, activation limbs, m, n]
    firsts = jnp.array([first for first, _ in problem.code_limbs])
    used = jnp.clip(bitlayers[None] - firsts[:, None], 0, contract.LIMB_BITS)  # [code limbs, m]
    values = _center(plan, packed, sums, used)
    return _to_float(problem, values, scale, bitlayers)


def prefixes(
    problem: contract.Problem,
    x: jax.Array,
    words: jax.Array,
    scale: jax.Array,
    limit: jax.Array,
    *,
    config: Config | None = None,
) -> jax.Array:
    """The product at every number of bitlayers up to `limit`, from one pass over the words."""
    _check(problem)
    if 0 in (problem.m, problem.k, problem.n):
        return jnp.zeros((problem.bits, problem.m, problem.n), jnp.float32)
    plan = Plan(problem=problem, config=config or config_for(problem), sweep=True)
    limit = jnp.clip(limit, 0, problem.bits).astype(jnp.int32)
    packed = pack(problem, x)
    sums = _sums(plan, packed, words, jnp.full((problem.m,), limit))  # [bits, segments, activation limbs, m, n]
    position = np.arange(problem.bits) % contract.LIMB_BITS + 1
    used = jnp.broadcast_to(jnp.array(position, jnp.int32)[:, None], (problem.bits, problem.m))
    values = _center(plan, packed, sums, used)
    results = []
    for count in range(1, problem.bits + 1):
        taken = [values[min(count, last) - 1] for first, last in problem.code_limbs if first < count]
        counts = jnp.full((problem.m,), count, jnp.int32)
        results.append(_to_float(problem, jnp.stack(taken), scale, counts))
    return jnp.stack(results)


def _check(problem: contract.Problem) -> None:
    reason = unsupported(problem)
    if reason is not None:
        raise contract.Unsupported(reason)


def _sums(plan: Plan, packed: jax.Array, words: jax.Array, bitlayers: jax.Array) -> jax.Array:
    """x . code of each slot, segment and limb. int32[slots, segments, activation limbs, m, n]."""
    from pallas_kernels.bit_matmul import _mosaic_gpu  # Mosaic GPU is imported where it is used, and nowhere else

    return add_splits(plan, _mosaic_gpu.launch(plan, words, fragments(plan, packed), counts(plan, bitlayers)))


def add_splits(plan: Plan, sums: jax.Array) -> jax.Array:
    """int32[slots, splits, row blocks * row limbs, n] -> int32[slots, segments, activation limbs, m, n]."""
    problem = plan.problem
    sums = sums.reshape(plan.slots, -1, plan.segment_splits, *sums.shape[2:]).sum(axis=2)
    sums = sums.reshape(*sums.shape[:2], -1, problem.activation_limbs, problem.n)[:, :, : problem.m]
    return jnp.swapaxes(sums, 2, 3)


def counts(plan: Plan, bitlayers: jax.Array) -> jax.Array:
    """Bitlayers used by each row; none by those that fill up a block. int32[row blocks, rows]."""
    rows = plan.row_blocks * plan.config.rows
    padded = jnp.pad(bitlayers.astype(jnp.int32), (0, rows - plan.problem.m))
    return padded.reshape(plan.row_blocks, plan.config.rows)


def pack(problem: contract.Problem, x: jax.Array) -> jax.Array:
    """The bits of the activations. uint32[column, activation limbs, m, num_words], column j: bit j of the limb."""
    x = jnp.pad(x, ((0, 0), (0, problem.num_words * contract.WORD_BITS - problem.k)))
    codes = limbs.split(x, problem.activation_limbs)
    codes = codes.astype(jnp.uint32).reshape(*codes.shape[:2], -1, contract.WORD_BITS)
    position = jnp.arange(contract.WORD_BITS, dtype=jnp.uint32)[None, None, None, None, :]
    column = jnp.arange(contract.LIMB_BITS, dtype=jnp.uint32)[:, None, None, None, None]
    # A sign-extended top limb has its sign in bit 7, whatever its width.
    return jnp.sum(((codes[None] >> column) & jnp.uint32(1)) << position, axis=-1, dtype=jnp.uint32)


def fragments(plan: Plan, packed: jax.Array) -> jax.Array:
    """The B fragments of all mma, in the order in which lanes load them. uint32[`plan.fragments_shape`]."""
    problem, config = plan.problem, plan.config
    packed = jnp.pad(packed, ((0, 0), (0, 0), (0, plan.row_blocks * config.rows - problem.m), (0, 0)))
    packed = _split(plan, packed)  # [column, limbs, rows, splits * split words]
    packed = packed.reshape(
        contract.LIMB_BITS,
        problem.activation_limbs,
        plan.row_blocks,
        config.rows,
        plan.splits,
        config.warps_k * config.steps,
        2,  # words q and q + 4
        STEP_WORDS // 2,
    )
    # -> row block, split, step, row, limb, column, q, half: lane 4 * column + q has b0 and b1 side by side
    return jnp.transpose(packed, (2, 4, 5, 3, 1, 0, 7, 6)).reshape(plan.fragments_shape)


def _split(plan: Plan, per_word: jax.Array) -> jax.Array:
    """[..., num_words] -> [..., splits * split words], with zeros where a split is not full."""
    num_words, size = plan.problem.num_words, plan.config.split_words
    source = np.full((len(plan.problem.segments), plan.segment_splits * size), num_words)
    for i, (_, start, stop) in enumerate(plan.problem.segments):
        source[i, : stop - start] = np.arange(start, stop)
    source = source.ravel()
    if np.array_equal(source, np.arange(num_words)):
        return per_word
    padded = jnp.pad(per_word, [(0, 0)] * (per_word.ndim - 1) + [(0, 1)])
    return jnp.take(padded, source, axis=-1)


def _center(plan: Plan, packed: jax.Array, sums: jax.Array, used: jax.Array) -> jax.Array:
    """2 * (q . c) - (2**used - 1) * sum_k q, exact. int32[slots, segments, activation limbs, m, n]."""
    # Of the bits, not of the codes: so the codes have one reader, into which a compiler may fuse what makes them.
    weights = np.full((contract.LIMB_BITS, plan.problem.activation_limbs), 1) << np.arange(contract.LIMB_BITS)[:, None]
    weights[-1, 0] *= -1  # the sign
    word_sums = jnp.sum(
        jax.lax.population_count(packed).astype(jnp.int32) * weights[..., None, None].astype(np.int32), axis=0
    )
    row_sums = _split(plan, word_sums).reshape(*packed.shape[1:3], len(plan.problem.segments), -1).sum(axis=-1)
    row_sums = jnp.moveaxis(row_sums, -1, 0)[None, ..., None]  # [1, segments, activation limbs, m, 1]
    return 2 * sums - ((1 << used) - 1)[:, None, None, :, None] * row_sums


def _to_float(problem: contract.Problem, values: jax.Array, scale: jax.Array, bitlayers: jax.Array) -> jax.Array:
    """values: int32[code limbs, segments, activation limbs, m, n] -> f32[m, n]."""
    return epilogue.scale_segments(problem, jnp.transpose(values, (1, 2, 0, 3, 4)), scale, bitlayers)
