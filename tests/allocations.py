"""One function of three layers for the tests of `pbjax.allocate`: its errors add up, so that the best is known."""

from __future__ import annotations

import functools
import itertools

import jax
import numpy as np

import pbjax
from tests.cases import normal

X = normal(6, 48, seed=1)
SHAPES = {"a": (48, 40), "b": (48, 8), "c": (48, 24)}
BITS = 6


def apart(params, x):
    """Outputs that are apart, so that errors of layers add up exactly."""
    return {name: x @ params[name] for name in params}


# Outputs differ in size by a factor of 4 each: layers of very different sensitivity.
PARAMS = {name: 4.0**i * normal(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
QPARAMS = pbjax.quantize(PARAMS, BITS, fn=apart, args=(X,))
APART = pbjax.quantized(apart)


def allocate(fn=APART, qparams=QPARAMS, batch=X, **kwargs):
    return pbjax.allocate(fn, qparams, batch, progress=False, **kwargs)


@functools.cache  # and not where tests are collected, in every process
def every_allocation():
    """Each of the 216: bitlayers, bytes, bitlayers per weight, and the error, written out."""
    full = {name: np.asarray(pbjax.matmul(X, QPARAMS[name]), np.float64) for name in SHAPES}
    square = sum((y**2).sum() for y in full.values())
    errors, sizes = {}, {}
    for name, b in itertools.product(SHAPES, range(1, BITS + 1)):
        y = np.asarray(pbjax.matmul(X, QPARAMS[name], bitlayers=b), np.float64)
        errors[name, b] = ((y - full[name]) ** 2).sum() / square
        sizes[name, b] = pbjax.truncate(QPARAMS[name], b).nbytes
    weights = {name: shape[0] * shape[1] for name, shape in SHAPES.items()}
    found = []
    for numbers in itertools.product(range(1, BITS + 1), repeat=3):
        chosen = list(zip(SHAPES, numbers, strict=True))
        average = sum(weights[name] * b for name, b in chosen) / sum(weights.values())
        found.append((numbers, sum(sizes[one] for one in chosen), average, sum(errors[one] for one in chosen)))
    return found


def numbers_of(allocation):
    return tuple(row.bitlayers for row in allocation.rows)


def is_tensor(leaf):
    return isinstance(leaf, pbjax.BitTensor)


def tensors_of(tree):
    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_tensor) if is_tensor(leaf)]


def run_module(model, x):
    return model(x)
