"""What bitlayers are compared with: other forms of the linear layers of a model, each a module in their place.

The number format of the PrecisionBatching paper is here too, as a reference: it computes the same numbers as that
format would, in float32 and at its speed.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx


class Bfloat16Linear(nnx.Module):
    """Weights and activations in bfloat16, sums in float32."""

    def __init__(self, layer: nnx.Linear):
        self.kernel = nnx.Param(layer.kernel[...].astype(jnp.bfloat16))
        self.bias = layer.bias

    def __call__(self, x):
        x = x.astype(jnp.bfloat16)
        return _add(jnp.dot(x, self.kernel[...], preferred_element_type=jnp.float32), self.bias)


class Int8Linear(nnx.Module):
    """int8 weights with a scale for each channel; activations become int8 row by row, by their largest magnitude."""

    def __init__(self, layer: nnx.Linear):
        kernel = layer.kernel[...]
        scale = jnp.abs(kernel).max(axis=0, keepdims=True) / 127
        self.kernel = nnx.Param(jnp.rint(kernel / scale).astype(jnp.int8))
        self.scale = nnx.Param(scale)
        self.bias = layer.bias

    def __call__(self, x):
        step = jnp.maximum(jnp.abs(x).max(axis=-1, keepdims=True), 1e-30) / 127
        codes = jnp.rint(x / step).astype(jnp.int8)
        sums = jnp.dot(codes, self.kernel[...], preferred_element_type=jnp.int32)
        return _add(sums.astype(jnp.float32) * step * self.scale[...], self.bias)


class OriginalLinear(nnx.Module):
    """The paper's format: n bits of magnitude and one of sign over a step that is a power of two for the whole weight.

    The largest magnitude uses at most half of the codes, and none of them is 0. Activations, if they are not floats,
    are fixed-point numbers with a step of 1/64 whatever their size, cut to 8 bits of two's complement: what lies
    outside of -2..2 wraps around. After the authors' implementation, github.com/precisionbatching/pbatch.
    """

    def __init__(self, layer: nnx.Linear, bits: int, activation_bits: int | None):
        kernel = layer.kernel[...]
        step = 2.0 ** (math.ceil(math.log2(float(jnp.abs(kernel).max()))) + 1 - bits)
        magnitude = jnp.clip(jnp.rint(jnp.abs(kernel) / step), 1, max(2**bits - 1, 1))
        self.kernel = nnx.Param(jnp.sign(kernel) * magnitude * step)
        self.bias = layer.bias
        self.activation_bits = activation_bits

    def __call__(self, x):
        if self.activation_bits is not None:
            half = 2 ** (self.activation_bits - 1)
            x = (jnp.mod(jnp.trunc(x * 64) + half, 2 * half) - half) / 64
        return _add(jnp.dot(x, self.kernel[...]), self.bias)


def original_bytes(model: nnx.Module, bits: int) -> int:
    """Bytes of a model in the paper's format: `bits` + 1 bitlayers of each weight, 32 inputs to a word."""
    total = model_bytes(model)
    for _, layer in nnx.iter_graph(model):
        if isinstance(layer, nnx.Linear):
            k, n = layer.kernel.shape
            total += 4 * (bits + 1) * math.ceil(k / 32) * n - layer.kernel.nbytes
    return total


def model_bytes(model: nnx.Module) -> int:
    """Bytes of all parameters; int4 ones take half a byte each."""
    leaves = jax.tree.leaves(nnx.state(model))
    return sum(math.ceil(leaf.size * (0.5 if leaf.dtype == jnp.int4 else leaf.dtype.itemsize)) for leaf in leaves)


def _add(y: jax.Array, bias: nnx.Param | None) -> jax.Array:
    return y if bias is None else y + bias[...]


def replace_linears(model: nnx.Module, make: Callable[[nnx.Linear], nnx.Module]) -> nnx.Module:
    """A copy of a model with another module in place of each linear layer."""
    model = nnx.clone(model)
    for _, module in list(nnx.iter_graph(model)):
        if isinstance(module, nnx.Module):
            for name, layer in list(vars(module).items()):
                if isinstance(layer, nnx.Linear):
                    setattr(module, name, make(layer))
    return model


def qwix_linear(layer: nnx.Linear, weight_type: str) -> nnx.Module:
    """A linear layer quantized by qwix: weights of a type, activations in int8."""
    import qwix

    rule = qwix.QuantizationRule(module_path=".*", weight_qtype=weight_type, act_qtype="int8")
    return qwix.quantize_model(layer, qwix.PtqProvider([rule]), jnp.zeros((1, layer.in_features)))


def baselines(model: nnx.Module) -> dict[str, nnx.Module | str]:
    """Models to compare with by name, or why there is none."""
    found: dict[str, nnx.Module | str] = {
        "float32": model,
        "bfloat16": replace_linears(model, Bfloat16Linear),
        "int8 (XLA)": replace_linears(model, Int8Linear),
    }
    for weight_type in ("int8", "int4"):
        if importlib.util.find_spec("qwix") is None:
            found[f"{weight_type} (qwix)"] = "qwix is not installed"
        else:
            found[f"{weight_type} (qwix)"] = replace_linears(
                model, lambda layer, weight_type=weight_type: qwix_linear(layer, weight_type)
            )
    return found
