"""`BitTensor`: a weight as packed bitlayers, a pytree that JAX's transforms slice, shard and rebuild freely."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bit_matmul import contract
from pbjax import _checks, _format


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BitTensor:
    """A weight split into 1-bit bitlayers, most significant first, of which the first `bitlayers` are used.

    Invariants, with `stack = words.shape[:-3]`, `k = prod(packed_shape[i] for i in contract_axes)` and
    `n = prod(packed_shape[i] for i in output_axes)`:

        shape           == stack + packed_shape
        words           : uint32[*stack, bits, ceil(k / 32), n]     bit t of word j holds k index 32 * j + t
        scale           : float32[*stack, min(bits, 4), groups, n]  row b - 1 serves b bitlayers, the last all b >= 4
        groups          == 1 if group_size is None else ceil(k / group_size)
        bitlayers       : int32[*stack], each in 1..bits
        sorted(contract_axes + output_axes) == range(len(packed_shape))

    k and n run over their axes in the order in which `contract_axes` and `output_axes` name them, the last fastest.
    Stack axes (layers under `jax.lax.scan`, an ensemble under `jax.vmap`) come first in every leaf and are stored
    nowhere else, so that slicing the leaves slices the weight. Nothing is checked on construction, because pytrees
    are rebuilt around tracers, shardings and None; `check_bit_tensor` checks.

    Attributes:
      words: packed bitlayers.
      scale: scales of each group and output channel; trainable.
      bitlayers: how many bitlayers are used; dynamic, so changing it recompiles nothing.
      packed_shape: sizes of the packed axes in the weight's own order.
      contract_axes: packed axes that a product sums over.
      output_axes: packed axes that a product keeps.
      dtype: dtype of the weight that was quantized, and of what `pbjax.dequantize` returns.
      bits: number of bitlayers stored, 1..16.
      group_size: consecutive k that share a scale, a multiple of 32, or None for all of k.
      activation_bits: width of fixed-point activations in a product, 2..24, or None for float activations.
    """

    words: jax.Array
    scale: jax.Array
    bitlayers: jax.Array
    packed_shape: tuple[int, ...] = dataclasses.field(metadata=dict(static=True))
    contract_axes: tuple[int, ...] = dataclasses.field(metadata=dict(static=True))
    output_axes: tuple[int, ...] = dataclasses.field(metadata=dict(static=True))
    dtype: np.dtype = dataclasses.field(metadata=dict(static=True))
    bits: int = dataclasses.field(metadata=dict(static=True))
    group_size: int | None = dataclasses.field(metadata=dict(static=True))
    activation_bits: int | None = dataclasses.field(metadata=dict(static=True))

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Sizes of the leading axes, read off the words."""
        return tuple(self.words.shape[:-3])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that this stands for."""
        return self.stack_shape + self.packed_shape

    @property
    def ndim(self) -> int:
        """Rank of the weight that this stands for."""
        return len(self.shape)

    @property
    def contract_shape(self) -> tuple[int, ...]:
        """Sizes of the contracted axes, in the order of k."""
        return tuple(self.packed_shape[i] for i in self.contract_axes)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Sizes of the output axes, in the order of n."""
        return tuple(self.packed_shape[i] for i in self.output_axes)

    @property
    def k(self) -> int:
        """Length of the contraction."""
        return math.prod(self.contract_shape)

    @property
    def n(self) -> int:
        """Number of output channels."""
        return math.prod(self.output_shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the words and scales stored."""
        return 4 * (math.prod(self.words.shape) + math.prod(self.scale.shape))

    def replace(self, **changes: Any) -> BitTensor:
        """A copy with some fields changed, as `dataclasses.replace`."""
        return dataclasses.replace(self, **changes)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            f"{self!r} cannot be used as an array. Run the function that does so through `pbjax.quantized`, multiply "
            "with `pbjax.matmul`, or unpack it with `pbjax.dequantize`."
        )

    # What JAX, NumPy and Python ask for where an array is expected: without them, their own messages say less.
    __jax_array__ = __array__ = __getitem__ = __matmul__ = __rmatmul__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __neg__ = _refuse

    def __repr__(self) -> str:
        if not hasattr(self.words, "shape"):  # rebuilt around shardings, None, ...
            return f"BitTensor({self.words!r}, bits={self.bits}, packed_shape={self.packed_shape})"
        return (
            f"BitTensor({np.dtype(self.dtype).name}{list(self.shape)}, bits={self.bits}, "
            f"contract_axes={self.contract_axes}, group_size={self.group_size}, "
            f"activation_bits={self.activation_bits})"
        )


def is_bit_tensor(value: object) -> bool:
    """Whether a value is a BitTensor: the `is_leaf` of pytree functions."""
    return isinstance(value, BitTensor)


def check_any(leaves: list[Any]) -> None:
    """Raises ValueError unless some leaf of a `tree` is a BitTensor."""
    if not any(map(is_bit_tensor, leaves)):
        raise ValueError("`tree` must hold BitTensors, but it has none. Make them with `pbjax.quantize`.")


def pack_array(
    weight: jax.Array,
    *,
    contract_axes: tuple[int, ...],
    output_axes: tuple[int, ...],
    num_stack: int,
    bits: int,
    group_size: int | None,
    activation_bits: int | None,
    clip_bits: int | None,
    in_blocks: bool,
    layer_by_layer: bool,
) -> BitTensor:
    """Quantizes one array whose first `num_stack` axes are stacked; the other axes are numbered from there.

    `in_blocks` keeps intermediates small, for weights that lie on one device, and so does `layer_by_layer`, for stacks
    whose layers do not lie on different ones.
    """
    quantize = _format.quantize_in_blocks if in_blocks else _format.quantize
    stack_shape, packed_shape = weight.shape[:num_stack], weight.shape[num_stack:]
    k = math.prod(packed_shape[i] for i in contract_axes)

    def one(matrix):
        matrix = matrix.transpose(contract_axes + output_axes).reshape(k, -1)
        return quantize(matrix, bits, group_size, clip_bits)

    if num_stack == 0:
        words, scale = one(weight)
    else:  # one after the other, a stack needs no more memory for intermediates than one layer
        layers = functools.partial(jax.lax.map, one) if layer_by_layer else jax.vmap(one)
        words, scale = layers(weight.reshape(-1, *packed_shape))
        words, scale = (leaf.reshape(*stack_shape, *leaf.shape[1:]) for leaf in (words, scale))
    return BitTensor(
        words=words,
        scale=scale,
        bitlayers=jnp.full(stack_shape, bits, jnp.int32),
        packed_shape=packed_shape,
        contract_axes=contract_axes,
        output_axes=output_axes,
        dtype=np.dtype(weight.dtype),
        bits=bits,
        group_size=group_size,
        activation_bits=activation_bits,
    )


def unpack_array(tensor: BitTensor) -> jax.Array:
    """The weight that the bitlayers used stand for, in the tensor's shape and dtype."""

    def one(words, scale, bitlayers):
        matrix = _format.dequantize(words, scale, bitlayers, tensor.k, tensor.group_size)
        array = matrix.reshape(tensor.contract_shape + tensor.output_shape)
        return array.transpose(np.argsort(tensor.contract_axes + tensor.output_axes)).astype(tensor.dtype)

    for _ in tensor.stack_shape:
        one = jax.vmap(one)
    return one(tensor.words, tensor.scale, clip_bitlayers(tensor.bitlayers, tensor.bits))


def clip_bitlayers(bitlayers: jax.Array, bits: int) -> jax.Array:
    """Brings a run-time number of bitlayers into 1..bits; a traced value cannot raise."""
    bitlayers = jnp.asarray(bitlayers)
    if bitlayers.dtype.itemsize < 4:  # `bits` may be no value of a narrow type; a wide one is clipped before it is cut
        bitlayers = bitlayers.astype(jnp.int32)
    return jnp.clip(bitlayers, 1, bits).astype(jnp.int32)


def check_bitlayers(bitlayers: Any, bits: int, where: str) -> None:
    """Raises if a Python or NumPy number of bitlayers lies outside 1..bits, or if any is no integer.

    Args:
      bitlayers: Python or NumPy integers, or a JAX array, whose values may not be known and are not looked at.
      bits: number of bitlayers stored.
      where: the pytree path or argument, for the message.

    Raises:
      TypeError: not an integer type.
      ValueError: out of range.
    """
    is_number = isinstance(bitlayers, (int, np.integer)) and not isinstance(bitlayers, bool)
    if not (is_number or jnp.issubdtype(getattr(bitlayers, "dtype", object), jnp.integer)):
        raise TypeError(f"`bitlayers` must be an integer or an integer array, but got {bitlayers!r} ({where}).")
    _checks.native("bitlayers", bitlayers, where)
    if isinstance(bitlayers, (int, np.integer, np.ndarray)):
        values = np.asarray(bitlayers)
        if values.size and (values.min() < 1 or values.max() > bits):
            raise ValueError(
                f"`bitlayers` must lie in 1..{bits}, the bitlayers stored, but got {bitlayers} ({where}). "
                "Use fewer, or quantize to more bits."
            )


def checked(tensor: BitTensor, where: str) -> BitTensor:
    """The tensor, or inside `jax.shard_map` the part of it that a device has; raises if it breaks its invariants."""
    if jax.sharding.get_abstract_mesh().manual_axes:
        tensor = _shard(tensor)
    check_bit_tensor(tensor, where)
    return tensor


def _shard(tensor: BitTensor) -> BitTensor:
    """`packed_shape` as the leaves have it: `shard_map` cuts them, along k and n, and leaves static fields alone."""
    num_words, n = tensor.words.shape[-2:]
    shape = list(tensor.packed_shape)
    whole = (tensor.contract_axes, contract.num_words(tensor.k), num_words), (tensor.output_axes, tensor.n, n)
    for axes, size, part in whole:
        num_parts, rest = divmod(size, max(part, 1))
        first = next((axis for axis in axes if shape[axis] != 1), None)
        if num_parts > 1 and not rest and first is not None and shape[first] % num_parts == 0:
            shape[first] //= num_parts
    return tensor.replace(packed_shape=tuple(shape))


def check_bit_tensor(tensor: BitTensor, where: str) -> None:
    """Raises ValueError or TypeError if a BitTensor breaks its invariants; leaves that are no arrays pass."""
    if not all(hasattr(leaf, "shape") for leaf in (tensor.words, tensor.scale, tensor.bitlayers)):
        return
    for name, dtype in (("words", jnp.uint32), ("scale", jnp.float32), ("bitlayers", jnp.int32)):
        if getattr(tensor, name).dtype != dtype:
            raise TypeError(
                f"`{name}` must be {np.dtype(dtype).name}, but got {getattr(tensor, name).dtype} ({where}). "
                "Cast float leaves only: BitTensor leaves keep their dtypes."
            )
    groups = contract.num_groups(tensor.k, tensor.group_size)
    expected = {
        "words": (*tensor.stack_shape, tensor.bits, contract.num_words(tensor.k), tensor.n),
        "scale": (*tensor.stack_shape, min(tensor.bits, contract.NUM_SCALES), groups, tensor.n),
        "bitlayers": tensor.stack_shape,
    }
    for name, shape in expected.items():
        if getattr(tensor, name).shape != shape:
            raise ValueError(
                f"`{name}` must have shape {shape} for a weight of shape {tensor.shape} with {tensor.bits} bits, "
                f"but got {getattr(tensor, name).shape} ({where}). Build BitTensors with `pbjax.quantize`."
            )


# `jax.export` writes down the trees that a function takes and returns.


def _static_to_bytes(static: tuple[Any, ...]) -> bytes:
    names = [field.name for field in dataclasses.fields(BitTensor) if field.metadata.get("static")]
    fields = dict(zip(names, static, strict=True))
    return json.dumps({**fields, "dtype": np.dtype(fields["dtype"]).name}).encode()


def _static_from_bytes(data: bytes | bytearray) -> dict[str, Any]:
    static = json.loads(bytes(data))
    axes = {name: tuple(static[name]) for name in ("packed_shape", "contract_axes", "output_axes")}
    return {**static, **axes, "dtype": np.dtype(static["dtype"])}


def _from_children(aux_data: dict[str, Any], children: Sequence[Any]) -> BitTensor:
    return BitTensor(*children, **aux_data)


jax.export.register_pytree_node_serialization(
    BitTensor,
    serialized_name="pbjax.BitTensor",
    serialize_auxdata=_static_to_bytes,
    deserialize_auxdata=_static_from_bytes,
    from_children=_from_children,
)
