"""Trees as plain data and back: what a file knows of a pytree besides its arrays.

A node is a list, its kind first: dicts, lists, tuples, None and leaves; of Flax NNX `State` and its own kinds of
Variables. Any other registered node (a dataclass, a named tuple, an NNX module) is written with its leaves' names, but
a file brings no class to life: such trees are loaded into one of the same structure, `pbjax.load(path, like=...)`.
Nothing that a file names is imported or called.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, KeyPath, SequenceKey

from pallas_kernels.bit_matmul import contract
from pbjax import _bit_tensor, _checks, _paths
from pbjax._bit_tensor import BitTensor, is_bit_tensor
from pbjax.files import _layout

_KEY_IMPLS = ("threefry2x32", "rbg", "unsafe_rbg")
_STATIC = [field.name for field in dataclasses.fields(BitTensor) if field.metadata.get("static")]
MAX_DEPTH = 100  # levels of a tree: what reads and writes it recurses, several calls a level, and Python allows 1000
_CONSTANTS = (bool, int, float, str)  # Python's own: no arrays, but leaves

Tensors = dict[str, tuple[np.dtype, tuple[int, ...]]]  # dtype and shape by name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """A leaf that is a Python number or text: its path and its value."""

    name: str
    value: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Array:
    """A leaf that is an array: its path, which is its tensor; of random keys, the name of their implementation."""

    name: str
    impl: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """A leaf that is a BitTensor: its path and static fields."""

    name: str
    static: dict[str, Any]

    @property
    def bits(self) -> int:
        """Bitlayers stored."""
        return self.static["bits"]

    def level(self, i: int) -> list[str]:
        """The tensors of bitlayer i."""
        return [f"{self.name}/scale/{i}"] * (i < contract.NUM_SCALES) + [f"{self.name}/words/{i}"]

    def tensors(self, stack_shape: tuple[int, ...], bits: int) -> Tensors:
        """Dtypes and shapes of the tensors of the first `bits` bitlayers, in the order of a file."""
        shape = self.static["packed_shape"]
        k, n = (math.prod(shape[i] for i in self.static[axes]) for axes in ("contract_axes", "output_axes"))
        groups = contract.num_groups(k, self.static["group_size"])
        tensors: Tensors = {f"{self.name}/bitlayers": (np.dtype(np.int32), stack_shape)}
        for i in range(bits):
            for name in self.level(i):
                is_scale = name.endswith(f"/scale/{i}")
                rows, dtype = (groups, np.float32) if is_scale else (contract.num_words(k), np.uint32)
                tensors[name] = np.dtype(dtype), (*stack_shape, rows, n)
        return tensors

    def truncated(self, bits: int) -> Packed:
        """With no more than `bits` bitlayers."""
        return Packed(name=self.name, static={**self.static, "bits": min(bits, self.bits)})


Leaf = Constant | Array | Packed


def packed_leaf(name: str, tensor: BitTensor) -> Packed:
    """The description of a BitTensor."""
    return Packed(name=name, static={field: getattr(tensor, field) for field in _STATIC})


def tensor_names(leaf: Leaf) -> list[str]:
    """Names of the tensors that hold a leaf."""
    match leaf:
        case Packed():
            return list(leaf.tensors((), leaf.bits))
        case Array():
            return [leaf.name]
    return []


def leaf_name(path: KeyPath) -> str:
    """The name of a leaf: its path, `value` for a tree that is a leaf itself."""
    return _paths.path_name(path) or "value"


def encode(tree: Any) -> tuple[list[Any], list[tuple[Leaf, Any]]]:
    """A tree as plain data, and its leaves.

    Raises:
      TypeError: a leaf or a key that a file cannot hold.
      ValueError: two leaves of one name, a BitTensor that breaks its invariants, or too many levels.
    """
    leaves: list[tuple[Leaf, Any]] = []
    node = _encode(tree, (), leaves)
    names = {_layout.PADDING, _layout.METADATA}
    for leaf, _ in leaves:
        for name in tensor_names(leaf) or [leaf.name]:
            if name in names:
                raise ValueError(f"leaves must have names that differ, but got two of {name!r}. Rename a key.")
            names.add(name)
    return node, leaves


def _encode(value: Any, path: KeyPath, leaves: list[tuple[Leaf, Any]]) -> list[Any]:
    if len(path) > MAX_DEPTH:
        some = leaf_name(path[:3])
        raise ValueError(f"a tree must not be nested deeper than {MAX_DEPTH} levels, but {some}/... is. Flatten it.")
    if type(value) is dict:
        if not _are_ordered(value):
            raise TypeError(f"keys of a dict must be of one kind, but got {list(value)!r}. Rename them.")
        return [
            "dict",
            [[encode_key(key), _encode(item, (*path, DictKey(key)), leaves)] for key, item in value.items()],
        ]
    if type(value) in (list, tuple):
        items = enumerate(value)
        return [type(value).__name__, [_encode(item, (*path, SequenceKey(i)), leaves) for i, item in items]]
    if value is None:
        return ["none"]
    if "flax.nnx" in sys.modules:  # otherwise it is none of NNX's
        from pbjax.files import _nnx_nodes

        if (found := _nnx_nodes.encode(value, lambda child, below: _encode(child, path + below, leaves))) is not None:
            return found
    if not is_bit_tensor(value):
        children = one_level(value)
        if not (len(children) == 1 and children[0][1] is value):
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            return ["other", kind, [_encode(child, path + key, leaves) for key, child in children]]
    leaf = _leaf(leaf_name(path), value)
    leaves.append((leaf, value))
    return _leaf_node(leaf)


def _leaf_node(leaf: Leaf) -> list[Any]:
    match leaf:
        case Constant():
            return ["constant", leaf.name, leaf.value]
        case Array():
            return ["array", leaf.name] if leaf.impl is None else ["key", leaf.name, leaf.impl]
        case Packed():
            return ["bits", leaf.name, {**leaf.static, "dtype": leaf.static["dtype"].name}]


def with_leaves(node: Any, leaves: Mapping[str, Leaf]) -> Any:
    """A node whose leaves, by name, are others."""
    match node:
        case ["constant" | "array" | "key" | "bits", str(name), *_]:  # where this is a key of a dict, a list follows
            return _leaf_node(leaves[name])
        case list():
            return [with_leaves(child, leaves) for child in node]
    return node


def one_level(value: Any) -> list[tuple[KeyPath, Any]]:
    """Children of a pytree node and the keys that lead to them; a leaf is its own only child."""
    return jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda child: child is not value)[0]


def _leaf(name: str, value: Any) -> Leaf:
    if is_bit_tensor(value):
        for field in ("words", "scale", "bitlayers"):
            _check_array(f"{name}/{field}", getattr(value, field))
        _bit_tensor.check_bit_tensor(value, name)
        return packed_leaf(name, value)
    if type(value) in _CONSTANTS:
        return Constant(name=name, value=value)
    _check_array(name, value)
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        impl = str(jax.random.key_impl(value))
        if impl not in _KEY_IMPLS:
            raise TypeError(f"random keys must be of {', '.join(_KEY_IMPLS)}, but {name} is of {impl}.")
        return Array(name=name, impl=impl)
    if value.dtype not in _layout.DTYPE_NAMES:
        raise TypeError(
            f"leaves must be of a dtype that safetensors knows, but {name} is of {value.dtype}. Cast it first."
        )
    return Array(name=name)


def _check_array(name: str, value: Any) -> None:
    """Raises unless a leaf is an array whose values this process has."""
    if not isinstance(value, (jax.Array, np.ndarray, np.generic)) or isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"leaves must be arrays with known values, BitTensors, Python numbers or text, but {name} is "
            f"{type(value).__name__}. Leave it out, and save outside of `jax.jit`."
        )
    if isinstance(value, jax.Array) and not (value.is_fully_addressable or value.is_fully_replicated):
        raise ValueError(
            f"leaves must lie on devices of this process, but {name} does not. Replicate it, or save with Orbax."
        )


def encode_key(key: Any) -> Any:
    """A key of a dict as plain data."""
    if type(key) is tuple:
        return {"tuple": [encode_key(part) for part in key]}
    if type(key) in (str, int):
        return key
    raise TypeError(f"keys of dicts must be text, integers or tuples of them, but got {key!r}. Rename it.")


def decode(node: Any, path: str, make: Callable[[Leaf], Any], *, like_given: bool = False) -> Any:
    """The tree of a node, with what `make` returns for each leaf.

    Args:
      node: what `encode` returned, from a file.
      path: the file.
      make: takes a leaf; called once for each.
      like_given: take nodes of other kinds as lists of their children: who asks has the structure from elsewhere.

    Raises:
      FileError: not a node.
      ValueError: a node that only `like` can bring to life.
    """

    def visit(node: Any) -> Any:
        match node:
            case ["none"]:
                return None
            case ["dict", list(items)]:
                return decode_dict(items, path, visit)
            case ["list", list(items)]:
                return [visit(item) for item in items]
            case ["tuple", list(items)]:
                return tuple(visit(item) for item in items)
            case ["constant", str(name), value] if type(value) in _CONSTANTS:
                return make(Constant(name=name, value=value))
            case ["array", str(name)]:
                return make(Array(name=name))
            case ["key", str(name), str(impl)] if impl in _KEY_IMPLS:
                return make(Array(name=name, impl=impl))
            case ["bits", str(name), dict(static)]:
                return make(Packed(name=name, static=_decode_static(static, path, name)))
            case ["other", str(kind), list(children)]:
                if not like_given:
                    raise ValueError(
                        f"`like` must be given for a tree that holds a {kind[:100]}, a class that files do not bring "
                        f"to life, but got none ({path}). Give a tree of the same structure."
                    )
                return [visit(child) for child in children]
            case [str(kind), *rest] if kind.startswith("nnx."):
                from pbjax.files import _nnx_nodes

                return _nnx_nodes.decode(kind, rest, path, visit)
        raise _layout.FileError(path, f"its tree holds an unknown node: {str(node)[:100]}")

    try:
        return visit(node)
    except RecursionError:
        raise _layout.FileError(path, "its tree is nested too deeply") from None


def decode_dict(items: list[Any], path: str, visit: Callable[[Any], Any]) -> dict[Any, Any]:
    """A dict from plain data."""
    result = {}
    for item in items:
        match item:
            case [key, node]:
                key = decode_key(key, path)
                if key in result:
                    raise _layout.FileError(path, f"a dict of its tree has two keys {str(key)[:100]!r}")
                result[key] = visit(node)
            case _:
                raise _layout.FileError(path, f"a dict of its tree holds {str(item)[:100]}")
    if not _are_ordered(result):
        raise _layout.FileError(path, "a dict of its tree mixes kinds of keys")
    return result


def _are_ordered(keys: Iterable[Any]) -> bool:
    """Whether JAX can put the keys of a dict in order."""
    try:
        sorted(keys)
    except TypeError:
        return False
    return True


def decode_key(key: Any, path: str) -> Any:
    """A key of a dict from plain data."""
    match key:
        case {"tuple": list(parts)}:
            return tuple(decode_key(part, path) for part in parts)
        case str() | int() if type(key) is not bool:
            return key
    raise _layout.FileError(path, f"a dict of its tree has the key {str(key)[:100]!r}")


def _decode_static(static: dict[str, Any], path: str, name: str) -> dict[str, Any]:
    """The static fields of a BitTensor, each checked."""
    try:
        if sorted(static) != sorted(_STATIC):
            raise ValueError(f"fields are {', '.join(sorted(static))[:200]}")
        axes = {key: tuple(static[key]) for key in ("packed_shape", "contract_axes", "output_axes")}
        sizes = axes["packed_shape"]
        if not all(type(i) is int for i in sum(axes.values(), ())) or not all(0 < i < 2**62 for i in sizes):
            raise ValueError("axes are no sensible integers")
        if sorted(axes["contract_axes"] + axes["output_axes"]) != list(range(len(sizes))):
            raise ValueError("contracted and output axes are not all axes")
        dtype = next((d for d in _layout.DTYPE_NAMES if d.name == static["dtype"]), None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"dtype is {str(static['dtype'])[:40]!r}")
        group_size = static["group_size"]
        if group_size is not None:
            group_size = _checks.integer("group_size", group_size, contract.WORD_BITS, None, name)
            if group_size % contract.WORD_BITS:
                raise ValueError(f"group_size is {group_size}")
        return {
            **axes,
            "dtype": dtype,
            "bits": _checks.integer("bits", static["bits"], 1, contract.MAX_BITS, name),
            "group_size": group_size,
            "activation_bits": _checks.activation_bits(static["activation_bits"], name),
        }
    except (TypeError, ValueError) as error:
        raise _layout.FileError(path, f"its description as a packed weight is wrong: {error}", name) from None
