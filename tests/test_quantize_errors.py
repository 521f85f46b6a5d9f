"""Every message of `quantize`, `dequantize`, `with_bitlayers`, `truncate` and `report`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pbjax
from tests.cases import normal

PARAMS = {
    "params": {
        "Dense_0": {"kernel": normal(40, 24), "bias": normal(24)},
        "Dense_1": {"kernel": normal(24, 8, seed=1), "bias": normal(8)},
        "norm": {"scale": normal(24)},
    }
}


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, r"`bits` must lie in 1\.\.16, but got 0", lambda: pbjax.quantize(PARAMS, 0)),
        (ValueError, r"`bits` must lie in 1\.\.16, but got 17", lambda: pbjax.quantize(PARAMS, 17)),
        (TypeError, r"`bits` must be an int, but got 4\.0", lambda: pbjax.quantize(PARAMS, 4.0)),
        (TypeError, r"`bits` must be an int, but got True", lambda: pbjax.quantize(PARAMS, True)),
        (
            ValueError,
            r"`bits` must lie in 1\.\.16, but got 99 \(rule 'Dense'\)",
            lambda: pbjax.quantize(PARAMS, 8, rules={"Dense": 99}),
        ),
        (
            ValueError,
            r"`group_size` must be a multiple of 32, but got 48",
            lambda: pbjax.quantize(PARAMS, 8, group_size=48),
        ),
        (ValueError, r"`group_size` must be at least 1, but got 0", lambda: pbjax.quantize(PARAMS, 8, group_size=0)),
        (TypeError, r"`group_size` must be an int", lambda: pbjax.quantize(PARAMS, 8, group_size="all")),
        (ValueError, r"`clip_bits` must lie in 1\.\.4, but got 5", lambda: pbjax.quantize(PARAMS, 4, clip_bits=5)),
        (
            ValueError,
            r"`activation_bits` must lie in 2\.\.24, but got 1",
            lambda: pbjax.quantize(PARAMS, 8, activation_bits=1),
        ),
        (
            TypeError,
            r"`activation_bits` must be an int, but got .*Use None for float",
            lambda: pbjax.quantize(PARAMS, 8, activation_bits=8.0),
        ),
        (
            ValueError,
            r"must hold a weight to quantize, but none of its 1 leaves",
            lambda: pbjax.quantize({"bias": normal(8)}, 8),
        ),
        (ValueError, r"must hold a weight to quantize, but none of its 0 leaves", lambda: pbjax.quantize({}, 8)),
        (
            TypeError,
            r"must be float16, bfloat16, float32 or float64 of this machine, but a/kernel is >f4\[40, 6\]\. Cast it",
            lambda: pbjax.quantize({"a": {"kernel": np.ones((40, 6), ">f4")}}, 8),
        ),
        pytest.param(
            TypeError,
            r"must be float16, bfloat16, .*, but a/kernel is (float128|longdouble|float96)\[40, 6\]",
            lambda: pbjax.quantize({"a": {"kernel": np.ones((40, 6), np.longdouble)}}, 8),
            marks=pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="it is a double here"),
        ),
        (
            TypeError,
            r"must be a float array of 16 bits or more, but ints is int32\[4, 4\]",
            lambda: pbjax.quantize({"ints": jnp.eye(4, dtype=jnp.int32)}, 8, rules={"ints": 8}),
        ),
        (
            TypeError,
            r"must be a float array of 16 bits or more, but name is 'text'",
            lambda: pbjax.quantize({"name": "text"}, 8, rules={"name": 8}),
        ),
        (
            ValueError,
            r"must be finite, but a/kernel holds a NaN",
            lambda: pbjax.quantize({"a": {"kernel": jnp.full((4, 4), jnp.nan)}}, 8),
        ),
        (
            ValueError,
            r"must be finite, but kernel holds an infinity",
            lambda: pbjax.quantize({"kernel": jnp.full((4, 4), jnp.inf)}, 8),
        ),
        (
            ValueError,
            r"must not be empty, but kernel is float32\[0, 4\]",
            lambda: pbjax.quantize({"kernel": jnp.zeros((0, 4))}, 8),
        ),
        (
            ValueError,
            r"`contract` must name axes .* got \(\) .*bias",
            lambda: pbjax.quantize(PARAMS, 8, rules={"Dense_0/bias": 8}),
        ),
        (
            ValueError,
            r"`contract` must name axes .* got \(2,\)",
            lambda: pbjax.quantize(PARAMS, 8, rules={"kernel": pbjax.Spec(contract=(2,))}),
        ),
        (
            ValueError,
            r"`contract` must name axes .* got \(0, 0\)",
            lambda: pbjax.quantize(PARAMS, 8, rules={"kernel": pbjax.Spec(contract=(0, 0))}),
        ),
        (
            ValueError,
            r"`stack` must name leading axes .* got \(1,\)",
            lambda: pbjax.quantize(PARAMS, 8, rules={"kernel": pbjax.Spec(stack=(1,))}),
        ),
        (
            TypeError,
            r"`bitlayers` must be an int, but got 'four'",
            lambda: pbjax.truncate(pbjax.quantize(PARAMS, 8), "four"),
        ),
        (
            ValueError,
            r"`bitlayers` must lie in 1\.\.16, but got 0",
            lambda: pbjax.truncate(pbjax.quantize(PARAMS, 8), 0),
        ),
        (
            ValueError,
            r"`bitlayers` must lie in 1\.\.16, .* got \[ 0 17\] \(w\)",
            lambda: pbjax.truncate(
                pbjax.quantize({"w": normal(2, 40, 5)}, 8, rules={"w": pbjax.Spec(stack=(0,))}),
                {"w": np.array([0, 17])},
            ),
        ),
        (
            ValueError,
            r"`bitlayers` must lie in 1\.\.8.* got 9 \(params/Dense_0/kernel\)",
            lambda: pbjax.with_bitlayers(pbjax.quantize(PARAMS, 8), 9),
        ),
        (
            ValueError,
            r"`bitlayers` must lie in 1\.\.8.* got 0",
            lambda: pbjax.with_bitlayers(pbjax.quantize(PARAMS, 8), np.int32(0)),
        ),
        (TypeError, r"`bitlayers` must be an integer", lambda: pbjax.with_bitlayers(pbjax.quantize(PARAMS, 8), 2.5)),
        (
            ValueError,
            r"pattern 'Dense_7' matches none of params/Dense_0/kernel",
            lambda: pbjax.with_bitlayers(pbjax.quantize(PARAMS, 8), {"Dense_7": 2}),
        ),
        (
            ValueError,
            r"broadcast to the stack axes \(\)",
            lambda: pbjax.with_bitlayers(pbjax.quantize(PARAMS, 8), jnp.arange(1, 9)),
        ),
        (
            ValueError,
            r"`bitlayers` must be a number, a dict",
            lambda: pbjax.with_bitlayers(pbjax.quantize(PARAMS, 8), [1, 2]),
        ),
        (
            ValueError,
            r"`rules` must name leaves of the tree, but pattern 'nope' matches none of",
            lambda: pbjax.quantize(PARAMS, 8, rules={"nope": 4}),
        ),
        (
            ValueError,
            r"path patterns in `rules` must be regular expressions, but got '\('",
            lambda: pbjax.quantize(PARAMS, 8, rules={"(": 4}),
        ),
        (
            TypeError,
            r"path patterns in `rules` must be strings, but got 3",
            lambda: pbjax.quantize(PARAMS, 8, rules={3: 4}),
        ),
        (
            TypeError,
            r"`rules` must be a dict from path patterns, but got \['kernel'\]",
            lambda: pbjax.quantize(PARAMS, 8, rules=["kernel"]),
        ),
        (
            TypeError,
            r"`contract` must be a tuple of axes, but got 0 \(rule 'kernel'\)\. Write one axis as \(0,\)",
            lambda: pbjax.quantize(PARAMS, 8, rules={"kernel": pbjax.Spec(contract=0)}),
        ),
        (
            TypeError,
            r"`stack` must be a tuple of axes, but got \('a',\)",
            lambda: pbjax.quantize(PARAMS, 8, rules={"kernel": pbjax.Spec(stack=("a",))}),
        ),
        (
            TypeError,
            r"must be a float array of 16 bits or more, but kernel is float8_e4m3fn\[4, 4\]",
            lambda: pbjax.quantize({"kernel": jnp.ones((4, 4), jnp.float8_e4m3fn)}, 8),
        ),
        (
            TypeError,
            r"must have values, but kernel has a shape only\. Use `jax\.eval_shape`",
            lambda: pbjax.quantize({"kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32)}, 8),
        ),
        (
            ValueError,
            r"must be finite, but kernel holds 1e\+300, which float32 cannot hold",
            lambda: pbjax.quantize({"kernel": np.full((4, 4), 1e300)}, 8),
        ),
        (
            TypeError,
            r"`select` must return a bool, but got \w+ for params/Dense_0",
            lambda: pbjax.quantize(PARAMS, 8, select=lambda path, leaf: leaf > 0),
        ),
        (
            ValueError,
            r"asks for 8 bits of params/Dense_0/kernel, which stores 4\. .*`pbjax\.truncate`",
            lambda: pbjax.quantize(pbjax.quantize(PARAMS, 4), 8, rules={"kernel": 8}),
        ),
        (
            ValueError,
            r"`original` must hold the float weights, but has BitTensors",
            lambda: pbjax.report(pbjax.quantize(PARAMS, 8), pbjax.quantize(PARAMS, 8)),
        ),
        (TypeError, r"`args` must be a tuple, but got int", lambda: pbjax.quantize(PARAMS, 8, fn=len, args=3)),
        (ValueError, r"`args` must come with `fn`", lambda: pbjax.quantize(PARAMS, 8, args=(3,))),
        (TypeError, r"`fn` must be a function, but got 3", lambda: pbjax.quantize(PARAMS, 8, fn=3)),
        (TypeError, r"`select` must be a function, but got 'k'", lambda: pbjax.quantize(PARAMS, 8, select="k")),
        (ValueError, r"`tree` must hold BitTensors", lambda: pbjax.with_bitlayers(PARAMS, 4)),
        (ValueError, r"`tree` must hold BitTensors", lambda: pbjax.truncate(PARAMS, 4)),
        (
            ValueError,
            r"path patterns in `bitlayers` must be regular expressions, but got '\('",
            lambda: pbjax.with_bitlayers(pbjax.quantize(PARAMS, 8), {"(": 3}),
        ),
        (ValueError, r"`tree` must hold BitTensors", lambda: pbjax.report(PARAMS)),
        (ValueError, r"`original` must have the structure", lambda: pbjax.report(pbjax.quantize(PARAMS, 8), {"a": 1})),
        (
            ValueError,
            r"`original` must have shape \(40, 24\)",
            lambda: pbjax.report(pbjax.quantize(PARAMS, 8), jax.tree.map(lambda a: a[:1], PARAMS)),
        ),
    ],
)
def test_errors(error, match, call):
    with pytest.raises(error, match=match):
        call()
