"""Convolution with a weight that stays packed: patches of the input times the kernel, seen as a matrix.

Row and order of a product over patches: the kernel's axes (*space, input features) in the order in which the weight is
packed. Patches are gathered, not computed, so they hold the input's values to the last bit. For images whose patches
would take much memory, they are made in blocks of output rows; a kernel of size 1 needs none.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pbjax._views import Flipped, View

_BLOCK_BYTES = 16 * 2**20  # of patches; some thousand rows, so that unpacking the words once for each block is cheap


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Window:
    """One spatial axis of a convolution: output o reads input `o * stride + k * dilation` for each k of the kernel."""

    size: int
    stride: int
    dilation: int
    outputs: int
    flipped: bool

    def inputs(self, outputs: int) -> int:
        """How many inputs that many consecutive outputs read."""
        return (outputs - 1) * self.stride + (self.size - 1) * self.dilation + 1


def convolve(x: jax.Array, kernel: View | Flipped, params: dict[str, Any], out_dtype: np.dtype) -> jax.Array | None:
    """`lax.conv_general_dilated` of an array with a kernel that stays packed.

    With fixed-point activations each patch (of each feature group) is a row with a step of its own.

    Args:
      x: the input.
      kernel: the kernel; `lax.conv_transpose` may flip its spatial axes.
      params: parameters of the primitive.
      out_dtype: dtype of the result.

    Returns:
      The output of the convolution, or None where it has no form on bitlayers: a `batch_group_count`, which only
      derivatives with respect to kernels have, a flip of feature axes, and dtypes other than floating ones.
    """
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    kernel, flipped = (kernel.view, kernel.dims) if isinstance(kernel, Flipped) else (kernel, ())
    if params["batch_group_count"] != 1 or not set(flipped) <= set(rhs_spec[2:]):
        return None
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    batch_dim, feature_dim, *space = lhs_spec
    x = x.transpose((batch_dim, *space, feature_dim))
    out_channels, in_channels, *kernel_space = rhs_spec
    edges = zip(params["padding"], params["lhs_dilation"], strict=True)
    padding = [(0, 0, 0), *((low, high, dilation - 1) for (low, high), dilation in edges), (0, 0, 0)]
    x = lax.pad(x, jnp.zeros((), x.dtype), padding)
    windows = []
    for size, dim, stride, dilation in zip(
        x.shape[1:-1], kernel_space, params["window_strides"], params["rhs_dilation"], strict=True
    ):
        width = kernel.shape[dim]
        outputs = max(0, (size - (width - 1) * dilation - 1) // stride + 1)
        windows.append(_Window(size=width, stride=stride, dilation=dilation, outputs=outputs, flipped=dim in flipped))
    if 0 in x.shape or any(window.outputs == 0 for window in windows):
        return None
    groups = params["feature_group_count"]
    matrix = kernel.transpose((*kernel_space, in_channels, out_channels))
    if groups > 1:  # [*space, input of a group, groups, output of a group]
        matrix = matrix.reshape((*matrix.shape[:-1], groups, matrix.shape[-1] // groups))
        if matrix is None:
            return None
    y = _in_blocks(x, matrix, windows, groups, out_dtype)  # [batch, *space, features]
    if y is None:
        return None
    order = [out_spec.index(i) for i in range(y.ndim)]  # out_spec is (batch, features, *space)
    return y.transpose([(0, y.ndim - 1, *range(1, y.ndim - 1))[i] for i in order])


def _in_blocks(
    x: jax.Array, matrix: View, windows: list[_Window], groups: int, out_dtype: np.dtype
) -> jax.Array | None:
    """As `_product`, with no more patches at once than fill _BLOCK_BYTES, or one row of outputs of one example."""
    patch_bytes = 4 * x.shape[-1] * math.prod(window.size for window in windows)
    if all(window.size == 1 for window in windows):
        patch_bytes = 0  # nothing is copied
    row_bytes = patch_bytes * math.prod(window.outputs for window in windows[1:])
    first, rest = windows[0], windows[1:]
    image_bytes = row_bytes * first.outputs
    if image_bytes * x.shape[0] <= _BLOCK_BYTES:
        return _product(x, matrix, windows, groups, out_dtype)
    rows = min(first.outputs, max(1, _BLOCK_BYTES // row_bytes))
    blocks = math.ceil(first.outputs / rows)
    missing = first.inputs(blocks * rows) - x.shape[1]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, max(0, missing), 0), *[(0, 0, 0)] * (x.ndim - 2)])
    windows = [dataclasses.replace(first, outputs=rows), *rest]

    def image(x):
        def block(start):
            part = lax.dynamic_slice_in_dim(x, start, first.inputs(rows), axis=0)
            y = _product(part[None], matrix, windows, groups, out_dtype)
            return None if y is None else y[0]

        y = lax.map(block, jnp.arange(blocks, dtype=jnp.int32) * (rows * first.stride))
        return None if y is None else y.reshape(blocks * rows, *y.shape[2:])[: first.outputs]

    return lax.map(image, x, batch_size=max(1, _BLOCK_BYTES // (row_bytes * rows)))


def _product(x: jax.Array, matrix: View, windows: list[_Window], groups: int, out_dtype: np.dtype) -> jax.Array | None:
    """[batch, *inputs, features] to [batch, *outputs, features]; None where the weight's packing does not allow it."""
    rank = len(windows)
    patches = x
    for i, window in reversed(list(enumerate(windows, 1))):
        patches = _unfold(patches, i, window)
    # [batch, outputs, size, outputs, size, .., features]
    order = (0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1)
    patches = patches.transpose(order)
    space = tuple(range(1 + rank, 1 + 2 * rank))
    if groups == 1:
        x_dims, dims = ((*space, 1 + 2 * rank), ()), (tuple(range(rank + 1)), ())
        return matrix.dot(patches, x_dims, dims, out_dtype)
    patches = patches.reshape((*patches.shape[:-1], groups, -1))
    x_dims, dims = ((*space, 2 + 2 * rank), (1 + 2 * rank,)), (tuple(range(rank + 1)), (rank + 1,))
    y = matrix.dot(patches, x_dims, dims, out_dtype)
    return None if y is None else jnp.moveaxis(y, 0, -2).reshape((*y.shape[1:-1], -1))


def _unfold(x: jax.Array, axis: int, window: _Window) -> jax.Array:
    """One axis of inputs as two, (outputs, size of the kernel); inputs behind the last that is read do not matter."""
    if window.size == 1:
        part = lax.slice_in_dim(x, 0, window.inputs(window.outputs), window.stride, axis)
        return jnp.expand_dims(part, axis + 1)
    if window.stride == window.size and window.dilation == 1:  # windows that do not overlap
        part = lax.slice_in_dim(x, 0, window.inputs(window.outputs), 1, axis)
        unfolded = part.reshape((*x.shape[:axis], window.outputs, window.size, *x.shape[axis + 1 :]))
        return jnp.flip(unfolded, axis + 1) if window.flipped else unfolded
    offsets = np.arange(window.size) * window.dilation
    indices = np.arange(window.outputs)[:, None] * window.stride + (offsets[::-1] if window.flipped else offsets)
    return jnp.take(x, indices, axis=axis, mode="clip")
