"""Reading of files that `pbjax.save` wrote: the header first, tensors when they are asked for, each one checked."""

from __future__ import annotations

import os
from typing import Any, BinaryIO

import numpy as np

from pbjax.files import _layout, _structure


class Source:
    """One safetensors file, of any origin: its header, read and checked, and its tensors on demand."""

    def __init__(self, path: str):
        self.path = path
        self._file: BinaryIO = open(path, "rb", buffering=0)  # noqa: SIM115
        try:
            self.header = _layout.read_header(self._file, os.fstat(self._file.fileno()).st_size, path)
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str, target: np.ndarray | None = None) -> np.ndarray:
        """A tensor, or `target`, a contiguous array of its dtype and shape, filled with it."""
        entry = self.header.entries[name]
        if target is None:
            target = np.empty(entry.shape, entry.dtype)
        self._file.seek(self.header.start + entry.begin)
        _layout.read_into(self._file, _layout.bytes_of(target), self.path, name)
        return target

    def mapped(self, name: str) -> np.ndarray:
        """A tensor that is read where it is looked at."""
        entry = self.header.entries[name]
        if entry.end == entry.begin:
            return np.empty(entry.shape, entry.dtype)
        offset = self.header.start + entry.begin
        return np.memmap(self.path, entry.dtype, mode="r", offset=offset, shape=entry.shape)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Checkpoint:
    """What `pbjax.save` wrote under a path: one file, or several behind an index, which are opened when needed.

    Attributes:
      path: the file that describes the tree.
      node: the tree as plain data, see `pbjax.files._structure`.
      metadata: what the user gave to `save`.
      leaves: the leaves by path.
      files: bytes of each file opened so far, by path.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path, self._sources = os.fspath(path), dict[str, Source]()
        self._checksums: dict[str, dict[str, str]] = {}
        self._seals: dict[str, str] = {}
        self._file_of: dict[str, str] | None = None
        index = self.path if self.path.endswith(_layout.INDEX_SUFFIX) else self.path + _layout.INDEX_SUFFIX
        try:
            if os.path.exists(index):
                self.path = index
                description = self._read_index()
            else:
                description = self._open(self.path).header.metadata
            self._describe(description)
        except BaseException:
            self.close()
            raise

    def _describe(self, description: dict[str, Any]) -> None:
        """Reads structure and metadata, and compares the structure with the tensors that are there."""
        tree, metadata = (description.get(f"pbjax.{key}") for key in ("tree", "metadata"))
        if not (isinstance(tree, str) and isinstance(metadata, str)):
            raise _layout.FileError(self.path, "its header describes no tree")
        self.node = _layout.parse_json(tree.encode(errors="replace"), self.path, list)
        self.metadata = _layout.parse_json(metadata.encode(errors="replace"), self.path)
        self.leaves: dict[str, _structure.Leaf] = {}
        _structure.decode(self.node, self.path, self._add_leaf, like_given=True)
        expected = {name for leaf in self.leaves.values() for name in _structure.tensor_names(leaf)}
        if expected != self.names:
            some = sorted(expected ^ self.names)[:5]
            raise _layout.FileError(self.path, f"its tree and its tensors differ: {', '.join(some)[:500]}")

    def _add_leaf(self, leaf: _structure.Leaf) -> None:
        if leaf.name in self.leaves:
            raise _layout.FileError(self.path, "occurs twice in the tree", leaf.name)
        self.leaves[leaf.name] = leaf

    def _read_index(self) -> dict[str, Any]:
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > _layout.MAX_HEADER_BYTES:
                raise _layout.FileError(self.path, f"an index of {size} bytes is too long")
            text = _layout.read_exactly(file, size, self.path)
        _layout.check_seal(text, "metadata", self.path)
        match _layout.parse_json(text, self.path):
            case {"metadata": {"pbjax.shards": dict(shards), **description}, "weight_map": dict(weight_map)}:
                pass
            case _:
                raise _layout.FileError(self.path, "an index must hold metadata and weight_map")
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or shard not in shards:
                raise _layout.FileError(self.path, f"in no file that the index lists: {str(shard)[:100]!r}", name)
        for shard in shards:
            if not _layout.is_plain_name(shard):
                raise _layout.FileError(self.path, f"files must lie beside the index, but got {shard[:100]!r}")
        self._file_of, self._shards = weight_map, shards
        return description

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        if self._file_of is not None:
            return set(self._file_of)
        return self._sources[self.path].header.entries.keys() - {_layout.PADDING}

    @property
    def files(self) -> dict[str, int]:
        """Bytes of the files opened so far."""
        return {path: os.path.getsize(path) for path in self._sources}

    def _open(self, path: str) -> Source:
        source = self._sources[path] = Source(path)
        self._seals[path] = _layout.check_seal(source.header.text, _layout.METADATA, path)
        joined, names = source.header.metadata.get("pbjax.crc32", ""), list(source.header.entries)
        if len(joined) != 8 * len(names):
            raise _layout.FileError(path, f"must hold {len(names)} checksums, but has {len(joined) / 8:g}")
        self._checksums[path] = {name: joined[8 * i : 8 * i + 8] for i, name in enumerate(names)}
        return source

    def source(self, name: str) -> Source:
        """The file that holds a tensor."""
        if self._file_of is None:
            return self._sources[self.path]
        shard = self._file_of[name]
        path = os.path.join(os.path.dirname(self.path), shard)
        if path not in self._sources:
            if not os.path.isfile(path):
                raise _layout.FileError(self.path, f"the index lists {shard}, which is not there", name)
            source = self._open(path)
            if self._seals[path] != self._shards[shard]:
                raise _layout.FileError(path, "is another file than the one that the index lists")
            listed = {tensor for tensor, file in self._file_of.items() if file == shard}
            if source.header.entries.keys() - {_layout.PADDING} != listed:
                raise _layout.FileError(path, "holds other tensors than the index lists")
        return self._sources[path]

    def entry(self, name: str) -> _layout.Entry:
        """Dtype and shape of a tensor."""
        return self.source(name).header.entries[name]

    def read(self, name: str, target: np.ndarray | None = None) -> np.ndarray:
        """A tensor whose checksum is right, in `target` if that is given."""
        source = self.source(name)
        array = source.read(name, target)
        self._check(source, name, array)
        return array

    def read_padding(self) -> None:
        """Compares the padding of all files opened so far with its checksums."""
        for source in self._sources.values():
            if _layout.PADDING in source.header.entries:
                self._check(source, _layout.PADDING, source.read(_layout.PADDING))

    def _check(self, source: Source, name: str, array: np.ndarray) -> None:
        if _layout.checksum(_layout.bytes_of(array)) != self._checksums[source.path][name]:
            raise _layout.FileError(source.path, "is damaged: its checksum differs", name)

    def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, read without the rest and therefore unchecked."""
        return np.array(self.source(name).mapped(name)[index])

    def check_entries(self, leaf: _structure.Packed, bits: int) -> tuple[int, ...]:
        """The stack shape of a BitTensor; raises FileError unless its first `bits` bitlayers have the right shapes."""
        stack_shape = self.entry(f"{leaf.name}/bitlayers").shape
        for name, (dtype, shape) in leaf.tensors(stack_shape, bits).items():
            entry = self.entry(name)
            if (entry.dtype, entry.shape) != (dtype, shape):
                raise _layout.FileError(
                    self.source(name).path,
                    f"must be {dtype.name}{list(shape)} for its weight, but is {entry.dtype.name}{list(entry.shape)}",
                    name,
                )
        return stack_shape

    def close(self) -> None:
        """Closes all files."""
        for source in self._sources.values():
            source.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
