"""`pbjax.matmul`: the product of an array with a BitTensor."""

from __future__ import annotations

import math
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from pallas_kernels._compat import varying_axes
from pbjax import _bit_tensor, _checks, _partition, _product
from pbjax._bit_tensor import BitTensor
from pbjax._sharding import check_cut


def matmul(
    x: ArrayLike,
    w: BitTensor,
    *,
    activation_bits: int | EllipsisType | None = ...,
    bitlayers: ArrayLike | None = None,
    backend: str | None = None,
    preferred_element_type: DTypeLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """Multiplies activations with a weight stored as bitlayers: y = x . w_b over the weight's contracted axes.

    With fixed-point activations (the default) each row is quantized to q = round_half_even(x / t),
    t = max|x| / (2**(A-1) - 1), where x / t is computed in float32 (at A = 24 q may be off by one), and

        y = (t * scale_b) * 2**-b * sum_k q * (2 * c_b - (2**b - 1)),

    whose integers are exact: the result is the same to the last bit on every backend, for any number of rows, jitted
    or not. With float activations the sum runs in float32 in an order that the backend chooses. A row that holds a
    NaN or an infinity gives NaN in that row and no other. Rows whose magnitudes all lie below 2**-100 keep the step of
    2**-100, and so lose precision.

    `vmap` over `x` or the number of bitlayers folds into rows: with few rows a sweep over all numbers of bitlayers
    is one pass over the words, with many it takes a product for each number.
    The reverse-mode derivative goes through the dequantized weight, with respect to `x` and to `w.scale`.

    Args:
      x: float[..., *contract_shape]. Computed in float32 (fixed point) or as it is with float32 accumulation (float).
      w: the weight, without stack axes (`jax.lax.scan` or `jax.vmap` takes those off).
      activation_bits: A, 2..24, or None for float activations; default `...` is the weight's own.
      bitlayers: int, or int array broadcastable to the leading axes of `x` (one per row). Python and NumPy integers
        must lie in 1..w.bits; JAX arrays, whose values may not be known, are clipped to it. Default None is the
        weight's own.
      backend: a name, to run there or raise; default None chooses (see `pbjax.select_backend`).
      preferred_element_type: dtype of the result; default is the promotion of x.dtype and w.dtype.
      axis_name: inside `jax.shard_map`, the mesh axes over which k is cut, in whole words of 32 and whole groups: each
        device gives its part of `x` and of `w`, and gets the product over all of k. With fixed-point activations it
        has the bits of the unsharded product: the largest |x| of each row is that of all parts, and integers are
        added. A weight with one scale per output channel gives it to every device.

    Returns:
      float[..., *output_shape].

    Raises:
      TypeError: `w` is no BitTensor, `x` is not of a real floating dtype, or `bitlayers` is not of an integer one.
      ValueError: shapes do not agree, a width or number of bitlayers is out of range, an unknown backend.
      Unsupported: the backend asked for cannot run the problem.

    Cost: reads ceil(k / 32) * n * 4 bytes for each bitlayer in use, and nothing of the others.

    References:
      PrecisionBatching: Lam, Yedidia, Banbury, Reddi, arXiv 2003.00822.

    Example:
      >>> w = pbjax.quantize({"kernel": jnp.eye(4)}, bits=8)["kernel"]
      >>> pbjax.matmul(jnp.ones((2, 4)), w).shape
      (2, 4)
    """
    if not isinstance(w, BitTensor):
        raise TypeError(f"`w` must be a BitTensor, but got {type(w).__name__}. Make one with `pbjax.quantize`.")
    w = _bit_tensor.checked(w, "argument `w` of matmul")
    x = _as_array(x)
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize < 2:
        raise TypeError(f"`x` must be of a real floating dtype, but got {x.dtype}. Cast it first.")
    if w.stack_shape:
        raise ValueError(
            f"`w` must have no stack axes in a product, but got stack shape {w.stack_shape}. "
            "Map over them with `jax.vmap` or `jax.lax.scan`."
        )
    num_contract = len(w.contract_axes)
    rows_shape = x.shape[: x.ndim - num_contract]
    if x.ndim < num_contract or x.shape[x.ndim - num_contract :] != w.contract_shape:
        raise ValueError(
            f"`x` must end in the contracted shape {w.contract_shape} of `w`, but got shape {x.shape}. "
            f"`w` stands for a weight of shape {w.shape}."
        )
    if activation_bits is ...:
        activation_bits = w.activation_bits
    activation_bits = _checks.activation_bits(activation_bits, "argument of matmul")
    out_dtype = _result_dtype(preferred_element_type, x.dtype, w.dtype)
    m = math.prod(rows_shape)
    axes = _mesh_axes(axis_name)
    if axes:
        _check_shard(w, axes)

    def multiply(x, w, counts):
        if x.dtype.itemsize > 4:  # here, where derivatives go through it, and not where 64 bits are switched off
            x = x.astype(jnp.float32)
        y = _product.product(
            x.reshape(m, w.k),
            w.words,
            w.scale,
            counts.reshape(m),
            group_size=w.group_size,
            activation_bits=activation_bits,
            backend=backend,
            axes=axes,
        )
        return y.reshape(rows_shape + w.output_shape).astype(out_dtype)

    counts = _row_counts(w.bitlayers if bitlayers is None else bitlayers, w.bits, rows_shape)
    return _partition.in_explicit_mesh(multiply, x, w, counts)


def _mesh_axes(axis_name: Any) -> tuple[str, ...]:
    axes = () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else axis_name
    known = jax.sharding.get_abstract_mesh().manual_axes
    if not isinstance(axes, (tuple, list)) or not all(axis in known for axis in axes):
        raise ValueError(
            f"`axis_name` must name axes of the mesh of a `jax.shard_map` around the product, but got {axis_name!r} "
            f"where these are {tuple(known)}. Outside of one, a product is cut as its weight is, by itself."
        )
    return tuple(axes)


def _check_shard(w: BitTensor, axes: tuple[str, ...]) -> None:
    """Raises ValueError unless `w` can be the shard over k of a weight."""
    num_shards = lax.axis_size(axes)
    check_cut(f"`w`, cut over k along {axes}", w.k * num_shards, w.group_size, num_shards)
    if w.group_size is None and (varying := varying_axes(w.scale).intersection(axes)):
        raise ValueError(
            f"`w.scale` must be the same on all devices that share k, but it varies over {tuple(sorted(varying))}. "
            "Quantize the whole weight and cut its words, or give it groups."
        )


def _as_array(x: ArrayLike) -> jax.Array:
    _checks.native("x", x, "argument of matmul")
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError) as error:
        kind = f"{type(x).__name__} of {x.dtype}" if isinstance(x, np.ndarray) else type(x).__name__
        raise TypeError(f"`x` must be an array that JAX can hold, but got {kind}: {error}") from error


def _result_dtype(preferred: DTypeLike | None, x: np.dtype, w: np.dtype) -> np.dtype:
    if preferred is None:
        try:
            return jnp.promote_types(x, w)
        except jax.dtypes.TypePromotionError as error:
            raise type(error)(
                f"`x` and `w` must have dtypes that promote, but got {x} and {w}. Cast `x`, or give "
                "`preferred_element_type`."
            ) from error
    try:
        dtype = jnp.dtype(preferred)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`preferred_element_type` must be a floating dtype, but got {preferred!r}.")
    return dtype


def _row_counts(bitlayers: ArrayLike, bits: int, rows_shape: tuple[int, ...]) -> jax.Array:
    """The number of bitlayers of each row: int32[*rows_shape] in 1..bits."""
    _bit_tensor.check_bitlayers(bitlayers, bits, "argument of matmul")
    counts = _bit_tensor.clip_bitlayers(jnp.asarray(bitlayers), bits)
    shape = counts.shape
    padded = (1,) * (len(rows_shape) - len(shape)) + shape
    if len(shape) > len(rows_shape) or any(a not in (1, b) for a, b in zip(padded, rows_shape, strict=True)):
        raise ValueError(
            f"`bitlayers` must broadcast to the leading axes {rows_shape} of `x`, but got shape {shape}. "
            "Give one number for all, or one for each row."
        )
    return jnp.broadcast_to(counts.reshape(padded), rows_shape)
