"""How the shardings of a weight and of its packed form belong together.

k and n are single axes of the words, whatever number of axes they stand for. So a mesh may cut the first of the
contracted axes, between words and between groups, the first of the output axes, and the stack axes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.core
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.bit_matmul import contract

Axes = tuple[str, ...]


def axes_of(entry: Any) -> Axes:
    """One entry of a PartitionSpec as a tuple of mesh axes."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """Shardings of the leaves of a BitTensor."""

    words: NamedSharding
    scale: NamedSharding
    bitlayers: NamedSharding


def packed_shardings(
    leaf: Any,
    name: str,
    *,
    num_stack: int,
    contract_axes: tuple[int, ...],
    output_axes: tuple[int, ...],
    group_size: int | None,
) -> Packed | None:
    """The shardings of a packed weight that leave every element of it on the devices that have it as a float.

    Args:
      leaf: the weight.
      name: its path, for messages.
      num_stack: number of leading stack axes.
      contract_axes: axes behind these that a product sums over.
      output_axes: the others.
      group_size: of the scales.

    Returns:
      The shardings, or None where the weight lies on one device or its sharding is not known.

    Raises:
      ValueError: the weight is cut where words cannot be.
    """
    sharding = getattr(leaf, "sharding", None)
    if isinstance(leaf, jax.core.Tracer) or not isinstance(sharding, NamedSharding) or len(sharding.device_set) == 1:
        return None
    mesh = sharding.mesh
    spec = [axes_of(entry) for entry in (*sharding.spec, *(None,) * (leaf.ndim - len(sharding.spec)))]
    stack, rest, shape = spec[:num_stack], spec[num_stack:], leaf.shape[num_stack:]

    def first(axes: tuple[int, ...], what: str) -> Axes:
        """The mesh axes that cut the slowest of some axes; no other may be cut."""
        wide = [axis for axis in axes if shape[axis] != 1]
        for axis in wide[1:]:
            if math.prod(mesh.shape[a] for a in rest[axis]) > 1:
                raise ValueError(
                    f"a sharded weight must be cut along the first of its {what} axes, but {name} of shape "
                    f"{leaf.shape} is cut along axis {num_stack + axis} by {rest[axis]}. Shard axis "
                    f"{num_stack + wide[0]} with `jax.device_put`, or replicate it."
                )
        return rest[wide[0]] if wide else ()

    k_axes, n_axes = first(contract_axes, "contracted"), first(output_axes, "output")
    k = math.prod(shape[axis] for axis in contract_axes)
    check_cut(f"{name}, cut over k", k, group_size, math.prod(mesh.shape[axis] for axis in k_axes))
    groups = () if group_size is None else k_axes
    return Packed(
        words=NamedSharding(mesh, P(*stack, None, k_axes, n_axes)),
        scale=NamedSharding(mesh, P(*stack, None, groups, n_axes)),
        bitlayers=NamedSharding(mesh, P(*stack)),
    )


def cuts_stack(leaf: Any, num_stack: int) -> bool:
    """Whether a weight is known to have layers of its stack on different devices."""
    sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    return isinstance(sharding, NamedSharding) and any(axes_of(entry) for entry in sharding.spec[:num_stack])


def check_cut(what: str, k: int, group_size: int | None, num_shards: int) -> None:
    """Raises ValueError unless k falls into equal shards of whole words and whole groups."""
    unit = group_size or contract.WORD_BITS
    if num_shards > 1 and k % (unit * num_shards):
        parts = f"groups of {unit}" if group_size else f"words of {unit}"
        raise ValueError(
            f"{what}, must fall into whole {parts}, but got k = {k} in {num_shards} shards. Use a k that is a multiple "
            f"of {unit * num_shards}, fewer shards, or cut output channels instead."
        )
