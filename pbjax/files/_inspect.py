"""What a file holds (`info`) and whether it is whole (`verify`)."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import jax.numpy as jnp

from pbjax import _report
from pbjax.files import _convert, _layout, _load, _structure
from pbjax.files._checkpoint import Checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafInfo:
    """One leaf of the tree in a file.

    Attributes:
      path: its path in the tree.
      dtype: of the array, or of the weight that was packed; None for Python numbers and text.
      shape: of the array or the weight.
      bits: bitlayers stored; None for what is not packed.
      num_bytes: that its tensors take in the file.
      errors: of a packed weight, ||w_B - w_b|| / ||w_B|| after b = 1, 2, .. of B bitlayers, if asked for.
    """

    path: str
    dtype: str | None
    shape: tuple[int, ...]
    bits: int | None
    num_bytes: int
    errors: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info:
    """What a file holds.

    Attributes:
      path: the file, or the index of several.
      version: of the format.
      metadata: what was given to `pbjax.save`.
      leaves: in the order of the tree.
      num_bytes: of all leaves together.
    """

    path: str
    version: int
    metadata: dict[str, Any]
    leaves: tuple[LeafInfo, ...]
    num_bytes: int


def info(path: str | os.PathLike[str], *, errors: bool = False, progress: bool | None = None) -> Info:
    """Describes a file that `pbjax.save` wrote, from its header.

    Args:
      path: the file.
      errors: whether to compute how much each weight loses with fewer bitlayers than stored, which reads the file, one
        weight at a time.
      progress: whether to show a progress bar where errors are computed; None shows one on a terminal.

    Raises:
      pbjax.files.FileError: a file that cannot be read.
      FileNotFoundError: no file.
    """
    with Checkpoint(path) as file:
        leaves = list(file.leaves.values())
        if errors:
            leaves = _convert.track(leaves, "errors", progress)
        rows = tuple(_leaf_info(file, leaf, errors) for leaf in leaves)
        return Info(
            path=file.path,
            version=_layout.FORMAT_VERSION,
            metadata=file.metadata,
            leaves=rows,
            num_bytes=sum(row.num_bytes for row in rows),
        )


def _leaf_info(file: Checkpoint, leaf: _structure.Leaf, errors: bool) -> LeafInfo:
    match leaf:
        case _structure.Constant():
            return LeafInfo(path=leaf.name, dtype=None, shape=(), bits=None, num_bytes=0)
        case _structure.Array():
            entry = file.entry(leaf.name)
            shape = entry.shape if leaf.impl is None else entry.shape[:-1]
            dtype = entry.dtype.name if leaf.impl is None else f"key<{leaf.impl}>"
            return LeafInfo(path=leaf.name, dtype=dtype, shape=shape, bits=None, num_bytes=entry.end - entry.begin)
    stack_shape = file.entry(f"{leaf.name}/bitlayers").shape
    relative: tuple[float, ...] = ()
    if errors:
        tensor = _load.load_leaf(file, leaf, None, None)
        relative = _report.row_of(leaf.name, tensor, _report.squared_errors(tensor, None)).errors
    tensors = leaf.tensors(stack_shape, leaf.bits).values()
    return LeafInfo(
        path=leaf.name,
        dtype=jnp.dtype(leaf.static["dtype"]).name,
        shape=(*stack_shape, *leaf.static["packed_shape"]),
        bits=leaf.bits,
        num_bytes=sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors),
        errors=relative,
    )


def verify(path: str | os.PathLike[str], *, progress: bool | None = None) -> list[_layout.FileError]:
    """Reads all of a file that `pbjax.save` wrote and compares every tensor with its checksum and its description.

    Args:
      path: the file.
      progress: whether to show a progress bar; None shows one on a terminal.

    Returns:
      What is wrong with which tensor; nothing for a file that is whole.

    Raises:
      pbjax.files.FileError: a header that is damaged, so that nothing can be said of tensors.
      FileNotFoundError: no file.

    Cost: one tensor at a time, on the host.
    """
    found: list[_layout.FileError] = []
    with Checkpoint(path) as file:
        for leaf in _convert.track(list(file.leaves.values()), "verify", progress):
            try:
                if isinstance(leaf, _structure.Packed):
                    file.check_entries(leaf, leaf.bits)
            except _layout.FileError as error:
                found.append(error)
            for name in _structure.tensor_names(leaf):
                try:
                    file.read(name)
                except _layout.FileError as error:
                    found.append(error)
        try:
            file.read_padding()
        except _layout.FileError as error:
            found.append(error)
    return found
