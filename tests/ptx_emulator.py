"""The PTX instructions of `_ptx`, executed from their text: what a GPU is asked to do, not what its author meant.

From the PTX ISA 8.8: 9.7.8.6 `lop3`, bit i of the table is the result where the operands' bits are those of i, most
significant first; 9.7.9.7 `prmt`, each four bits of the selector pick one byte of {b, a}; 9.7.4.5 `fma.rn.bf16x2`.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np


def execute(text: str, *words: jax.Array) -> jax.Array:
    """`_compat.triton_inline_asm` on the CPU. `text` is one statement, or a block of them. uint32 in and out."""
    registers: dict[str, np.ndarray] = {f"${i + 1}": np.asarray(word, np.uint32) for i, word in enumerate(words)}
    shape = registers["$1"].shape

    def value(operand: str) -> np.ndarray:
        return registers[operand] if operand in registers else np.full(shape, int(operand, 0), np.uint32)

    for statement in filter(None, map(str.strip, text.strip("{} ").split(";"))):
        opcode, rest = statement.split(maxsplit=1)
        if opcode == ".reg":
            continue
        target, *operands = re.split(r",\s*", rest)
        registers[target] = _OPCODES[opcode](*map(value, operands))
    return jnp.asarray(registers["$0"])


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    out = np.zeros_like(a)
    for position in range(32):
        index = ((a >> position) & 1) << 2 | ((b >> position) & 1) << 1 | ((c >> position) & 1)
        out |= ((table >> index) & 1) << np.uint32(position)
    return out


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    source = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros_like(a)
    for place in range(4):
        picked = (selector >> np.uint32(4 * place)) & 0xF
        assert np.all(picked < 8), "the sign of a byte is not replicated here"
        byte = (source >> (8 * picked).astype(np.uint64)) & np.uint64(0xFF)
        out |= byte.astype(np.uint32) << np.uint32(8 * place)
    return out


def _fma_bf16x2(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    out = np.zeros_like(a)
    for shift in (np.uint32(0), np.uint32(16)):
        x, y, z = ((((word >> shift) & 0xFFFF) << 16).view(np.float32).astype(np.float64) for word in (a, b, c))
        rounded = np.asarray(jnp.asarray((x * y + z).astype(np.float32), jnp.bfloat16)).view(np.uint16)
        out |= rounded.astype(np.uint32) << shift
    return out


_OPCODES = {"lop3.b32": _lop3, "prmt.b32": _prmt, "mov.b32": lambda a: a, "fma.rn.bf16x2": _fma_bf16x2}
