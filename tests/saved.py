"""Trees that the tests of files save, and what it means that one came back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import pbjax


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def packed_tree(bits=8):
    """Stacked and plain weights, with groups and without, of several dtypes, among other leaves."""
    floats = {
        "dense": {"kernel": normal(70, 10), "bias": jnp.ones(3, jnp.bfloat16)},
        "stack": {"kernel": normal(3, 64, 8)},
        "heads": {"kernel": jnp.asarray(normal(6, 4, 8), jnp.float16)},
    }
    rules = {
        "stack": pbjax.Spec(stack=(0,), group_size=32),
        "heads": pbjax.Spec(contract=(2, 0), bits=5, activation_bits=None),
    }
    return pbjax.quantize(floats, bits, rules=rules)


def assert_same(actual, expected):
    """Equal structures, dtypes, shapes and bytes; whether NumPy or JAX holds an array is of no account."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if not hasattr(b, "dtype"):
            assert type(a) is type(b)
            assert a == b or (a != a and b != b)
            continue
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes()
