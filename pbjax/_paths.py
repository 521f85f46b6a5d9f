"""Names of pytree leaves, as users write them in rules and read them in messages."""

from __future__ import annotations

from typing import Any

import jax
from jax.tree_util import GetAttrKey, KeyPath

from pbjax._bit_tensor import is_bit_tensor

# The attribute under which an nnx.Variable keeps its array: not part of the name that users know.
_VARIABLE_ATTRIBUTES = ("value", "raw_value")


def path_name(path: KeyPath) -> str:
    """A key path as `params/Dense_0/kernel`; the array inside an nnx.Variable has the Variable's name."""
    if path and isinstance(path[-1], GetAttrKey) and path[-1].name in _VARIABLE_ATTRIBUTES:
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> tuple[list[str], list[Any], Any]:
    """Names, leaves and structure of a tree whose BitTensors are leaves."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_bit_tensor)
    return [path_name(path) for path, _ in paths], [leaf for _, leaf in paths], treedef
