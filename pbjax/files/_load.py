"""`pbjax.load`: trees of weights from files, with as many bitlayers as are asked for and no byte more."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bit_matmul import contract
from pbjax import _checks, _paths, _sharding
from pbjax._bit_tensor import BitTensor, is_bit_tensor
from pbjax.files import _layout, _structure
from pbjax.files._checkpoint import Checkpoint

Index = tuple[slice, ...]


def load(
    path: str | os.PathLike[str],
    *,
    bits: int | None = None,
    sharding: Any = None,
    like: Any = None,
) -> Any:
    """Reads a tree of weights that `pbjax.save` wrote.

    With `bits`, only that many bitlayers of each weight are read: `load(path, bits=b)` equals
    `pbjax.truncate(load(path), b)`, bit for bit, for about b/B of the bytes of B bitlayers. Every tensor that is read
    is compared with its checksum. Nothing that a file says is run or imported.

    Args:
      path: what was given to `save`, or the index of several files.
      bits: bitlayers to read, 1..16; weights that store no more are read as they are. None reads all.
      sharding: where arrays go. None is the default device. Otherwise one of
        - a `jax.sharding.Sharding` or `jax.Device` for all of them;
        - a dict from path patterns (regular expressions, searched for; the first match decides);
        - a tree of them with the structure of the saved tree.

        A sharding of a BitTensor is that of the float weight it stands for, as `quantize` keeps it, or, in a tree, a
        BitTensor of shardings. Processes that hold a part of a mesh read their own parts; these bytes are not compared
        with checksums, since a checksum is one of a whole bitlayer (`python -m pbjax verify` compares all).
      like: a tree of the same structure, for trees that hold classes which files do not bring to life: NNX modules,
        dataclasses, named tuples, own Variables. Its leaves are ignored but for their paths, shapes and dtypes (of a
        packed weight, those of the float one). What is no leaf comes from it, such as static fields of dataclasses.

    Returns:
      The tree; dicts have their keys in order. Arrays are JAX arrays in the dtypes saved; those of 64 bits stay NumPy
      arrays without `jax_enable_x64`.

    Raises:
      pbjax.files.FileError: the file is damaged, cut short, of a later version, or of another kind; with the tensor.
      FileNotFoundError: no file.
      TypeError: an argument of another type than it should be.
      ValueError: `bits` out of range or without BitTensors in the file, a `sharding` that does not fit, `like` missing
        or of another structure.

    Cost: one weight on the host at a time, and the headers.
    """
    if bits is not None:
        bits = _checks.integer("bits", bits, 1, contract.MAX_BITS, "argument of load")
    with Checkpoint(path) as file:
        if bits is not None and not any(isinstance(leaf, _structure.Packed) for leaf in file.leaves.values()):
            raise ValueError(f"`bits` must come with a file of BitTensors, but {file.path} has none. Leave it out.")
        leaves, treedef = _leaves(file, like)
        shardings = _shardings(sharding, leaves, treedef)
        values = [load_leaf(file, leaf, bits, where) for leaf, where in zip(leaves, shardings, strict=True)]
        return jax.tree.unflatten(treedef, values)


def _leaves(file: Checkpoint, like: Any) -> tuple[list[_structure.Leaf], Any]:
    """Leaves and structure of the tree: the file's own, or that of `like`."""
    if like is None:
        tree = _structure.decode(file.node, file.path, lambda leaf: leaf)
        return jax.tree.flatten(tree)
    paths, treedef = jax.tree_util.tree_flatten_with_path(like, is_leaf=is_bit_tensor)
    names = [_structure.leaf_name(path) for path, _ in paths]
    if sorted(names) != sorted(file.leaves):
        extra, missing = sorted(set(names) - set(file.leaves)), sorted(set(file.leaves) - set(names))
        raise ValueError(
            f"`like` must have the leaves of {file.path}, but has {', '.join(extra[:5]) or 'no other'} that the file "
            f"has not, and lacks {', '.join(missing[:5]) or 'none'}."
        )
    leaves = [file.leaves[name] for name in names]
    for leaf, (_, value) in zip(leaves, paths, strict=True):
        _check_leaf(file, leaf, value)
    return leaves, treedef


def _check_leaf(file: Checkpoint, leaf: _structure.Leaf, value: Any) -> None:
    """Raises unless a leaf of `like` has the shape and dtype of that in the file."""
    if isinstance(leaf, _structure.Constant) or not (hasattr(value, "shape") and hasattr(value, "dtype")):
        return
    if isinstance(leaf, _structure.Packed):
        shape, dtype = (*file.entry(f"{leaf.name}/bitlayers").shape, *leaf.static["packed_shape"]), leaf.static["dtype"]
    else:
        shape, dtype = file.entry(leaf.name).shape, file.entry(leaf.name).dtype
        if leaf.impl is not None:
            shape, dtype = shape[:-1], jax.eval_shape(lambda: jax.random.key(0, impl=leaf.impl)).dtype
    # Without `jax_enable_x64` JAX says 32 bits where the file has 64.
    if value.dtype not in (dtype, jax.dtypes.canonicalize_dtype(dtype, allow_extended_dtype=True)):
        raise ValueError(
            f"`like` must have the dtypes of {file.path}, but {leaf.name} is {value.dtype} where the file has {dtype}."
        )
    if tuple(value.shape) != shape:
        raise ValueError(
            f"`like` must have the shapes of {file.path}, but {leaf.name} has {tuple(value.shape)} where the file has "
            f"{shape}."
        )


def _shardings(sharding: Any, leaves: list[_structure.Leaf], treedef: Any) -> list[Any]:
    """One sharding, or None for the default device, for each leaf."""
    if sharding is None or _is_sharding(sharding):
        return [sharding] * len(leaves)
    names = [leaf.name for leaf in leaves]
    try:
        result = treedef.flatten_up_to(sharding)
    except (ValueError, TypeError, KeyError):
        if not isinstance(sharding, Mapping):
            raise ValueError(
                "`sharding` must be a sharding, a dict from path patterns to shardings, or a tree with the structure "
                f"of the saved tree, but got a tree of structure {jax.tree.structure(sharding)}."
            ) from None
        patterns = _paths.compile_patterns("sharding", sharding)
        _paths.check_matches("sharding", patterns, names, "leaves of the tree")
        result = [_paths.first_match(patterns, name, None) for name in names]
    for name, where in zip(names, result, strict=True):
        if not (where is None or _is_sharding(where) or is_bit_tensor(where)):
            raise TypeError(f"`sharding` must hold shardings or devices, but got {where!r} for {name}.")
    return result


def _is_sharding(value: Any) -> bool:
    return isinstance(value, (jax.sharding.Sharding, jax.Device))


def load_leaf(file: Checkpoint, leaf: _structure.Leaf, bits: int | None, where: Any) -> Any:
    """One leaf from a file, with no more than `bits` bitlayers, on a device or a mesh."""
    match leaf:
        case _structure.Constant():
            return leaf.value
        case _structure.Packed():
            return _load_packed(file, leaf, bits, where)
        case _structure.Array(impl=None):
            return _load_array(file, leaf.name, where)
        case _structure.Array():
            data = file.read(leaf.name)
            if data.dtype != np.uint32 or data.ndim == 0:
                raise _layout.FileError(file.path, "is no data of random keys", leaf.name)
            try:
                keys = jax.random.wrap_key_data(jnp.asarray(data), impl=leaf.impl)
            except (TypeError, ValueError) as error:
                raise _layout.FileError(file.path, f"is no data of random keys: {error}", leaf.name) from None
            return keys if where is None else jax.device_put(keys, where)


def _load_array(file: Checkpoint, name: str, where: Any) -> Any:
    entry = file.entry(name)

    def read(index: Index | None) -> np.ndarray:
        return file.read(name) if index is None else file.read_part(name, index)

    return _place(entry.shape, entry.dtype, where, read, name)


def _load_packed(file: Checkpoint, leaf: _structure.Packed, bits: int | None, where: Any) -> BitTensor:
    kept = leaf.bits if bits is None else min(bits, leaf.bits)
    stack_shape = file.check_entries(leaf, kept)
    places = _packed_places(leaf, stack_shape, where)
    tensor = BitTensor(None, None, None, **leaf.truncated(kept).static)  # pyright: ignore[reportArgumentType]
    bitlayers = file.read(f"{leaf.name}/bitlayers")
    if bitlayers.size and (bitlayers.min() < 1 or bitlayers.max() > leaf.bits):
        raise _layout.FileError(
            file.path, f"must lie in 1..{leaf.bits}, the bitlayers stored", f"{leaf.name}/bitlayers"
        )
    bitlayers = np.minimum(bitlayers, kept)
    num_scales = min(kept, contract.NUM_SCALES)

    def read(index: Index | None) -> np.ndarray:
        return bitlayers[index or ...]

    return tensor.replace(
        words=_load_levels(file, [f"{leaf.name}/words/{i}" for i in range(kept)], places.words),
        scale=_load_levels(file, [f"{leaf.name}/scale/{i}" for i in range(num_scales)], places.scale),
        bitlayers=_place(stack_shape, bitlayers.dtype, places.bitlayers, read, leaf.name),
    )


def _packed_places(leaf: _structure.Packed, stack_shape: tuple[int, ...], where: Any) -> Any:
    """Where words, scale and bitlayers go, given where the float weight would."""
    if is_bit_tensor(where):
        return where
    if isinstance(where, jax.sharding.Sharding):
        static = leaf.static
        weight = jax.ShapeDtypeStruct(stack_shape + static["packed_shape"], static["dtype"], sharding=where)
        packed = _sharding.packed_shardings(
            weight,
            leaf.name,
            num_stack=len(stack_shape),
            contract_axes=static["contract_axes"],
            output_axes=static["output_axes"],
            group_size=static["group_size"],
        )
        if packed is not None:
            return packed
        if len(where.device_set) > 1:
            raise ValueError(
                f"`sharding` of a packed weight must be a NamedSharding, or one of a single device, but got {where} "
                f"for {leaf.name}."
            )
        (where,) = where.device_set
    return _sharding.Packed(words=where, scale=where, bitlayers=where)


def _load_levels(file: Checkpoint, names: list[str], where: Any) -> jax.Array:
    """Tensors of one shape, [*stack, a, n] each, as [*stack, len(names), a, n]."""
    entry = file.entry(names[0])
    stack, rest = entry.shape[:-2], entry.shape[-2:]
    axis = len(stack)

    def read(index: Index | None) -> np.ndarray:
        if index is not None:
            levels = names[index[axis]]
            index = (*index[:axis], *index[axis + 1 :])
            return np.stack([file.read_part(name, index) for name in levels], axis)
        array = np.empty((*stack, len(names), *rest), entry.dtype)
        for i, name in enumerate(names):
            if stack:
                array[..., i, :, :] = file.read(name)
            else:
                file.read(name, array[i])
        return array

    return _place((*stack, len(names), *rest), entry.dtype, where, read, names[0])


def _place(
    shape: tuple[int, ...], dtype: np.dtype, where: Any, read: Callable[[Index | None], np.ndarray], name: str
) -> Any:
    """What `read` returns, as an array on a device or a mesh; only the parts of this process, if there are others."""
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:  # JAX would cut it to 32 bits
        if where is not None:
            raise ValueError(
                f"`sharding` must be for arrays that JAX holds, but {name} is {dtype.name}. Enable `jax_enable_x64`, "
                "or leave it out of `sharding`."
            )
        return read(None)
    if isinstance(where, jax.sharding.Sharding) and not where.is_fully_addressable:
        return jax.make_array_from_callback(shape, where, read, dtype=dtype)
    return jax.device_put(read(None), where)
