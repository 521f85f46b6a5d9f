"""Unmodified models that the tests run on bitlayers: Linen, NNX and plain JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from tests.cases import normal

KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A function of parameters and inputs.

    `layouts` are (stack shape, contract axes) of the BitTensors that `quantize(fn=)` makes of it, in the order of the
    leaves; `as_floats` are the primitives that need a weight as floats.
    """

    name: str
    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    layouts: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    as_floats: tuple[str, ...] = ()


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(48)(x)))


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3))(x)))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


class TiedEmbedding(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(50, 16)
        return embed.attend(nn.Dense(16)(embed(tokens)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(32)(nn.relu(nn.Dense(16)(x))), None


class ScannedBlocks(nn.Module):
    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return blocks()(x, None)[0]


class NnxMLP(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(32, 48, rngs=rngs)
        self.second = nnx.Linear(48, 10, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


def _linen(name: str, module: nn.Module, x: jax.Array, layouts, as_floats=()) -> Model:
    params = module.init(KEY, x)
    return Model(name=name, fn=module.apply, params=params, args=(x,), layouts=layouts, as_floats=as_floats)


def _plain(name: str, fn, weight_shape, x_shape, layout, as_floats=()) -> Model:
    params = {"w": normal(*weight_shape) / 4}
    x = normal(*x_shape, seed=1)
    return Model(name=name, fn=fn, params=params, args=(x,), layouts=(layout,), as_floats=as_floats)


def _loop(params, x):
    for i in range(3):
        x = jnp.tanh(x @ params["w"][i])
    return x


def _fori(params, x):
    return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ params["w"][i]), x)


def _scan(params, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), jnp.sum(x)), x, params["w"], reverse=True)


def _cond(params, x):
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ params["w"], lambda x: -x @ params["w"], x)


def _split(params, x):
    return [x @ part for part in jnp.split(params["w"], 3, axis=1)]


def _heads(params, x):
    return jnp.einsum("bi,ihd->hbd", x, params["w"].reshape(16, 4, 12))


def _custom_vjp(params, x):
    @jax.custom_vjp
    def double(w, x):
        return 2 * (x @ w)

    double.defvjp(lambda w, x: (double(w, x), None), lambda _, g: (None, None))
    return double(params["w"], x)


def _mixed_precision(params, x):
    return x.astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16)


def models() -> list[Model]:
    """The table; made anew, so that tests cannot spoil each other's parameters."""
    x = normal(4, 32)
    sequence = normal(2, 5, 16)
    tokens = jnp.arange(6).reshape(2, 3)
    graphdef, state = nnx.split(NnxMLP(nnx.Rngs(0)))
    dense = ((), (0,))
    return [
        _linen("mlp", MLP(), x, (dense, dense)),
        _linen("conv", ConvNet(), normal(2, 8, 8, 3), (((), (0, 1, 2)), dense)),
        _linen("lstm", nn.RNN(nn.OptimizedLSTMCell(24)), sequence, (dense,) * 8),
        _linen("gru", nn.RNN(nn.GRUCell(24)), sequence, (dense,) * 6),
        _linen(
            "attention", nn.MultiHeadDotProductAttention(num_heads=4), sequence, (dense, ((), (0, 1)), dense, dense)
        ),
        _linen("dense_general", nn.DenseGeneral((3, 5), axis=(-2, -1)), sequence, (((), (0, 1)),)),
        _linen("tied_embedding", TiedEmbedding(), tokens, (dense, ((), (1,)))),
        _linen("scanned_blocks", ScannedBlocks(), x, (((3,), (0,)), ((3,), (0,)))),
        Model(
            name="nnx_mlp",
            fn=lambda state, x: nnx.merge(graphdef, state)(x),
            params=state,
            args=(x,),
            layouts=(dense, dense),
        ),
        _plain("loop", _loop, (3, 16, 16), (4, 16), ((3,), (0,))),
        _plain("fori", _fori, (3, 16, 16), (4, 16), ((3,), (0,))),
        _plain("scan", _scan, (3, 16, 16), (4, 16), ((3,), (0,))),
        _plain("vmap", lambda p, x: jax.vmap(jnp.matmul)(x, p["w"]), (3, 16, 8), (3, 4, 16), ((3,), (0,))),
        _plain("cond", _cond, (16, 12), (4, 16), dense),
        _plain("split", _split, (16, 48), (4, 16), dense),
        _plain("heads", _heads, (16, 48), (4, 16), dense),
        _plain("transposed", lambda p, x: x @ p["w"].T, (12, 16), (4, 16), ((), (1,))),
        _plain("weight_first", lambda p, x: p["w"] @ x, (12, 16), (16, 4), ((), (1,))),
        _plain("custom_vjp", _custom_vjp, (16, 12), (4, 16), dense),
        _plain("mixed_precision", _mixed_precision, (16, 12), (4, 16), dense),
        _plain("concatenated", lambda p, x: x @ jnp.concatenate([p["w"], p["w"]], 1), (16, 12), (4, 16), dense),
        _plain("expanded", lambda p, x: (x @ p["w"][None])[0], (16, 12), (4, 16), dense),
        _plain("columns", lambda p, x: x @ p["w"][:, 2:11:3], (16, 12), (4, 16), dense),
        _plain("elementwise", lambda p, x: x @ (p["w"] * 2) + x @ p["w"], (16, 12), (4, 16), dense, ("mul",)),
        _plain("both_sides", lambda p, x: x @ p["w"] @ p["w"].T, (16, 12), (4, 16), dense, ("dot_general",)),
    ]
