"""The BitTensor behind a view: answers products and look-ups from its words, and notes when it has to be unpacked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pbjax import _bit_tensor, _format, _matmul
from pbjax._bit_tensor import BitTensor
from pbjax._views import Axes


@dataclasses.dataclass(frozen=True, order=True)
class Dequantized:
    """A weight that a function made pbjax unpack to floats.

    Attributes:
      path: pytree path of the weight.
      primitive: the JAX primitive that could not use bitlayers.
    """

    path: str
    primitive: str


@dataclasses.dataclass(eq=False)
class Log:
    """What was unpacked while one function was traced; compared by identity, so it can be a static field."""

    entries: list[Dequantized] = dataclasses.field(default_factory=list)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A BitTensor as the source of views (see `pbjax._views.Source`).

    Attributes:
      tensor: the weight.
      path: its pytree path.
      log: identity-hashed list that `to_array` appends to.
    """

    tensor: BitTensor
    path: str = dataclasses.field(metadata=dict(static=True))
    log: Log = dataclasses.field(metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def stack_shape(self) -> tuple[int, ...]:
        return self.tensor.stack_shape

    def to_array(self, primitive: str) -> jax.Array:
        self.log.entries.append(Dequantized(self.path, primitive))
        return _bit_tensor.unpack_array(self.tensor)

    def split_axis(self, axis: int, sizes: tuple[int, int]) -> Packed | None:
        tensor = self.tensor
        i = axis + len(tensor.packed_shape)
        if i < 0:
            return None

        def renumber(axes: Axes) -> Axes:
            return tuple(j for a in axes for j in ((i, i + 1) if a == i else (a + (a > i),)))

        return self._with(
            tensor.replace(
                packed_shape=(*tensor.packed_shape[:i], *sizes, *tensor.packed_shape[i + 1 :]),
                contract_axes=renumber(tensor.contract_axes),
                output_axes=renumber(tensor.output_axes),
            )
        )

    def slice_axis(self, axis: int, start: int | jax.Array, size: int, stride: int) -> Packed | None:
        tensor = self.tensor
        i = axis + tensor.ndim
        num_stack = len(tensor.stack_shape)

        def cut(array, dim):
            if isinstance(start, int):
                return lax.slice_in_dim(array, start, start + (size - 1) * stride + 1, stride, dim)
            return lax.dynamic_slice_in_dim(array, start, size, dim)

        if size == 0:
            return None
        if i < num_stack:
            words, scale, bitlayers = (cut(leaf, i) for leaf in (tensor.words, tensor.scale, tensor.bitlayers))
            return self._with(tensor.replace(words=words, scale=scale, bitlayers=bitlayers))
        i -= num_stack
        if i not in tensor.output_axes:
            return None
        dim = tensor.output_axes.index(i)

        def cut_channels(leaf):
            lead = leaf.shape[:-1]
            return cut(leaf.reshape(lead + tensor.output_shape), len(lead) + dim).reshape(*lead, -1)

        packed_shape = (*tensor.packed_shape[:i], size, *tensor.packed_shape[i + 1 :])
        return self._with(
            tensor.replace(
                words=cut_channels(tensor.words), scale=cut_channels(tensor.scale), packed_shape=packed_shape
            )
        )

    def dot(self, x: jax.Array, contract: Axes, batch: Axes, free: Axes, out_dtype: np.dtype) -> jax.Array | None:
        tensor = self.tensor
        num_packed = len(tensor.packed_shape)
        wide = lambda axes: [a for a in axes if self.shape[a] != 1]  # noqa: E731
        mapped = [a for a in wide(batch) if a + num_packed in tensor.output_axes]
        if mapped:  # as many products as there are groups of channels
            packed, renumber = self._stack_channels(mapped)
            contract, batch, free = (tuple(map(renumber, axes)) for axes in (contract, batch, free))
            return packed.dot(x, contract, batch, free, out_dtype)
        stored_contract = [a - num_packed for a in tensor.contract_axes]
        stored_free = [a - num_packed for a in tensor.output_axes]
        stack = range(-tensor.ndim, -num_packed)
        if sorted(wide(contract)) != sorted(wide(stored_contract)) or wide(batch) != wide(stack):
            return None
        if not (jnp.issubdtype(x.dtype, jnp.floating) and jnp.issubdtype(out_dtype, jnp.floating)):
            return None
        batch_shape = x.shape[: len(batch)]
        rows_shape = x.shape[len(batch) : x.ndim - len(contract)]
        offset = x.ndim - len(contract)
        order = [offset + contract.index(a) for a in stored_contract if a in contract]
        order += [i for i in range(offset, x.ndim) if i not in order]  # of size 1
        x = x.transpose((*range(offset), *order)).reshape(batch_shape + rows_shape + tensor.contract_shape)

        def product(x, tensor):
            return _matmul.matmul(x, tensor, preferred_element_type=out_dtype)

        for _ in batch_shape:
            product = jax.vmap(product)
        skip = len(tensor.stack_shape)
        y = product(
            x,
            tensor.replace(
                words=tensor.words.reshape(batch_shape + tensor.words.shape[skip:]),
                scale=tensor.scale.reshape(batch_shape + tensor.scale.shape[skip:]),
                bitlayers=tensor.bitlayers.reshape(batch_shape),
            ),
        )
        offset = len(batch_shape) + len(rows_shape)
        order = [offset + stored_free.index(a) for a in free]
        order += [i for i in range(offset, y.ndim) if i not in order]  # of size 1
        return y.transpose((*range(offset), *order)).reshape(
            batch_shape + rows_shape + tuple(self.shape[a] for a in free)
        )

    def _stack_channels(self, axes: list[int]) -> tuple[Packed, Callable[[int], int]]:
        """With some output axes as the last of the stack axes, and where each axis went."""
        tensor = self.tensor
        num_packed, num_stack = len(tensor.packed_shape), len(tensor.stack_shape)
        moved = [a + num_packed for a in axes]
        kept = [i for i in range(num_packed) if i not in moved]
        order = [a - num_packed for a in range(-num_stack, 0)] + [i - num_packed for i in (*moved, *kept)]
        places = {axis: place - tensor.ndim for place, axis in enumerate(order)}

        def split(leaf):  # [*stack, a, b, n] -> [*stack, *moved, a, b, rest of n]
            leaf = leaf.reshape(leaf.shape[:-1] + tensor.output_shape)
            dims = [num_stack + 2 + tensor.output_axes.index(i) for i in moved]
            leaf = jnp.moveaxis(leaf, dims, range(num_stack, num_stack + len(dims)))
            return leaf.reshape((*leaf.shape[: num_stack + len(dims) + 2], -1))

        sizes = tuple(tensor.packed_shape[i] for i in moved)
        bitlayers = tensor.bitlayers.reshape(tensor.stack_shape + (1,) * len(sizes))
        stacked = tensor.replace(
            words=split(tensor.words),
            scale=split(tensor.scale),
            bitlayers=jnp.broadcast_to(bitlayers, tensor.stack_shape + sizes),
            packed_shape=tuple(tensor.packed_shape[i] for i in kept),
            contract_axes=tuple(kept.index(i) for i in tensor.contract_axes),
            output_axes=tuple(kept.index(i) for i in tensor.output_axes if i in kept),
        )
        return self._with(stacked), places.__getitem__

    def take(self, axis: int, indices: jax.Array) -> jax.Array | None:
        tensor = self.tensor
        i = axis + len(tensor.packed_shape)
        if tensor.stack_shape or i not in tensor.output_axes:
            return None
        dim = tensor.output_axes.index(i)
        rest_shape = tuple(tensor.packed_shape[a] for a in tensor.output_axes if a != i)

        def rows(leaf):  # [a, b, n] -> [num_indices, a, b, rest of n]
            leaf = leaf.reshape(leaf.shape[:2] + tensor.output_shape)
            taken = jnp.moveaxis(jnp.take(leaf, indices.reshape(-1), axis=2 + dim, mode="clip"), 2 + dim, 0)
            return taken.reshape(*taken.shape[:3], -1)

        def decode(words, scale):
            count = _bit_tensor.clip_bitlayers(tensor.bitlayers, tensor.bits)
            return _format.dequantize(words, scale, count, tensor.k, tensor.group_size)

        values = jax.vmap(decode)(rows(tensor.words), rows(tensor.scale))
        values = values.reshape(values.shape[:1] + tensor.contract_shape + rest_shape)
        stored = [*tensor.contract_axes, *(a for a in tensor.output_axes if a != i)]
        values = values.transpose((0, *(1 + int(j) for j in np.argsort(stored))))
        return values.reshape(indices.shape + values.shape[1:])

    def _with(self, tensor: BitTensor) -> Packed:
        return dataclasses.replace(self, tensor=tensor)
