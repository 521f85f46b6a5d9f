"""The layers of a tree: what gets a number of bitlayers of its own."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from pallas_kernels.bit_matmul import contract
from pbjax import _bit_tensor, _paths
from pbjax._bit_tensor import is_bit_tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """A BitTensor, or one of the weights that it stacks.

    Attributes:
      path: pytree path of the BitTensor.
      index: place in the stack; () without one.
      shape: shape of the weight, without stack axes.
      bits: bitlayers stored.
    """

    path: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    bits: int

    @property
    def name(self) -> str:
        """The path, and the place in the stack."""
        return self.path + "".join(f"[{i}]" for i in self.index)

    @property
    def num_weights(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredLayer(Layer):
    """A layer, and what its bitlayers take.

    Attributes:
      words_bytes: of one bitlayer.
      scale_bytes: of one row of scales; b bitlayers keep min(b, 4) rows.
    """

    words_bytes: int
    scale_bytes: int

    def bytes_of(self, bitlayers: int) -> int:
        """Bytes of the first bitlayers and of their scales, as `pbjax.truncate` keeps them."""
        return bitlayers * self.words_bytes + min(bitlayers, contract.NUM_SCALES) * self.scale_bytes


def layers_of(tree: Any) -> list[StoredLayer]:
    """The layers of a tree, in the order of its leaves and of their stacks."""
    names, leaves, _ = _paths.named_leaves(tree)
    _bit_tensor.check_any(leaves)
    layers = []
    for name, leaf in zip(names, leaves, strict=True):
        if not is_bit_tensor(leaf):
            continue
        tensor = _bit_tensor.checked(leaf, name)
        groups = contract.num_groups(tensor.k, tensor.group_size)
        layers += [
            StoredLayer(
                path=name,
                index=index,
                shape=tensor.packed_shape,
                bits=tensor.bits,
                words_bytes=4 * contract.num_words(tensor.k) * tensor.n,
                scale_bytes=4 * groups * tensor.n,
            )
            for index in np.ndindex(*tensor.stack_shape)
        ]
    return layers


def check_paths(layers: Sequence[Layer]) -> None:
    """Raises ValueError where a path does not tell BitTensors apart, which the numbers are handed out by."""
    names = [layer.name for layer in layers]
    twice = next((name for name, count in collections.Counter(names).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"paths of BitTensors must differ, but `qparams` has two of {twice}. Rename one.")


def check_known(qparams: Any, batches: Any, where: str) -> None:
    """Raises TypeError in a trace, where nothing can be measured."""
    if any(isinstance(array, Tracer) for array in jax.tree.leaves((qparams, batches))):
        raise TypeError(
            f"`qparams` and `batch` must have known values, but got traced ones ({where}). Measure outside of "
            "`jax.jit` and other transforms."
        )
