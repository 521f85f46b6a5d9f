"""What every test runs under: the CPU unless told otherwise, and JAX at its strictest."""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX is imported; JAX_PLATFORMS=cuda runs the same tests there

import hypothesis
import jax
import pytest

import pbjax

# No silent widening of dtypes or ranks, in the tests or in the library.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A new shape is a new compilation, so examples are few and have no deadline. In CI they are the same in every run.
hypothesis.settings.register_profile("dev", max_examples=25, deadline=None)
hypothesis.settings.register_profile(
    "ci", parent=hypothesis.settings.get_profile("dev"), derandomize=True, database=None
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture
def path(tmp_path):
    """Where a file may be saved, alone in its folder."""
    return tmp_path / "model.safetensors"


@pytest.fixture
def reference_backend():
    """For where it makes no difference which backend multiplies: the oracle compiles fastest."""
    with pbjax.use_backend("reference"):
        yield
