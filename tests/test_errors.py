"""Every message of the product, of the backends and of a BitTensor's invariants: what is wrong, and what to do."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import pbjax
from pbjax import _bit_tensor
from tests.cases import normal

W = pbjax.quantize({"kernel": normal(40, 3)}, 4)["kernel"]
STACKED = pbjax.quantize({"kernel": normal(2, 40, 3)}, 4, rules={"kernel": pbjax.Spec(stack=(0,))})["kernel"]
TWO_AXES = pbjax.quantize({"kernel": normal(4, 10, 3)}, 4, rules={"kernel": pbjax.Spec(contract=(0, 1))})["kernel"]
X = jnp.ones((2, 5, 40))
PROBLEM = pbjax.Problem(m=2, k=40, n=3, bits=4, group_size=None, activation_bits=8)

MATMUL = {
    "not a BitTensor": (
        lambda: pbjax.matmul(X, jnp.ones((40, 3))),
        TypeError,
        r"`w` must be a BitTensor, but got ArrayImpl\. Make one with `pbjax\.quantize`\.",
    ),
    "integer x": (
        lambda: pbjax.matmul(jnp.ones((2, 40), jnp.int32), W),
        TypeError,
        r"`x` must be of a real floating dtype, but got int32\. Cast it first\.",
    ),
    "x that is no array": (
        lambda: pbjax.matmul(None, W),
        TypeError,
        r"`x` must be an array that JAX can hold, but got NoneType: ",
    ),
    "x of another machine": (
        lambda: pbjax.matmul(np.ones((2, 40), ">f4"), W),
        TypeError,
        r"`x` must be in the byte order of this machine, but got >f4 \(argument of matmul\)\. Cast it first\.",
    ),
    "bitlayers of another machine": (
        lambda: pbjax.matmul(X, W, bitlayers=np.array([1, 2, 3, 4, 1], ">i4")),
        TypeError,
        r"`bitlayers` must be in the byte order of this machine, but got >i4 \(argument of matmul\)",
    ),
    "8-bit floats": (
        lambda: pbjax.matmul(X.astype(jnp.float8_e4m3fn), W),
        TypeError,
        r"`x` must be of a real floating dtype, but got float8_e4m3fn",
    ),
    "axis outside of shard_map": (
        lambda: pbjax.matmul(X, W, axis_name="k"),
        ValueError,
        r"`axis_name` must name axes of the mesh of a `jax\.shard_map` around .*, but got 'k' where these are \(\)",
    ),
    "axis that is no name": (
        lambda: pbjax.matmul(X, W, axis_name=3),
        ValueError,
        r"`axis_name` must name axes of the mesh .* but got 3",
    ),
    "list of bitlayers": (
        lambda: pbjax.matmul(X, W, bitlayers=[1, 2]),
        TypeError,
        r"`bitlayers` must be an integer or an integer array, but got \[1, 2\] \(argument of matmul\)",
    ),
    "bitlayers as text": (
        lambda: pbjax.matmul(X, W, bitlayers="4"),
        TypeError,
        r"`bitlayers` must be an integer or an integer array, but got '4'",
    ),
    "unknown result dtype": (
        lambda: pbjax.matmul(X, W, preferred_element_type="foo"),
        TypeError,
        r"`preferred_element_type` must be a floating dtype, but got 'foo'",
    ),
    "complex x": (
        lambda: pbjax.matmul(jnp.ones((2, 40), jnp.complex64), W),
        TypeError,
        r"`x` must be of a real floating dtype, but got complex64\.",
    ),
    "stacked w": (
        lambda: pbjax.matmul(X, STACKED),
        ValueError,
        r"`w` must have no stack axes in a product, but got stack shape \(2,\)\. Map over them with `jax\.vmap`",
    ),
    "another k": (
        lambda: pbjax.matmul(jnp.ones((2, 41)), W),
        ValueError,
        r"`x` must end in the contracted shape \(40,\) of `w`, but got shape \(2, 41\)\. .* of shape \(40, 3\)",
    ),
    "too few axes": (
        lambda: pbjax.matmul(jnp.ones(10), TWO_AXES),
        ValueError,
        r"`x` must end in the contracted shape \(4, 10\) of `w`, but got shape \(10,\)",
    ),
    "scalar x": (
        lambda: pbjax.matmul(jnp.float32(1), W),
        ValueError,
        r"`x` must end in the contracted shape \(40,\) of `w`, but got shape \(\)",
    ),
    "1 activation bit": (
        lambda: pbjax.matmul(X, W, activation_bits=1),
        ValueError,
        r"`activation_bits` must lie in 2\.\.24, but got 1 \(argument of matmul\)\. Use None for float activations\.",
    ),
    "25 activation bits": (
        lambda: pbjax.matmul(X, W, activation_bits=25),
        ValueError,
        r"`activation_bits` must lie in 2\.\.24, but got 25",
    ),
    "float activation bits": (
        lambda: pbjax.matmul(X, W, activation_bits=8.0),
        TypeError,
        r"`activation_bits` must be an int, but got 8\.0 \(argument of matmul\)",
    ),
    "bool activation bits": (
        lambda: pbjax.matmul(X, W, activation_bits=True),
        TypeError,
        r"`activation_bits` must be an int, but got True",
    ),
    "integer result": (
        lambda: pbjax.matmul(X, W, preferred_element_type=jnp.int32),
        TypeError,
        r"`preferred_element_type` must be a floating dtype, but got .*int32",
    ),
    "no bitlayers": (
        lambda: pbjax.matmul(X, W, bitlayers=0),
        ValueError,
        r"`bitlayers` must lie in 1\.\.4, the bitlayers stored, but got 0 \(argument of matmul\)\. Use fewer, or",
    ),
    "too many bitlayers": (
        lambda: pbjax.matmul(X, W, bitlayers=5),
        ValueError,
        r"`bitlayers` must lie in 1\.\.4, the bitlayers stored, but got 5",
    ),
    "too many bitlayers, in jit": (
        lambda: jax.jit(lambda x: pbjax.matmul(x, W, bitlayers=5))(X),
        ValueError,
        r"`bitlayers` must lie in 1\.\.4",
    ),
    "one row with too many": (
        lambda: pbjax.matmul(X, W, bitlayers=np.array([1, 2, 3, 4, 5])),
        ValueError,
        r"`bitlayers` must lie in 1\.\.4, the bitlayers stored, but got \[1 2 3 4 5\]",
    ),
    "float bitlayers": (
        lambda: pbjax.matmul(X, W, bitlayers=2.0),
        TypeError,
        r"`bitlayers` must be an integer or an integer array, but got 2\.0 \(argument of matmul\)",
    ),
    "bool bitlayers": (
        lambda: pbjax.matmul(X, W, bitlayers=True),
        TypeError,
        r"`bitlayers` must be an integer or an integer array, but got True",
    ),
    "float array of bitlayers": (
        lambda: pbjax.matmul(X, W, bitlayers=jnp.ones(5)),
        TypeError,
        r"`bitlayers` must be an integer or an integer array",
    ),
    "bitlayers of another shape": (
        lambda: pbjax.matmul(X, W, bitlayers=jnp.ones(3, jnp.int32)),
        ValueError,
        r"`bitlayers` must broadcast to the leading axes \(2, 5\) of `x`, but got shape \(3,\)\. Give one number",
    ),
    "bitlayers of a higher rank": (
        lambda: pbjax.matmul(X[0], W, bitlayers=jnp.ones((2, 5), jnp.int32)),
        ValueError,
        r"`bitlayers` must broadcast to the leading axes \(5,\) of `x`, but got shape \(2, 5\)",
    ),
    "bitlayers that would enlarge x": (
        lambda: pbjax.matmul(X[:1], W, bitlayers=jnp.ones((2, 5), jnp.int32)),
        ValueError,
        r"`bitlayers` must broadcast to the leading axes \(1, 5\) of `x`, but got shape \(2, 5\)",
    ),
    "cast words": (
        lambda: pbjax.matmul(X, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), W)),
        TypeError,
        r"`words` must be uint32, but got float32 \(argument `w` of matmul\)\. Cast float leaves only",
    ),
    "unknown backend": (
        lambda: pbjax.matmul(X, W, backend="cuda"),
        ValueError,
        r"`backend` must be one of mosaic, triton, cpu, xla, .*but got 'cuda' from the argument `backend`\.",
    ),
}

if np.dtype(np.longdouble).itemsize > 8:  # on some systems it is a double
    MATMUL["long double x"] = (
        lambda: pbjax.matmul(np.ones((2, 40), np.longdouble), W),
        TypeError,
        r"`x` must be an array that JAX can hold, but got ndarray of (float128|longdouble|float96): ",
    )

BACKENDS = {
    "no problem": (
        lambda: pbjax.select_backend(3),
        TypeError,
        r"`problem` must be a `pbjax\.Problem`, but got 3",
    ),
    "argument": (
        lambda: pbjax.select_backend(PROBLEM, "numpy"),
        ValueError,
        r"`backend` must be one of mosaic, triton, cpu, xla, .*but got 'numpy' from the argument `backend`\.",
    ),
    "empty argument": (
        lambda: pbjax.select_backend(PROBLEM, ""),
        ValueError,
        r"`backend` must be one of .* but got '' from the argument `backend`",
    ),
    "negative rows": (
        lambda: pbjax.select_backend(dataclasses.replace(PROBLEM, m=-1)),
        ValueError,
        r"`m` must be at least 0, but got -1 \(of Problem\(m=-1, k=40, ",
    ),
    "inputs that are no number": (
        lambda: pbjax.select_backend(dataclasses.replace(PROBLEM, k="a")),
        TypeError,
        r"`k` must be an int, but got 'a' \(of Problem\(",
    ),
    "negative channels": (
        lambda: pbjax.select_backend(dataclasses.replace(PROBLEM, n=-3)),
        ValueError,
        r"`n` must be at least 0, but got -3",
    ),
    "bits of a problem": (
        lambda: pbjax.select_backend(dataclasses.replace(PROBLEM, bits=17)),
        ValueError,
        r"`bits` must lie in 1\.\.16, but got 17 \(of Problem\(",
    ),
    "group_size of a problem": (
        lambda: pbjax.select_backend(dataclasses.replace(PROBLEM, group_size=33)),
        ValueError,
        r"`group_size` must be a multiple of 32, but got 33 \(of Problem\(",
    ),
    "activation_bits of a problem": (
        lambda: pbjax.select_backend(dataclasses.replace(PROBLEM, activation_bits=1)),
        ValueError,
        r"`activation_bits` must lie in 2\.\.24, but got 1 \(of Problem\(",
    ),
    "platform": (
        lambda: pbjax.select_backend(PROBLEM, platform="gpu"),
        ValueError,
        r"`platform` must be one of cpu, cuda, rocm, tpu, or this machine's own, but got 'gpu'\.",
    ),
    "context": (
        lambda: pbjax.use_backend("numpy").__enter__(),
        ValueError,
        r"`backend` must be one of .* but got 'numpy' from `pbjax\.use_backend`\.",
    ),
}


def checked(**changes):
    return lambda: _bit_tensor.check_bit_tensor(W.replace(**changes), "params/kernel")


INVARIANTS = {
    "dtype of words": (
        checked(words=W.words.astype(jnp.int32)),
        TypeError,
        r"`words` must be uint32, but got int32 \(params/kernel\)\. Cast float leaves only: BitTensor leaves keep",
    ),
    "dtype of scale": (
        checked(scale=W.scale.astype(jnp.bfloat16)),
        TypeError,
        r"`scale` must be float32, but got bfloat16 \(params/kernel\)",
    ),
    "dtype of bitlayers": (
        checked(bitlayers=jnp.int16(3)),
        TypeError,
        r"`bitlayers` must be int32, but got int16 \(params/kernel\)",
    ),
    "number of words": (
        checked(words=W.words[:, :1]),
        ValueError,
        r"`words` must have shape \(4, 2, 3\) for a weight of shape \(40, 3\) with 4 bits, but got \(4, 1, 3\) "
        r"\(params/kernel\)\. Build BitTensors with `pbjax\.quantize`\.",
    ),
    "number of bitlayers stored": (
        checked(words=W.words[:3]),
        ValueError,
        r"`words` must have shape \(4, 2, 3\) .* but got \(3, 2, 3\)",
    ),
    "number of channels": (
        checked(packed_shape=(40, 4)),
        ValueError,
        r"`words` must have shape \(4, 2, 4\) for a weight of shape \(40, 4\)",
    ),
    "rows of scales": (
        checked(scale=W.scale[:3]),
        ValueError,
        r"`scale` must have shape \(4, 1, 3\) .* but got \(3, 1, 3\)",
    ),
    "groups": (
        checked(group_size=32),
        ValueError,
        r"`scale` must have shape \(4, 2, 3\) .* but got \(4, 1, 3\)",
    ),
    "stack of bitlayers": (
        checked(bitlayers=jnp.full((2,), 3, jnp.int32)),
        ValueError,
        r"`bitlayers` must have shape \(\) .* but got \(2,\)",
    ),
}

CASES = {
    **MATMUL,
    **{f"backend: {k}": v for k, v in BACKENDS.items()},
    **{f"leaf: {k}": v for k, v in INVARIANTS.items()},
}


@pytest.mark.parametrize("name", CASES)
def test_message(name):
    """`pytest.raises` takes subclasses too, so the type is compared."""
    call, error, message = CASES[name]
    with pytest.raises(error, match=message) as raised:
        call()
    assert raised.type is error


def test_message_of_the_environment_variable(monkeypatch):
    monkeypatch.setenv("PBJAX_BACKEND", "numpy")
    with pytest.raises(ValueError, match="but got 'numpy' from the environment variable PBJAX_BACKEND"):
        pbjax.select_backend(PROBLEM)


@pytest.mark.parametrize(
    "use",
    [
        lambda: X @ W,
        lambda: W @ X,
        lambda: jnp.dot(X, W),
        lambda: jnp.asarray(W),
        lambda: np.asarray(W),
        lambda: W[0],
        lambda: W + 1,
        lambda: 2 * W,
    ],
)
def test_a_weight_used_as_an_array_says_what_to_do(use):
    message = r"BitTensor\(.*\) cannot be used as an array\. Run the function .* through `pbjax\.quantized`, multiply"
    with pytest.raises(TypeError, match=message):
        use()


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (3, r"`fn` must be a function, but got 3"),
        (nn.Dense(3), r"`fn` must be a function, but got a Linen module\. Give its `apply`"),
        (
            nnx.Sequential(pbjax.quantize(nnx.Linear(40, 3, rngs=nnx.Rngs(0)), 4)),
            r"`fn` must be a function that takes its weights as arguments, but got a module that holds BitTensors",
        ),
    ],
)
def test_quantized_takes_functions_of_weights(fn, message):
    with pytest.raises(TypeError, match=message):
        pbjax.quantized(fn)


def test_what_is_right_passes():
    """Whole and stacked weights, abstract ones, and those rebuilt around what is no array."""
    for tensor in (W, STACKED, TWO_AXES, jax.eval_shape(lambda w: w, STACKED), jax.tree.map(lambda _: None, W)):
        _bit_tensor.check_bit_tensor(tensor, "here")


def test_errors_come_before_any_kernel():
    """At trace time: shapes alone are enough."""
    with pytest.raises(ValueError, match="`x` must end in the contracted shape"):
        jax.eval_shape(pbjax.matmul, jax.ShapeDtypeStruct((2, 41), jnp.float32), W)


def test_unsupported_is_typed():
    """The only error that automatic choice answers by another backend is a ValueError with a name of its own."""
    assert issubclass(pbjax.Unsupported, ValueError)
