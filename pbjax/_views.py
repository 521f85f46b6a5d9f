"""What flows through a traced function in place of a weight: a view of its axes onto a source that is never unpacked.

A `View` says which axes of its source each of its own axes consists of. Transposing and reshaping change only that
bookkeeping; products, slices and look-ups go to the source. The source is a `BitTensor` when the function runs, or a
`pbjax._uses.Probe` when it is only asked how it uses its weights. Source axes are numbered from the last, -1, so that
`scan` and `vmap`, which take axes off the front, leave the numbers valid.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Axes = tuple[int, ...]


class Source(Protocol):
    """The weight behind a view. Methods return None where the packed form does not allow what is asked."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Sizes of the leading axes that `scan` may take off."""
        ...

    def to_array(self, primitive: str) -> jax.Array:
        """The whole weight as floats, asked for by `primitive`."""
        ...

    def split_axis(self, axis: int, sizes: tuple[int, int]) -> Source | None:
        """One axis as two, the first the slower."""
        ...

    def slice_axis(self, axis: int, start: int | jax.Array, size: int, stride: int) -> Source | None:
        """Part of one axis."""
        ...

    def dot(self, x: jax.Array, contract: Axes, batch: Axes, free: Axes, out_dtype: np.dtype) -> jax.Array | None:
        """x[*batch, *rows, *contract] times the weight: [*batch, *rows, *free]. Axes longer than 1 are all named."""
        ...

    def take(self, axis: int, indices: jax.Array) -> jax.Array | None:
        """Rows along one axis as floats: [*indices.shape, *other axes in their order]; indices in range."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """A weight as a traced function sees it.

    Attributes:
      source: the weight behind it.
      axes: for each axis of the view, the source axes (negative numbers) that it runs over, the last fastest; source
        axes of size 1 may be missing.
      dtype: the dtype that the function thinks the weight has.
    """

    source: Source
    axes: tuple[Axes, ...] = dataclasses.field(metadata=dict(static=True))
    dtype: np.dtype = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def of(cls, source: Source, dtype: np.dtype) -> View:
        """The view that shows a source as it is."""
        rank = len(source.shape)
        return cls(source, tuple((i - rank,) for i in range(rank)), np.dtype(dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.source.shape[a] for a in axes) for axes in self.axes)

    def to_array(self, primitive: str) -> jax.Array:
        """The weight as the floats that the function expects; `primitive` could not do with less."""
        array = self.source.to_array(primitive)
        order = [a + array.ndim for a in itertools.chain.from_iterable(self.axes)]
        order += [i for i in range(array.ndim) if i not in order]  # of size 1
        return array.transpose(order).reshape(self.shape).astype(self.dtype)

    def next_layer(self) -> View:
        """The view after `scan` took the leading axis off the source's leaves."""
        return dataclasses.replace(self, axes=self.axes[1:])

    @property
    def is_stacked(self) -> bool:
        """Whether the view's leading axis is the source's leading axis, so that `scan` may take it off."""
        return bool(self.source.stack_shape) and self.axes[:1] == ((-len(self.source.shape),),)

    def astype(self, dtype: np.dtype) -> View | None:
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        return dataclasses.replace(self, dtype=np.dtype(dtype))

    def transpose(self, permutation: Sequence[int]) -> View:
        return dataclasses.replace(self, axes=tuple(self.axes[i] for i in permutation))

    def reshape(self, shape: Sequence[int]) -> View | None:
        """The same elements in row-major order under another shape, or None where that cuts across source axes."""
        if 0 in self.shape:
            return None
        view, pending, axes = self, list(itertools.chain.from_iterable(self.axes)), []
        for size in shape:
            taken: list[int] = []
            missing = size
            while missing > 1:
                if not pending:
                    return None
                axis = pending[0]
                length = view.source.shape[axis]
                if missing % length == 0:
                    pending.pop(0)
                    taken += [axis] * (length > 1)  # an axis of size 1 may go unnamed
                    missing //= length
                    continue
                if length % missing:
                    return None
                source = view.source.split_axis(axis, (missing, length // missing))
                if source is None:
                    return None
                # `axis` became two: every number at or before it in the order of axes moves one further from the end.
                renumber = lambda a, axis=axis: a - 1 if a < axis else a  # noqa: E731
                view = dataclasses.replace(view, source=source)
                axes = [tuple(map(renumber, group)) for group in axes]
                taken = [*map(renumber, taken), axis - 1]
                pending = [axis, *map(renumber, pending[1:])]
                missing = 1
            if size == 1 and pending and view.source.shape[pending[0]] == 1:
                taken.append(pending.pop(0))  # an axis of size 1 stays itself where it can: it may be a stack
            axes.append(tuple(taken))
        return dataclasses.replace(view, axes=tuple(axes))

    def slice_axis(self, dim: int, start: int | jax.Array, size: int, stride: int = 1) -> View | None:
        """Part of one axis of the view."""
        if len(self.axes[dim]) != 1:
            return None
        source = self.source.slice_axis(self.axes[dim][0], start, size, stride)
        return None if source is None else dataclasses.replace(self, source=source)

    def dot(
        self, x: jax.Array, x_dims: tuple[Axes, Axes], dims: tuple[Axes, Axes], out_dtype: np.dtype
    ) -> jax.Array | None:
        """`dot_general` of x (first operand) with the view: [*batch, *free axes of x, *free axes of the view].

        Args:
          x: the other operand.
          x_dims: its (contracting, batch) dimensions.
          dims: the view's (contracting, batch) dimensions.
          out_dtype: dtype of the result.
        """
        (x_contract, x_batch), (contract, batch) = x_dims, dims
        free = [i for i in range(len(self.axes)) if i not in (*contract, *batch)]
        rows = [i for i in range(x.ndim) if i not in (*x_contract, *x_batch)]
        x = x.transpose((*x_batch, *rows, *x_contract))
        batch_shape, rows_shape = x.shape[: len(x_batch)], x.shape[len(x_batch) : len(x_batch) + len(rows)]
        contract_axes, batch_axes, free_axes = (
            tuple(itertools.chain.from_iterable(self.axes[i] for i in group)) for group in (contract, batch, free)
        )
        sizes = self.source.shape
        x = x.reshape((*(sizes[a] for a in batch_axes), *rows_shape, *(sizes[a] for a in contract_axes)))
        y = self.source.dot(x, contract_axes, batch_axes, free_axes, out_dtype)
        return None if y is None else y.reshape((*batch_shape, *rows_shape, *(self.shape[i] for i in free)))

    def take(self, dim: int, indices: jax.Array) -> jax.Array | None:
        """Rows along one axis: [*indices.shape, *other axes of the view in their order], in the view's dtype."""
        others = [axes for i, axes in enumerate(self.axes) if i != dim]
        if len(self.axes[dim]) != 1:
            return None
        axis = self.axes[dim][0]
        rows = self.source.take(axis, indices)
        if rows is None:
            return None
        remaining = [a for a in range(-len(self.source.shape), 0) if a != axis]
        order = [remaining.index(a) for a in itertools.chain.from_iterable(others)]
        order += [i for i in range(len(remaining)) if i not in order]
        rows = rows.transpose((*range(indices.ndim), *(i + indices.ndim for i in order)))
        shape = tuple(size for i, size in enumerate(self.shape) if i != dim)
        return rows.reshape(indices.shape + shape).astype(self.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Concatenation:
    """Views joined along one axis, kept apart because each has scales and a number of bitlayers of its own."""

    parts: tuple[View, ...]
    dim: int = dataclasses.field(metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        shape[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        return tuple(shape)

    def map(self, fn: Callable[[View], View | None], dim: int) -> Concatenation | None:
        """Applies `fn` to every part; None if it is None for any."""
        parts = [mapped for part in self.parts if (mapped := fn(part)) is not None]
        return Concatenation(tuple(parts), dim) if len(parts) == len(self.parts) else None

    def to_array(self, primitive: str) -> jax.Array:
        return lax.concatenate([part.to_array(primitive) for part in self.parts], self.dim)

    @property
    def is_stacked(self) -> bool:
        return self.dim > 0 and all(part.is_stacked for part in self.parts)

    def next_layer(self) -> Concatenation:
        return Concatenation(tuple(part.next_layer() for part in self.parts), self.dim - 1)

    def astype(self, dtype: np.dtype) -> Concatenation | None:
        return self.map(lambda part: part.astype(dtype), self.dim)

    def transpose(self, permutation: Sequence[int]) -> Concatenation | None:
        return self.map(lambda part: part.transpose(permutation), list(permutation).index(self.dim))

    def dot(
        self, x: jax.Array, x_dims: tuple[Axes, Axes], dims: tuple[Axes, Axes], out_dtype: np.dtype
    ) -> jax.Array | None:
        contract, batch = dims
        if self.dim in (*contract, *batch):
            return None
        results = [y for part in self.parts if (y := part.dot(x, x_dims, dims, out_dtype)) is not None]
        if len(results) < len(self.parts):
            return None
        free = [i for i in range(len(self.shape)) if i not in (*contract, *batch)]
        return lax.concatenate(results, results[0].ndim - len(free) + free.index(self.dim))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Flipped:
    """A view with some axes in reverse order: a convolution can read its kernel so, nothing else can."""

    view: View
    dims: frozenset[int] = dataclasses.field(metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.view.shape

    @property
    def is_stacked(self) -> bool:
        return 0 not in self.dims and self.view.is_stacked

    def next_layer(self) -> Flipped:
        return Flipped(self.view.next_layer(), frozenset(i - 1 for i in self.dims))

    def to_array(self, primitive: str) -> jax.Array:
        return lax.rev(self.view.to_array(primitive), sorted(self.dims))

    def astype(self, dtype: np.dtype) -> Flipped | None:
        view = self.view.astype(dtype)
        return None if view is None else Flipped(view, self.dims)

    def transpose(self, permutation: Sequence[int]) -> Flipped:
        dims = frozenset(i for i, old in enumerate(permutation) if old in self.dims)
        return Flipped(self.view.transpose(permutation), dims)


Weight = View | Concatenation | Flipped


def is_weight(value: object) -> bool:
    """Whether a value stands for a weight: the `is_leaf` of pytree functions."""
    return isinstance(value, (View, Concatenation, Flipped))
