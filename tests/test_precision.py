"""A number of bitlayers for each example of a batch, through whole models: each example as if it were alone.

To the last bit where a model has no float sums of its own: XLA may order those of attention or of a layer norm by the
shape of the batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import pbjax
from tests import models

BITS = 8
COUNTS = np.array([1, 8, 3, 3, 5], np.int32)


class Decoder(nn.Module):
    """Tied embedding, LSTM, a scanned stack with remat: what a number for each example has to get through."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(50, 32)
        x = nn.RNN(nn.OptimizedLSTMCell(32))(embed(tokens))
        return embed.attend(models.ScannedBlocks()(x))


def _nnx_model():
    graphdef, state = nnx.split(models.NnxMLP(nnx.Rngs(0)))
    return lambda state, x: nnx.merge(graphdef, state)(x), state


def _models():
    images = np.array(jax.random.normal(jax.random.key(1), (5, 6, 32)))
    tokens = np.array(jax.random.randint(jax.random.key(2), (5, 7), 0, 50))
    mlp, decoder = models.MLP(), Decoder()
    return {
        "mlp": (mlp.apply, mlp.init(models.KEY, images), images),
        "nnx": (*_nnx_model(), images),
        "decoder": (decoder.apply, decoder.init(models.KEY, tokens), tokens),
    }


@pytest.fixture
def model(request):
    """An unmodified model on bitlayers: (function of (qparams, bitlayers, one example), qparams, batch)."""
    fn, params, batch = _models()[request.param]
    qparams = pbjax.quantize(params, BITS, fn=fn, args=(batch,), group_size=32)

    def at(qparams, bitlayers, example):
        return pbjax.quantized(fn)(pbjax.with_bitlayers(qparams, bitlayers), example[None])[0]

    return at, qparams, batch


@pytest.mark.parametrize("model", ["nnx", "decoder"], indirect=True)
def test_each_example_at_its_own_precision(model):
    """One program and one pass over the words for the batch, and the bits of the examples run one by one."""
    at, qparams, batch = model
    y = jax.jit(jax.vmap(at, (None, 0, 0)))(qparams, COUNTS, batch)
    single = jax.jit(at)
    one_by_one = np.stack([single(qparams, b, x) for b, x in zip(COUNTS, batch, strict=True)])
    np.testing.assert_array_equal(y, one_by_one)
    assert single._cache_size() == 1
    same = jax.jit(jax.vmap(at, (None, None, 0)))(qparams, 3, batch)
    np.testing.assert_array_equal(same[2:4], y[2:4])  # what the others of a batch use does not matter
    assert not np.array_equal(same[0], y[0])


@pytest.mark.parametrize("model", ["decoder"], indirect=True)
def test_each_example_and_each_layer_at_its_own_precision(model):
    """A number for each pair of example and weight, by path and by tree."""
    at, qparams, batch = model
    is_tensor = lambda leaf: isinstance(leaf, pbjax.BitTensor)  # noqa: E731
    tensors = [leaf for leaf in jax.tree.leaves(qparams, is_leaf=is_tensor) if is_tensor(leaf)]
    counts = iter(jax.random.randint(jax.random.key(3), (len(tensors), len(batch)), 1, BITS + 1))
    trees = jax.tree.map(lambda leaf: next(counts) if is_tensor(leaf) else None, qparams, is_leaf=is_tensor)
    y = jax.jit(jax.vmap(at, (None, 0, 0)))(qparams, trees, batch)
    single = jax.jit(at)
    for i, example in enumerate(batch):
        alone = single(qparams, jax.tree.map(lambda count, i=i: count[i], trees), example)
        np.testing.assert_array_equal(y[i], alone)


def test_pattern_for_one_layer():
    fn, params, batch = _models()["mlp"]
    qparams = pbjax.quantize(params, BITS)

    def at(first, example):
        return pbjax.quantized(fn)(pbjax.with_bitlayers(qparams, {"Dense_0": first, "Dense_1": 6}), example)

    y = jax.jit(jax.vmap(at))(COUNTS, batch)
    np.testing.assert_array_equal(y, np.stack([jax.jit(at)(b, x) for b, x in zip(COUNTS, batch, strict=True)]))


@pytest.mark.parametrize("model", ["mlp"], indirect=True)
def test_every_precision_of_every_example(model):
    """A sweep over all numbers for a batch, as `vmap` over both."""
    at, qparams, batch = model
    every = jnp.arange(1, BITS + 1)
    sweep = jax.jit(jax.vmap(jax.vmap(at, (None, None, 0)), (None, 0, None)))(qparams, every, batch)
    single = jax.jit(at)
    for b in (1, 2, 7):
        np.testing.assert_array_equal(sweep[b - 1, 4], single(qparams, jnp.int32(b), batch[4]))
