"""How a function uses its weights: traced abstractly, with probes in their place that note what is done to them."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pbjax import _interpret
from pbjax._views import Axes, View


@dataclasses.dataclass(frozen=True)
class Use:
    """One operation that consumes a weight, in the weight's own (negative) axis numbers.

    Attributes:
      primitive: the JAX primitive.
      contract: axes that it sums over; empty if it is no product.
      free: axes that it keeps, beyond those it is mapped over.
    """

    primitive: str
    contract: Axes
    free: Axes


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a weight is packed: the first `num_stack` axes are stacked, `contract` (of all axes) become k, the rest n."""

    num_stack: int
    contract: Axes


@dataclasses.dataclass(eq=False)
class Uses:
    """The uses of every weight of one trace; compared by identity, so it can be a static field."""

    by_weight: dict[int, list[Use]] = dataclasses.field(default_factory=lambda: defaultdict(list))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Probe:
    """A float weight as the source of views (see `pbjax._views.Source`) that notes how it is used.

    It exists under `jax.eval_shape` only, where values do not matter: results are zeros of the right shape.

    Attributes:
      array: the weight, or the slice of it that the trace has got to.
      origin: for each axis of `array`, the axis of the whole weight that it is, or is a part of.
      cut: axes of the whole weight of which only a part is left.
      index: which weight this is.
      uses: where the notes go.
    """

    array: jax.Array
    origin: Axes = dataclasses.field(metadata=dict(static=True))
    cut: frozenset[int] = dataclasses.field(metadata=dict(static=True))
    index: int = dataclasses.field(metadata=dict(static=True))
    uses: Uses = dataclasses.field(metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def stack_shape(self) -> tuple[int, ...]:
        return self.array.shape  # which axes are stacks is what the trace is to find out

    def to_array(self, primitive: str) -> jax.Array:
        self._note(primitive, (), ())
        return self.array

    def split_axis(self, axis: int, sizes: tuple[int, int]) -> Probe:
        i = axis + self.array.ndim
        shape = self.array.shape
        return dataclasses.replace(
            self,
            array=self.array.reshape(*shape[:i], *sizes, *shape[i + 1 :]),
            origin=(*self._origin[:i], self._origin[i], *self._origin[i:]),
        )

    def slice_axis(self, axis: int, start: int | jax.Array, size: int, stride: int) -> Probe:
        shape = list(self.array.shape)
        shape[axis] = size
        array = jnp.zeros(shape, self.array.dtype)
        return dataclasses.replace(self, array=array, origin=self._origin, cut=self.cut | {self._origin[axis]})

    def dot(self, x: jax.Array, contract: Axes, batch: Axes, free: Axes, out_dtype: np.dtype) -> jax.Array:
        self._note("dot_general", contract, free)
        rows_shape = x.shape[: x.ndim - len(contract)]
        return jnp.zeros(rows_shape + tuple(self.shape[a] for a in free), out_dtype)

    def take(self, axis: int, indices: jax.Array) -> jax.Array:
        self._note("gather", (), [axis])
        shape = tuple(size for i, size in enumerate(self.shape) if i != axis + self.array.ndim)
        return jnp.zeros(indices.shape + shape, self.array.dtype)

    @property
    def _axes(self) -> range:
        return range(-self.array.ndim, 0)

    @property
    def _origin(self) -> Axes:
        """`origin` of the axes that are left: `scan` takes axes off the front of the array only."""
        return self.origin[len(self.origin) - self.array.ndim :]

    def _note(self, primitive: str, contract: Sequence[int], free: Sequence[int]) -> None:
        def original(axes):
            return tuple(sorted({self._origin[a] for a in axes}))

        use = Use(primitive, original(contract), original(free))
        if use.contract and (set(use.contract) & (self.cut | set(use.free))):
            use = Use(f"{primitive} over part of an axis", (), ())
        self.uses.by_weight[self.index].append(use)


def trace_uses(fn: Callable[..., Any], tree: Any, args: tuple[Any, ...]) -> list[list[Use]]:
    """The uses that `fn(tree, *args)` makes of every array leaf of `tree`, in the order of its leaves.

    Nothing is computed: arrays and `jax.ShapeDtypeStruct`s do alike.
    """
    uses = Uses()

    def run(tree, args):
        leaves, treedef = jax.tree.flatten(tree)
        weights = [_probe(leaf, i, uses) for i, leaf in enumerate(leaves)]
        _interpret.call(fn, (jax.tree.unflatten(treedef, weights), *args), {})

    _interpret.trace(run, tree, args)
    return [uses.by_weight[i] for i in range(len(jax.tree.leaves(tree)))]


def _probe(leaf: Any, index: int, uses: Uses) -> Any:
    """A probe in place of a leaf that may be a weight; any other leaf itself."""
    if not (isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim >= 2):
        return leaf
    return View.of(Probe(leaf, tuple(range(-leaf.ndim, 0)), frozenset(), index, uses), leaf.dtype)


def layout_of(shape: tuple[int, ...], uses: Sequence[Use]) -> Layout | None:
    """The packing that serves the first product among the uses, or None where there is none.

    Axes before the first that the product contracts or keeps are stacked: the function indexes, scans or maps them.
    Those behind it that are neither (feature groups of a convolution) become channels, and the product maps over them.
    A look-up by row is served too when the product keeps the axis that it looks up.
    """
    rank = len(shape)
    for use in uses:
        if not use.contract:
            continue
        return Layout(min((*use.contract, *use.free)) + rank, tuple(a + rank for a in use.contract))
    for use in uses:
        if use.primitive == "gather" and rank == 2:
            (axis,) = use.free
            return Layout(0, (1 - (axis + rank),))
    return None


def has_product(uses: Sequence[Use]) -> bool:
    """Whether any use is a product."""
    return any(use.contract for use in uses)
