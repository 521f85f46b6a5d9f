"""Flax's layers that pbjax has under the same names, and calls of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import pbjax
from tests.cases import normal

KEY = jax.random.key(0)
X = normal(4, 5, 32)
IMAGE = normal(2, 5, 4, 3)
TOKENS = jnp.arange(6).reshape(2, 3)
CARRY = (X[:, 0], X[:, 1])

# name, arguments of the constructor, arguments of a call
LINEN = [
    ("Dense", dict(features=7), (X,)),
    ("Dense", dict(features=7, use_bias=False, dtype=jnp.bfloat16), (X,)),
    ("DenseGeneral", dict(features=(3, 4), axis=(-2, -1)), (X,)),
    ("DenseGeneral", dict(features=6, axis=-1, batch_dims=(0,)), (X,)),
    ("Einsum", dict(shape=(32, 3, 5), einsum_str="bti,ihd->bthd"), (X,)),
    ("Conv", dict(features=6, kernel_size=(3, 3)), (IMAGE,)),
    ("ConvLocal", dict(features=6, kernel_size=(2, 3)), (IMAGE,)),
    ("ConvTranspose", dict(features=6, kernel_size=(3, 3), strides=(2, 2)), (IMAGE,)),
    ("Embed", dict(num_embeddings=20, features=8), (TOKENS,)),
    ("SimpleCell", dict(features=32), (X[:, 0], X[:, 1])),
    ("LSTMCell", dict(features=32), (CARRY, X[:, 1])),
    ("OptimizedLSTMCell", dict(features=32), (CARRY, X[:, 1])),
    ("GRUCell", dict(features=32), (X[:, 0], X[:, 1])),
    ("MGUCell", dict(features=32), (X[:, 0], X[:, 1])),
    ("ConvLSTMCell", dict(features=3, kernel_size=(3, 3)), ((IMAGE, IMAGE), IMAGE)),
    ("MultiHeadDotProductAttention", dict(num_heads=4), (X,)),
    ("MultiHeadAttention", dict(num_heads=4), (X,)),
]
NNX = [
    ("Linear", dict(in_features=32, out_features=7), (X,)),
    ("Linear", dict(in_features=32, out_features=7, use_bias=False, dtype=jnp.bfloat16), (X,)),
    ("LinearGeneral", dict(in_features=(5, 32), out_features=(3, 4), axis=(-2, -1)), (X,)),
    ("LinearGeneral", dict(in_features=32, out_features=6, axis=-1, batch_axis={0: 4}), (X,)),
    ("Einsum", dict(einsum_str="bti,ihd->bthd", kernel_shape=(32, 3, 5)), (X,)),
    ("Einsum", dict(einsum_str="bti,tio->bto", kernel_shape=(5, 32, 3)), (X,)),
    ("Conv", dict(in_features=3, out_features=6, kernel_size=(3, 3)), (IMAGE,)),
    (
        "ConvTranspose",
        dict(in_features=3, out_features=6, kernel_size=(3, 3), strides=(2, 2), transpose_kernel=True),
        (IMAGE,),
    ),
    ("Embed", dict(num_embeddings=20, features=8), (TOKENS,)),
    ("SimpleCell", dict(in_features=32, hidden_features=32), (X[:, 0], X[:, 1])),
    ("LSTMCell", dict(in_features=32, hidden_features=32), (CARRY, X[:, 1])),
    ("OptimizedLSTMCell", dict(in_features=32, hidden_features=32), (CARRY, X[:, 1])),
    ("GRUCell", dict(in_features=32, hidden_features=32), (X[:, 0], X[:, 1])),
    ("MultiHeadAttention", dict(num_heads=4, in_features=32, decode=False), (X,)),
]


def rules_of(name):
    """`quantize` with `fn` leaves tables alone that are only looked up."""
    return {"embedding": 8} if name == "Embed" else None


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def tensors_of(tree):
    is_tensor = lambda leaf: isinstance(leaf, pbjax.BitTensor)  # noqa: E731
    return list(filter(is_tensor, jax.tree.leaves(tree, is_leaf=is_tensor)))


def call(module, *args):
    return module(*args)
