"""Few rows on a GPU: AND and population count, bitlayer by bitlayer, at any fixed-point width.

A program takes `block_n` channels, `block_rows` rows and one run of words. For each `block_words` words of its run it
holds the activation bits in registers, as scalars that all lanes share, and goes through the bitlayers: one 16-byte
load per word and lane, four channels each. n alone does not fill a GPU, so the words are split over programs; what
they return are integers, which XLA sums.

What bounds it is the population count: 16 lanes per clock and SM, against 64 for a logic operation (CUDA C++
Programming Guide, throughput of native arithmetic instructions, compute capability 8.0 and 9.0). So three words of
equal weight are first added bit by bit, into a sum of that weight and a carry of twice that, one LOP3 each; the carry
joins the words of the next activation bit, whose weight it has. Taken to its end this trades counts for more logic
than is free: with half of the words left to count, both units are busy about as long.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _compat
from pallas_kernels.bit_matmul import _triton_epilogue, _triton_pack, contract, epilogue, limbs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How a product is cut into programs. Sizes but `num_blocks` are powers of two."""

    block_n: int  # channels of a program; four to a lane
    block_rows: int  # rows of a program: the words are loaded once for all of them
    block_words: int  # words whose activation bits are in registers at once
    num_blocks: int  # blocks of words of a program, one after the other
    num_warps: int
    num_stages: int = 1  # there is no loop that Triton would pipeline


_LANE_CHANNELS = 4
_WARP_CHANNELS = 32 * _LANE_CHANNELS
_MAX_WARPS = 4
_MAX_BLOCK_WORDS = 4
_MAX_ACTIVATION_WORDS = 64  # registers of every lane
_MIN_PROGRAMS = 528  # four to each of the 132 SMs of an H200


def config_for(problem: contract.Problem) -> Config:
    """The configuration for a shape: activations that fit into registers, and enough programs to fill a GPU."""
    assert problem.activation_bits is not None
    num_warps = min(_MAX_WARPS, pl.next_power_of_2(pl.cdiv(problem.n, _WARP_CHANNELS)))
    block_n = num_warps * _WARP_CHANNELS
    segment_words = max(stop - start for _, start, stop in problem.segments)
    block_words = min(_MAX_BLOCK_WORDS, pl.next_power_of_2(segment_words))
    room = max(1, _MAX_ACTIVATION_WORDS // (block_words * problem.activation_bits))
    block_rows = min(1 << (room.bit_length() - 1), pl.next_power_of_2(problem.m))
    programs = pl.cdiv(problem.n, block_n) * pl.cdiv(problem.m, block_rows) * len(problem.segments)
    parts = pl.cdiv(_MIN_PROGRAMS, programs)  # of a segment
    return Config(
        block_n=block_n,
        block_rows=block_rows,
        block_words=block_words,
        num_blocks=max(1, segment_words // (block_words * parts)),
        num_warps=num_warps,
    )


def quantize_rows(
    problem: contract.Problem, x: jax.Array, *, config: Config, interpret: bool
) -> tuple[limbs.Packed, jax.Array, jax.Array]:
    """`activations.quantize_rows` in one kernel. x: float[m, k]; the codes are those that `matmul` takes."""
    cut, bits = _cut(problem, config), problem.fixed_point_bits
    num_words, rows = cut.index.size, problem.m + -problem.m % config.block_rows
    layout = _triton_pack.Layout(
        shape=(rows, bits, num_words),
        rows=rows,
        num_words=num_words,
        source=None if cut.is_identity else np.where(cut.inside, cut.index, -1).astype(np.int32),
        offset=lambda row, bit, word: (row * bits + bit) * num_words + word,
        bits=bits,
    )
    return _triton_pack.quantize_rows(problem, x, layout, interpret=interpret)


def matmul(
    problem: contract.Problem,
    codes: jax.Array | limbs.Packed,
    words: jax.Array,
    scale: jax.Array,
    bitlayers: jax.Array,
    *,
    sweep: bool,
    config: Config,
    interpret: bool,
) -> jax.Array:
    """The product of the contract.

    Args:
      problem: the product.
      codes: int32[m, 32 * num_words], 0 past k, or what `quantize_rows` makes of rows.
      words: uint32[bits, num_words, n].
      scale: f32[min(bits, 4), groups, n].
      bitlayers: int32[m].
      sweep: at every number of bitlayers up to max(bitlayers), which is then the same for all rows.
      config: how to cut it.
      interpret: run on the CPU, as JAX operations.

    Returns:
      f32[m, n], or with `sweep` f32[bits, m, n].
    """
    cut, codes, sums = _launch(problem, codes, words, bitlayers, sweep, config, interpret)
    return _triton_epilogue.finish(
        problem,
        sums,
        codes.row_sums,
        scale,
        None if sweep else bitlayers,
        steps=codes.steps,
        parts=len(cut.first_words) // len(problem.segments),
        place=lambda slot, part, limb, row, channels: (part, slot, limb, row, channels),
        interpret=interpret,
    )


def limb_sums(
    problem: contract.Problem,
    codes: jax.Array,
    words: jax.Array,
    bitlayers: jax.Array,
    *,
    config: Config,
    interpret: bool,
) -> jax.Array:
    """The integers of the contract. codes: int32[m, 32 * num_words], 0 past k."""
    _, packed, sums = _launch(problem, codes, words, bitlayers, False, config, interpret)
    sums = sums.reshape(len(problem.segments), -1, *sums.shape[1:])[..., : problem.m, :].sum(axis=1)
    return epilogue.centre(problem, jnp.swapaxes(sums, 1, 2), packed.row_sums, bitlayers)


def _launch(
    problem: contract.Problem,
    codes: jax.Array | limbs.Packed,
    words: jax.Array,
    bitlayers: jax.Array,
    sweep: bool,
    config: Config,
    interpret: bool,
) -> tuple[_Cut, limbs.Packed, jax.Array]:
    """How k was cut, what was multiplied, and the sums of parts, limbs of bitlayers or bitlayers, and limbs of rows."""
    cut = _cut(problem, config)
    padding = -problem.m % config.block_rows
    if not isinstance(codes, limbs.Packed):
        bits = limbs.pack(codes, problem.fixed_point_bits)
        packed = jnp.pad(cut.arrange(bits), ((0, padding), (0, 0), (0, 0)))
        codes = limbs.Packed(bits=packed, row_sums=_row_sums(problem, bits))
    packed = codes.bits
    num_kept = problem.bits if sweep else len(problem.code_limbs)
    sums = _compat.triton_call(
        functools.partial(_kernel, problem=problem, config=config, sweep=sweep),
        name="bit_matmul_serial",
        grid=(pl.cdiv(problem.n, config.block_n), len(cut.first_words), packed.shape[0] // config.block_rows),
        out_shape=jax.ShapeDtypeStruct(
            (len(cut.first_words), num_kept, problem.activation_limbs, packed.shape[0], problem.n), jnp.int32
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )(None if cut.is_even else jnp.asarray(cut.first_words), packed, jnp.pad(bitlayers, (0, padding)), words)
    return cut, codes, sums


def _kernel(first_words, packed, counts, words, out, *, problem: contract.Problem, config: Config, sweep: bool):
    """One block of channels, one part of the words, one block of rows.

    Args:
      first_words: [parts] int32, where each part begins; None where each begins as the one before ends
      packed: [rows, activation_bits, parts * words of a part] uint32
      counts: [rows] int32
      words: [bits, num_words, n] uint32
      out: [parts, code limbs, activation limbs, rows, n] int32, with `sweep` [parts, bits, ..]
      problem: the product.
      config: how it is cut.
      sweep: return the accumulator after each bitlayer.
    """
    part, first_row = pl.program_id(1), pl.program_id(2) * config.block_rows
    first_channel = pl.program_id(0) * config.block_n
    channels = pl.ds(first_channel, config.block_n)
    whole = problem.n % config.block_n == 0
    inside = None if whole else first_channel + jnp.arange(config.block_n, dtype=jnp.int32) < problem.n
    num_limbs = problem.activation_limbs
    rows = range(config.block_rows)
    row_counts = [counts[first_row + row] for row in rows]
    limit = functools.reduce(jnp.maximum, row_counts)

    part_words = config.num_blocks * config.block_words

    def load_words(layer, block):  # block_words of [block_n] uint32
        first = part * part_words if first_words is None else first_words[part]
        first += block * config.block_words
        # Past the last word there are no activations: any word will do.
        index = [jnp.minimum(first + i, problem.num_words - 1) for i in range(config.block_words)]
        return [_compat.triton_load(words.at[layer, i, channels], mask=inside) for i in index]

    def load_activations(block):  # [row][activation bit][word], a scalar uint32
        first = part * part_words + block * config.block_words
        bits, block_words = range(packed.shape[1]), range(config.block_words)
        return [[[packed[first_row + row, bit, first + i] for i in block_words] for bit in bits] for row in rows]

    def add_bitlayer(layer, block, activations, acc, *, shift):
        """acc[limb of row] <- 2 * acc + q_a . bit, for rows that are not done."""
        block_words = load_words(layer, block)
        new = []
        for row in rows:
            old = acc[row * num_limbs : (row + 1) * num_limbs]
            sums = _limb_sums(problem, block_words, activations[row])
            added = [(2 * a if shift else a) + s for a, s in zip(old, sums, strict=True)]
            # All rows of a sweep end together; a row alone ends with the loop.
            if config.block_rows > 1 and not sweep:
                added = [jnp.where(layer < row_counts[row], b, a) for a, b in zip(old, added, strict=True)]
            new += added
        return tuple(new)

    def store(index, acc):
        for row in rows:
            for limb in range(num_limbs):
                ref = out.at[part, index, jnp.int32(limb), first_row + row, channels]
                _compat.triton_store(ref, acc[row * num_limbs + limb], mask=inside)

    zero = (jnp.zeros((config.block_n,), jnp.int32),) * (config.block_rows * num_limbs)

    def limb_by_blocks(first, stop):
        """Blocks outside, so that each loads its activations once."""

        def add_block(block, total):
            activations = load_activations(block)

            def step(layer, acc):
                return add_bitlayer(layer, block, activations, acc, shift=True)

            acc = lax.fori_loop(jnp.int32(first), stop, step, zero)
            return tuple(t + a for t, a in zip(total, acc, strict=True))

        return _loop(config.num_blocks, add_block, zero)

    def limb_by_bitlayers(first, stop):
        """Bitlayers outside, and the accumulator after each is stored."""
        kept = load_activations(0) if config.num_blocks == 1 else None

        def add_all(layer, acc):
            def add_block(block, acc):
                return add_bitlayer(layer, block, kept or load_activations(block), acc, shift=False)

            acc = _loop(config.num_blocks, add_block, tuple(2 * a for a in acc))
            store(layer, acc)
            return acc

        lax.fori_loop(jnp.int32(first), stop, add_all, zero)

    for index, (first, last) in enumerate(problem.code_limbs):
        stop = jnp.clip(limit, first, last)
        if sweep:
            limb_by_bitlayers(first, stop)
        else:
            store(jnp.int32(index), limb_by_blocks(first, stop))


def _loop(num: int, body, init):
    """A loop of a fixed number of turns; of one, no loop."""
    return body(0, init) if num == 1 else lax.fori_loop(0, num, body, init)


def _limb_sums(
    problem: contract.Problem, words: list[jax.Array], activations: list[list[jax.Array]]
) -> list[jax.Array]:
    """sum_k q_a * bit for each limb a of one row, most significant first. int32[block_n] each."""
    keep = max(2, len(words) // 2)
    sums = []
    for low in range(contract.LIMB_BITS * (problem.activation_limbs - 1), -1, -contract.LIMB_BITS):
        bits = activations[low : low + contract.LIMB_BITS]
        columns = [[word & activation for word, activation in zip(words, bit, strict=True)] for bit in bits]
        if low + len(bits) < len(activations):
            sums.append(_weighted_count(columns, keep))
            continue
        *columns, sign = columns  # of two's complement
        count = -_weighted_count([sign], keep) << len(columns)
        sums.append(_weighted_count(columns, keep) + count if columns else count)
    return sums


def _weighted_count(columns: list[list[jax.Array]], keep: int) -> jax.Array:
    """sum_j 2**j * (number of ones in columns[j]), with at most `keep` population counts for a column."""
    columns = [list(column) for column in columns]
    weighted = []
    while len(weighted) < len(columns):
        weight = len(weighted)
        column = columns[weight]
        while len(column) > keep and len(column) > 2:
            a, b, c = column[:3]
            either = a ^ b
            column = [*column[3:], either ^ c]
            if weight + 1 == len(columns):
                columns.append([])
            columns[weight + 1].append((either & c) | (a & b))  # of all forms, the one that ptxas does in fewest LOP3
        counts = [_compat.triton_population_count(word) for word in column]
        weighted.append(sum(counts[1:], start=counts[0]) << weight)
    return sum(weighted[1:], start=weighted[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Cut:
    """The words in parts of equal length, each inside one segment, the same number of parts for every segment."""

    part_words: int
    first_words: np.ndarray  # int32[parts]
    index: np.ndarray  # int[parts * words of a part], the word that stands there
    inside: np.ndarray  # bool, like index; false where the segment has ended

    @property
    def is_identity(self) -> bool:
        """Every word of k, in order, and nothing else."""
        return bool(self.inside.all()) and np.array_equal(self.index, np.arange(self.index.size))

    @property
    def is_even(self) -> bool:
        """Each part begins where as many words of the one before end."""
        return np.array_equal(self.first_words, np.arange(self.first_words.size) * self.part_words)

    def arrange(self, packed: jax.Array) -> jax.Array:
        """uint32[.., num_words] -> uint32[.., parts * words of a part], zero where there is no word of the segment."""
        return packed if self.is_identity else jnp.where(self.inside, packed[..., self.index], jnp.uint32(0))


def _cut(problem: contract.Problem, config: Config) -> _Cut:
    part_words = config.block_words * config.num_blocks
    num_parts = pl.cdiv(max(stop - start for _, start, stop in problem.segments), part_words)  # of a segment
    first = np.array([start + part * part_words for _, start, _ in problem.segments for part in range(num_parts)])
    last = np.repeat([stop for _, _, stop in problem.segments], num_parts)
    index = first[:, None] + np.arange(part_words)
    return _Cut(
        part_words=part_words,
        first_words=first.astype(np.int32),
        index=np.minimum(index, problem.num_words - 1).reshape(-1),
        inside=(index < last[:, None]).reshape(-1),
    )


def _row_sums(problem: contract.Problem, packed: jax.Array) -> jax.Array:
    """sum_k q_a by segment, from the bits of the codes. int32[segments, activation limbs, m].

    Not from the codes: so the codes have one reader, into which XLA may fuse what makes them.
    """
    bit = np.arange(problem.fixed_point_bits)
    weights = np.where(bit == bit[-1], -1, 1) << bit % contract.LIMB_BITS
    counts = lax.population_count(packed).astype(jnp.int32) * weights.astype(np.int32)[None, :, None]
    by_word = jnp.stack(
        [
            counts[:, low : low + contract.LIMB_BITS].sum(axis=1)
            for low in range(contract.LIMB_BITS * (problem.activation_limbs - 1), -1, -contract.LIMB_BITS)
        ]
    )
    return jnp.stack([by_word[..., start:stop].sum(axis=-1) for _, start, stop in problem.segments])
