"""Files to files, one tensor at a time: `convert` packs float weights, `truncate` keeps the first bitlayers."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import rich.console
import rich.progress

from pallas_kernels.bit_matmul import contract
from pbjax import _bit_tensor, _checks, _paths, _quantize, _report, _specs
from pbjax._bit_tensor import BitTensor
from pbjax._specs import Spec
from pbjax.files import _layout, _save, _structure
from pbjax.files._checkpoint import Checkpoint, Source

Renaming = str | tuple[str, tuple[int, ...]] | None
T = TypeVar("T")


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    bits: int,
    *,
    rename: Mapping[str, Renaming] | None = None,
    rules: Mapping[str, int | Spec | None] | None = None,
    group_size: int | None = None,
    activation_bits: int | None = 16,
    clip_bits: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    max_shard_bytes: int | None = None,
    errors: bool = False,
    progress: bool | None = None,
) -> _report.Report:
    r"""Quantizes the float weights of a safetensors checkpoint into a file for `pbjax.load`, tensor by tensor.

    Names become paths of nested dicts, cut at "." and "/". `rename` maps them first, for instance those of PyTorch,
    whose linear layers hold (out, in) where Flax's kernels are (in, out):

        rename = {
            r"^model\.layers\.(\d+)\..*\.(\w+)_proj\.weight$": (r"layers_\1.\2.kernel", (1, 0)),
            r"embed_tokens\.weight$": "embed.embedding",
            r"rotary_emb": None,
        }

    Args:
      source: a safetensors file, an index of several (`model.safetensors.index.json`), a folder that holds
        `model.safetensors` or that index, or a file of `pbjax.save`, whose tree is kept, with what it holds packed.
      target: the file to write, see `pbjax.save`.
      bits: bitlayers to store, 1..16.
      rename: patterns (regular expressions, searched for in the source's names; the first match decides) to a
        replacement for the match, to a replacement and an order of axes as `numpy.transpose` takes it, or to None,
        which leaves the tensor out. Other names stay.
      rules: as in `pbjax.quantize`, on the paths in the target. By default every `kernel` of rank 2 or more is packed.
      group_size: as in `pbjax.quantize`.
      activation_bits: as in `pbjax.quantize`.
      clip_bits: as in `pbjax.quantize`.
      metadata: as in `pbjax.save`; None keeps that of a file of `pbjax.save`.
      max_shard_bytes: as in `pbjax.save`.
      errors: whether to compare each packed weight with the original after every number of bitlayers.
      progress: whether to show a progress bar; None shows one on a terminal.

    Returns:
      A `pbjax.Report` of the weights packed, with errors if asked for.

    Raises:
      pbjax.files.FileError: a file that cannot be read.
      FileNotFoundError: no file.
      TypeError, ValueError: what `pbjax.quantize` and `pbjax.save` raise; names that come to one path or to a reserved
        one, a pattern without a match, a source whose weights are packed already.

    Cost: one tensor at a time, and its packed form; nothing else of the model is in memory.
    """
    widths = _specs.check_widths(bits, group_size, activation_bits, clip_bits, "argument of convert")
    patterns = _specs.compile_rules(rules, widths)
    source = _resolve(os.fspath(source))
    with Checkpoint(source) if is_ours(source) else _Floats(source, rename or {}) as file:
        if rename and isinstance(file, Checkpoint):
            raise ValueError(f"`rename` must be left out for a file that holds a tree, as {source} does.")
        if isinstance(file, Checkpoint) and metadata is None:
            metadata = file.metadata
        names = list(file.leaves)
        stand_ins = [_stand_in(file, leaf) for leaf in file.leaves.values()]
        _paths.check_matches("rules", patterns, names, "tensors of the checkpoint")
        uses = [[]] * len(names)
        plans = _quantize.plan_leaves(
            names, stand_ins, uses, widths=widths, patterns=patterns, select=None, has_fn=False
        )
        if not plans:
            raise ValueError(
                f"`source` must hold a float weight to pack, but those of {source} are packed already. Use `truncate` "
                "for fewer bitlayers; more need the float weights."
            )
        leaves, stacks = dict(file.leaves), {}
        for i, plan in plans.items():
            pack = functools.partial(_bit_tensor.pack_array, **dataclasses.asdict(plan))
            packed = jax.eval_shape(pack, jax.ShapeDtypeStruct(stand_ins[i].shape, stand_ins[i].dtype))
            leaves[names[i]] = _structure.packed_leaf(names[i], packed)
            stacks[names[i]] = packed.stack_shape
        tensors = {
            name: leaf.tensors(stacks[name], leaf.bits)
            if isinstance(leaf, _structure.Packed) and name in stacks
            else _tensors(file, leaf)
            for name, leaf in leaves.items()
        }
        rows, squares = [], []
        node = _structure.with_leaves(file.node, leaves)
        with _save.writer(target, node, list(leaves.values()), tensors, metadata, max_shard_bytes) as out:
            for i, name in track(list(enumerate(names)), "quantize", progress):
                if i not in plans:
                    _copy(file, leaves[name], out)
                    continue
                weight = file.read(name)
                tensor = _quantize.pack_leaf(name, weight, plans[i])
                out.write_leaf(leaves[name], tensor)
                squares.append(_report.squared_errors(tensor, weight) if errors else ([], 0.0))
                rows.append(_report.row_of(name, tensor, squares[-1]))
    return _report.report_of(rows, squares, "original")


def truncate(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    bits: int,
    *,
    max_shard_bytes: int | None = None,
    progress: bool | None = None,
) -> None:
    """Writes a file with the first bitlayers of another; reads no more of it than these.

    Args:
      source: what `pbjax.save` wrote.
      target: the file to write; structure and metadata are those of the source.
      bits: bitlayers to keep, 1..16; weights that store no more are kept as they are.
      max_shard_bytes: as in `pbjax.save`.
      progress: whether to show a progress bar; None shows one on a terminal.

    Raises:
      pbjax.files.FileError: a file that cannot be read.
      FileNotFoundError: no file.
      TypeError, ValueError: `bits` is no int in 1..16.

    Cost: one bitlayer of one weight at a time, on the host.
    """
    bits = _checks.integer("bits", bits, 1, contract.MAX_BITS, "argument of truncate")
    with Checkpoint(source) as file:
        leaves = dict(file.leaves)
        for name, leaf in file.leaves.items():
            if isinstance(leaf, _structure.Packed):
                leaves[name] = kept = leaf.truncated(bits)
                file.check_entries(leaf, kept.bits)
        tensors = {name: _tensors(file, leaf) for name, leaf in leaves.items()}
        node = _structure.with_leaves(file.node, leaves)
        with _save.writer(target, node, list(leaves.values()), tensors, file.metadata, max_shard_bytes) as out:
            for name in track(list(leaves), "truncate", progress):
                _copy(file, leaves[name], out)


def is_ours(path: str) -> bool:
    """Whether a file, or the index beside it, begins as `pbjax.save` begins it; a damaged beginning does not."""
    index = path if path.endswith(_layout.INDEX_SUFFIX) else path + _layout.INDEX_SUFFIX
    is_index = os.path.exists(index)
    with open(index if is_index else path, "rb") as file:
        text = file.read(100)
    return _layout.is_sealed(text, "metadata") if is_index else _layout.is_sealed(text[8:], _layout.METADATA)


def _resolve(path: str) -> str:
    """The file that a folder stands for."""
    if not os.path.isdir(path):
        return path
    for name in (f"model.safetensors{_layout.INDEX_SUFFIX}", "model.safetensors"):
        if os.path.exists(found := os.path.join(path, name)):
            return found
    raise FileNotFoundError(f"{path} holds neither model.safetensors nor model.safetensors{_layout.INDEX_SUFFIX}")


class _Floats:
    """A checkpoint of plain tensors, as Hugging Face's libraries write them, seen as a tree."""

    def __init__(self, path: str, rename: Mapping[str, Renaming]):
        self.path = path
        self._sources: dict[str, Source] = {}
        index = path if path.endswith(_layout.INDEX_SUFFIX) else path + _layout.INDEX_SUFFIX
        try:
            file_of = self._read_index(index) if os.path.exists(index) else {}
            if not file_of:
                self._sources[path] = Source(path)
                file_of = dict.fromkeys(self._sources[path].header.entries, path)
            self._rename(file_of, _paths.compile_patterns("rename", rename))
            self.node = _node_of(self._tensors)
        except BaseException:
            self.close()
            raise
        self.leaves: dict[str, _structure.Leaf] = {name: _structure.Array(name=name) for name in self._tensors}

    def _read_index(self, index: str) -> dict[str, str]:
        with open(index, "rb") as file:
            document = _layout.parse_json(file.read(_layout.MAX_HEADER_BYTES), index)
        weight_map = document.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise _layout.FileError(index, "an index must hold a weight_map")
        for name, shard in weight_map.items():
            if not _layout.is_plain_name(shard):
                raise _layout.FileError(index, f"files must lie beside the index, but got {str(shard)[:100]!r}", name)
            path = os.path.join(os.path.dirname(index), shard)
            if path not in self._sources:
                self._sources[path] = Source(path)
            if name not in self._sources[path].header.entries:
                raise _layout.FileError(path, "is not there, though the index lists it", name)
        return {name: os.path.join(os.path.dirname(index), shard) for name, shard in weight_map.items()}

    def _rename(self, file_of: Mapping[str, str], patterns: _paths.Patterns[Renaming]) -> None:
        _paths.check_matches("rename", patterns, file_of, "tensors of the checkpoint")
        self._tensors: dict[str, tuple[str, str, tuple[int, ...] | None]] = {}
        for name, file in file_of.items():
            renamed = _renamed(name, patterns)
            if renamed is None:
                continue
            path, axes = renamed
            rank = len(self._sources[file].header.entries[name].shape)
            if axes is not None and sorted(axes) != list(range(rank)):
                raise ValueError(f"`rename` must order all {rank} axes of {name}, but got {axes}.")
            if path in (_layout.PADDING, _layout.METADATA):
                raise ValueError(
                    f"`rename` must give each tensor a name that is not reserved, but {name} comes to {path!r}. Give "
                    "it another name, or None to leave it out."
                )
            if path in self._tensors:
                raise ValueError(f"`rename` must give each tensor a path of its own, but two come to {path}.")
            self._tensors[path] = file, name, axes

    def entry(self, name: str) -> _layout.Entry:
        """Dtype and shape of a tensor, with its axes in the order wanted."""
        file, tensor, axes = self._tensors[name]
        entry = self._sources[file].header.entries[tensor]
        return entry if axes is None else dataclasses.replace(entry, shape=tuple(entry.shape[axis] for axis in axes))

    def read(self, name: str) -> np.ndarray:
        """A tensor, with its axes in the order wanted."""
        file, tensor, axes = self._tensors[name]
        array = self._sources[file].read(tensor)
        return array if axes is None else array.transpose(axes)

    def close(self) -> None:
        for source in self._sources.values():
            source.close()

    def __enter__(self) -> _Floats:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _renamed(name: str, patterns: _paths.Patterns[Renaming]) -> tuple[str, tuple[int, ...] | None] | None:
    """Path and order of axes of a tensor, or None for one to leave out."""
    axes = None
    for pattern, replacement in patterns:
        if not pattern.search(name):
            continue
        match replacement:
            case None:
                return None
            case str(text):
                pass
            case (str(text), tuple(axes) | list(axes)) if all(type(axis) is int for axis in axes):
                axes = tuple(axes)
            case _:
                raise TypeError(
                    f"`rename` must hold text, (text, axes) or None, but got {replacement!r} for {pattern.pattern!r}."
                )
        try:
            name = pattern.sub(text, name, count=1)
        except (re.error, IndexError) as error:
            raise ValueError(f"`rename` must refer to groups of its pattern, but {text!r} does not: {error}.") from None
        break
    return "/".join(part for part in re.split(r"[./]", name) if part) or "value", axes


def _node_of(paths: Iterable[str]) -> list[Any]:
    """Nested dicts with an array at each path."""
    tree: dict[str, Any] = {}
    for path in paths:
        *folders, last = path.split("/")
        place = tree
        for folder in folders:
            if isinstance(place, dict):
                place = place.setdefault(folder, {})
        if not isinstance(place, dict) or last in place:
            raise ValueError(f"`rename` must not put tensors below a tensor, but {path} is, or has, one. Leave it out.")
        place[last] = path

    def node(value: Any) -> list[Any]:
        if isinstance(value, str):
            return ["array", value]
        return ["dict", [[key, node(item)] for key, item in value.items()]]

    return node(tree)


def _stand_in(file: Checkpoint | _Floats, leaf: _structure.Leaf) -> Any:
    """What planning has to know of a leaf: an array of its dtype and shape that takes no memory."""
    if isinstance(leaf, _structure.Packed):
        return BitTensor(None, None, None, **leaf.static)  # pyright: ignore[reportArgumentType]
    if isinstance(leaf, _structure.Array) and leaf.impl is None:
        entry = file.entry(leaf.name)
        return np.broadcast_to(np.zeros((), entry.dtype), entry.shape)
    return None


def _tensors(file: Checkpoint | _Floats, leaf: _structure.Leaf) -> _structure.Tensors:
    """The tensors of a leaf as the file has them."""
    return {name: (file.entry(name).dtype, file.entry(name).shape) for name in _structure.tensor_names(leaf)}


def _copy(file: Checkpoint | _Floats, leaf: _structure.Leaf, out: _save.Writer) -> None:
    """Writes a leaf as it is, with as many bitlayers as are still asked for."""
    for name in _structure.tensor_names(leaf):
        array = file.read(name)
        if isinstance(leaf, _structure.Packed) and name.endswith("/bitlayers"):
            array = np.minimum(array, leaf.bits)
        out.write(name, array)


def track(items: list[T], what: str, progress: bool | None) -> Iterable[T]:
    """Items, with a progress bar on standard error where it is wanted."""
    if not (sys.stderr.isatty() if progress is None else progress):
        return items
    return rich.progress.track(items, what, console=rich.console.Console(stderr=True))
