"""The product of rows of floats, how it is cut among devices, and how those that share k add up what each has.

Rows and output channels are cut without communication. Where words are cut over k, each device has the integers of its
own k, in whole groups. They are added up, exactly, before they become floats, so that the result has the bits of one
device: by one all-reduce of the limbs, or, where groups have scales of their own, of the sums of all groups. What float
activations give is added as floats, in the order of the machine.

A compiler that sees only the loops of a backend gathers activations, and words. The rule that it is given instead, by
`jax.experimental.custom_partitioning`, leaves no trace in a program for one device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import _compat
from pallas_kernels.bit_matmul import contract, epilogue, xla
from pbjax import _backends
from pbjax._bit_tensor import BitTensor
from pbjax._lowering import run_chosen
from pbjax._rows import on_codes
from pbjax._sharding import Axes, axes_of, check_cut

Run = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def partitioned(choice: _backends.Choice, *, problem: contract.Problem, prefixes: bool, axes: Axes) -> Run:
    """The product, or all of its prefixes, of (x, words, scale, counts), cut as these are sharded; x: float[m, k].

    With `axes` the operands are those of one device inside `jax.shard_map`, which has a part of k.
    """
    if axes:
        whole = dataclasses.replace(problem, k=problem.k * lax.axis_size(axes))
        return _Shards(choice=choice, problem=whole, axes=axes, prefixes=prefixes).of_parts
    # Inside `jax.shard_map` every device has a product of its own; without jit there is nothing to partition.
    if jax.sharding.get_abstract_mesh().manual_axes or jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue] dynamic
        return functools.partial(_of_rows, choice, problem, prefixes)

    def run(x, words, scale, counts):
        x = jnp.pad(x, ((0, 0), (0, problem.num_words * contract.WORD_BITS - problem.k)))  # 32 of k for each word
        return _with_rule(choice, problem, prefixes)(x, words, scale, counts)

    return run


def _of_rows(
    choice: _backends.Choice,
    problem: contract.Problem,
    prefixes: bool,
    x: jax.Array,
    words: jax.Array,
    scale: jax.Array,
    counts: jax.Array,
) -> jax.Array:
    """The product on a device that has all of k."""
    local = _local(problem, x, words)

    def implementation(backend):
        run = functools.partial(backend.prefixes if prefixes else backend.matmul, local)
        if backend.whole:
            return run
        quantize = backend.quantize_rows and functools.partial(backend.quantize_rows, local, sweep=prefixes)
        return lambda x, *weight: on_codes(
            lambda codes: run(codes, *weight), x, problem.activation_bits, quantize=quantize
        )

    shape = (local.bits,) * prefixes + (local.m, local.n)
    return run_chosen(choice, implementation, (x, words, scale, counts), jax.ShapeDtypeStruct(shape, jnp.float32))


def _limb_sums(
    choice: _backends.Choice, problem: contract.Problem, x: jax.Array, words: jax.Array, counts: jax.Array
) -> jax.Array:
    """The integers of a fixed-point product. int32[segments, activation limbs, code limbs, m, n]."""
    shape = (len(problem.segments), problem.activation_limbs, len(problem.code_limbs), problem.m, problem.n)
    implementation = lambda backend: functools.partial(backend.limb_sums or xla.limb_sums, problem)  # noqa: E731
    return run_chosen(choice, implementation, (x, words, counts), jax.ShapeDtypeStruct(shape, jnp.int32))


def _scale_groups(
    choice: _backends.Choice, problem: contract.Problem, sums: jax.Array, scale: jax.Array, counts: jax.Array
) -> jax.Array:
    """The product of the sums of all groups, f32[groups, m, n]. f32[m, n]."""
    in_xla = functools.partial(epilogue.scale_groups, activation_bits=problem.fixed_point_bits)
    if len(sums) == 1:
        return in_xla(sums, scale, counts)

    def implementation(backend):
        return functools.partial(backend.scale_groups, problem) if backend.scale_groups else in_xla

    return run_chosen(choice, implementation, (sums, scale, counts), jax.ShapeDtypeStruct(sums.shape[1:], jnp.float32))


def _local(problem: contract.Problem, x: jax.Array, words: jax.Array) -> contract.Problem:
    """The part of a problem that these operands are."""
    return dataclasses.replace(problem, m=x.shape[0], k=x.shape[1], n=words.shape[-1])


@functools.cache
def _with_rule(choice: _backends.Choice, problem: contract.Problem, prefixes: bool) -> Run:
    run = functools.partial(_of_rows, choice, problem, prefixes)

    def partition(mesh, arg_shapes, result_shape):
        del result_shape
        x_spec = arg_shapes[0].sharding.spec
        rows, k_axes, n_axes = _cut(x_spec, arg_shapes[1].sharding.spec)
        put = lambda *spec: NamedSharding(mesh, P(*spec))  # noqa: E731
        x_cut_alike = axes_of(x_spec[1]) == k_axes
        operands = (
            put(rows, k_axes if x_cut_alike else ()),
            put(None, k_axes, n_axes),
            put(None, k_axes if problem.groups > 1 else (), n_axes),
            put() if prefixes else put(rows),
        )
        fn = run
        if k_axes:
            num_shards = math.prod(mesh.shape[axis] for axis in k_axes)
            check_cut("`w`, cut over k", problem.num_words * contract.WORD_BITS, problem.group_size, num_shards)
            shards = _Shards(choice=choice, problem=problem, axes=k_axes, prefixes=prefixes)
            fn = shards.of_parts if x_cut_alike else shards.of_rows
        return mesh, fn, put(None, rows, n_axes) if prefixes else put(rows, n_axes), operands

    # Words run over groups and the words of a group; a last group that is short is never cut. The k of x is a factor of
    # its own: where x is not cut, cutting it would cost communication for the largest value of each row.
    sizes: dict[str, Any] = {}  # of the factors that are no axis of any operand
    if problem.groups == 1 or problem.num_words % problem.groups:
        words_k = "w"
    elif problem.words_per_group == 1:
        words_k = "g"
    else:
        words_k = "(g w)"
        sizes["w"] = problem.words_per_group
    counts, result = ("", "b m n") if prefixes else ("m", "m n")
    fn = custom_partitioning(lambda x, words, scale, counts: run(x, words, scale, counts))
    fn.def_partition(
        partition=partition,
        sharding_rule=f"m k, i {words_k} n, s g n, {counts} -> {result}",
        reduction_factors=("k", *words_k.strip("()").split()),
        **sizes,
    )
    return fn


def _cut(x_spec: P, words_spec: P) -> tuple[Axes, Axes, Axes]:
    """The mesh axes that cut rows, k and n. The words stay where they are; activations come to them."""
    rows, k_axes, n_axes = map(axes_of, (x_spec[0], words_spec[1], words_spec[2]))
    return tuple(axis for axis in rows if axis not in (*k_axes, *n_axes)), k_axes, n_axes


def in_explicit_mesh(
    fn: Callable[[jax.Array, BitTensor, jax.Array], jax.Array], x: jax.Array, w: BitTensor, counts: jax.Array
) -> jax.Array:
    """fn(x, w, counts), of x[*rows, *contracted] and a result [*rows, *outputs], where shardings are part of types.

    Rows stay cut as those of x, and outputs become cut as the words: inside, the axes are left to the compiler and to
    the rule above.
    """
    mesh = next((t.sharding.mesh for t in map(jax.typeof, (x, w.words)) if t.sharding.mesh.explicit_axes), None)
    if mesh is None:
        return fn(x, w, counts)
    words_spec = jax.typeof(w.words).sharding.spec
    n_axes = axes_of(words_spec[2])
    taken = (*axes_of(words_spec[1]), *n_axes)
    rows = [tuple(a for a in axes_of(entry) if a not in taken) for entry in jax.typeof(x).sharding.spec[: counts.ndim]]
    even = w.output_shape and w.output_shape[0] % math.prod(mesh.shape[axis] for axis in n_axes) == 0
    spec = P(*rows, *([n_axes if even else ()] * bool(w.output_shape)))
    leaves, treedef = jax.tree.flatten((x, w, counts))
    run = lambda *leaves: fn(*jax.tree.unflatten(treedef, leaves))  # noqa: E731
    auto: Callable[..., Any] = jax.sharding.auto_axes(run, out_sharding=NamedSharding(mesh, spec))
    return auto(*leaves)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shards:
    """A product whose k lies in equal parts on several devices; each runs its part, and has the whole result.

    Attributes:
      choice: what runs each part.
      problem: the whole problem; m and n are read off the operands.
      axes: the mesh axes that cut k.
      prefixes: whether to return the product at every number of bitlayers; `counts` is not looked at then.
    """

    choice: _backends.Choice
    problem: contract.Problem
    axes: Axes
    prefixes: bool

    def of_parts(self, x: jax.Array, words: jax.Array, scale: jax.Array, counts: jax.Array) -> jax.Array:
        """The product of float[m, k / shards], the part of each row that belongs to the words here."""
        run = functools.partial(self.sum, words=words, scale=scale, counts=counts)
        return on_codes(run, x, self.problem.activation_bits, self.axes)

    def of_rows(self, x: jax.Array, words: jax.Array, scale: jax.Array, counts: jax.Array) -> jax.Array:
        """The same of whole rows, float[m, k]: their steps need no communication, and codes are cut afterwards."""
        size = words.shape[1] * contract.WORD_BITS

        def run(codes):
            part = lax.dynamic_slice_in_dim(codes, lax.axis_index(self.axes) * size, size, 1)
            return self.sum(part, words, scale, counts)

        return on_codes(run, x, self.problem.activation_bits)

    def sum(self, x: jax.Array, words: jax.Array, scale: jax.Array, counts: jax.Array) -> jax.Array:
        """The product of the contract, its parts added up.

        Args:
          x: number[m, k / shards], codes of steps that all devices share, or floats.
          words: uint32[bits, words / shards, n].
          scale: f32[min(bits, 4), groups / shards, n], or of one group, the same on all devices.
          counts: int32[m].

        Returns:
          f32[m, n], or f32[bits, m, n], the same on all devices.
        """
        problem = self.problem
        if self.prefixes:  # one row for each number of bitlayers
            counts = jnp.repeat(jnp.arange(1, problem.bits + 1, dtype=jnp.int32), len(x))
            x = jnp.tile(x, (problem.bits, 1))
        local = _local(problem, x, words)
        if problem.activation_bits is None:
            y = lax.psum(_of_rows(self.choice, local, False, x, words, scale, counts), self.axes)
        else:
            limb_sums = functools.partial(_limb_sums, self.choice, words=words)
            if problem.groups == 1:
                sums = lax.psum(_segments_of_k(problem, local, self.axes, limb_sums, x, counts), self.axes)
                sums = _sum_segments(problem, sums, counts)
            else:
                sums = _sum_segments(local, limb_sums(local, x, counts=counts), counts)
                first = lax.axis_index(self.axes) * local.groups
                sums, scale = lax.psum(
                    (_place(sums, 0, first, problem.groups), _place(scale, 1, first, problem.groups)), self.axes
                )
            y = _scale_groups(self.choice, problem, sums, scale, counts)
        return y.reshape(problem.bits, -1, y.shape[1]) if self.prefixes else y


def _segments_of_k(
    problem: contract.Problem,
    local: contract.Problem,
    axes: Axes,
    limb_sums: Callable[..., jax.Array],
    x: jax.Array,
    counts: jax.Array,
) -> jax.Array:
    """What one shard of a single group adds to each segment of the whole: int32[segments, .., m, n]."""
    num = len(problem.segments)
    if num == 1:
        return limb_sums(local, x, counts=counts)
    longest = contract.MAX_EXACT_K
    start = lax.axis_index(axes) * local.k
    if local.k % longest == 0:
        return _place(limb_sums(local, x, counts=counts), 0, start // longest, num)
    # A shard that does not begin with a segment reaches into one more: each in turn, times zero outside of it.
    total = 0
    for i in range(1 if longest % local.k == 0 else -(-local.k // longest) + 1):
        segment = start // longest + i
        inside = (start + jnp.arange(local.k, dtype=jnp.int32)) // longest == segment
        sums = limb_sums(local, jnp.where(inside, x, 0), counts=counts).sum(0, keepdims=True)
        total = total + jnp.where(segment < num, _place(sums, 0, jnp.minimum(segment, num - 1), num), 0)
    return jnp.asarray(total)


def _place(part: jax.Array, axis: int, start: jax.Array, size: int) -> jax.Array:
    """Zeros of `size` along one axis, but for the part that begins at `start`."""
    shape = (*part.shape[:axis], size, *part.shape[axis + 1 :])
    zero = _compat.varying_like(jnp.zeros(shape, part.dtype), part)
    return lax.dynamic_update_slice_in_dim(zero, part, start, axis)


def _sum_segments(problem: contract.Problem, sums: jax.Array, counts: jax.Array) -> jax.Array:
    """int32[segments, activation limbs, code limbs, m, n] -> f32[groups, m, n]."""
    return epilogue.sum_segments(problem, jax.vmap(epilogue.combine_limbs, in_axes=(0, None))(sums, counts))
