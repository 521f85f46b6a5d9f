"""From words to codes and centres in registers: by JAX's operations, and by the PTX that a GPU is given."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _compat
from pallas_kernels.bit_matmul import _ptx, _triton_codes
from tests import ptx_emulator

WORDS, CHANNELS = 4, 8


@pytest.fixture(params=[True, False], ids=["interpreted", "ptx"])
def interpret(request, monkeypatch) -> bool:
    monkeypatch.setattr(_compat, "triton_inline_asm", ptx_emulator.execute)
    return request.param


def codes_and_words(bits: int, used: int) -> tuple[np.ndarray, list[jnp.ndarray]]:
    """Every code of `used` bits, [channels, words, 32], and words of its bitlayers; zeros for those not in use."""
    codes = np.arange(CHANNELS * WORDS * 32).reshape(CHANNELS, WORDS, 32) * 7 % 2**used
    assert used > 8 or len(np.unique(codes)) == 2**used
    layers = [(codes >> max(used - 1 - i, 0)) & (i < used) for i in range(bits)]
    words = [np.sum(layer.astype(np.uint32) << np.arange(32, dtype=np.uint32), axis=-1) for layer in layers]
    return codes, [jnp.asarray(word.T, jnp.uint32) for word in words]


def in_order(codes: np.ndarray) -> np.ndarray:
    """[channels, 32 * words], as activations are arranged."""
    return np.asarray(_triton_codes.arrange(jnp.asarray(codes.reshape(1, CHANNELS, -1))))[0]


COUNTS = [(bits, used) for bits in (1, 2, 5, 8) for used in range(1, bits + 1)]


@pytest.mark.parametrize(("bits", "used"), COUNTS)
def test_codes(bits, used, interpret):
    codes, words = codes_and_words(bits, used)
    values = _triton_codes.signed(words, interpret=interpret)
    np.testing.assert_array_equal(values.T, in_order(codes * 2 ** (8 - used) - 128))


@pytest.mark.parametrize(("bits", "used"), COUNTS)
def test_centres(bits, used, interpret):
    codes, words = codes_and_words(bits, used)
    values = _triton_codes.centred(words, jnp.int32(used), interpret=interpret)
    centres = (codes + 0.5 - 2 ** (used - 1)) * 2 ** (8 - used)
    np.testing.assert_array_equal(values.astype(jnp.float32), in_order(np.sign(centres) if bits == 1 else centres))


def test_instructions_on_random_words(monkeypatch):
    """Also on bits, and on bfloat16, that no code has; sums round as those of a GPU do."""
    monkeypatch.setattr(_compat, "triton_inline_asm", ptx_emulator.execute)
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.integers(0, 2**32, 1000, dtype=np.uint32)) for _ in range(2))
    # bfloat16 of exponents that are near each other
    x, y = ((word & jnp.uint32(0x83FF83FF)) | jnp.uint32(0x40004000) for word in (a, b))
    for run in (
        lambda how: _ptx.select(0xF0F01234, a, b, interpret=how),
        lambda how: _ptx.and_or(a, 0x807F807F, 0x43004300, interpret=how),
        lambda how: _ptx.and_xor(a, 0x80008000, b, interpret=how),
        lambda how: _ptx.permute_bytes(a, (3, 1, 0, 2), interpret=how),
        lambda how: _ptx.add_bfloat16_pairs(x, y, interpret=how),
    ):
        np.testing.assert_array_equal(run(True), run(False))
