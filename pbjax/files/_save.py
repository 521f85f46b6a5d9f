"""`pbjax.save`, and the writer of files beneath it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from pallas_kernels.bit_matmul import contract
from pbjax import _checks
from pbjax._bit_tensor import BitTensor
from pbjax.files import _layout, _structure

_SHARD_NAME = "{}-[0-9a-f]{{8}}-[0-9]{{5}}-of-[0-9]{{5}}\\.safetensors"


def save(
    path: str | os.PathLike[str],
    tree: Any,
    metadata: Mapping[str, Any] | None = None,
    *,
    max_shard_bytes: int | None = None,
) -> None:
    """Writes a tree of weights to a safetensors file, in an order that lets `load` read the first bitlayers only.

    The file holds the tree's structure, BitTensors as they are, and all other arrays in their dtypes. It replaces an
    older one as a whole, when it is complete and on the disk: a process that dies while it writes leaves the older one.

    Args:
      path: the file to write, usually `NAME.safetensors`.
      tree: dicts (loaded with their keys in order, as JAX rebuilds them), lists, tuples and None (with keys of text,
        integers, or tuples of these), nested up to 100 levels, `nnx.State` with Flax's
        own Variables, arrays of any dtype that safetensors knows (no int4, no complex128), random keys, BitTensors,
        Python numbers and text. Other registered nodes, NNX modules among them, are saved too; they are loaded with
        `like`.
      metadata: anything that JSON holds, keys being text, to be read by `pbjax.files.info`.
      max_shard_bytes: if given, a tree of more bytes is written to several files of at most this many bytes of tensors
        (or one tensor; the headers come on top) and `path` + ".index.json", which `load` finds under the same `path`.
        Later bitlayers go to later files.

    Raises:
      TypeError: a leaf, key or metadata that a file cannot hold; the message names the path.
      ValueError: two leaves of one name, an array that does not lie on devices of this process, a tree or metadata of
        more than 100 levels, NaN or infinity in metadata, a `path` that names no file, or ends in ".index.json", or has
        beside it an index that another program wrote.
      OSError: from the file system.

    Cost: beyond the tree, one weight on the host at a time (none where it lies there already).

    References:
      safetensors: https://github.com/huggingface/safetensors
    """
    node, leaves = _structure.encode(tree)
    tensors = {leaf.name: tensors_of(leaf, value) for leaf, value in leaves}
    with writer(path, node, [leaf for leaf, _ in leaves], tensors, metadata, max_shard_bytes) as out:
        for leaf, value in leaves:
            out.write_leaf(leaf, value)


def tensors_of(leaf: _structure.Leaf, value: Any) -> _structure.Tensors:
    """Dtypes and shapes of the tensors that a leaf is written as; of the value, the shape counts only."""
    match leaf:
        case _structure.Packed():
            return leaf.tensors(value.stack_shape, leaf.bits)
        case _structure.Array(impl=None):
            return {leaf.name: (np.dtype(value.dtype), tuple(value.shape))}
        case _structure.Array():
            data = jax.eval_shape(jax.random.key_data, value)
            return {leaf.name: (np.dtype(data.dtype), data.shape)}
    return {}


@contextlib.contextmanager
def writer(
    path: str | os.PathLike[str],
    node: list[Any],
    leaves: list[_structure.Leaf],
    tensors: Mapping[str, _structure.Tensors],
    metadata: Mapping[str, Any] | None,
    max_shard_bytes: int | None,
) -> Iterator[Writer]:
    """A `Writer` that commits at the end of a `with` block, and leaves nothing behind where that raises."""
    out = Writer(os.fspath(path), node, leaves, tensors, metadata, max_shard_bytes)
    try:
        yield out
        out.commit()
    finally:
        out.close()


class Writer:
    """Writes the tensors of leaves, in any order, to places fixed in advance; nothing is seen before `commit`."""

    def __init__(
        self,
        path: str,
        node: list[Any],
        leaves: list[_structure.Leaf],
        tensors: Mapping[str, _structure.Tensors],
        metadata: Mapping[str, Any] | None,
        max_shard_bytes: int | None,
    ):
        self._path = _check_path(path)
        self._index = Path(f"{path}{_layout.INDEX_SUFFIX}")
        _check_index(self._index)
        where = "argument of save"
        if max_shard_bytes is not None:
            max_shard_bytes = _checks.integer("max_shard_bytes", max_shard_bytes, 1, None, where)
        self._description = {"pbjax.tree": _compact(node), "pbjax.metadata": _metadata_text(metadata)}
        ordered = _order(leaves, tensors)
        layouts = [_layout.lay_out(part) for part in _parts(ordered, max_shard_bytes)]
        self._sharded = len(layouts) > 1
        description = {} if self._sharded else self._description
        self._shards: list[_Shard] = []
        try:
            for layout in layouts:
                self._shards.append(_Shard(self._path, layout, description))
        except BaseException:
            self.close()
            raise
        self._shard_of = {name: shard for shard in self._shards for name in shard.entries}

    def write_leaf(self, leaf: _structure.Leaf, value: Any) -> None:
        """Writes all tensors of a leaf."""
        match leaf:
            case _structure.Packed():
                self._write_packed(leaf, value)
            case _structure.Array():
                self.write(leaf.name, np.asarray(value if leaf.impl is None else jax.random.key_data(value)))

    def _write_packed(self, leaf: _structure.Packed, value: BitTensor) -> None:
        self.write(f"{leaf.name}/bitlayers", np.asarray(value.bitlayers))
        words, scale = np.asarray(value.words), np.asarray(value.scale)
        for i in range(leaf.bits):
            self.write(f"{leaf.name}/words/{i}", words[..., i, :, :])
            if i < contract.NUM_SCALES:
                self.write(f"{leaf.name}/scale/{i}", scale[..., i, :, :])

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one tensor."""
        self._shard_of[name].write(name, array)

    def commit(self) -> None:
        """Puts the file in place of an older one; of several files, the index last."""
        index = self._index
        stem = self._path.name.removesuffix(".safetensors")
        before = {name for name in _shards_in(index) if re.fullmatch(_SHARD_NAME.format(re.escape(stem)), name)}
        checksums = [shard.finish() for shard in self._shards]
        if not self._sharded:
            self._shards[0].move(self._path)
            _sync_folder(self._path.parent)
            if os.path.exists(index):  # `load` prefers it; of a long name there can be none
                index.unlink(missing_ok=True)
            now = set()
        else:
            # Names that depend on the contents: the files of an older index stay what they are.
            token = _layout.checksum("".join(checksums).encode())
            num = len(self._shards)
            names = [f"{stem}-{token}-{i + 1:05d}-of-{num:05d}.safetensors" for i in range(num)]
            for shard, name in zip(self._shards, names, strict=True):
                shard.move(self._path.with_name(name))
            _sync_folder(self._path.parent)
            self._write_index(index, dict(zip(names, checksums, strict=True)))
            self._path.unlink(missing_ok=True)
            now = set(names)
        for name in before - now:
            self._path.with_name(name).unlink(missing_ok=True)
        _sync_folder(self._path.parent)

    def _write_index(self, index: Path, checksums: Mapping[str, str]) -> None:
        weight_map = {
            tensor: name
            for name, shard in zip(checksums, self._shards, strict=True)
            for tensor in shard.entries
            if tensor != _layout.PADDING
        }
        total = sum(entry.end - entry.begin for shard in self._shards for entry in shard.entries.values())
        metadata = {"pbjax.shards": checksums, "total_size": total, **self._description}
        temporary = _temporary(index)
        try:
            with open(temporary, "xb") as file:
                file.write(_layout.seal({"metadata": metadata, "weight_map": weight_map}))
                _sync(file)
            os.replace(temporary, index)
            _sync_folder(index.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def close(self) -> None:
        """Closes and removes what is temporary."""
        for shard in self._shards:
            shard.close()


class _Shard:
    """One file under a temporary name."""

    def __init__(self, path: Path, entries: dict[str, _layout.Entry], description: Mapping[str, str]):
        self.entries = entries
        self._description = description
        self._checksums: dict[str, str] = {}
        self._temporary = _temporary(path)
        self._start = len(self._header(dict.fromkeys(entries, "0" * 8)))
        self._file: BinaryIO = open(self._temporary, "xb")  # noqa: SIM115
        if _layout.PADDING in entries:
            self.write(_layout.PADDING, np.zeros(entries[_layout.PADDING].shape, np.uint8))

    def _header(self, checksums: Mapping[str, str]) -> bytes:
        joined = "".join(checksums[name] for name in self.entries)  # always as long, so it is written last
        return _layout.header_bytes(self.entries, {"pbjax.crc32": joined, **self._description})

    def write(self, name: str, array: np.ndarray) -> None:
        entry = self.entries[name]
        assert (array.dtype, array.shape) == (entry.dtype, entry.shape), name
        data = _layout.bytes_of(np.ascontiguousarray(array))
        self._file.seek(self._start + entry.begin)
        self._file.write(data)
        self._checksums[name] = _layout.checksum(data)

    def finish(self) -> str:
        """Writes the header and waits for the disk; returns the header's checksum."""
        header = self._header(self._checksums)
        self._file.seek(0)
        self._file.write(header)
        _sync(self._file)
        self._file.close()
        return _layout.check_seal(header[8:], _layout.METADATA, str(self._temporary))

    def move(self, path: Path) -> None:
        os.replace(self._temporary, path)

    def close(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def _order(leaves: list[_structure.Leaf], tensors: Mapping[str, _structure.Tensors]) -> dict[str, Any]:
    """All tensors in the order of the file: what every precision needs, then bitlayer by bitlayer."""
    everything = {name: value for leaf in leaves for name, value in tensors[leaf.name].items()}
    packed = [leaf for leaf in leaves if isinstance(leaf, _structure.Packed)]
    levels = [name for i in range(contract.MAX_BITS) for leaf in packed if i < leaf.bits for name in leaf.level(i)]
    first = everything.keys() - set(levels)
    by_size = sorted(
        (name for name in everything if name in first), key=lambda name: -everything[name][0].itemsize
    )  # stable, and aligned without gaps
    return {name: everything[name] for name in (*by_size, *levels)}


def _parts(ordered: Mapping[str, Any], max_bytes: int | None) -> list[list[tuple[str, Any, Any]]]:
    """Tensors in as many runs as it takes to keep each below a number of bytes."""
    parts: list[list[tuple[str, Any, Any]]] = [[]]
    size = 0
    for name, (dtype, shape) in ordered.items():
        num_bytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if max_bytes is not None and parts[-1] and size + num_bytes > max_bytes:
            parts.append([])
            size = 0
        parts[-1].append((name, dtype, shape))
        size += num_bytes
    return parts


def _metadata_text(metadata: Any) -> str:
    if metadata is not None and not isinstance(metadata, Mapping):
        raise TypeError(f"`metadata` must be a dict, but got {type(metadata).__name__} (argument of save).")
    metadata = dict(metadata or {})
    _check_metadata(metadata)
    try:
        return json.dumps(metadata, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"`metadata` must be what JSON holds, but got {error} (argument of save).") from None


def _check_metadata(value: Any, depth: int = 0) -> None:
    """Raises for keys that JSON would turn into text, and where they might meet, and for what contains itself."""
    if depth > _structure.MAX_DEPTH:
        raise ValueError(
            f"`metadata` must not be nested deeper than {_structure.MAX_DEPTH} levels, but is (argument of save)."
        )
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"`metadata` must have keys of text, but got {key!r} (argument of save).")
    if isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            _check_metadata(item, depth + 1)


def _check_path(path: str) -> Path:
    """A path that a file can be written to and read from; raises before anything is written."""
    if os.path.isdir(path):
        raise IsADirectoryError(f"`path` must name a file, but {path!r} is a folder. Add a file name.")
    if not os.path.basename(path):
        raise ValueError(f"`path` must name a file, but got {path!r}.")
    if path.endswith(_layout.INDEX_SUFFIX):
        stem = path.removesuffix(_layout.INDEX_SUFFIX)
        raise ValueError(
            f"`path` must not end in {_layout.INDEX_SUFFIX}, but got {path!r}. Give {stem!r}, and `max_shard_bytes` "
            "for several files; their index gets its name from it."
        )
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise FileNotFoundError(f"`path` must lie in a folder that is there, but got {path!r}. Make the folder first.")
    return Path(path)


def _check_index(index: Path) -> None:
    """Raises where a new file would be hidden by, or take the place of, the index that another program wrote."""
    if not os.path.exists(index):
        return
    with open(index, "rb") as file:
        if not _layout.is_sealed(file.read(100), "metadata"):
            raise ValueError(
                f"`path` must not have an index of another program beside it, which `load` would read instead, but "
                f"{index} is there. Remove it, or choose another name."
            )


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _shards_in(index: Path) -> list[str]:
    """Files that an index in place refers to; none where there is none, or none that can be read."""
    if not os.path.exists(index):
        return []
    try:
        text = index.read_bytes()
        _layout.check_seal(text, "metadata", str(index))
        return list(_layout.parse_json(text, str(index))["metadata"]["pbjax.shards"])
    except (FileNotFoundError, _layout.FileError):
        return []


def _temporary(path: Path) -> Path:
    """A name beside a path, so that renaming stays within one file system; short, as that of the path may be long."""
    return path.with_name(f".{secrets.token_hex(4)}.tmp")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Waits until names in a folder are on the disk, where the system can do that."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
