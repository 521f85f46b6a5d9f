"""The watch over Triton kernels finds what is outside of an array, and only that."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import _compat
from tests import memory_watch


def run(kernel):
    """With an array of 4, and one of 8 for the result."""
    out = jax.ShapeDtypeStruct((8,), jnp.float32)
    options = dict(name="watched", grid=(1,), out_shape=out, num_warps=1, num_stages=1, interpret=True)
    with memory_watch.watch():
        jax.block_until_ready(_compat.triton_call(kernel, **options)(jnp.ones(4)))


def load(first, mask=True):
    def kernel(x, y):
        i = first + jnp.arange(4, dtype=jnp.int32)
        value = _compat.triton_load(x.at[i], mask=i < 4 if mask else None, other=0.0 if mask else None)
        _compat.triton_store(y.at[pl.ds(0, 4)], value)

    return kernel


def store(first):
    def kernel(x, y):
        _compat.triton_store(y.at[pl.ds(first + pl.program_id(0), 4)], _compat.triton_load(x.at[pl.ds(0, 4)]))

    return kernel


def scalar(index):
    def kernel(x, y):
        y[jnp.int32(0)] = x[index + pl.program_id(0)]

    return kernel


@pytest.mark.parametrize("kernel", [load(0), load(0, mask=False), load(3), store(4), scalar(3)])
def test_inside(kernel):
    run(kernel)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (load(-1), "-1..-1 of axis 0 of (4,) is read"),
        (load(2, mask=False), "4..5 of axis 0 of (4,) is read"),
        (store(5), "8..8 of axis 0 of (8,) is written"),
        (scalar(4), "4..4 of axis 0 of (4,) is read"),
    ],
)
def test_outside(kernel, message):
    with pytest.raises(AssertionError) as error:
        run(kernel)
    assert str(error.value).splitlines()[0] == message
