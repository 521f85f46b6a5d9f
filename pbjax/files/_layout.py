"""The file format: safetensors, ordered by bitlayers, under a header that vouches for all that follows.

A file is a safetensors file: 8 bytes with the length of the header, the header (JSON), the tensors' bytes. In it

- a BitTensor at `path` is the tensors `path/bitlayers`, int32[*stack], and for each bitlayer i `path/words/i`,
  uint32[*stack, ceil(k / 32), n], and for the first four `path/scale/i`, float32[*stack, groups, n]. Other leaves are
  tensors of their own;
- other leaves come first, then the first bitlayer of every weight, the second of every weight, and so on: the first b
  bitlayers of the whole model are one run of bytes from the start of the file, whatever axes are stacked;
- the metadata begins with the version of this format and the CRC-32 of all of the header that follows it. What follows
  holds the structure of the tree and a CRC-32 of each tensor, padding among them, so every byte is vouched for, and
  each bitlayer can be checked without reading the next. `load` checks what it reads, `verify` all, padding too.

Of several files (`max_shard_bytes`) each is such a file, later bitlayers in later files, and `NAME.index.json` beside
them tells which tensor is where, as Hugging Face's libraries write it, with the structure and the files' own checksums.

CRC-32 finds damage, not forgery: who can change a file can change its checksums.

References:
  safetensors, the format: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, TypeVar

import jax.numpy as jnp
import numpy as np

T = TypeVar("T", dict, list)

FORMAT_VERSION = 1
PADDING = "__padding__"  # a tensor without meaning that keeps those behind it aligned
METADATA = "__metadata__"  # the key that safetensors reserves
INDEX_SUFFIX = ".index.json"

MAX_HEADER_BYTES = 100_000_000  # as the safetensors library has it
_MAX_RANK = 32
_MAX_AXIS = 2**62
_ALIGNMENT = 8

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "F8_E8M0": np.dtype(jnp.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(jnp.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(jnp.float8_e5m2fnuz),
    "C64": np.dtype(np.complex64),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class FileError(ValueError):
    """A file that cannot be read: damaged, cut short, of a later version, or no file of this format.

    Attributes:
      path: the file.
      tensor: the tensor concerned, or None for the file as a whole.
      reason: what is wrong.
    """

    def __init__(self, path: str, reason: str, tensor: str | None = None):
        super().__init__(f"{path}: {reason}" if tensor is None else f"{path}: tensor {tensor!r}: {reason}")
        self.path, self.tensor, self.reason = path, tensor, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.reason, self.tensor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a file: its dtype and shape, and where its bytes begin and end, counted behind the header."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """What a safetensors file says of itself.

    Attributes:
      entries: the tensors by name, in the order of their bytes.
      metadata: free text by key.
      text: the header as it stands in the file.
    """

    entries: dict[str, Entry]
    metadata: dict[str, str]
    text: bytes

    @property
    def start(self) -> int:
        """Where the tensors' bytes start."""
        return 8 + len(self.text)


def lay_out(tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]]) -> dict[str, Entry]:
    """Places for tensors one after the other, each aligned to its dtype."""
    entries: dict[str, Entry] = {}
    offset = 0
    for name, dtype, shape in tensors:
        if gap := -offset % dtype.itemsize:
            entries[PADDING] = Entry(dtype=np.dtype(np.uint8), shape=(gap,), begin=offset, end=offset + gap)
            offset += gap
        size = math.prod(shape) * dtype.itemsize
        entries[name] = Entry(dtype=dtype, shape=shape, begin=offset, end=offset + size)
        offset += size
    return entries


def header_bytes(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """The sealed header of a file, with the length before it."""
    table = {
        name: {"dtype": DTYPE_NAMES[e.dtype], "shape": e.shape, "data_offsets": (e.begin, e.end)}
        for name, e in entries.items()
    }
    text = seal({METADATA: metadata, **table})
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(
            f"a header must not exceed {MAX_HEADER_BYTES} bytes, but got {len(text)}. Save the tree in parts."
        )
    return len(text).to_bytes(8, "little") + text


def seal(document: Mapping[str, Any]) -> bytes:
    """JSON of a document whose first value, a dict, gets the version and the checksum of what follows."""
    (first, metadata), *rest = document.items()
    metadata = {"pbjax.version": str(FORMAT_VERSION), "pbjax.checksum": "0" * 8, **metadata}
    text = json.dumps({first: metadata, **dict(rest)}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    end = _seal_pattern(first).match(text).end()  # type: ignore[union-attr]
    return text[: end - 8] + checksum(text[end:]).encode() + text[end:]


def check_seal(text: bytes, first: str, path: str) -> str:
    """The checksum of a sealed JSON text; raises FileError where the text is not what was sealed."""
    match = _seal_pattern(first).match(text)
    if match is None:
        raise FileError(path, "not written by pbjax, or damaged at its start; float weights are read by `convert`")
    version = int(match[1])
    if version != FORMAT_VERSION:
        raise FileError(
            path, f"format version {version}, but this pbjax reads version {FORMAT_VERSION}. Use a newer pbjax."
        )
    if checksum(text[match.end() :]) != match[2].decode():
        raise FileError(path, "the header is damaged: its checksum differs")
    return match[2].decode()


def is_sealed(text: bytes, first: str) -> bool:
    """Whether a text begins as `seal` begins it."""
    return _seal_pattern(first).match(text) is not None


def is_plain_name(name: Any) -> bool:
    """Whether a value is the name of a file in the same folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and not re.search(r"[/\\\0]", name)


def _seal_pattern(first: str) -> re.Pattern[bytes]:
    pattern = r'\{"%s":\{"pbjax\.version":"([0-9]{1,9})","pbjax\.checksum":"([0-9a-f]{8})'
    return re.compile((pattern % re.escape(first)).encode())


def checksum(data: bytes | memoryview, before: int = 0) -> str:
    """CRC-32 as 8 digits."""
    return f"{zlib.crc32(data, before):08x}"


def bytes_of(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, as they stand in a file: little-endian, as JAX has it everywhere."""
    return array.reshape(-1).view(np.uint8).data


def read_header(file: BinaryIO, size: int, path: str) -> Header:
    """Reads and checks the header of any safetensors file.

    Every number is compared with the size of the file before anything is allocated.

    Args:
      file: unbuffered, at its start.
      size: bytes of the file.
      path: for messages.

    Raises:
      FileError: not a safetensors file, or a header that contradicts itself or the size of the file.
    """
    prefix = file.read(8)
    if len(prefix) < 8:
        raise FileError(path, f"must begin with the 8 bytes of a header's length, but has {len(prefix)}")
    length = int.from_bytes(prefix, "little")
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise FileError(path, f"its header should have {length} bytes, but the file has {size}: cut short, or damaged")
    text = read_exactly(file, length, path)
    document = parse_json(text, path)
    metadata = document.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FileError(path, "its metadata is no table of text")
    entries = {name: _entry(value, path, name) for name, value in document.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    offset = 0
    for name, entry in entries.items():
        if entry.begin != offset:
            raise FileError(path, f"begins at byte {entry.begin}, but the one before ends at {offset}", name)
        offset = entry.end
    if offset != size - 8 - length:
        raise FileError(
            path, f"should hold {offset} bytes behind its header, but has {size - 8 - length}: cut short, or damaged"
        )
    return Header(entries=entries, metadata=metadata, text=text)


def _entry(value: Any, path: str, name: str) -> Entry:
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if len(value) == 3:
            pass
        case _:
            raise FileError(path, "its entry must hold dtype, shape and data_offsets", name)
    if dtype not in DTYPES:
        raise FileError(path, f"unknown dtype {dtype[:40]!r}", name)
    if not all(type(i) is int and 0 <= i <= _MAX_AXIS for i in (*shape, begin, end)) or len(shape) > _MAX_RANK:
        raise FileError(path, "its shape or its offsets are no sensible integers", name)
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != expected:
        raise FileError(path, f"{dtype}{shape} takes {expected} bytes, but got {end - begin}", name)
    if expected == 0 and any(i >= 2**31 for i in shape):
        raise FileError(path, f"an empty tensor of absurd shape {shape}", name)
    return Entry(dtype=DTYPES[dtype], shape=tuple(shape), begin=begin, end=end)


def parse_json(text: bytes, path: str, kind: type[T] = dict) -> T:
    """JSON without repeated keys, of the kind expected: an object or a list."""
    try:
        document = json.loads(text, object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        raise FileError(path, f"its header is no JSON: {str(error)[:200]}") from None
    if not isinstance(document, kind):
        raise FileError(path, f"its header must hold a JSON {kind.__name__}, but has {type(document).__name__}")
    return document


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        raise ValueError("a key occurs twice")
    return document


def read_exactly(file: BinaryIO, length: int, path: str, tensor: str | None = None) -> bytes:
    """The next bytes of a file, all of them."""
    data = bytearray(length)
    read_into(file, memoryview(data), path, tensor)
    return bytes(data)


def read_into(file: BinaryIO, target: memoryview, path: str, tensor: str | None = None) -> None:
    """Fills a buffer from a file; a read may come back with less than was asked for."""
    while target:
        count = file.readinto(target)  # type: ignore[attr-defined]
        if not count:
            raise FileError(path, f"ends {len(target)} bytes too early", tensor)
        target = target[count:]
