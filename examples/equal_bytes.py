"""Allocated bitlayers beside the same number everywhere, within the same bytes, and beside all other assignments."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.table
from quality import Row, divergence_of, quality_text

import pbjax

METHOD = "equal bytes"  # of the rows
TOGETHER = 8  # assignments measured in one pass


def divergences(
    logits: Callable[[Any, jax.Array], jax.Array],
    qparams: Any,
    inputs: jax.Array,
    patterns: Sequence[str],
    numbers: np.ndarray,
) -> np.ndarray:
    """float64[num]: how far outputs at assignments int[num, layers] are from those at all bitlayers, in nats."""
    exact = logits(qparams, inputs)
    index = np.minimum(np.arange(-(-len(numbers) // TOGETHER) * TOGETHER), len(numbers) - 1).reshape(-1, TOGETHER)
    parts = [_divergences(logits, tuple(patterns), qparams, numbers[i], inputs, exact) for i in index]
    return np.concatenate(parts)[: len(numbers)].astype(np.float64)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _divergences(logits, patterns, qparams, rows, inputs, exact):
    probabilities, log_probabilities = jax.nn.softmax(exact), jax.nn.log_softmax(exact)

    def one(row):
        tree = pbjax.with_bitlayers(qparams, dict(zip(patterns, row, strict=True)))
        return divergence_of(logits(tree, inputs), probabilities, log_probabilities)

    return jax.vmap(one)(rows)


def sizes_of(qparams: Any) -> list[list[int]]:
    """For each BitTensor its bytes at 1, 2, .. bitlayers."""
    leaves = jax.tree.leaves(qparams, is_leaf=lambda leaf: isinstance(leaf, pbjax.BitTensor))
    tensors = [leaf for leaf in leaves if isinstance(leaf, pbjax.BitTensor)]
    return [[pbjax.truncate(tensor, b).nbytes for b in range(1, tensor.bits + 1)] for tensor in tensors]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What came of one limit.

    Attributes:
      allocation: what `pbjax.allocate` chose.
      calibration: its divergence.
      tried: how many assignments keep to the limit.
      best: the least divergence of all of them.
    """

    allocation: pbjax.Allocation
    calibration: float
    tried: int
    best: float


def search(
    logits: Callable[[Any, jax.Array], jax.Array], qparams: Any, calibration: np.ndarray, limits: Sequence[int]
) -> dict[int, Found]:
    """What `pbjax.allocate` finds within the bytes of uniform numbers of bitlayers, and the best there is.

    Args:
      logits: of the model.
      qparams: its weights, none of them stacked.
      calibration: inputs.
      limits: uniform numbers of bitlayers.

    Returns:
      By limit what was found. All assignments are measured: bits**layers of them.
    """
    sizes, inputs = sizes_of(qparams), jnp.asarray(calibration)
    every = np.array(list(itertools.product(*(range(1, len(size) + 1) for size in sizes))), np.int32)
    num_bytes = sum(np.array(size)[every[:, i] - 1] for i, size in enumerate(sizes))
    budgets = {b: sum(size[b - 1] for size in sizes) for b in limits}
    found, errors = {}, None
    for b, budget in budgets.items():
        allocation = pbjax.allocate(logits, qparams, inputs, budget=budget, metric="kl", progress=False)
        if errors is None:
            within = num_bytes <= max(budgets.values())
            every, num_bytes = every[within], num_bytes[within]
            errors = divergences(logits, qparams, inputs, list(allocation.bitlayers), every)
        fits = num_bytes <= budget
        is_chosen = (every == [row.bitlayers for row in allocation.rows]).all(1)
        found[b] = Found(
            allocation=allocation,
            calibration=errors[is_chosen].item(),
            tried=int(fits.sum()),
            best=errors[fits].min().item(),
        )
    return found


def make_table(rows: Sequence[Row], title: str) -> rich.table.Table:
    """The allocations of a task beside the uniform numbers whose bytes they keep to, for the terminal.

    Args:
      rows: of the task, of method `METHOD` and "uniform" among others.
      title: of the table.
    """
    table = rich.table.Table(title=title, caption="KL: divergence from float32 on the test data, in nats")
    for name in _columns(rows[0].metric):
        table.add_column(name, justify="right")
    for row in _of_method(rows):
        table.add_row(*_cells(row, rows))
    return table


def markdown(rows: Sequence[Row]) -> str:
    """The same for all tasks, one below the other, as the README has it."""
    columns = ["task", *_columns("quality")]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join([row.task, *_cells(row, rows)])} |" for row in _of_method(rows)]
    return "\n".join(lines) + "\n"


def _columns(quality: str) -> list[str]:
    return ["bytes of", "MB", "uniform: KL", quality, "allocated", "KL", quality, "KL ratio", "among all assignments"]


def _cells(row: Row, rows: Sequence[Row]) -> list[str]:
    uniform = uniform_of(row, rows)
    return [
        str(row.limit),
        f"{uniform.num_bytes / 1e6:.3g}",
        f"{uniform.divergence:.2g}",
        quality_text(uniform),
        row.layers,
        f"{row.divergence:.2g}",
        quality_text(row),
        f"{uniform.divergence / row.divergence:.2f}",
        verdict(row),
    ]


def _of_method(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.method == METHOD]


def uniform_of(row: Row, rows: Sequence[Row]) -> Row:
    """The uniform row whose bytes a row of `METHOD` keeps to."""
    return next(
        one
        for one in rows
        if (one.task, one.method, one.activation_bits) == (row.task, "uniform", row.activation_bits)
        and one.bitlayers == row.limit
    )


def verdict(row: Row) -> str:
    """How an allocation stands among all that keep to its bytes, on the inputs that it was chosen from."""
    is_uniform = len(set(row.layers.split("-"))) == 1
    if row.calibration > row.best * (1 + 1e-3):
        return f"{row.calibration / row.best:.2f} times the least of {row.tried}"
    return f"uniform is the best of {row.tried}" if is_uniform else f"the best of {row.tried}"
