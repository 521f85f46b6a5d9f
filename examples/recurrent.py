"""Recurrent cells of Flax by name, run over sequences, and how models of them are trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
import rich.console
import rich.progress
from flax import nnx

CELLS = {"lstm": nnx.OptimizedLSTMCell, "gru": nnx.GRUCell, "rnn": nnx.SimpleCell}


def zero_carry(cell: nnx.RNNCellBase, num_rows: int) -> Any:
    """The state that a cell begins with."""
    zeros = jnp.zeros((num_rows, cell.hidden_features))
    return (zeros, zeros) if isinstance(cell, nnx.OptimizedLSTMCell) else zeros


def run_over(cell: nnx.RNNCellBase, inputs: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The outputs of a cell over sequences: float[rows, length, features] -> float[rows, length, hidden].

    Where `mask`, bool[rows, length], is False the state and the output stay as they were, zeros at the beginning.
    """
    mask = jnp.ones(inputs.shape[:2], bool) if mask is None else mask

    def step(state, now):
        x, is_there = now
        new = cell(state[0], x)
        state = jax.tree.map(lambda new, old: jnp.where(is_there[:, None], new, old), new, state)
        return state, state[1]

    start = zero_carry(cell, len(inputs)), jnp.zeros((len(inputs), cell.hidden_features))
    _, outputs = jax.lax.scan(step, start, (jnp.moveaxis(inputs, 1, 0), mask.T))
    return jnp.moveaxis(outputs, 0, 1)


def train(
    model: nnx.Module,
    logits_of: Callable[[Any, jax.Array], jax.Array],
    batches: Iterator[tuple[Any, Any]],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float,
    progress: bool,
) -> nnx.Module:
    """A model after `steps` steps of AdamW on batches of inputs and labels, with gradients clipped to a norm of 1."""
    graph, params = nnx.split(model)
    warmup = min(max(steps // 20, 1), steps - 1)
    schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, warmup, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=weight_decay))
    state = optimizer.init(params)

    def loss_of(params, inputs, labels):
        logits = logits_of(nnx.merge(graph, params), inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit(donate_argnums=(0, 1))
    def step(params, state, inputs, labels):
        loss, gradients = jax.value_and_grad(loss_of)(params, inputs, labels)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.TextColumn("loss {task.fields[loss]:.3f}"))
    with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("train", total=steps, loss=math.nan)
        for _ in range(steps):
            params, state, loss = step(params, state, *next(batches))
            bar.update(task, advance=1, loss=float(loss))
    return nnx.merge(graph, params)
