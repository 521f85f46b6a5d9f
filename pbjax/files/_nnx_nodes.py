"""`nnx.State` and Flax's own Variables as plain data, for `pbjax.files._structure`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.tree_util import DictKey

from pbjax.files import _layout, _structure
from pbjax.nnx import PackedParam

# The only classes that a file brings to life. Others, as users derive them, are loaded into a tree that holds them.
_VARIABLES: dict[str, type[nnx.Variable]] = {
    cls.__name__: cls
    for cls in (
        nnx.Variable,
        nnx.Param,
        nnx.BatchStat,
        nnx.Cache,
        nnx.Intermediate,
        nnx.LoRAParam,
        nnx.OptArray,
        nnx.OptState,
        nnx.OptVariable,
        nnx.Perturbation,
        nnx.RngCount,
        nnx.RngKey,
        nnx.RngState,
        PackedParam,
    )
}


def encode(value: Any, visit: Callable[[Any, Any], list[Any]]) -> list[Any] | None:
    """A State or a Variable of Flax's as a node, or None for everything else.

    Args:
      value: any value.
      visit: takes a child and the keys that lead to it, and returns its node.
    """
    if type(value) is nnx.State:
        items = value.raw_mapping.items()
        return ["nnx.State", [[_structure.encode_key(key), visit(item, (DictKey(key),))] for key, item in items]]
    if isinstance(value, nnx.Variable) and _VARIABLES.get(type(value).__name__) is type(value):
        try:
            metadata = [[key, _encode_data(item)] for key, item in value.get_metadata().items()]
        except TypeError:  # a function or a mesh
            return None
        ((keys, child),) = _structure.one_level(value)
        return ["nnx.Variable", type(value).__name__, metadata, visit(child, keys)]
    return None


def decode(kind: str, rest: list[Any], path: str, visit: Callable[[Any], Any]) -> Any:
    """The State or Variable of a node.

    Raises:
      FileError: not a node that `encode` writes.
    """
    match kind, rest:
        case "nnx.State", [list(items)]:
            return nnx.State(_structure.decode_dict(items, path, visit))
        case "nnx.Variable", [str(name), list(items), child] if name in _VARIABLES:
            metadata = {}
            for item in items:
                match item:
                    case [str(key), data] if key.isidentifier():
                        metadata[key] = _decode_data(data, path)
                    case _:
                        raise _layout.FileError(path, f"metadata of a Variable is {str(item)[:100]}")
            if metadata.get("hijax") or metadata.get("ref"):
                raise _layout.FileError(path, "a Variable of its tree has no plain value")
            value = visit(child)
            try:
                return _VARIABLES[name].from_metadata(value, metadata)
            except (KeyError, TypeError, ValueError) as error:
                raise _layout.FileError(path, f"a Variable of its tree cannot be made: {error!r}") from None
    raise _layout.FileError(path, f"its tree holds an unknown node: {str([kind, *rest])[:100]}")


def _encode_data(value: Any) -> list[Any]:
    if value is None or type(value) in (bool, int, float, str):
        return ["value", value]
    if type(value) in (list, tuple):
        return [type(value).__name__, [_encode_data(item) for item in value]]
    if isinstance(value, jax.sharding.PartitionSpec):
        return ["PartitionSpec", [_encode_data(item) for item in value]]
    raise TypeError(type(value).__name__)


def _decode_data(data: Any, path: str) -> Any:
    match data:
        case ["value", None | bool() | int() | float() | str() as value]:
            return value
        case ["list", list(items)]:
            return [_decode_data(item, path) for item in items]
        case ["tuple", list(items)]:
            return tuple(_decode_data(item, path) for item in items)
        case ["PartitionSpec", list(items)]:
            try:
                return jax.sharding.PartitionSpec(*(_decode_data(item, path) for item in items))
            except (TypeError, ValueError) as error:
                raise _layout.FileError(path, f"a PartitionSpec of its tree is wrong: {error}") from None
    raise _layout.FileError(path, f"metadata of a Variable is {str(data)[:100]}")
