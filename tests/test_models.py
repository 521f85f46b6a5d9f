"""Whole unmodified models on bitlayers: what they give, that no weight is unpacked, and how much memory they take."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import pbjax
from tests.cases import normal

KEY = jax.random.key(0)
WIDTH = 384  # a kernel of it is larger than everything else in the models below
TOKENS = jnp.arange(4).reshape(1, 4)


class LinenMLP(nn.Module):
    dense: type[nn.Module] = nn.Dense

    @nn.compact
    def __call__(self, x):
        return self.dense(10)(nn.relu(self.dense(WIDTH)(nn.relu(self.dense(WIDTH)(x)))))


class NnxMLP(nnx.Module):
    def __init__(self, rngs):
        sizes = (WIDTH, WIDTH, WIDTH, 10)
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes)])

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


class LinenCNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (64, 128, 128):
            x = nn.Conv(features, (3, 3), strides=2, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        return nn.Dense(10)(x.mean((1, 2)))


class NnxCNN(nnx.Module):
    def __init__(self, rngs):
        sizes = (3, 64, 128, 128)
        pairs = list(itertools.pairwise(sizes))
        self.convs = nnx.List([nnx.Conv(a, b, (3, 3), strides=2, rngs=rngs) for a, b in pairs])
        self.norms = nnx.List([nnx.BatchNorm(b, use_running_average=True, rngs=rngs) for _, b in pairs])
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return self.head(x.mean((1, 2)))


class LanguageModel(nn.Module):
    """Tied embeddings around an LSTM."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(100, WIDTH)
        return embed.attend(nn.RNN(nn.OptimizedLSTMCell(WIDTH))(embed(tokens)))


class LinenBidirectional(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Bidirectional(nn.RNN(nn.LSTMCell(WIDTH)), nn.RNN(nn.LSTMCell(WIDTH)))(x)
        return nn.Dense(10)(x)


class NnxBidirectional(nnx.Module):
    def __init__(self, rngs):
        cells = [nnx.LSTMCell(WIDTH, WIDTH, rngs=rngs) for _ in range(2)]
        self.rnn = nnx.Bidirectional(*(nnx.RNN(cell, rngs=rngs) for cell in cells), rngs=rngs)
        self.head = nnx.Linear(2 * WIDTH, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(self.rnn(x))


class EncoderBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(y, y)
        return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x)))), None


class LinenEncoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(nn.remat(EncoderBlock), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return blocks()(x, None)[0]


class DecoderBlock(nnx.Module):
    def __init__(self, rngs):
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        mask = nnx.make_causal_mask(jnp.ones(x.shape[:2]))
        x = x + self.attention(self.norms[0](x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class NnxDecoder(nnx.Module):
    """Tied embeddings around stacked layers under `nnx.scan` and `nnx.remat`."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(100, WIDTH, rngs=rngs)
        self.blocks = nnx.vmap(DecoderBlock)(rngs.split(3))

    def __call__(self, tokens):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def layers(block, x):
            return block(x)

        return self.embed.attend(layers(self.blocks, self.embed(tokens)))


class CachedAttention(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(100, WIDTH)
        x = embed(tokens)
        return embed.attend(x + nn.MultiHeadDotProductAttention(num_heads=4, decode=True)(x, x))


def decode(params, cache, token):
    """Greedy tokens, one at a time, from a model with a cache of keys and values."""

    def step(state):
        i, token, cache, out = state
        logits, state = CachedAttention().apply({"params": params, "cache": cache}, token, mutable=["cache"])
        token = jnp.argmax(logits[:, -1:], -1)
        return i + 1, token, state["cache"], out.at[:, i].set(logits[:, 0])

    start = (0, token, cache, jnp.zeros((1, 6, 100)))
    return jax.lax.while_loop(lambda state: state[0] < 6, step, start)[-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A function of weights and inputs; `num_packed` weights of it are used by products."""

    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    num_packed: int


def linen(module, x, num_packed) -> Case:
    return Case(fn=module.apply, params=module.init(KEY, x), args=(x,), num_packed=num_packed)


def of_nnx(model, x, num_packed) -> Case:
    return Case(fn=lambda model, x: model(x), params=model(nnx.Rngs(0)), args=(x,), num_packed=num_packed)


def decoding() -> Case:
    variables = CachedAttention().init(KEY, jnp.ones((1, 6), jnp.int32))
    args = (variables["cache"], jnp.ones((1, 1), jnp.int32))
    return Case(fn=decode, params=variables["params"], args=args, num_packed=5)


def cases() -> dict[str, Callable[[], Case]]:
    row, image = normal(1, WIDTH), normal(1, 8, 8, 3)
    sequence = normal(1, 4, WIDTH)
    return {
        "linen_mlp": lambda: linen(LinenMLP(), row, 3),
        "nnx_mlp": lambda: of_nnx(NnxMLP, row, 3),
        "linen_cnn": lambda: linen(LinenCNN(), image, 4),
        "nnx_cnn": lambda: of_nnx(NnxCNN, image, 4),
        "lstm_language_model": lambda: linen(LanguageModel(), TOKENS, 9),
        "linen_bidirectional_lstm": lambda: linen(LinenBidirectional(), sequence, 17),
        "nnx_bidirectional_lstm": lambda: of_nnx(NnxBidirectional, sequence, 17),
        "linen_encoder": lambda: linen(LinenEncoder(), sequence, 6),
        "nnx_decoder": lambda: of_nnx(NnxDecoder, TOKENS, 7),
        "decode_loop": decoding,
    }


@pytest.mark.parametrize("name", cases())
def test_model(name):
    case = cases()[name]()
    qparams = pbjax.quantize(case.params, 4, fn=case.fn, args=case.args, activation_bits=24)
    tensors = [leaf for leaf in jax.tree.leaves(qparams, is_leaf=is_tensor) if is_tensor(leaf)]
    assert len(tensors) == case.num_packed

    report = pbjax.report(qparams, fn=case.fn, args=case.args)
    assert [row.dequantized_by for row in report.rows] == [()] * case.num_packed
    compiled = jax.jit(pbjax.quantized(case.fn)).lower(qparams, *case.args).compile()
    largest = max(4 * int(np.prod(tensor.packed_shape)) for tensor in tensors)
    assert compiled.memory_analysis().temp_size_in_bytes < largest

    actual, expected = compiled(qparams, *case.args), jax.jit(case.fn)(pbjax.dequantize(qparams), *case.args)
    assert np.isfinite(actual).all()
    # 24-bit activations: what is left is float32 rounding, through some ten layers.
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


def is_tensor(leaf):
    return isinstance(leaf, pbjax.BitTensor)


def num_products(compiled) -> Counter:
    """How often each kind of operation that a product consists of stands in a program."""
    return Counter(re.findall(r" (dot|while|convolution|custom-call|conditional|reduce)\(", compiled.as_text()))


@pytest.mark.parametrize("name", ["mlp", "lstm"])
def test_as_many_products_as_with_layers_of_its_own(name):
    """Running an unmodified model adds time to tracing and nothing to the program."""
    x = normal(1, 64)
    if name == "mlp":
        flaxs, ours, args = LinenMLP(), LinenMLP(pbjax.linen.Dense), (x,)
    else:
        flaxs, ours, args = nn.LSTMCell(64), pbjax.linen.LSTMCell(64), ((x, x), x)
    variables = flaxs.init(KEY, *args)
    qvariables = pbjax.quantize(variables, 4)
    compile_ = lambda fn: jax.jit(functools.partial(fn)).lower(qvariables, *args).compile()  # noqa: E731
    expected = num_products(compile_(ours.apply))
    assert expected.total() > 0
    assert num_products(compile_(pbjax.quantized(flaxs.apply))) == expected
