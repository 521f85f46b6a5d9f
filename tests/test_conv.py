"""Convolutions on bitlayers: products of patches with the packed kernel, in every shape that a convolution has."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import pbjax
from pbjax import _conv
from tests import cases
from tests.cases import normal

KEY = jax.random.key(0)

LAYERS = {
    "same": (nn.Conv(8, (3, 3)), (2, 7, 6, 4)),
    "valid_strides_dilation": (nn.Conv(8, (3, 2), strides=2, padding="VALID", kernel_dilation=2), (2, 9, 8, 4)),
    "explicit_padding": (nn.Conv(8, (3, 3), padding=((0, 2), (1, 0))), (2, 7, 6, 4)),
    "circular": (nn.Conv(8, (3,), padding="CIRCULAR"), (2, 9, 5)),
    "causal": (nn.Conv(8, (3,), padding="CAUSAL", kernel_dilation=2), (2, 9, 5)),
    "pointwise": (nn.Conv(8, (1, 1), strides=(2, 2)), (2, 7, 6, 40)),
    "patches": (nn.Conv(8, (4, 4), strides=(4, 4), padding="VALID"), (2, 9, 8, 3)),
    "three_dimensions": (nn.Conv(5, (2, 3, 2)), (3, 4, 5, 4)),
    "groups": (nn.Conv(8, (3, 3), feature_group_count=2), (2, 7, 6, 6)),
    "depthwise": (nn.Conv(12, (3, 3), feature_group_count=6), (2, 7, 6, 6)),
    "input_dilation": (nn.Conv(8, (3, 3), input_dilation=(2, 1), padding=((1, 2), (0, -1))), (2, 7, 6, 4)),
    "transpose": (nn.ConvTranspose(6, (3, 4), strides=(2, 2)), (2, 5, 6, 4)),
    "transpose_kernel": (nn.ConvTranspose(6, (3, 4), strides=(2, 1), transpose_kernel=True), (2, 5, 6, 4)),
    "transpose_circular": (nn.ConvTranspose(6, (3, 2), padding="CIRCULAR"), (2, 5, 6, 4)),
    "local": (nn.ConvLocal(6, (3, 2)), (2, 5, 4, 3)),
}


@pytest.fixture(autouse=True)
def reference(request):
    """Which backend multiplies makes no difference here, and the oracle compiles fastest."""
    with pbjax.use_backend("xla" if "large" in request.node.name else "reference"):
        yield


def assert_close(actual, expected, relative):
    assert actual.shape == expected.shape
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert np.isfinite(actual).all()
    assert np.abs(actual - expected).max() <= relative * np.abs(expected).max()


@pytest.mark.parametrize(
    ("name", "activation_bits"), [*((name, 24) for name in LAYERS), ("same", None), ("groups", None)]
)
def test_equals_the_convolution_with_the_dequantized_kernel(name, activation_bits):
    layer, shape = LAYERS[name]
    x = normal(*shape)
    variables = cases.jit_once(layer.init)(KEY, x)
    qvariables = pbjax.quantize(variables, 8, fn=layer.apply, args=(x,), activation_bits=activation_bits)
    qvariables = pbjax.with_bitlayers(qvariables, 5)
    # Warnings are errors: nothing is dequantized.
    actual, expected = cases.jit_once(
        lambda q, x: (pbjax.quantized(layer.apply)(q, x), layer.apply(pbjax.dequantize(q), x))
    )(qvariables, x)
    # At most 160 products of float32, or of activations with 2**-23 of the largest: their roundings add up.
    assert_close(actual, expected, 160 * 2**-23)


def patches_of(x, kernel_shape, **params):
    """The library's own patches, [batch, *space, *kernel space, features]; its order is features first."""
    *space, features = kernel_shape
    patches = lax.conv_general_dilated_patches(x, tuple(space), dimension_numbers=("NHWC", "HWIO", "NHWC"), **params)
    patches = patches.reshape(*patches.shape[:-1], features, *space)
    return jnp.moveaxis(patches, -3, -1)


@pytest.mark.parametrize(
    ("block_bytes", "params"),
    [
        (None, dict(window_strides=(1, 1), padding="SAME")),
        (None, dict(window_strides=(1, 2), padding=((2, 1), (0, 3)), lhs_dilation=(2, 1))),
        (1, dict(window_strides=(2, 1), padding="VALID", rhs_dilation=(1, 2))),
        (4000, dict(window_strides=(2, 1), padding="SAME")),  # two rows of one example at a time
        (15000, dict(window_strides=(2, 1), padding="SAME")),  # two examples at a time
    ],
)
def test_equals_matmul_of_patches_bit_for_bit(params, block_bytes, monkeypatch):
    x, kernel = normal(3, 9, 8, 5), normal(3, 3, 5, 7, seed=1)
    if block_bytes is not None:
        monkeypatch.setattr(_conv, "_BLOCK_BYTES", block_bytes)

    def convolve(kernel, x):
        return lax.conv_general_dilated(x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **params)

    tensor = pbjax.quantize(kernel, 8, fn=convolve, args=(x,), group_size=32)
    assert tensor.contract_axes == (0, 1, 2)
    expected = pbjax.matmul(patches_of(x, kernel.shape[:-1], **params), tensor)
    np.testing.assert_array_equal(jax.jit(pbjax.quantized(convolve))(tensor, x), expected)


def test_groups_are_products_of_their_own_bit_for_bit():
    x, kernel = normal(2, 6, 5, 6), normal(3, 3, 3, 8, seed=1)

    def convolve(kernel, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=2)

    def halves(kernel, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        parts = zip(jnp.split(x, 2, -1), jnp.split(kernel, 2, -1), strict=True)
        return jnp.concatenate(
            [lax.conv_general_dilated(a, w, (1, 1), "SAME", dimension_numbers=numbers) for a, w in parts], -1
        )

    tensor = pbjax.quantize(kernel, 8, fn=convolve, args=(x,))
    actual, expected = (jax.jit(pbjax.quantized(fn))(tensor, x) for fn in (convolve, halves))
    np.testing.assert_array_equal(actual, expected)


def test_any_order_of_dimensions_and_vmap():
    """Channels first, output features first in the kernel, mapped over examples and over a stack of kernels."""
    x, kernels = normal(2, 3, 4, 9), normal(2, 6, 4, 3, seed=1)

    def convolve(kernels, x):
        numbers = ("NCH", "OIH", "NCH")
        one = lambda w, x: lax.conv_general_dilated(x, w, (2,), [(1, 0)], dimension_numbers=numbers)  # noqa: E731
        return jax.vmap(one)(kernels, x)

    tensor = pbjax.quantize(kernels, 8, fn=convolve, args=(x,), activation_bits=24)
    assert (tensor.stack_shape, tensor.contract_axes) == ((2,), (1, 2))
    actual = jax.jit(pbjax.quantized(convolve))(tensor, x)
    assert_close(actual, convolve(pbjax.dequantize(tensor), x), 1e-5)
    tensor = pbjax.with_bitlayers(tensor, 3)
    sweep = jax.jit(jax.vmap(lambda b: pbjax.quantized(convolve)(pbjax.with_bitlayers(tensor, b), x)))(
        jnp.array([3, 8])
    )
    assert_close(sweep[0], convolve(pbjax.dequantize(tensor), x), 1e-5)


def test_patches_of_a_large_image_are_made_in_blocks():
    layer, x = nn.Conv(16, (5, 5)), jax.ShapeDtypeStruct((2, 384, 384, 16), jnp.float32)
    variables = layer.init(KEY, jnp.zeros((1, 5, 5, 16)))
    qvariables = pbjax.quantize(variables, 4, fn=layer.apply, args=(x,))
    compiled = jax.jit(pbjax.quantized(layer.apply)).lower(qvariables, x).compile()
    patch_bytes = 2 * 384 * 384 * 5 * 5 * 16 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < patch_bytes / 2


def test_what_has_no_form_is_said():
    x = normal(2, 6, 6, 4)
    layer = nn.Conv(4, (3, 3), mask=jnp.ones((3, 3, 4, 4)))
    variables = layer.init(KEY, x)
    qvariables = pbjax.quantize(variables, 8)
    with pytest.warns(pbjax.DequantizedWarning, match=r"params/kernel \(mul\)"):
        actual = pbjax.quantized(layer.apply)(qvariables, x)
    assert_close(actual, layer.apply(pbjax.dequantize(qvariables), x), 1e-5)

    def grouped(kernel, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers, batch_group_count=2)

    kernel = pbjax.quantize({"kernel": normal(3, 3, 4, 6)}, 8)["kernel"]
    with pytest.warns(pbjax.DequantizedWarning, match="conv_general_dilated"):
        actual = pbjax.quantized(grouped)(kernel, x)
    assert_close(actual, grouped(pbjax.dequantize(kernel), x), 1e-5)


def test_gradient_with_respect_to_the_image():
    layer, x = nn.Conv(5, (3, 3), strides=2), normal(2, 7, 6, 4)
    qvariables = pbjax.quantize(layer.init(KEY, x), 8, activation_bits=24)
    loss = lambda apply, variables: lambda x: jnp.sum(jnp.square(apply(variables, x)))  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = jax.jit(jax.grad(loss(pbjax.quantized(layer.apply), qvariables)))(x)
    assert_close(actual, jax.jit(jax.grad(loss(layer.apply, pbjax.dequantize(qvariables))))(x), 1e-4)
